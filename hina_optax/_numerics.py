"""Arithmetic that every part shares: fp32 scalars, whole-leaf sums, averages, quantiles.

Nothing here knows what a parameter, a path or an optimizer is. All functions take and return arrays
of one floating dtype of at least 32 bits (`compute_dtype`), so that nothing is computed in bf16 by
accident.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

Array = jax.Array
Scalar = float | int | jax.Array

# Of the axis that counts the leaves of a stack.
LEAVES = "leaves of a stack of hina_optax"
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
  """Sum of `x * y` over all axes.

  XLA computes arithmetic and absolute values on the way into a sum, on CPUs too, and writes nothing
  out; comparisons, selections and casts it does write out there. Of a sharded leaf only the scalar
  is all-reduced.
  """
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
  # Integer sums are an order of magnitude slower on CPUs.
  return mean(mask.astype(dtype))


def norm(x: Array) -> Array:
  """Euclidean norm over all axes."""
  return jnp.sqrt(inner_product(x, x))


def wide_norm(x: Array) -> Array:
  """`norm`, also where fp32 cannot hold the squares; reads the leaf twice there."""
  squares = inner_product(x, x)
  least, most = (jnp.asarray(bound, x.dtype) for bound in _SQUARES)
  fits = (least < squares) & (squares < most)
  return usually(fits, jnp.sqrt(squares), _scaled_norm, x)


def _scaled_norm(x: Array) -> Array:
  largest = jnp.max(jnp.abs(x), initial=0)
  # Not times the reciprocal of a constant: XLA would take the squares first.
  return largest * norm(x / jnp.where(largest > 0, largest, jnp.ones_like(largest)))


def usually(fits: Array, short: Array, long: Callable[..., Array], *operands: Array) -> Array:
  """`short` where it `fits`, else `long(*operands)`: for CPUs a branch that is seldom taken.

  A stack takes it if one of its leaves must. Elsewhere a branch would cost more than `long`.
  """
  def branch(fits: Array, short: Array, *operands: Array) -> Array:
    return lax.cond(_all_leaves(fits), lambda short, *_: short, lambda _, *xs: long(*xs),
                    short, *operands)

  found = lax.platform_dependent(
    fits, short, *operands, cpu=branch, default=lambda fits, short, *xs: long(*xs))
  return jnp.where(fits, short, found)


def _all_leaves(fits: Array) -> Array:
  """Whether that is so of all leaves of a stack that is visited."""
  try:
    return lax.pmin(fits.astype(jnp.int32), LEAVES) > 0
  except NameError:
    return fits


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


def noinline(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
  """`function`, jitted with `options`, as a call that XLA leaves one; costs no copy on CPUs.

  XLA's CPU backend fuses nothing across it, and generates code once for calls of equal shapes.
  """
  @functools.wraps(function)
  def inside(*args: Any, **kwargs: Any) -> Any:
    # What is jitted in there, as much of jax.numpy is, should be inlined.
    with set_xla_metadata(inlineable=None):
      return function(*args, **kwargs)

  jitted = jax.jit(inside, **options)

  @functools.wraps(function)
  def call(*args: Any, **kwargs: Any) -> Any:
    with set_xla_metadata(inlineable="false"):
      return jitted(*args, **kwargs)

  return call


def written(x: Array) -> Array:
  """`x`, which XLA on CPUs writes out instead of computing it again in each of its readers."""
  return lax.platform_dependent(x, cpu=_handed_on, default=lax.optimization_barrier)


@noinline
def _handed_on(x: Array) -> Array:
  # XLA drops a call that gives back its argument.
  return lax.optimization_barrier(x)


def after(earlier: Sequence[Array], x: Array) -> Array:
  """`x`, which XLA takes on CPUs to depend on what is `earlier`, and so computes later."""
  numbers = [y[(0,) * y.ndim].astype(jnp.float32) for y in earlier if y.size]
  if not numbers:
    return x
  never = lax.platform_dependent(
    sum(numbers), cpu=_never, default=lambda number: jnp.zeros_like(number, bool))
  return jnp.where(never, jnp.zeros_like(x), x)


# Inlined, what `number` depends on would be computed again for each element of an array.
@noinline
def _never(number: Array) -> Array:
  """False, which the compiler cannot work out."""
  return lax.population_count(number.astype(jnp.int32)) > 32


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
