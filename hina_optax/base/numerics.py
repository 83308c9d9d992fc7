"""Arithmetic that all parts share: scalars, sums over a leaf, averages, order statistics.

Nothing here knows what a parameter, a path or an optimizer is. All functions take and return arrays
of one floating dtype of at least 32 bits (`compute_dtype`), so that nothing is computed in bf16 by
accident.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array
Scalar = float | int | jax.Array

# Above this integer fp32 no longer represents every integer, so counts go wrong.
_LARGEST_FP32_COUNT = 1 << 24
# Bounds on a sum of squares within which fp32 neither underflows nor overflows.
_SQUARED_NORM_BOUNDS = 1e-30, 1e36
# The square of a larger number is infinite in fp32, and an average that contains it stays infinite.
_LARGEST_SQUARABLE = 1.8e19


def compute_dtype(*dtypes: Any) -> Any:
  """The dtype to compute in: fp64 if one of `dtypes` is fp64, else fp32."""
  # jnp.promote_types would refuse to mix dtypes under strict promotion.
  has_fp64 = any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes)
  return jnp.dtype(jnp.float64 if has_fp64 else jnp.float32)


def scalar(value: Any, dtype: Any) -> Any:
  """A hyperparameter that mixes with arrays of `dtype`.

  A Python number stays one, so that `1 - b2` is computed in double precision as optax does it; an
  array, such as a traced bf16 hyperparameter, is cast.
  """
  return value if isinstance(value, (int, float)) else jnp.asarray(value).astype(dtype)


def saturate_cast(x: Array, dtype: Any) -> Array:
  """Casts `x`; a finite number beyond the range of `dtype` becomes the largest finite one."""
  if jnp.dtype(dtype).itemsize >= x.dtype.itemsize:
    return x.astype(dtype)
  largest = float(jnp.finfo(dtype).max)
  return jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x).astype(dtype)


def clip_to_squarable(x: Array) -> Array:
  """`x`, clipped to plus and minus 1.8e19, so that fp32 can hold its squares."""
  return jnp.clip(x, -_LARGEST_SQUARABLE, _LARGEST_SQUARABLE)


def inner_product(x: Array, y: Array) -> Array:
  """Sum of `x * y` over all axes. If the leaf is sharded, only a scalar is all-reduced."""
  return jnp.sum(x * y)


def total(x: Array) -> Array:
  """Sum over all axes."""
  return jnp.sum(x)


def mean(x: Array) -> Array:
  """Mean over all axes; 0 for an empty leaf."""
  return total(x) / max(x.size, 1)


def share_of_true(mask: Array, dtype: Any = jnp.float32) -> Array:
  """Number of true elements divided by the number of elements; 0 for an empty leaf."""
  if mask.size > _LARGEST_FP32_COUNT:
    return jnp.sum(mask.astype(jnp.int32)).astype(dtype) / mask.size
  # Sums of integers are an order of magnitude slower than sums of floats on CPUs (jaxlib 0.10).
  return mean(mask.astype(dtype))


def norm(x: Array) -> Array:
  """Euclidean norm over all axes."""
  return jnp.sqrt(inner_product(x, x))


def scaled_norm(x: Array) -> Array:
  """`norm`, correct even where fp32 cannot hold the squares; it reads the leaf twice."""
  largest = jnp.max(jnp.abs(x), initial=0)
  # A division, because XLA would move a multiplication by a reciprocal behind the squares.
  return largest * norm(x / jnp.where(largest > 0, largest, jnp.ones_like(largest)))


def safe_divide(numerator: Array, denominator: Array, default: float = 0.0) -> Array:
  """`numerator / denominator`, or `default` where the denominator is 0 or the ratio not finite."""
  usable = (denominator != 0) & jnp.isfinite(denominator)
  ratio = numerator / jnp.where(usable, denominator, jnp.ones_like(denominator))
  return jnp.where(usable & jnp.isfinite(ratio), ratio, jnp.full_like(ratio, default))


def reciprocal(x: Array) -> Array:
  """`1 / x`, or 0 where the reciprocal is not finite."""
  return safe_divide(jnp.ones_like(x), x)


def cosine(x: Array, y: Array) -> Array:
  """Cosine of the angle between two leaves; 0 unless `have_directions`."""
  angle = safe_divide(safe_divide(inner_product(x, y), norm(x)), norm(y))
  return jnp.where(have_directions(x, y), angle, jnp.zeros_like(angle))


def have_directions(x: Array, y: Array) -> Array:
  """Whether the norms of both leaves lie between 1e-15 and 1e18, so that fp32 holds the squares."""
  least, most = (jnp.asarray(bound, x.dtype) for bound in _SQUARED_NORM_BOUNDS)
  first, second = inner_product(x, x), inner_product(y, y)
  return (least < first) & (first < most) & (least < second) & (second < most)


def variance(x: Array) -> Array:
  """Unbiased variance (n - 1) over all axes; 0 for fewer than two elements."""
  return total(jnp.square(x - mean(x))) / max(x.size - 1, 1)


def zero_non_finite(x: Array) -> Array:
  """`x` with 0 in place of each element that is not finite."""
  return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))


def update_average(old: Array, new: Array, decay: Any) -> Array:
  """The next exponential moving average: `decay * old + (1 - decay) * new`."""
  rate = scalar(decay, old.dtype)
  return rate * old + (1 - rate) * new


def bias_correction(
  decay: Any, count: Array, dtype: Any = jnp.float32, precise: bool = False
) -> Array:
  """`1 - decay**count`, the divisor that corrects an average for its start from zero.

  In fp32 the difference loses digits: for 0.999 it is off by 1.3e-5 at the first step, as it is in
  optax. With `precise`, the logarithm of a Python number is taken in double precision first.
  """
  steps = count.astype(dtype)
  if precise and isinstance(decay, float) and decay > 0:
    return -jnp.expm1(steps * math.log(decay))
  return 1 - scalar(decay, dtype) ** steps


def concatenate_sorted(parts: Sequence[Array], numbers: Sequence[int]) -> Array:
  """Concatenates `parts` and sorts the rows by `numbers`, which has one number per row."""
  joined = jnp.concatenate(parts)
  order = list(numbers)
  return joined if order == sorted(order) else joined[np.argsort(order)]


def order_statistic(x: Array, rank: int) -> Array:
  """The element at index `rank` of the sorted elements of `x`, found without sorting.

  The elements must not be negative: their bit patterns then have the same order as their values.
  The function bisects on the bit pattern with one count over the leaf per bit. If the leaf is
  sharded, each count is all-reduced as a scalar.
  """
  if x.size == 0:
    return jnp.zeros([], x.dtype)
  pattern = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)

  def set_next_bit(step: Array, prefix: Array) -> Array:
    candidate = prefix | jnp.left_shift(jnp.int32(1), jnp.int32(30) - step)
    below = jnp.sum((pattern < candidate).astype(jnp.int32))
    return jnp.where(below <= rank, candidate, prefix)

  result = lax.fori_loop(
    0, 31, lambda i, prefix: set_next_bit(jnp.asarray(i, jnp.int32), prefix), jnp.int32(0))
  return lax.bitcast_convert_type(result, jnp.float32).astype(x.dtype)
