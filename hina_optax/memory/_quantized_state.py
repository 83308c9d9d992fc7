"""`with_quantized_state`: one byte per number, in blocks, on a grid that is fine near zero."""

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
from hina_optax.grouped.codecs import Codec, QuantizedLeaf
from hina_optax.memory import _arguments, _blocks

_BLOCK = 256
MIN_SIZE = 4096
_PURPOSE = 3
# A block of finite numbers of which none is negative uses the codes 0..255. Any other block uses
# -126..126, and its three spare codes stand for infinity, minus infinity and NaN.
_UNSIGNED, _SIGNED = 255.0, 126.0
_INFINITE, _NAN = 127, -128


class WithQuantizedStateState(NamedTuple):
  """State of `with_quantized_state`.

  Attributes:
    inner_state: the inner's state, with a `QuantizedLeaf` in place of each selected leaf.
    step: int32 scalar, number of updates so far. It and `seed` determine the rounding noise.
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
  include: _arguments.Include = None,
  seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Computes in fp32 and stores the state of any transformation in 8 bits per number.

  Parameters and updates of fewer than 32 bits are cast to fp32 before the inner's `init` and
  `update`, and its updates are cast back. A block of numbers `x` with the largest magnitude `s`
  (rounded up to bf16) is stored as codes `c` on a grid of eighth powers,

  .. math::
    x \approx s\, (c/255)^8 \text{ if all } x \text{ are finite and none } < 0, \qquad
    x \approx s \operatorname{sign}(c)\, (c/126)^8 \text{ otherwise}

  with stochastic rounding between the two neighbours, so that the mean is exact. The grid is 3%
  (6%) wide at the top, 18% (36%) at :math:`10^{-6} s`, and goes on below :math:`10^{-16} s`. A
  linear grid ends at 1/255: smaller second moments would become 0, and the step, divided by their
  root, would explode. The numbers of a block determine its grid, and the sign of its scale records
  it. In a block without negative numbers, a positive number is never rounded to 0, but up to the
  smallest code. Infinite values and NaN are preserved. A block whose magnitudes are all below
  1.2e-38 is decoded to 0.

  Blocks span as few trailing axes as hold `block` numbers, and are of equal length: a row of 320 is
  one block. Codes have the leaf's shape, and scales have its leading axes, so both follow the
  sharding of the leaf. The first of the trailing axes is split into eighths of a block. If these
  fall evenly on the devices, a leaf stays in place whichever of its axes are sharded, and only the
  magnitudes of blocks are exchanged. Otherwise (rows of odd lengths) XLA gathers the leaf in every
  step.

  Around `hina_adaptive`, `with_leaf_batching` and parts of this library, one group of leaves is
  decoded at a time. The same holds around any other transformation that treats each leaf by itself.
  Around a transformation that looks across leaves, all of its state is decoded at once.

  Around `with_state_dtype`, each decoded number is rounded to the narrower dtype at random, so
  averages stay correct. Leaves that are already in 8 bits are not changed.

  `optax.tree.map_params` visits codes and scales one by one; with further trees, pass
  `is_leaf=lambda x: isinstance(x, QuantizedLeaf)` to pair each with its parameter.

  It suits averages (first and second moments). It does not suit state that accumulates many small
  steps into a precise value, such as the `z` of `optax.contrib.schedule_free`: exclude that by
  `include`. A number of a second moment fluctuates by about 20% around its true value (bf16: 5%),
  and by more if it is below a millionth of its block's largest number. The wrapper does not help if
  the state is small (LoRA).

  Args:
    inner: any optax transformation.
    bits: 8; `None` is 8 as well.
    block: about how many numbers share a scale, >= 16; `None` is 256. A block has 3/4 to 3/2 of
      this number if the length of the row allows it.
    min_size: smallest number of elements of a leaf that is quantized; `None` is 4096.
    include: which leaves of the state are quantized: a regular expression searched in the leaf's
      path (such as `"0/mu/dense/kernel"`), a function `(path, leaf) -> bool`, or `None` for all.
    seed: seed of the rounding noise, a whole number >= 0.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `WithQuantizedStateState`: 1 + 2/256 bytes per
    number of the inner's state (Adam: 2.02 bytes per parameter instead of 8), and 8 bytes in all.

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
  checks.static_value("bits", bits)
  checks.choice("bits", bits, (None, 8))
  length = _arguments.check_static_integer("block", block, _BLOCK, 16)
  min_elements = _arguments.check_static_integer("min_size", min_size, MIN_SIZE, 1)
  is_included = _arguments.compile_include(include)
  checks.integer("seed", seed, 0)

  def selects(path: str, leaf: Any) -> bool:
    return (
      codecs.is_floating(leaf) and leaf.dtype.itemsize > 1 and leaf.size >= min_elements
      and bool(is_included(path, leaf))
    )

  def encode(leaf: jax.Array, key: rounding.Key) -> QuantizedLeaf:
    stored = quantize_leaf(leaf, _blocks.find_scales_shape(leaf.shape, length), key)
    if isinstance(leaf, jax.core.Tracer) or stored.codes.sharding == leaf.sharding:
      return stored
    return stored._replace(codes=jax.device_put(stored.codes, leaf.sharding))

  def matches(stored: Any, like: Any) -> bool:
    return (
      isinstance(stored, QuantizedLeaf) and stored.codes.shape == like.shape
      and stored.scales.shape == _blocks.find_scales_shape(like.shape, length)
    )

  codec = Codec(
    f"8 bits in blocks of {length}", WithQuantizedStateState, selects, encode, _decode, matches,
    seed=seed, purpose=_PURPOSE)
  return driver.with_codec(_arguments.check_inner(inner), codec)


def dequantize_state(state: Any, dtype: Any = jnp.float32) -> Any:
  """Returns a copy of any tree in which each `QuantizedLeaf` is decoded to an array of `dtype`.

  The copy is for reading, for example with `optax.tree.get` or
  `optax.contrib.schedule_free_eval_params`. It is not a state for `update`.

  >>> import jax.numpy as jnp
  >>> import optax
  >>> import hina_optax.memory as memory
  >>> state = memory.with_quantized_state(optax.trace(0.9)).init(jnp.ones((64, 64)))
  >>> print(dequantize_state(state).inner_state.trace.shape)
  (64, 64)
  """
  return jax.tree.map(
    lambda x: _dequantize(x, dtype) if isinstance(x, QuantizedLeaf) else x,
    codecs.restore_quantized_leaves(state), is_leaf=lambda x: isinstance(x, QuantizedLeaf),
  )


def _decode(stored: QuantizedLeaf, like: Any, key: rounding.Key) -> jax.Array:
  # There are few codes, and each is decoded again and again. Rounding to the nearest bf16 would
  # give each the same error every time, and bias an average.
  return rounding.round_to(_dequantize(stored, jnp.float32), like.dtype, key)


def count_stored_bytes(shape: tuple[int, ...]) -> int:
  """Returns the bytes of a leaf of `shape` in blocks of the default length."""
  return math.prod(shape) + 2 * math.prod(_blocks.find_scales_shape(shape, _BLOCK))


def _run_sharded(function: Callable[..., Any], like: jax.Array, *arrays: Any) -> Any:
  """Runs `function(*arrays)`; shards the results like `like` on explicit mesh axes, if possible."""
  if AxisType.Explicit not in jax.typeof(like).sharding.mesh.axis_types:
    return function(*arrays)
  mesh, spec = jax.typeof(like).sharding.mesh, jax.typeof(like).sharding.spec

  def find_sharding(x: Any) -> NamedSharding:
    axes = [a if a is not None and n % _count_devices(mesh, a) == 0 else None
            for a, n in zip(spec, x.shape)]
    return NamedSharding(mesh, PartitionSpec(*axes))

  out_sharding = jax.tree.map(
    find_sharding, jax.eval_shape(function, *jax.tree.map(_to_shape, arrays)))
  return jax.sharding.auto_axes(function, out_sharding=out_sharding)(*arrays)


def _to_shape(x: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _count_devices(mesh: Any, axes: Any) -> int:
  return math.prod(mesh.shape[a] for a in (axes if isinstance(axes, tuple) else (axes,)))


# Jitted, so that it is traced once per shape, and an eager call runs one program instead of some
# fifty.
@functools.partial(jax.jit, static_argnums=1)
def quantize_leaf(
  leaf: jax.Array, scales_shape: tuple[int, ...], key: rounding.Key
) -> QuantizedLeaf:
  """Stores `leaf` in 8 bits, in blocks that follow from the shape of the scales."""
  return _run_sharded(functools.partial(_encode_blocks, scales_shape), leaf, leaf, key)


def _encode_blocks(
  scales_shape: tuple[int, ...], leaf: jax.Array, key: rounding.Key
) -> QuantizedLeaf:
  blocking = _blocks.find_blocking(leaf.shape, scales_shape)
  x = _blocks.to_blocks(rounding.round_to(leaf, jnp.float32, None), blocking)
  draw = _blocks.to_blocks(rounding.uniform(leaf.shape, key), blocking)
  finite = jnp.isfinite(x)
  size = jnp.where(finite, jnp.abs(x), jnp.zeros_like(x))
  maximum = _round_up_to_bf16(_blocks.block_max(size, blocking))
  # 1 if a number of a block is not finite, 2 if one is negative: both are found in one pass.
  flags = jnp.where(x < 0, np.int8(2), jnp.where(finite, np.int8(0), np.int8(1)))
  flags = _blocks.block_max(flags, blocking)
  scale = _blocks.broadcast_to_parts(maximum, blocking)
  has_spare_codes = _blocks.broadcast_to_parts(flags > 0, blocking)
  levels = jnp.where(has_spare_codes, jnp.float32(_SIGNED), jnp.float32(_UNSIGNED))
  code = _round_to_code(_divide_by_scale(size, scale), levels, draw)
  # No second moment is rounded to 0: with a momentum that is not 0, the step would be divided by
  # eps alone.
  has_no_negative = _blocks.broadcast_to_parts(flags < 2, blocking)
  code = jnp.where(has_no_negative & (size > 0), jnp.maximum(code, 1), code)
  code = jnp.where(jnp.isinf(x), _INFINITE, code.astype(jnp.int32))
  code = jnp.where(jnp.isnan(x), _NAN, jnp.where(x < 0, -code, code))
  codes = _blocks.from_blocks((code & 0xFF).astype(jnp.uint8), blocking, leaf.shape)
  scales = jnp.where(flags > 0, maximum, -maximum).astype(jnp.bfloat16)
  return QuantizedLeaf(codes, scales.reshape(scales_shape))


def _divide_by_scale(size: jax.Array, scale: jax.Array) -> jax.Array:
  """Returns `size / scale`, at most 1; 0 in a block of zeros."""
  # XLA may multiply by the reciprocal instead, which is flushed to 0 if a scale is close to the
  # largest float. Both are scaled down first.
  factor = jnp.where(scale > 1, jnp.float32(2.0**-32), jnp.ones_like(scale))
  divisor = jnp.where(scale > 0, scale * factor, jnp.ones_like(scale))
  return jnp.minimum(size * factor / divisor, 1)


def _round_to_code(share: jax.Array, levels: jax.Array, draw: jax.Array) -> jax.Array:
  """Rounds `share` to the code below or above at random, so that the decoded mean is `share`."""
  root = jnp.sqrt(jnp.sqrt(jnp.sqrt(share)))
  low = jnp.minimum(jnp.floor(root * levels), levels - 1)
  below, above = _raise_to_eighth(low / levels), _raise_to_eighth((low + 1) / levels)
  return low + (draw * (above - below) < share - below).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=1)
def _dequantize(leaf: QuantizedLeaf, dtype: Any) -> jax.Array:
  return _run_sharded(functools.partial(_decode_blocks, dtype), leaf.codes, leaf)


def _decode_blocks(dtype: Any, leaf: QuantizedLeaf) -> jax.Array:
  blocking = _blocks.find_blocking(leaf.codes.shape, leaf.scales.shape)
  code = _blocks.to_blocks(leaf.codes.astype(jnp.int32), blocking)
  scales = leaf.scales.astype(jnp.float32).reshape(*blocking.lead, blocking.blocks)
  scale = _blocks.broadcast_to_parts(scales, blocking)
  signed = scale >= 0
  code = jnp.where(signed & (code >= 128), code - 256, code)
  levels = jnp.where(signed, jnp.float32(_SIGNED), jnp.float32(_UNSIGNED))
  size = _raise_to_eighth(code.astype(jnp.float32) / levels) * jnp.abs(scale)
  value = jnp.where(code < 0, -size, size)
  infinity = jnp.copysign(jnp.float32(np.inf), value)
  value = jnp.where(signed & (jnp.abs(code) == _INFINITE), infinity, value)
  value = jnp.where(signed & (code == _NAN), jnp.float32(np.nan), value)
  return _blocks.from_blocks(value, blocking, leaf.codes.shape).astype(dtype)


def _raise_to_eighth(x: jax.Array) -> jax.Array:
  return jnp.square(jnp.square(jnp.square(x)))


def _round_up_to_bf16(x: jax.Array) -> jax.Array:
  """Rounds up to bf16, in fp32; 0 for subnormal numbers, which cannot be divided by."""
  pattern = lax.bitcast_convert_type(x, jnp.uint32)
  upper = lax.bitcast_convert_type(((pattern + np.uint32(0xFFFF)) >> 16) << 16, jnp.float32)
  upper = jnp.minimum(upper, jnp.float32(jnp.finfo(jnp.bfloat16).max))
  return jnp.where(x < jnp.float32(jnp.finfo(jnp.float32).tiny), jnp.zeros_like(x), upper)
