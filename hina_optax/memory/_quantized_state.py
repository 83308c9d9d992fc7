"""State in one byte a number, in blocks, on a grid that is fine where numbers are small."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from hina_optax import _checks, _rounding
from hina_optax.memory import _storage

_BLOCK = 256
_MIN_SIZE = 4096
_PURPOSE = 3
# A block without negative numbers counts 0..255. Any other counts -126..126, and its three spare
# codes stand for infinity, minus infinity and NaN.
_UNSIGNED, _SIGNED = 255.0, 126.0
_INFINITE, _NAN = 127, -128


class QuantizedLeaf(NamedTuple):
  """A leaf of a state in 8 bits; `dequantize_state` reads it.

  Attributes:
    codes: uint8, of the leaf's shape.
    scales: bf16, one number a block, with as many axes as the leaf: leading ones of the leaf, one
      that counts blocks, ones. Negative where the block has no negative number.
  """

  codes: jax.Array
  scales: jax.Array


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
  least = _storage.structural_number("min_size", min_size, _MIN_SIZE, 1)
  included = _storage.path_rule(include)

  def chosen(path: str, leaf: Any) -> bool:
    return (
      _storage.is_floating(leaf) and leaf.dtype.itemsize > 1 and leaf.size >= least
      and bool(included(path, leaf))
    )

  def encode(leaf: jax.Array, key: _rounding.Key) -> QuantizedLeaf:
    return _quantize(leaf, _scales_shape(leaf.shape, length), key)

  def fits(stored: Any, like: Any) -> bool:
    return (
      isinstance(stored, QuantizedLeaf) and stored.codes.shape == like.shape
      and stored.scales.shape == _scales_shape(like.shape, length)
    )

  codec = _storage.Codec(
    f"8 bits in blocks of {length}", chosen, encode,
    lambda stored, like: _dequantize(stored, like.dtype), fits,
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
    state, is_leaf=lambda x: isinstance(x, QuantizedLeaf),
  )


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
  if count * length > size:
    padding = [(0, 0)] * len(lead) + [(0, count * length - size)]
    x = jnp.pad(x.reshape(*lead, size), padding)
  return x.reshape(*lead, count, length)


def _from_blocks(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  lead = blocks.shape[:-2]
  size = math.prod(shape[len(lead):])
  if math.prod(blocks.shape[-2:]) > size:
    blocks = blocks.reshape(*lead, -1)[..., :size]
  return blocks.reshape(shape)


def _lead_and_count(scales_shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
  # Where trailing ones leave it open which axis counts the blocks, every reading cuts alike.
  used = [axis for axis, n in enumerate(scales_shape) if n != 1]
  axis = used[-1] if used else 0
  return tuple(scales_shape[:axis]), math.prod(scales_shape[axis:])


def _quantize(leaf: jax.Array, scales_shape: tuple[int, ...], key: _rounding.Key) -> QuantizedLeaf:
  x = _to_blocks(leaf.astype(jnp.float32), scales_shape)
  draw = _to_blocks(_rounding.uniform(leaf.shape, key), scales_shape)
  finite = jnp.isfinite(x)
  size = jnp.where(finite, jnp.abs(x), jnp.zeros_like(x))
  scale = _round_up(jnp.max(size, axis=-1, keepdims=True))
  signed = jnp.any((x < 0) | ~finite, axis=-1, keepdims=True)
  levels = jnp.where(signed, jnp.float32(_SIGNED), jnp.float32(_UNSIGNED))
  share = jnp.minimum(size / jnp.where(scale > 0, scale, jnp.ones_like(scale)), 1)
  code = _nearby_code(share, levels, draw)
  # A second moment of 0 under a momentum that is not 0 would divide by eps alone.
  code = jnp.where(~signed & (size > 0), jnp.maximum(code, 1), code).astype(jnp.int32)
  code = jnp.where(jnp.isinf(x), _INFINITE, code)
  code = jnp.where(jnp.isnan(x), _NAN, jnp.where(x < 0, -code, code))
  codes = _from_blocks((code & 0xFF).astype(jnp.uint8), leaf.shape)
  kept = jnp.where(signed, scale, -scale).astype(jnp.bfloat16)
  return QuantizedLeaf(codes, kept.reshape(scales_shape))


def _nearby_code(share: jax.Array, levels: jax.Array, draw: jax.Array) -> jax.Array:
  """The code below or above `share`, by chance, such that the mean of what they read is `share`."""
  root = jnp.sqrt(jnp.sqrt(jnp.sqrt(share)))
  low = jnp.minimum(jnp.floor(root * levels), levels - 1)
  below, above = _eighth_power(low / levels), _eighth_power((low + 1) / levels)
  return low + (draw * (above - below) < share - below).astype(jnp.float32)


def _dequantize(leaf: QuantizedLeaf, dtype: Any) -> jax.Array:
  code = _to_blocks(leaf.codes.astype(jnp.int32), leaf.scales.shape)
  scale = leaf.scales.astype(jnp.float32).reshape(*code.shape[:-1], 1)
  signed = scale >= 0
  code = jnp.where(signed & (code >= 128), code - 256, code)
  levels = jnp.where(signed, jnp.float32(_SIGNED), jnp.float32(_UNSIGNED))
  size = _eighth_power(code.astype(jnp.float32) / levels) * jnp.abs(scale)
  value = jnp.where(code < 0, -size, size)
  infinity = jnp.copysign(jnp.float32(np.inf), value)
  value = jnp.where(signed & (jnp.abs(code) == _INFINITE), infinity, value)
  value = jnp.where(signed & (code == _NAN), jnp.float32(np.nan), value)
  return _from_blocks(value, leaf.codes.shape).astype(dtype)


def _eighth_power(x: jax.Array) -> jax.Array:
  return jnp.square(jnp.square(jnp.square(x)))


def _round_up(x: jax.Array) -> jax.Array:
  """The next value of bf16, in fp32; 0 below the normal numbers, which do not divide."""
  pattern = lax.bitcast_convert_type(x, jnp.uint32)
  upper = lax.bitcast_convert_type(((pattern + np.uint32(0xFFFF)) >> 16) << 16, jnp.float32)
  upper = jnp.minimum(upper, jnp.float32(jnp.finfo(jnp.bfloat16).max))
  return jnp.where(x < jnp.float32(jnp.finfo(jnp.float32).tiny), jnp.zeros_like(x), upper)
