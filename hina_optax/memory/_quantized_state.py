"""State in one byte a number, in blocks, on a grid that is fine where numbers are small."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from hina_optax import _checks, _rounding
from hina_optax.memory import _storage
from hina_optax.memory._storage import QuantizedLeaf

_BLOCK = 256
MIN_SIZE = 4096
_PURPOSE = 3
# A block without negative numbers counts 0..255. Any other counts -126..126, and its three spare
# codes stand for infinity, minus infinity and NaN.
_UNSIGNED, _SIGNED = 255.0, 126.0
_INFINITE, _NAN = 127, -128


class WithQuantizedStateState(NamedTuple):
  """State of `with_quantized_state`.

  Attributes:
    inner_state: the inner's state, with a `QuantizedLeaf` in place of each chosen leaf.
    step: int32 scalar, updates so far. It and `seed` determine the rounding noise.
    seed: uint32 scalar.
  """

  inner_state: Any
  step: jax.Array
  seed: jax.Array


def with_quantized_state(
  inner: optax.GradientTransformation,
  bits: int | None = None,
  block: int | None = None,
  min_size: int | None = None,
  include: _storage.Include = None,
  seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Computes in fp32 and keeps the state of any transformation in 8 bits a number.

  Parameters and updates of fewer than 32 bits are cast to fp32 before the inner's `init` and
  `update`, and its updates are cast back. A block of numbers `x` with the largest magnitude `s`
  (rounded up to bf16) is kept as codes `c` on a grid of eighth powers,

  .. math::
    x \approx s\, (c/255)^8 \text{ if no } x < 0, \qquad x \approx s \operatorname{sign}(c)\,
    (c/126)^8 \text{ otherwise}

  with stochastic rounding between the two neighbours, so that the mean is exact. The grid is 3%
  (6%) wide at the top, 18% (36%) at :math:`10^{-6} s`, and goes on below :math:`10^{-16} s`. A
  linear grid ends at 1/255: smaller second moments become 0 there and the step, divided by their
  root, explodes. Which grid a block uses is seen from its numbers and kept in the sign of its
  scale; without negative numbers a positive one is never rounded to 0, but up to the smallest code.
  Infinite values and NaN pass. A block that nowhere reaches 1.2e-38 reads 0.

  Blocks lie within the trailing axes, as few of them as hold `block` numbers, and are cut evenly: a
  row of 320 is one block. Codes keep the leaf's shape and scales its leading axes, so both follow a
  leaf that is sharded over a leading axis. Sharded over the last axis, a leaf stays in place only
  if its blocks fall evenly on the devices; otherwise XLA gathers it in every step.

  Around `with_state_dtype` it reads each number back into the narrower dtype at random, so averages
  stay right; what is in 8 bits already stays as it is.

  `optax.tree.map_params` visits codes and scales one by one; with further trees, pass
  `is_leaf=lambda x: isinstance(x, QuantizedLeaf)` to pair each with its parameter.

  It suits averages (first and second moments), not state that gathers many small steps into a
  precise value, such as the `z` of `optax.contrib.schedule_free`: leave that out by `include`. A
  number of a second moment wanders by about 20% around its true value (bf16: 5%), more where it is
  under a millionth of its block's largest. It does not help where state is small (LoRA).

  Args:
    inner: any optax transformation.
    bits: 8, which is also `None`.
    block: about how many numbers share a scale, >= 16; `None` is 256. A block has 3/4 to 3/2 of it
      where the row allows.
    min_size: number of elements from which a leaf is quantized; `None` is 4096.
    include: which leaves of the state are quantized: a regular expression searched in the leaf's
      path (such as `"0/mu/dense/kernel"`), a function `(path, leaf) -> bool`, or `None` for all.
    seed: of the rounding noise, a whole number >= 0.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `WithQuantizedStateState`: 1 + 2/256 bytes for
    each number of the inner's state (Adam: 2.02 a parameter, against 8), and 8 bytes in all.

  Raises:
    ValueError: if an argument is unknown, out of range or traced where it shapes the program; if a
      state was made with other options; if the inner keeps its state in host memory.
    TypeError: if `inner` is no transformation or `include` no rule.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import hina_optax.memory as memory
    >>> tx = memory.with_quantized_state(optax.rmsprop(1e-3, decay=0.999, momentum=0.9))
    >>> params = {"kernel": jnp.ones((512, 512))}
    >>> state = tx.init(params)
    >>> print(round(sum(x.nbytes for x in jax.tree.leaves(state)) / 512**2, 2))
    2.02
    >>> updates, state = tx.update(params, state, params)
    >>> nu = optax.tree.get(memory.dequantize_state(state), "nu")
    >>> print(round(float(nu["kernel"].mean()), 5))
    0.001

  References:
    Dettmers et al., 8-bit optimizers via block-wise quantization, arXiv 2110.02861 (blocks and a
    non-linear grid; theirs is a table). Zamirai et al., arXiv 2010.06192 (stochastic rounding).
  """
  _checks.structural("bits", bits)
  _checks.choice("bits", bits, (None, 8))
  length = _storage.structural_number("block", block, _BLOCK, 16)
  least = _storage.structural_number("min_size", min_size, MIN_SIZE, 1)
  included = _storage.path_rule(include)

  def chosen(path: str, leaf: Any) -> bool:
    return (
      _storage.is_floating(leaf) and leaf.dtype.itemsize > 1 and leaf.size >= least
      and bool(included(path, leaf))
    )

  def encode(leaf: jax.Array, key: _rounding.Key) -> QuantizedLeaf:
    return quantize_leaf(leaf, _scales_shape(leaf.shape, length), key)

  def fits(stored: Any, like: Any) -> bool:
    return (
      isinstance(stored, QuantizedLeaf) and stored.codes.shape == like.shape
      and stored.scales.shape == _scales_shape(like.shape, length)
    )

  codec = _storage.Codec(
    f"8 bits in blocks of {length}", chosen, encode, _decode, fits,
  )
  return _storage.stored_transformation(inner, codec, WithQuantizedStateState, seed, _PURPOSE)


