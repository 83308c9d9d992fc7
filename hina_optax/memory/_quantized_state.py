"""State in one byte a number, in blocks, on a grid that is fine where numbers are small."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hina_optax.base import checks, rounding
from hina_optax.grouped import codecs, driver
from hina_optax.grouped.codecs import Layer, QuantizedLeaf
from hina_optax.memory import _blocks, _storage

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
  leaf that is sharded. What is read is the first of these axes in eighths of a block: where those
  fall evenly on the devices, a leaf stays in place whichever of its axes are sharded, and only
  magnitudes of blocks are exchanged; otherwise (rows of odd lengths) XLA gathers it in every step.

  Around `hina_adaptive`, `with_leaf_batching` and parts of this library one group of leaves lies
  open at a time, and so it does around any other transformation that treats each leaf by itself;
  around one that looks across leaves all of its state is open at once.

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
  checks.structural("bits", bits)
  checks.choice("bits", bits, (None, 8))
  length = _storage.structural_number("block", block, _BLOCK, 16)
  least = _storage.structural_number("min_size", min_size, MIN_SIZE, 1)
  included = _storage.path_rule(include)
  checks.integer("seed", seed, 0)

  def chosen(path: str, leaf: Any) -> bool:
    return (
      codecs.is_floating(leaf) and leaf.dtype.itemsize > 1 and leaf.size >= least
      and bool(included(path, leaf))
    )

  def encode(leaf: jax.Array, key: rounding.Key) -> QuantizedLeaf:
    stored = quantize_leaf(leaf, _blocks.scales_shape(leaf.shape, length), key)
    if isinstance(leaf, jax.core.Tracer) or stored.codes.sharding == leaf.sharding:
      return stored
    return stored._replace(codes=jax.device_put(stored.codes, leaf.sharding))

  def fits(stored: Any, like: Any) -> bool:
    return (
      isinstance(stored, QuantizedLeaf) and stored.codes.shape == like.shape
      and stored.scales.shape == _blocks.scales_shape(like.shape, length)
    )

  layer = Layer(
    f"8 bits in blocks of {length}", WithQuantizedStateState, chosen, encode, _decode, fits,
    seed=seed, purpose=_PURPOSE)
  return driver.with_layer(_storage.transformation(inner), layer)


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
    codecs.restored(state), is_leaf=lambda x: isinstance(x, QuantizedLeaf),
  )


def _decode(stored: QuantizedLeaf, like: Any, key: rounding.Key) -> jax.Array:
  # A few codes are read again and again: rounding each to the nearest bf16 would bias an average.
  return rounding.round_to(_dequantize(stored, jnp.float32), like.dtype, key)


def stored_bytes(shape: tuple[int, ...]) -> int:
  """Bytes of a leaf of `shape` in blocks of the default length."""
  return math.prod(shape) + 2 * math.prod(_blocks.scales_shape(shape, _BLOCK))


def _partitioned(function: Callable[..., Any], like: jax.Array, *arrays: Any) -> Any:
  """`function(*arrays)`; on explicit mesh axes its results lie as `like`, as far as they can."""
  if AxisType.Explicit not in jax.typeof(like).sharding.mesh.axis_types:
    return function(*arrays)
  mesh, spec = jax.typeof(like).sharding.mesh, jax.typeof(like).sharding.spec

  def place(x: Any) -> NamedSharding:
    axes = [a if a is not None and n % _devices(mesh, a) == 0 else None
            for a, n in zip(spec, x.shape)]
    return NamedSharding(mesh, PartitionSpec(*axes))

  places = jax.tree.map(place, jax.eval_shape(function, *jax.tree.map(_bare, arrays)))
  return jax.sharding.auto_axes(function, out_sharding=places)(*arrays)


def _bare(x: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _devices(mesh: Any, axes: Any) -> int:
  return math.prod(mesh.shape[a] for a in (axes if isinstance(axes, tuple) else (axes,)))


# Traced once for each shape; called outside of jit, one program in place of some fifty.
@functools.partial(jax.jit, static_argnums=1)
def quantize_leaf(
  leaf: jax.Array, scales_shape: tuple[int, ...], key: rounding.Key
) -> QuantizedLeaf:
  """`leaf` in 8 bits, in the blocks that scales of this shape count."""
  return _partitioned(functools.partial(_quantize, scales_shape), leaf, leaf, key)


def _quantize(
  scales_shape: tuple[int, ...], leaf: jax.Array, key: rounding.Key
) -> QuantizedLeaf:
  cut = _blocks.cut(leaf.shape, scales_shape)
  x = _blocks.to_blocks(rounding.round_to(leaf, jnp.float32, None), cut)
  draw = _blocks.to_blocks(rounding.uniform(leaf.shape, key), cut)
  finite = jnp.isfinite(x)
  size = jnp.where(finite, jnp.abs(x), jnp.zeros_like(x))
  kept = _round_up(_blocks.largest(size, cut))
  # 1 where a number of a block is not finite, 2 where one is negative: both in one pass.
  odd = jnp.where(x < 0, np.int8(2), jnp.where(finite, np.int8(0), np.int8(1)))
  odd = _blocks.largest(odd, cut)
  scale, signed = _blocks.spread(kept, cut), _blocks.spread(odd > 0, cut)
  levels = jnp.where(signed, jnp.float32(_SIGNED), jnp.float32(_UNSIGNED))
  code = _nearby_code(_share(size, scale), levels, draw)
  # A second moment of 0 under a momentum that is not 0 would divide by eps alone.
  code = jnp.where(_blocks.spread(odd < 2, cut) & (size > 0), jnp.maximum(code, 1), code)
  code = jnp.where(jnp.isinf(x), _INFINITE, code.astype(jnp.int32))
  code = jnp.where(jnp.isnan(x), _NAN, jnp.where(x < 0, -code, code))
  codes = _blocks.from_blocks((code & 0xFF).astype(jnp.uint8), cut, leaf.shape)
  scales = jnp.where(odd > 0, kept, -kept).astype(jnp.bfloat16)
  return QuantizedLeaf(codes, scales.reshape(scales_shape))


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
  return _partitioned(functools.partial(_values, dtype), leaf.codes, leaf)


def _values(dtype: Any, leaf: QuantizedLeaf) -> jax.Array:
  cut = _blocks.cut(leaf.codes.shape, leaf.scales.shape)
  code = _blocks.to_blocks(leaf.codes.astype(jnp.int32), cut)
  scale = _blocks.spread(leaf.scales.astype(jnp.float32).reshape(*cut.lead, cut.blocks), cut)
  signed = scale >= 0
  code = jnp.where(signed & (code >= 128), code - 256, code)
  levels = jnp.where(signed, jnp.float32(_SIGNED), jnp.float32(_UNSIGNED))
  size = _eighth_power(code.astype(jnp.float32) / levels) * jnp.abs(scale)
  value = jnp.where(code < 0, -size, size)
  infinity = jnp.copysign(jnp.float32(np.inf), value)
  value = jnp.where(signed & (jnp.abs(code) == _INFINITE), infinity, value)
  value = jnp.where(signed & (code == _NAN), jnp.float32(np.nan), value)
  return _blocks.from_blocks(value, cut, leaf.codes.shape).astype(dtype)


def _eighth_power(x: jax.Array) -> jax.Array:
  return jnp.square(jnp.square(jnp.square(x)))


def _round_up(x: jax.Array) -> jax.Array:
  """The next value of bf16, in fp32; 0 below the normal numbers, which do not divide."""
  pattern = lax.bitcast_convert_type(x, jnp.uint32)
  upper = lax.bitcast_convert_type(((pattern + np.uint32(0xFFFF)) >> 16) << 16, jnp.float32)
  upper = jnp.minimum(upper, jnp.float32(jnp.finfo(jnp.bfloat16).max))
  return jnp.where(x < jnp.float32(jnp.finfo(jnp.float32).tiny), jnp.zeros_like(x), upper)
