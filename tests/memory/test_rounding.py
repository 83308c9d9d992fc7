"""The rounding that the storage wrappers share: unbiased, in range, independent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hina_optax.base import rounding

DRAWS = 1_000_000
DTYPES = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def key(step=1, seed=0, purpose=1):
  return rounding.make_key(rounding.seed_word(seed), jnp.asarray(step, jnp.int32), purpose)


def bracket(x, dtype):
  """The two values of `dtype` around each `x`, in fp64."""
  x = np.asarray(x, np.float64)
  near = x.astype(dtype)
  with np.errstate(over="ignore"):
    up, down = (np.nextafter(near, np.asarray(s * np.inf, dtype)) for s in (1, -1))
  value = near.astype(np.float64)
  return np.where(value <= x, value, down.astype(np.float64)), np.where(
    value >= x, value, up.astype(np.float64))


def errors(x, dtype, step=1, count=DRAWS):
  """Errors of `count` draws at one number, and what one draw's deviation has to be."""
  rounded = jax.jit(lambda v: rounding.round_to(v, dtype, key(step)))(
    jnp.full(count, x, jnp.float32))
  assert rounded.dtype == jnp.dtype(dtype)
  low, high = bracket(np.float32(x), jnp.dtype(dtype))
  values = np.asarray(rounded).astype(np.float64)
  assert set(np.unique(values)) <= {float(low), float(high)}
  exact = float(np.float32(x))
  return values - exact, float(np.sqrt((exact - low) * (high - exact)))


MAGNITUDES = [
  m * 10.0**e for e in (-30, -20, -10, -3, 0, 3, 10, 20, 30) for m in (1.2345, -7.7)
]
# Just under and over powers of two, where the grid changes its width, and next to the largest.
BORDERS = [
  s * 2.0**e * (1 + d)
  for e, s in ((-126, -1), (-1, 1), (0, -1), (1, 1), (100, -1))
  for d in (-0.001, -0.0001, 0.0001, 0.003) if e > -126 or d > 0
] + [3.385e38, -3.385e38]


@pytest.mark.parametrize("x", MAGNITUDES + BORDERS)
def test_the_mean_of_bf16_is_exact(x):
  gaps, deviation = errors(x, "bfloat16")
  assert 0 < deviation
  assert abs(np.mean(gaps)) < 4 * deviation / np.sqrt(DRAWS)
  np.testing.assert_allclose(np.std(gaps), deviation, rtol=0.1)


@pytest.mark.parametrize("x", [
  s * v for s in (1, -1)
  for v in (1.23456, 0.99999, 1.0001, 2.0**-14 * 1.0003, 2.0**-14 * 0.9999, 2.0**-20 * 1.3,
            2.0**-24 * 0.3, 2.0**-26, 60001.0, 65503.0)
])
def test_the_mean_of_f16_is_exact_below_its_normal_numbers_too(x):
  gaps, deviation = errors(x, "float16")
  assert abs(np.mean(gaps)) < 4 * deviation / np.sqrt(DRAWS)


def test_the_mean_over_steps_is_exact_at_each_place():
  x = jnp.asarray(np.random.default_rng(0).normal(size=256), jnp.float32)
  steps = jnp.arange(1, 4001, dtype=jnp.int32)
  rounded = jax.jit(jax.vmap(lambda s: rounding.round_to(x, "bfloat16", key(s))))(steps)
  low, high = bracket(x, jnp.dtype("bfloat16"))
  exact = np.asarray(x, np.float64)
  scores = (np.asarray(rounded).astype(np.float64).mean(0) - exact) * np.sqrt(len(steps))
  scores /= np.sqrt((exact - low) * (high - exact))
  # 256 standard normal numbers: a maximum above 4.5 has odds of 1 in 600.
  assert np.max(np.abs(scores)) < 4.5
  assert 0.75 < np.std(scores) < 1.25


@DTYPES
def test_what_the_dtype_holds_is_kept(dtype):
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=4096) * 10.0 ** rng.uniform(-4, 4, 4096), dtype)
  rounded = rounding.round_to(x.astype(jnp.float32), dtype, key())
  assert rounded.tolist() == x.tolist()