def dequantize_state(state: Any, dtype: Any = jnp.float32) -> Any:
  """A copy of any tree in which each `QuantizedLeaf` is an array of `dtype`.

  For reading, for example with `optax.tree.get` or `optax.contrib.schedule_free_eval_params`. It is
  not the state that `update` takes.

  >>> import jax.numpy as jnp
  >>> import optax
  >>> import hina_optax.memory as memory
  >>> state = memory.with_quantized_state(optax.trace(0.9)).init(jnp.ones((64, 64)))
  >>> print(dequantize_state(state).inner_state.trace.shape)
  (64, 64)
  """
  return jax.tree.map(
    lambda x: _dequantize(x, dtype) if isinstance(x, QuantizedLeaf) else x,
    _storage.restored(state), is_leaf=lambda x: isinstance(x, QuantizedLeaf),
  )


def _decode(stored: QuantizedLeaf, like: Any, key: _rounding.Key) -> jax.Array:
  # A few codes are read again and again: rounding each to the nearest bf16 would bias an average.
  return _rounding.round_to(_dequantize(stored, jnp.float32), like.dtype, key)


def stored_bytes(shape: tuple[int, ...]) -> int:
  """Bytes of a leaf of `shape` in blocks of the default length."""
  return math.prod(shape) + 2 * math.prod(_scales_shape(shape, _BLOCK))


def _scales_shape(shape: tuple[int, ...], block: int) -> tuple[int, ...]:
  """Leading axes, number of blocks, ones: blocks span as few trailing axes as hold `block`."""
  if not shape:
    return ()
  axis = len(shape) - 1
  while axis > 0 and math.prod(shape[axis:]) < block:
    axis -= 1
  rest = (1,) * (len(shape) - axis - 1)
  return (*shape[:axis], _block_count(math.prod(shape[axis:]), block), *rest)


