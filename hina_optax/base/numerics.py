"""Arithmetic that every part shares: fp32 scalars, whole-leaf sums, averages, quantiles.

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

# In fp32 this number plus one is itself again.
_LARGEST_FP32_COUNT = 1 << 24
_SQUARES = 1e-30, 1e36
# Beyond it a square is infinite in fp32, and an average of such stays so.
_LARGEST_SQUARABLE = 1.8e19


def compute_dtype(*dtypes: Any) -> Any:
  """fp32 for floating dtypes, fp64 if one of them is that."""
  # Not jnp.promote_types, which refuses to mix dtypes under strict promotion.
  wide = any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes)
  return jnp.dtype(jnp.float64 if wide else jnp.float32)


def scalar(value: Any, dtype: Any) -> Any:
  """A hyperparameter that mixes with arrays of `dtype`.

  A Python number stays one, so that `1 - b2` is computed in double precision as optax does it; an
  array, such as a traced bf16 hyperparameter, is cast.
  """
  return value if isinstance(value, (int, float)) else jnp.asarray(value).astype(dtype)


def narrowed(x: Array, dtype: Any) -> Array:
  """`x` in `dtype`; a finite number beyond its range becomes its largest."""
  if jnp.dtype(dtype).itemsize >= x.dtype.itemsize:
    return x.astype(dtype)
  top = float(jnp.finfo(dtype).max)
  return jnp.where(jnp.isfinite(x), jnp.clip(x, -top, top), x).astype(dtype)


def squarable(x: Array) -> Array:
  """`x` within plus and minus 1.8e19, the square of which fp32 holds."""
  return jnp.clip(x, -_LARGEST_SQUARABLE, _LARGEST_SQUARABLE)


def inner_product(x: Array, y: Array) -> Array:
  """Sum of `x * y` over all axes. Of a sharded leaf only the scalar is all-reduced."""
  return jnp.sum(x * y)


def total(x: Array) -> Array:
  """Sum over all axes."""
  return jnp.sum(x)


def mean(x: Array) -> Array:
  """Mean over all axes; 0 for an empty leaf."""
  return total(x) / max(x.size, 1)


def fraction(mask: Array, dtype: Any = jnp.float32) -> Array:
  """Share of true elements; 0 for an empty leaf."""
  if mask.size > _LARGEST_FP32_COUNT:
    return jnp.sum(mask.astype(jnp.int32)).astype(dtype) / mask.size
  # Sums of integers are an order of magnitude slower than sums of floats on CPUs (jaxlib 0.10).
  return mean(mask.astype(dtype))


def norm(x: Array) -> Array:
  """Euclidean norm over all axes."""
  return jnp.sqrt(inner_product(x, x))


def scaled_norm(x: Array) -> Array:
  """`norm`, also where fp32 cannot hold the squares; reads the leaf twice."""
  largest = jnp.max(jnp.abs(x), initial=0)
  # Not times the reciprocal of a constant: XLA would take the squares first.
  return largest * norm(x / jnp.where(largest > 0, largest, jnp.ones_like(largest)))


def safe_divide(numerator: Array, denominator: Array, default: float = 0.0) -> Array:
  """`numerator / denominator`, or `default` where that is 0/0, x/0 or not finite."""
  usable = (denominator != 0) & jnp.isfinite(denominator)
  ratio = numerator / jnp.where(usable, denominator, jnp.ones_like(denominator))
  return jnp.where(usable & jnp.isfinite(ratio), ratio, jnp.full_like(ratio, default))


def reciprocal(x: Array) -> Array:
  """`1 / x`, or 0 where that is not finite."""
  return safe_divide(jnp.ones_like(x), x)


def cosine(x: Array, y: Array) -> Array:
  """Cosine of the angle between two leaves; 0 where either is as good as zero, or infinite."""
  angle = safe_divide(safe_divide(inner_product(x, y), norm(x)), norm(y))
  return jnp.where(have_directions(x, y), angle, jnp.zeros_like(angle))


def have_directions(x: Array, y: Array) -> Array:
  """Whether both leaves have norms of 1e-15 to 1e18, the squares of which fp32 holds."""
  least, most = (jnp.asarray(bound, x.dtype) for bound in _SQUARES)
  first, second = inner_product(x, x), inner_product(y, y)
  return (least < first) & (first < most) & (least < second) & (second < most)


def variance(x: Array) -> Array:
  """Unbiased variance (n - 1) over all axes; 0 for fewer than two elements."""
  return total(jnp.square(x - mean(x))) / max(x.size - 1, 1)


def finite(x: Array) -> Array:
  """`x` with 0 in place of what is not finite."""
  return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))


def average(old: Array, new: Array, decay: Any) -> Array:
  """Exponential average `decay * old + (1 - decay) * new`."""
  rate = scalar(decay, old.dtype)
  return rate * old + (1 - rate) * new


def debias(decay: Any, count: Array, dtype: Any = jnp.float32, precise: bool = False) -> Array:
  """`1 - decay**count`: what an average that started from zero has seen after `count` steps.

  In fp32 the difference loses digits: for 0.999 it is off by 1.3e-5 at the first step, in optax as
  well. `precise` takes the logarithm of a Python number in double precision first.
  """
  steps = count.astype(dtype)
  if precise and isinstance(decay, float) and decay > 0:
    return -jnp.expm1(steps * math.log(decay))
  return 1 - scalar(decay, dtype) ** steps


def in_order(numbers: Sequence[int], parts: Sequence[Array]) -> Array:
  """The rows of all `parts`, of which `numbers` has one each, sorted by their numbers."""
  joined = jnp.concatenate(parts)
  order = list(numbers)
  return joined if order == sorted(order) else joined[np.argsort(order)]


def order_statistic(x: Array, rank: int) -> Array:
  """The element of index `rank` of sorted non-negative `x`, without sorting.

  Bisects on the bit pattern, which orders as the values do: one count over the leaf for each bit,
  all-reduced as a scalar when the leaf is sharded.
  """
  if x.size == 0:
    return jnp.zeros([], x.dtype)
  pattern = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)

  def body(step: Array, found: Array) -> Array:
    candidate = found | jnp.left_shift(jnp.int32(1), jnp.int32(30) - step)
    below = jnp.sum((pattern < candidate).astype(jnp.int32))
    return jnp.where(below <= rank, candidate, found)

  found = lax.fori_loop(0, 31, lambda i, f: body(jnp.asarray(i, jnp.int32), f), jnp.int32(0))
  return lax.bitcast_convert_type(found, jnp.float32).astype(x.dtype)
