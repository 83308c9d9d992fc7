"""`with_rounded_updates`: plain `optax.apply_updates` lands on the rounded parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hina_optax import memory
from tests import trees
from tests.memory import storages
from tests.memory.storages import OUTER, RMS, every_inner, raises

wrap = memory.with_rounded_updates
NARROW = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def move(tx, params, gradients, state=None):
  """One step through `optax.apply_updates`, under jit."""
  state = tx.init(params) if state is None else state
  with jax.numpy_dtype_promotion("standard"):
    updates, state = jax.jit(tx.update)(gradients, state, params)
    return jax.jit(optax.apply_updates)(params, updates), updates, state


def plus(step):
  """An inner whose update is `step`, whatever the gradient."""
  return optax.GradientTransformation(
    lambda p: optax.EmptyState(), lambda u, s, p=None: (step, s))


def sums(dtype, size=200_000):
  """Parameters and updates of every relation of size and sign, cancellation among them."""
  rng = np.random.default_rng(0)
  span = 30 if dtype == "bfloat16" else 3
  start = rng.normal(size=size) * 10.0 ** rng.uniform(-span, span, size)
  ratio = rng.choice([-1, 1], size) * 10.0 ** rng.uniform(-12, 3, size)
  start = jnp.asarray(np.clip(start, -6e4, 6e4) if span == 3 else start, dtype)
  step = np.asarray(start, np.float64) * ratio
  near = rng.random(size) < 0.3
  step[near] = -np.asarray(start, np.float64)[near] * (1 + rng.normal(size=size)[near] * 0.01)
  return start, jnp.asarray(step, jnp.float32)


@NARROW
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_apply_updates_lands_on_a_neighbour_of_the_sum(dtype, rounding):
  start, step = sums(dtype)
  landed, updates, _ = move(wrap(plus(step), rounding), start, start)
  assert (landed.dtype, updates.dtype) == (start.dtype, jnp.float32)
  wanted = start.astype(jnp.float32) + step
  reach = np.asarray(wanted, np.float64)
  got = np.asarray(landed).astype(np.float64)
  top = float(jnp.finfo(dtype).max)
  below, above = (
    np.asarray(x).astype(np.float64) for x in (
      jnp.nextafter(landed, jnp.full_like(landed, -jnp.inf)),
      jnp.nextafter(landed, jnp.full_like(landed, jnp.inf)))
  )
  inside = np.abs(reach) < top
  tiny = np.abs(reach) < float(jnp.finfo(dtype).tiny)
  if rounding == "nearest":
    kept = np.asarray(wanted.astype(dtype)).astype(np.float64)
    assert np.all((got == kept)[inside & ~tiny])
  else:
    assert np.all(((below < reach) & (reach < above))[inside & ~tiny])
  assert np.all(np.abs(got[~inside & np.isfinite(reach)]) == top)


@NARROW
def test_what_is_returned_is_exactly_the_rounded_sum(dtype):
  # The parameter after apply_updates, not only near it: the rounding of p + u' adds nothing.
  start, step = sums(dtype)
  landed, _, _ = move(wrap(plus(step), "nearest"), start, start)
  wanted = start.astype(jnp.float32) + step
  clamped = jnp.clip(wanted, -jnp.finfo(dtype).max.astype(jnp.float32),
                     jnp.finfo(dtype).max.astype(jnp.float32)).astype(dtype)
  assert jnp.array_equal(landed, clamped)


@NARROW
def test_the_mean_over_draws_is_exact(dtype):
  size = 1_000_000
  params, step = jnp.full(size, 1.0, dtype), jnp.full(size, -3e-4, jnp.float32)
  landed, _, _ = move(wrap(plus(step)), params, params)
  values = np.asarray(landed, np.float64)
  assert len(np.unique(values)) == 2
  assert abs(values.mean() - float(jnp.float32(1) + step[0])) < 4 * values.std() / np.sqrt(size)


@pytest.mark.parametrize("start", [1.0, -1.0, 0.0])
def test_small_steps_add_up(start):
  params = jnp.full(4096, start, jnp.bfloat16)
  inner = plus(jnp.full(4096, 1e-4, jnp.float32))
  tx = wrap(inner)

  def loop(carry):
    def step(carry, _):
      params, state = carry
      updates, state = tx.update(params, state, params)
      return (optax.apply_updates(params, updates), state), None
    return jax.lax.scan(step, carry, length=1000)[0]

  with jax.numpy_dtype_promotion("standard"):
    moved, _ = jax.jit(loop)((params, tx.init(params)))
    still = params
    for _ in range(3):
      still = optax.apply_updates(still, jnp.full(4096, 1e-4, jnp.bfloat16))
  mean, error = float(jnp.mean(moved.astype(jnp.float32))), float(
    jnp.std(moved.astype(jnp.float32))) / 64
  assert abs(mean - start - 0.1) < 4 * error + 1e-6
  assert start == 0 or jnp.array_equal(still, params)


@every_inner
def test_around_any_inner(name):
  inner, params = storages.INNERS[name](), storages.for_inner(name, jnp.bfloat16)
  stored = memory.with_state_dtype(inner, "float32")
  expected, _ = storages.check_stable(stored, params, 1)
  updates, state = storages.check_stable(wrap(stored), params, 1)
  assert {x.dtype for x in jax.tree.leaves(updates)} <= {jnp.dtype("float32")}
  with jax.numpy_dtype_promotion("standard"):
    moved = optax.apply_updates(params, updates)
  assert trees.dtypes(moved) == trees.dtypes(params)
  for before, after, update in zip(*map(jax.tree.leaves, (params, moved, expected))):
    wide = before.astype(jnp.float32) + update.astype(jnp.float32)
    # One step of the grid at most, and at the border of a binade the wider one.
    assert jnp.all(jnp.abs(after.astype(jnp.float32) - wide) <= 2.0**-7 * jnp.abs(wide) + 1e-30)
  assert int(state.step) == 1


@pytest.mark.parametrize("name", ["adamw", "hina"])
def test_fp32_parameters_change_no_bit(name):
  storages.check_changes_no_bit(wrap, name)


def test_other_leaves_pass_untouched():
  params = {"wide": jnp.ones(3), "narrow": jnp.ones(3, jnp.bfloat16), "none": None,
            "masked": optax.MaskedNode(), "whole": jnp.ones(3, jnp.int32)}
  step = {**params, "narrow": jnp.full(3, 0.5, jnp.bfloat16)}
  moved, updates, _ = move(wrap(plus(step)), params, params)
  assert updates["wide"] is not None
  assert (updates["wide"].dtype, updates["whole"].dtype) == (jnp.float32, jnp.int32)
  assert updates["narrow"].dtype == jnp.float32
  assert moved["narrow"].tolist() == [1.5] * 3
  assert (moved["none"], moved["masked"]) == (None, optax.MaskedNode())


def test_an_absent_update_leaves_its_parameter_alone():
  params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2, jnp.float8_e4m3fn)}
  tx = wrap(plus({"a": params["a"], "b": None}))
  updates, _ = tx.update(params, tx.init(params), params)
  assert updates["b"] is None


@NARROW
def test_what_is_not_finite_passes(dtype):
  start = jnp.asarray([1.0, 1.0, 1.0, jnp.inf, jnp.nan, -jnp.inf], dtype)
  step = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, 1.0, 1.0, jnp.inf], jnp.float32)
  landed, _, _ = move(wrap(plus(step)), start, start)
  np.testing.assert_array_equal(
    np.asarray(landed, np.float64), [np.inf, -np.inf, np.nan, np.inf, np.nan, np.nan])


@NARROW
def test_a_finite_sum_beyond_the_range_is_the_largest_number(dtype):
  top = jnp.finfo(dtype).max
  start = jnp.asarray([top, -top], dtype)
  step = start.astype(jnp.float32) * jnp.float32(1 / 512)
  landed, _, _ = move(wrap(plus(step)), start, start)
  assert landed.tolist() == start.tolist()


@pytest.mark.parametrize("outer", [*OUTER, "rounded_state", "rounded_8_bit"])
def test_around_wrappers(outer):
  place = {**OUTER, "rounded_state": lambda tx: memory.with_state_dtype(tx, min_size=0),
           "rounded_8_bit": lambda tx: memory.with_quantized_state(tx, min_size=16)}[outer]
  params = storages.small(jnp.bfloat16)
  updates, _ = storages.check_stable(wrap(place(RMS)), params)
  assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("float32")}


def test_multi_steps_inside_does_not_move_between():
  params = storages.small(jnp.bfloat16)
  tx = wrap(optax.MultiSteps(RMS, 2))
  still, _, state = move(tx, params, params)
  trees.assert_equal(still, params)
  moved, _, _ = move(tx, params, params, state)
  assert storages.distance(moved, params) > 0


@pytest.mark.parametrize("outer", ["chain", "masked", "partition"])
def test_inside_wrappers_that_do_not_touch_the_updates(outer):
  params = storages.small(jnp.bfloat16)
  place = OUTER[outer] if outer != "chain" else lambda tx: optax.chain(
    optax.clip_by_global_norm(1.0), tx)
  updates, _ = storages.check_stable(place(wrap(RMS)), params)
  assert updates["w"].dtype == jnp.float32


def test_noise_differs_between_steps_and_seeds_and_is_repeatable():
  params = jnp.ones(4096, jnp.bfloat16)
  inner = plus(jnp.full(4096, 1e-3, jnp.float32))
  first, _, state = move(wrap(inner), params, params)
  again, _, _ = move(wrap(inner), params, params)
  later, _, _ = move(wrap(inner), params, params, state)
  other, _, _ = move(wrap(inner, seed=1), params, params)
  assert jnp.array_equal(first, again)
  for draw in (later, other):
    assert 0.1 < float(jnp.mean(first != draw)) < 0.5


def test_leaves_of_one_shape_draw_apart():
  params = {k: jnp.ones(4096, jnp.bfloat16) for k in "ab"}
  step = {k: jnp.full(4096, 4e-3, jnp.float32) for k in "ab"}
  moved, _, _ = move(wrap(plus(step)), params, params)
  assert 0.3 < float(jnp.mean(moved["a"] != moved["b"])) < 0.7


def test_under_vmap_scan_and_donation():
  tx = wrap(RMS)
  params = storages.small(jnp.bfloat16)
  batch = jax.tree.map(lambda x: jnp.stack([x, x]), params)
  updates, _ = jax.jit(jax.vmap(tx.update))(batch, jax.vmap(tx.init)(batch), batch)
  trees.assert_close(jax.tree.map(lambda x: x[1], updates),
                     jax.jit(tx.update)(params, tx.init(params), params)[0])

  def loop(state):
    return jax.lax.scan(lambda s, _: (tx.update(params, s, params)[1], None), state, length=3)[0]

  start = tx.init(params)
  assert int(jax.jit(loop, donate_argnums=0)(start).step) == 3
  assert all(x.is_deleted() for x in jax.tree.leaves(start))


def test_inject_hyperparams_and_map_params():
  params = storages.small(jnp.bfloat16)
  gradients = trees.sequence(params, 2)
  plain = trees.run_optax(wrap(RMS, seed=3), params, gradients)
  injected = trees.run_optax(optax.inject_hyperparams(wrap)(RMS, seed=3), params, gradients)
  trees.assert_equal(injected[:2], plain[:2])
  state = wrap(RMS).init(params)
  mapped = optax.tree.map_params(wrap(RMS), lambda x: x + jnp.ones_like(x), state)
  assert float(optax.tree.get(mapped, "nu")["b"][0]) == 1
  assert int(mapped.step) == 0


def test_bytes_and_extra_arguments():
  def update(updates, state, params=None, *, value, **extra_args):
    return jax.tree.map(lambda x: x * value, updates), state

  inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
  params = jnp.ones(8, jnp.bfloat16)
  state = wrap(inner).init(params)
  assert storages.nbytes(state) == 8
  updates, _ = wrap(inner).update(params, state, params, value=2.0, unknown=1)
  assert updates.tolist() == [2.0] * 8


def test_missing_parameters_are_named():
  params = storages.small(jnp.bfloat16)
  with raises(ValueError, "with_rounded_updates", "update(updates, state, params)"):
    wrap(RMS).update(params, wrap(RMS).init(params))


@pytest.mark.parametrize(("arguments", "kind", "parts"), [
  (dict(rounding="down"), ValueError, ("rounding", "'stochastic'", "'nearest'", "'down'")),
  (dict(rounding=None), ValueError, ("rounding", "None")),
  (dict(seed=-1), ValueError, ("seed", "-1")),
  (dict(seed="a"), TypeError, ("seed", "'a'")),
])
def test_bad_arguments(arguments, kind, parts):
  with raises(kind, *parts):
    wrap(optax.sgd(0.1), **arguments)


def test_a_parameter_of_8_bits_is_refused_by_name():
  params = {"dense": {"kernel": jnp.ones(4, jnp.float8_e4m3fn)}}
  step = jax.tree.map(lambda x: jnp.ones(4), params)
  tx = wrap(plus(step))
  with raises(TypeError, "'dense/kernel'", "float8_e4m3fn", "bfloat16 and float16", "optax.masked"):
    tx.update(params, tx.init(params), params)