def _block_count(size: int, block: int) -> int:
  """How many blocks `size` numbers are cut into: without a remainder if that is possible."""
  lengths = [n for n in range(3 * block // 4, 3 * block // 2 + 1) if size % n == 0]
  if lengths:
    return size // min(lengths, key=lambda n: abs(n - block))
  return max(1, math.ceil(size / block))


def _to_blocks(x: jax.Array, scales_shape: tuple[int, ...]) -> jax.Array:
  """`x` as `(leading axes, blocks, length)`, zeros at the end where the last block is not full."""
  lead, count = _lead_and_count(scales_shape)
  size = math.prod(x.shape[len(lead):])
  length = math.ceil(size / count)
  spec = _specification(x)
  kept, rest = spec[:len(lead)], spec[len(lead):]
  if count * length > size:
    padding = [(0, 0)] * len(lead) + [(0, count * length - size)]
    x = jnp.pad(_laid_out(x, (*lead, size), (*kept, None)), padding)
    rest = ()
  whole = bool(rest) and not any(rest[1:]) and count % _parts(x, rest[0]) == 0
  return _laid_out(x, (*lead, count, length), (*kept, rest[0] if whole else None, None))


def _from_blocks(blocks: jax.Array, like: jax.Array) -> jax.Array:
  """The shape and sharding of `like` again."""
  lead = blocks.shape[:-2]
  size, spec = math.prod(like.shape[len(lead):]), _specification(blocks)
  if math.prod(blocks.shape[-2:]) > size:
    rows = (*lead, math.prod(blocks.shape[-2:]))
    blocks = _laid_out(blocks, rows, (*spec[:-2], None))[..., :size]
  return _laid_out(blocks, like.shape, _specification(like))


def _specification(x: jax.Array) -> tuple[Any, ...]:
  """How each axis is sharded, as far as that is part of the type (explicit mesh axes)."""
  spec = tuple(jax.typeof(x).sharding.spec)
  return spec + (None,) * (x.ndim - len(spec))


def _laid_out(x: jax.Array, shape: tuple[int, ...], spec: tuple[Any, ...]) -> jax.Array:
  # Where sharding is part of the type, a reshape has to say how its result is sharded.
  if not any(spec) and not any(_specification(x)):
    return x.reshape(shape)
  mesh = jax.typeof(x).sharding.mesh
  return lax.reshape(x, shape, out_sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def _parts(x: jax.Array, axes: Any) -> int:
  """Over how many devices the mesh axes `axes` of a specification spread."""
  names = axes if isinstance(axes, tuple) else (axes,)
  return math.prod(jax.typeof(x).sharding.mesh.shape[a] for a in names if a is not None)


def _lead_and_count(scales_shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
  # Where trailing ones leave it open which axis counts the blocks, every reading cuts alike.
  used = [axis for axis, n in enumerate(scales_shape) if n != 1]
  axis = used[-1] if used else 0
  return tuple(scales_shape[:axis]), math.prod(scales_shape[axis:])


# Traced once for each shape; called outside of jit, one program in place of some fifty.
@functools.partial(jax.jit, static_argnums=1)
def quantize_leaf(
  leaf: jax.Array, scales_shape: tuple[int, ...], key: _rounding.Key
) -> QuantizedLeaf:
  """`leaf` in 8 bits, in the blocks that scales of this shape count."""
  x = _to_blocks(_rounding.round_to(leaf, jnp.float32, None), scales_shape)
  draw = _to_blocks(_rounding.uniform(leaf.shape, key), scales_shape)
  finite = jnp.isfinite(x)
  size = jnp.where(finite, jnp.abs(x), jnp.zeros_like(x))
  scale = _round_up(jnp.max(size, axis=-1, keepdims=True))
  signed = jnp.any((x < 0) | ~finite, axis=-1, keepdims=True)
  levels = jnp.where(signed, jnp.float32(_SIGNED), jnp.float32(_UNSIGNED))
  code = _nearby_code(_share(size, scale), levels, draw)
  # A second moment of 0 under a momentum that is not 0 would divide by eps alone.
  positive = ~jnp.any(x < 0, axis=-1, keepdims=True)
  code = jnp.where(positive & (size > 0), jnp.maximum(code, 1), code).astype(jnp.int32)
  code = jnp.where(jnp.isinf(x), _INFINITE, code)
  code = jnp.where(jnp.isnan(x), _NAN, jnp.where(x < 0, -code, code))
  codes = _from_blocks((code & 0xFF).astype(jnp.uint8), leaf)
  kept = jnp.where(signed, scale, -scale).astype(jnp.bfloat16)
  spec = _specification(kept)[:len(scales_shape)]
  spec += (None,) * (len(scales_shape) - len(spec))
  return QuantizedLeaf(codes, _laid_out(kept, scales_shape, spec))


def _share(size: jax.Array, scale: jax.Array) -> jax.Array:
  """`size / scale`, at most 1; 0 in a block of zeros."""
  # XLA may multiply by the reciprocal, which is flushed to 0 where a scale is near the largest.
  lower = jnp.where(scale > 1, jnp.float32(2.0**-32), jnp.ones_like(scale))
  divisor = jnp.where(scale > 0, scale * lower, jnp.ones_like(scale))
  return jnp.minimum(size * lower / divisor, 1)


def _nearby_code(share: jax.Array, levels: jax.Array, draw: jax.Array) -> jax.Array:
  """The code below or above `share`, by chance, such that the mean of what they read is `share`."""
  root = jnp.sqrt(jnp.sqrt(jnp.sqrt(share)))
  low = jnp.minimum(jnp.floor(root * levels), levels - 1)
  below, above = _eighth_power(low / levels), _eighth_power((low + 1) / levels)
  return low + (draw * (above - below) < share - below).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=1)
def _dequantize(leaf: QuantizedLeaf, dtype: Any) -> jax.Array:
  code = _to_blocks(leaf.codes.astype(jnp.int32), leaf.scales.shape)
  scale = _laid_out(
    leaf.scales.astype(jnp.float32), (*code.shape[:-1], 1), (*_specification(code)[:-1], None))
  signed = scale >= 0
  code = jnp.where(signed & (code >= 128), code - 256, code)
  levels = jnp.where(signed, jnp.float32(_SIGNED), jnp.float32(_UNSIGNED))
  size = _eighth_power(code.astype(jnp.float32) / levels) * jnp.abs(scale)
  value = jnp.where(code < 0, -size, size)
  infinity = jnp.copysign(jnp.float32(np.inf), value)
  value = jnp.where(signed & (jnp.abs(code) == _INFINITE), infinity, value)
  value = jnp.where(signed & (code == _NAN), jnp.float32(np.nan), value)
  return _from_blocks(value, leaf.codes).astype(dtype)


def _eighth_power(x: jax.Array) -> jax.Array:
  return jnp.square(jnp.square(jnp.square(x)))


def _round_up(x: jax.Array) -> jax.Array:
  """The next value of bf16, in fp32; 0 below the normal numbers, which do not divide."""
  pattern = lax.bitcast_convert_type(x, jnp.uint32)
  upper = lax.bitcast_convert_type(((pattern + np.uint32(0xFFFF)) >> 16) << 16, jnp.float32)
  upper = jnp.minimum(upper, jnp.float32(jnp.finfo(jnp.bfloat16).max))
  return jnp.where(x < jnp.float32(jnp.finfo(jnp.float32).tiny), jnp.zeros_like(x), upper)