@DTYPES
@pytest.mark.parametrize("at", [None, "random"])
def test_infinity_and_nan_pass_and_the_largest_stays_finite(dtype, at):
  top = float(jnp.finfo(dtype).max)
  beyond = float(np.nextafter(np.float32(top), np.float32(np.inf)))
  x = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, top, -top, beyond, -3.4028235e38, 0.0, -0.0])
  for step in range(20):
    rounded = np.asarray(rounding.round_to(x, dtype, at and key(step)).astype(jnp.float32))
    np.testing.assert_array_equal(rounded, [np.inf, -np.inf, np.nan, top, -top, top, -top, 0, 0])
  payload = lax.bitcast_convert_type(jnp.asarray([0x7F800001, 0xFFFFFFFF], jnp.uint32), jnp.float32)
  assert jnp.all(jnp.isnan(rounding.round_to(payload, dtype, at and key())))


def test_nearest_is_the_cast():
  x = jnp.asarray(np.random.default_rng(2).normal(size=1000), jnp.float32)
  assert jnp.array_equal(rounding.round_to(x, "bfloat16", None), x.astype(jnp.bfloat16))


def test_fp64_is_narrowed_and_kept_in_range():
  with jax.enable_x64(True):
    x = jnp.asarray([1e300, -1e300, np.inf, 0.1], jnp.float64)
    for dtype in ("bfloat16", "float32"):
      rounded = rounding.round_to(x, dtype, key())
      top = float(jnp.finfo(dtype).max)
      assert rounded.dtype == jnp.dtype(dtype)
      assert rounded[:3].tolist() == [top, -top, np.inf]
      assert abs(float(rounded[3]) - 0.1) < 1e-3


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5, 7), (2, 3, 4, 5)])
def test_every_shape_counts_its_places_in_order(shape):
  flat = rounding.random_bits((int(np.prod(shape)),), key())
  assert jnp.array_equal(rounding.random_bits(shape, key()).reshape(-1), flat)


def correlation(x, y):
  return abs(np.corrcoef(np.asarray(x, np.float64), np.asarray(y, np.float64))[0, 1])


@pytest.mark.parametrize("other", [
  dict(step=2), dict(seed=1), dict(purpose=2), dict(leaf=1), dict(leaf=2), dict(step=1 << 16),
], ids=str)
def test_steps_seeds_wrappers_and_leaves_draw_apart(other):
  size = 1 << 17
  leaf, names = other.get("leaf", 0), {k: v for k, v in other.items() if k != "leaf"}
  first = rounding.uniform((size,), key().fold(0))
  second = rounding.uniform((size,), key(**names).fold(leaf))
  limit = 4.5 / np.sqrt(size)
  assert correlation(first, second) < limit
  # Not the same numbers in another order of the places either.
  for shift in (1, 2, 16, 256):
    assert correlation(first[shift:], second[:-shift]) < limit
    assert correlation(first[shift:], first[:-shift]) < limit
  assert len(np.intersect1d(first, second)) < size / 16


def test_keys_that_share_most_of_a_word_do_not_draw_the_same_numbers_in_another_order():
  base = key()
  near = rounding.Key(base.first ^ np.uint32(1), base.second ^ np.uint32(12345))
  first, second = (np.asarray(rounding.random_bits((4096,), k)) for k in (base, near))
  assert len(np.intersect1d(first, second)) < 10


def test_noise_is_uniform():
  draw = np.asarray(rounding.uniform((1 << 20,), key()))
  assert 0 <= draw.min()
  assert draw.max() < 1
  counts = np.histogram(draw, 64, (0, 1))[0]
  expected = draw.size / 64
  # Chi-squared with 63 degrees of freedom: mean 63, deviation 11.2.
  assert np.sum((counts - expected) ** 2) / expected < 63 + 4.5 * 11.2


def test_seeds_may_be_numbers_or_arrays():
  for seed in (7, np.int64(7), jnp.asarray(7, jnp.int32), jnp.asarray(7.0), (1 << 32) + 7):
    assert rounding.seed_word(seed) == 7
    assert rounding.seed_word(seed).dtype == jnp.uint32
