"""`with_state_dtype`: state in two bytes that averages as in four, around any transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hina_optax import memory
from tests import trees
from tests.memory import storages
from tests.memory.storages import OUTER, RMS, every_inner, every_outer, raises

wrap = memory.with_state_dtype


def test_the_second_moment_follows_a_drop():
  inner = storages.second_moment_inner()
  exact = storages.exact_second_moment()
  np.testing.assert_allclose(exact, [0.9975, 0.01244], rtol=0.01)
  np.testing.assert_allclose(storages.second_moment(wrap(inner)), exact, rtol=0.02)


def test_rounding_to_the_nearest_does_not_follow():
  # Why "stochastic" is the default: neither phase is read, the second 138 times too high.
  high, low = storages.second_moment(wrap(storages.second_moment_inner(), rounding="nearest"))
  np.testing.assert_allclose([high, low], [1.72, 1.72], rtol=0.02)


@every_inner
def test_fp32_storage_changes_no_bit(name):
  inner, params = storages.INNERS[name](), storages.for_inner(name)
  gradients = trees.sequence(params, 3)
  plain = trees.run_optax(inner, params, gradients)
  stored = trees.run_optax(wrap(inner, "float32", min_size=0), params, gradients)
  trees.assert_equal(stored[:2], plain[:2])
  trees.assert_equal(stored[2].inner_state, plain[2])


@every_inner
def test_bf16_storage_computes_the_same_beyond_rounding(name):
  inner, params = storages.INNERS[name](), storages.for_inner(name)
  updates, state = storages.check_stable(
    wrap(inner, min_size=0, include=storages.INCLUDE.get(name)), params)
  assert trees.dtypes(updates) == trees.dtypes(params)
  exact, opened = storages.check_stable(inner, params)
  assert storages.distance(updates, exact) < storages.SLACK.get(name, 0.01)
  for (path, stored), like in zip(
    jax.tree_util.tree_leaves_with_path(state.inner_state), jax.tree.leaves(opened)
  ):
    left_out = jax.tree_util.keystr(path).startswith(".z")
    # Of a number per leaf there is nothing to save.
    left_out = left_out or "numbers" in jax.tree_util.keystr(path)
    narrow = jnp.issubdtype(like.dtype, jnp.floating) and not left_out
    assert stored.dtype == (jnp.bfloat16 if narrow else like.dtype)
    assert stored.shape == like.shape


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", jnp.bfloat16, np.dtype("float16")])
def test_only_large_chosen_floating_leaves_are_narrowed(dtype):
  params = {"large": jnp.ones((32, 32)), "small": jnp.ones((31, 33)), "kept": jnp.ones((64, 64))}
  for include in (r"/(large|small)$", lambda path, leaf: leaf.shape != (64, 64)):
    state = wrap(optax.adam(1e-3), dtype, include=include).init(params)
    mu = optax.tree.get(state, "mu")
    assert {k: x.dtype.name for k, x in mu.items()} == {
      "large": jnp.dtype(dtype).name, "small": "float32", "kept": "float32"}
    assert optax.tree.get(state, "count").dtype == jnp.int32


def test_bytes():
  params = {"kernel": jnp.ones((256, 256)), "other": jnp.ones((64, 64, 2))}
  size = sum(x.size for x in jax.tree.leaves(params))
  assert storages.nbytes(wrap(optax.adam(1e-3)).init(params)) == 4 * size + 4 + 8
  state = wrap(storages.everything()).init(params)
  assert 8 * size < storages.nbytes(state) <= 12 * size + 256


def test_compiled_memory():
  storages.check_compiled_memory(wrap(RMS))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_inner_computes_in_fp32(dtype):
  seen = []

  def watch(updates, state, params):
    seen.extend(x.dtype for x in jax.tree.leaves((updates, params)))
    return updates, state

  spy = optax.GradientTransformation(lambda p: (jax.tree.map(jnp.zeros_like, p)), watch)
  params = storages.tree(dtype)
  tx = wrap(spy, min_size=10**6)
  state = tx.init(params)
  updates, _ = tx.update(params, state, params)
  assert {x.dtype for x in jax.tree.leaves(state.inner_state)} == {jnp.dtype("float32")}
  assert set(seen) == {jnp.dtype("float32")}
  assert trees.dtypes(updates) == trees.dtypes(params)


def test_adamw_on_bf16_parameters_decays_its_second_moment():
  params = jnp.ones(1024, jnp.bfloat16)

  def nu(tx):
    with jax.numpy_dtype_promotion("standard"):
      def step(state, gradient):
        return tx.update(jnp.full_like(params, gradient), state, params)[1], None
      gradients = jnp.concatenate([jnp.ones(1, jnp.bfloat16), jnp.zeros(2000, jnp.bfloat16)])
      state = jax.jit(lambda s: jax.lax.scan(step, s, gradients)[0])(tx.init(params))
    return storages.mean_nu(state)

  assert nu(optax.adamw(1e-3)) > 0.9e-3  # of 1e-3 after the first step
  np.testing.assert_allclose(nu(wrap(optax.adamw(1e-3))), 1e-3 * 0.999**2000, rtol=0.02)


def test_fp64_state_is_narrowed():
  with jax.enable_x64(True):
    params = jnp.ones(8, jnp.float64)
    tx = wrap(optax.trace(0.9), "float32", min_size=0)
    state = tx.init(params)
    updates, state = tx.update(params, state, params)
    assert (updates.dtype, state.inner_state.trace.dtype) == (jnp.float64, jnp.float32)


def test_under_scan_cond_and_donation():
  params = storages.small()
  tx = wrap(RMS, min_size=0)

  def step(carry, _):
    params, state = carry
    updates, kept = tx.update(params, state, params)
    kept = jax.lax.cond(kept.step > 2, lambda: state, lambda: kept)
    return (optax.apply_updates(params, updates), kept), None

  def loop(carry):
    return jax.lax.scan(step, carry, length=4)[0]

  start = (jax.tree.map(jnp.copy, params), tx.init(params))
  moved, state = jax.jit(loop, donate_argnums=0)(start)
  assert all(x.is_deleted() for x in jax.tree.leaves(start))
  assert int(state.step) == 2
  assert storages.distance(moved, params) > 0


def test_under_vmap():
  tx = wrap(RMS, min_size=0)
  batch = jax.tree.map(lambda x: jnp.stack([x, 3 * x]), storages.small())
  update = jax.jit(tx.update)
  updates, state = jax.jit(jax.vmap(tx.update))(batch, jax.vmap(tx.init)(batch), batch)
  for i in range(2):
    one = jax.tree.map(lambda x: x[i], batch)
    alone, alone_state = update(one, tx.init(one), one)
    trees.assert_close(jax.tree.map(lambda x: x[i], updates), alone)
    trees.assert_close(jax.tree.map(lambda x: x[i], state), alone_state)


def test_the_noise_is_repeatable_and_differs_between_seeds():
  params = storages.small()
  gradients = trees.sequence(params, 2)
  states = [
    trees.run(wrap(RMS, min_size=0, seed=seed), params, gradients)[2].inner_state
    for seed in (0, 0, 1)
  ]
  trees.assert_equal(states[0], states[1])
  assert storages.distance(states[0], states[2]) > 1e-4


@pytest.mark.parametrize("make", [
  lambda tx: wrap(tx, min_size=0), memory.with_quantized_state,
], ids=["dtype", "quantized"])
def test_leaves_of_one_shape_draw_apart(make):
  params = {k: jnp.linspace(1.0, 2.0, 4096) for k in "ab"}
  tx = make(optax.trace(0.9))
  # The first state is that of zeros; the second has to be rounded.
  state = tx.update(params, tx.init(params))[1]
  trace = memory.dequantize_state(state).inner_state.trace
  assert 0.1 < float(jnp.mean(trace["a"] != trace["b"])) < 0.9


def test_the_state_keeps_its_seed():
  # A run that goes on from a saved state draws as it would have, whatever the new object was given.
  params = storages.small()
  gradients = trees.sequence(params, 2)
  _, _, state = trees.run(wrap(RMS, min_size=0, seed=1), params, gradients)
  following = [
    wrap(RMS, min_size=0, seed=seed).update(gradients[0], state, params)[1]
    for seed in (0, 1)
  ]
  trees.assert_equal(*following)


def test_unbiased_from_step_to_step():
  # An average of a constant stays at the constant: the noise of one step is not that of the next.
  tx = wrap(optax.ema(0.99, debias=False), min_size=0)
  params = jnp.full(4096, 1.0 + 1 / 300)

  def loop(state):
    return jax.lax.scan(lambda s, _: (tx.update(params, s)[1], None), state, length=2000)[0]

  ema = jax.jit(loop)(tx.init(params)).inner_state.ema.astype(jnp.float32)
  assert abs(float(jnp.mean(ema)) - float(params[0])) < 4 * float(jnp.std(ema)) / 64


@every_outer
def test_inside_and_around_optax_wrappers(outer):
  params, place = storages.small(), OUTER[outer]
  gradients = trees.sequence(params, 4)
  plain = trees.run_optax(place(RMS), params, gradients)
  for make in (lambda tx: place(wrap(tx, "float32", min_size=0)),
               lambda tx: wrap(place(tx), "float32", min_size=0)):
    trees.assert_equal(trees.run_optax(make(RMS), params, gradients)[:2], plain[:2])
  storages.check_stable(wrap(place(RMS), min_size=0), params)


def test_inject_hyperparams_outside_and_inside():
  params = storages.small()
  gradients = trees.sequence(params, 3)
  plain = trees.run(wrap(RMS, min_size=0, seed=3), params, gradients)
  outside = optax.inject_hyperparams(wrap, static_args=("min_size",))(
    RMS, min_size=0, seed=3)
  result = trees.run(outside, params, gradients)
  trees.assert_close(result[:2], plain[:2])
  inside = optax.inject_hyperparams(optax.rmsprop)(1e-2)
  storages.check_stable(wrap(inside, min_size=0), params)
  state = wrap(inside).init(params)
  assert optax.tree.get(state, "learning_rate") == jnp.float32(1e-2)


def test_the_state_can_be_searched_and_mapped():
  params = storages.small()
  tx = wrap(optax.adam(1e-2), min_size=0)
  state = tx.init(params)
  assert int(optax.tree.get(state, "step")) == 0
  mapped = optax.tree.map_params(tx, lambda x: x + jnp.ones_like(x), state)
  assert float(mapped.inner_state[0].mu["w"][0, 0]) == 1
  assert (int(mapped.step), int(mapped.inner_state[0].count)) == (0, 0)


def test_extra_arguments_reach_the_inner():
  def update(updates, state, params=None, *, value, **extra_args):
    return jax.tree.map(lambda x: x * value, updates), state

  inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
  params = storages.small()
  updates, _ = wrap(inner).update(params, wrap(inner).init(params), value=2.0, unknown=1)
  trees.assert_equal(updates, jax.tree.map(lambda x: 2 * x, params))
  tx = wrap(optax.sgd(1.0))
  trees.assert_equal(tx.update(params, tx.init(params), unknown=1)[0],
                     jax.tree.map(lambda x: -x, params))


def test_state_that_is_no_array_passes():
  inner = optax.GradientTransformation(lambda p: {"n": 0, "key": jax.random.key(1)},
                                       lambda u, s, p=None: (u, {**s, "n": s["n"] + 1}))
  tx, params = wrap(inner, min_size=0), storages.small()
  state = tx.init(params)
  for _ in range(2):
    _, state = tx.update(params, state)
  assert state.inner_state["n"] == 2


@pytest.mark.parametrize(("arguments", "kind", "parts"), [
  (dict(dtype="int8"), ValueError, ("dtype", "'bfloat16'", "'int8'", "with_quantized_state")),
  (dict(dtype="bf16"), ValueError, ("dtype", "'bfloat16'", "'bf16'")),
  (dict(dtype="float64"), ValueError, ("dtype", "'float64'")),
  (dict(dtype=7), ValueError, ("dtype", "7")),
  (dict(rounding="up"), ValueError, ("rounding", "'stochastic'", "'nearest'", "'up'")),
  (dict(min_size=-1), ValueError, ("min_size", "-1")),
  (dict(min_size=1.5), ValueError, ("min_size", "whole", "1.5")),
  (dict(min_size="a"), TypeError, ("min_size", "'a'")),
  (dict(include="("), ValueError, ("include", "regular expression", "'('")),
  (dict(include=3), TypeError, ("include", "regular expression", "3")),
  (dict(seed=-1), ValueError, ("seed", "-1")),
  (dict(seed=0.5), ValueError, ("seed", "whole", "0.5")),
])
def test_bad_arguments(arguments, kind, parts):
  with raises(kind, *parts):
    wrap(optax.adam(1e-3), **arguments)


@pytest.mark.parametrize("inner", [None, optax.adam, "adam", 1e-3])
def test_what_is_no_transformation_is_refused(inner):
  for factory in (wrap, memory.with_quantized_state, memory.with_host_offload,
                  memory.with_rounded_updates):
    with raises(TypeError, "inner", "optax.adamw(1e-3)", repr(inner)):
      factory(inner)


def test_a_traced_size_is_refused():
  tx = optax.inject_hyperparams(wrap)(optax.adam(1e-3), min_size=16)
  with raises(ValueError, "min_size", "static_args=('min_size',)"):
    tx.init(storages.small())


PARAMS = {"w": jnp.ones((64, 64))}


@pytest.mark.parametrize(("made", "used", "parts"), [
  (wrap(optax.adam(1e-3)), wrap(optax.adam(1e-3), "float16"), ("bfloat16[64, 64]", "float16")),
  (wrap(optax.adam(1e-3)), wrap(optax.adam(1e-3), "float32"), ("bfloat16[64, 64]", "float32")),
  (wrap(optax.adam(1e-3)), wrap(optax.adam(1e-3), min_size=5000), ("bfloat16[64, 64]", "float32")),
  (wrap(optax.adam(1e-3), min_size=5000), wrap(optax.adam(1e-3)), ("float32[64, 64]", "bfloat16")),
])
def test_a_state_made_with_other_options_is_refused(made, used, parts):
  with raises(ValueError, "state leaf '0/mu/w'", *parts, "other options"):
    used.update(PARAMS, made.init(PARAMS), PARAMS)


def test_a_state_of_another_wrapper_is_refused():
  made, used = memory.with_quantized_state(optax.adam(1e-3)), wrap(optax.adam(1e-3))
  state = made.init(PARAMS)
  with raises(ValueError, "WithQuantizedStateState", "WithStateDtypeState", "another optimizer"):
    used.update(PARAMS, state, PARAMS)
  relabelled = memory.WithStateDtypeState(*state)
  with raises(ValueError, "state leaf '0/mu/w'", "QuantizedLeaf(uint8[64, 64], bfloat16[16, 1])",
              "bfloat16", "other options"):
    used.update(PARAMS, relabelled, PARAMS)


def test_a_state_of_another_transformation_or_of_other_parameters_is_refused():
  tx = wrap(optax.adam(1e-3))
  with raises(ValueError, "structure", "another transformation"):
    tx.update(PARAMS, wrap(optax.sgd(1e-3)).init(PARAMS), PARAMS)
  other = {"w": jnp.ones((32, 64))}
  with raises(ValueError, "'0/mu/w'", "[64, 64]", "[32, 64]", "other parameters"):
    tx.update(other, tx.init(PARAMS), other)


def test_host_memory_inside_is_refused():
  tx = wrap(memory.with_host_offload(optax.adam(1e-3), min_bytes=0))
  with raises(ValueError, "'0/mu/w'", "host memory", "outside"):
    tx.init(PARAMS)
