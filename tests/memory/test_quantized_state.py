"""`with_quantized_state`: state in one byte a number, with second moments that never read 0."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hina_optax import memory
from tests import trees
from tests.memory import storages
from tests.memory.storages import OUTER, RMS, every_inner, every_outer, raises

wrap = memory.with_quantized_state


def store(values, **options):
  """The stored form of `values`, as the first state of an inner that keeps its parameters."""
  keep = optax.GradientTransformation(lambda p: p, lambda u, s, p=None: (u, s))
  return wrap(keep, **{"min_size": 1, **options}).init(jnp.asarray(values, jnp.float32))


def read(values, **options):
  return np.asarray(memory.dequantize_state(store(values, **options)).inner_state, np.float64)


def test_the_second_moment_follows_a_drop():
  inner = storages.second_moment_inner()
  exact = storages.exact_second_moment()
  stored = storages.second_moment(wrap(inner, min_size=1024))
  np.testing.assert_allclose(stored, exact, rtol=0.05)


@pytest.mark.parametrize("signed", [False, True])
def test_the_mean_over_draws_is_exact(signed):
  rng = np.random.default_rng(0)
  values = 10.0 ** rng.uniform(-12, 0, 64) * (rng.choice([-1, 1], 64) if signed else 1)
  values = np.asarray(values, np.float32)
  draws = np.stack([read(np.tile(values, (64, 1)), block=64, seed=s) for s in range(40)])
  draws = draws.reshape(-1, 64)
  gaps = draws.mean(0) - values
  deviation = draws.std(0)
  assert np.all(np.abs(gaps) <= 4.5 * deviation / np.sqrt(len(draws)) + 1e-6 * np.abs(values))
  # The grid is as fine as the docstring says, at the top and at a millionth of it.
  relative = deviation / np.abs(values)
  at_top = np.abs(values) > 0.3
  assert np.max(relative[at_top]) < (0.06 if signed else 0.03)
  assert np.max(relative[np.abs(values) > 1e-6]) < (0.36 if signed else 0.18)


@pytest.mark.parametrize("top", [1e-30, 1e-8, 1.0, 1e30])
def test_a_positive_second_moment_never_reads_0(top):
  share = np.geomspace(1e-24, 1, 256)
  for seed in range(10):
    kept = read(np.asarray(top * share, np.float32), block=256, seed=seed)
    positive = top * share / 1e19 > 1e-38
    assert np.all(kept[positive] > 0)
    assert np.all(kept >= 0)
    assert kept[-1] > 0.95 * top


def test_a_second_moment_beside_an_infinite_one_does_not_read_0():
  values = np.geomspace(1e-18, 1, 256)
  values[7] = np.inf
  for seed in range(20):
    kept = read(values, block=256, seed=seed)
    assert kept[7] == np.inf
    assert np.all(kept > 0)


def test_no_step_explodes_where_gradients_of_one_block_differ_by_a_million():
  # One block: gradients from 1e-6 to 1. On a linear grid the small second moments would read 0 and
  # the step would be momentum / eps.
  rng = np.random.default_rng(1)
  scale = np.geomspace(1e-6, 1.0, 256).astype(np.float32)
  params = jnp.zeros(256)
  inner = optax.scale_by_adam(b2=0.999, eps=1e-12)
  tx = wrap(inner, min_size=1)
  with jax.numpy_dtype_promotion("standard"):
    state, exact = tx.init(params), inner.init(params)
    update, reference = jax.jit(tx.update), jax.jit(inner.update)
    for _ in range(50):
      gradient = jnp.asarray(scale * rng.normal(size=256), jnp.float32)
      step, state = update(gradient, state)
      wanted, exact = reference(gradient, exact)
      assert float(jnp.max(jnp.abs(step))) < 5 * float(jnp.max(jnp.abs(wanted)))
  nu = memory.dequantize_state(state).inner_state.nu
  assert float(jnp.min(nu)) > 0


@pytest.mark.parametrize(("shape", "block", "scales"), [
  ((), None, ()),
  ((1,), None, (1,)),
  ((320,), None, (1,)),
  ((64, 64), None, (16, 1)),
  ((4096,), None, (16,)),
  ((3, 320), None, (3, 1)),
  ((2, 4099), None, (2, 17)),
  ((3, 3, 8, 32), None, (3, 3, 1, 1)),
  ((3, 3, 8, 33), None, (3, 3, 1, 1)),
  ((8, 2, 150), None, (8, 1, 1)),
  ((1, 1, 257), 16, (1, 1, 17)),
  ((7, 5, 3), 16, (7, 1, 1)),
  ((2, 131), 16, (2, 9)),
])
def test_every_shape_is_cut_and_read_back(shape, block, scales):
  # A number of its own for each place: a place read in another's stead shows.
  size = int(np.prod(shape))
  values = np.geomspace(1, 1000, size).reshape(shape)[..., ::-1] if shape else np.asarray(3.0)
  kept = store(values, block=block)
  assert kept.inner_state.codes.shape == shape
  assert kept.inner_state.scales.shape == scales
  np.testing.assert_allclose(
    memory.dequantize_state(kept).inner_state, values, rtol=0.08)
  alternating = values * np.where(np.arange(size).reshape(shape) % 2, -1, 1)
  np.testing.assert_allclose(read(alternating, block=block), alternating, rtol=0.2)


def test_a_block_keeps_its_largest_number_to_itself():
  values = np.ones((4, 256))
  values[1] = 1e6
  kept = read(values)
  np.testing.assert_allclose(kept[[0, 2, 3]], 1, rtol=1e-6)
  np.testing.assert_allclose(kept[1], 1e6, rtol=0.04)


def test_infinity_nan_zero_and_the_largest_pass():
  top = float(jnp.finfo(jnp.bfloat16).max)
  values = np.asarray([np.inf, -np.inf, np.nan, 0.0, 1.0, -1.0, 2.0, 1e-3] * 32)
  np.testing.assert_array_equal(read(values, block=256)[:4], [np.inf, -np.inf, np.nan, 0])
  assert abs(read(values, block=256)[6] - 2) < 0.02
  np.testing.assert_array_equal(read(np.full(256, 3.4028e38)), np.full(256, top))
  np.testing.assert_array_equal(read(np.full(256, -3.4028e38)), np.full(256, -top))
  np.testing.assert_array_equal(read(np.zeros(256)), np.zeros(256))
  np.testing.assert_array_equal(read(np.full(256, 1e-39)), np.zeros(256))
  np.testing.assert_array_equal(read(np.asarray([np.inf] * 256)), [np.inf] * 256)


def test_fp64_state_stays_in_range():
  with jax.enable_x64(True):
    params = jnp.asarray([1e300, 1.0] * 128, jnp.float64)
    keep = optax.GradientTransformation(lambda p: p, lambda u, s, p=None: (s, s))
    tx = wrap(keep, min_size=1)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates.dtype == jnp.float64
    np.testing.assert_allclose(updates[::2], float(jnp.finfo(jnp.bfloat16).max))


@every_inner
def test_it_computes_the_same_beyond_rounding(name):
  inner, params = storages.INNERS[name](), storages.for_inner(name)
  updates, state = storages.check_stable(
    wrap(inner, min_size=64, include=storages.INCLUDE.get(name)), params)
  assert trees.dtypes(updates) == trees.dtypes(params)
  exact, _ = storages.check_stable(inner, params)
  assert storages.distance(updates, exact) < max(storages.SLACK.get(name, 0), 0.1)
  assert any(x.dtype == jnp.uint8 for x in jax.tree.leaves(state))


@pytest.mark.parametrize("name", ["adamw", "hina"])
def test_what_is_too_small_changes_no_bit(name):
  storages.check_changes_no_bit(wrap, name)


def test_only_large_chosen_floating_leaves_are_quantized():
  params = {"large": jnp.ones((64, 64)), "small": jnp.ones(4095), "kept": jnp.ones((65, 64))}
  for include in (r"/(large|small)$", lambda path, leaf: leaf.shape != (65, 64)):
    state = wrap(optax.adam(1e-3), include=include).init(params)
    mu = optax.tree.get(state, "mu")
    assert isinstance(mu["large"], memory.QuantizedLeaf)
    assert {mu[k].dtype for k in ("small", "kept")} == {jnp.dtype("float32")}
    assert optax.tree.get(state, "count").dtype == jnp.int32


def test_bytes():
  params = {"kernel": jnp.ones((256, 256)), "other": jnp.ones((64, 64, 2))}
  size = sum(x.size for x in jax.tree.leaves(params))
  state = wrap(optax.adam(1e-3)).init(params)
  assert storages.nbytes(state) == 2 * (size + 2 * size // 256) + 4 + 8
  assert storages.nbytes(state) / size < 2.03
  state = wrap(storages.everything()).init(params)
  # Five numbers in 8 bits, and the sign agreement's counter, 16 bits already.
  assert storages.nbytes(state) <= (5 * (1 + 2 / 256) + 2) * size + 256


def test_compiled_memory():
  storages.check_compiled_memory(wrap(RMS))


def test_bf16_parameters_are_computed_in_fp32():
  params = storages.small(jnp.bfloat16)
  tx = wrap(RMS, min_size=16)
  updates, _ = storages.check_stable(tx, params)
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  gradients = [jax.tree.map(lambda x: x.astype(jnp.float32), g)
               for g in trees.sequence(params, 2)]
  expected = trees.run(tx, wide, gradients, apply=False)[1][-1]
  trees.assert_equal(updates, jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected))


def test_around_bf16_state_the_second_moment_is_read_without_bias():
  # Both wrappers on the same leaf: few codes, each always off by the same part in bf16, would
  # outweigh a decay of 1/1000.
  inner = storages.second_moment_inner()
  tx = wrap(memory.with_state_dtype(inner, min_size=0), min_size=1024)
  exact = storages.exact_second_moment()
  np.testing.assert_allclose(storages.second_moment(tx), exact, rtol=0.05)


def test_8_bits_within_8_bits_stay_as_they_are():
  params = {"w": jnp.ones((64, 64))}
  once = wrap(RMS)
  twice = wrap(once, min_size=1)
  state = twice.init(params)
  assert jax.tree.structure(state.inner_state) == jax.tree.structure(once.init(params))
  assert trees.dtypes(state.inner_state) == trees.dtypes(once.init(params))
  gradients = trees.sequence(params, 2)
  trees.assert_equal(
    trees.run(twice, params, gradients)[1], trees.run(once, params, gradients)[1])


def test_with_bf16_for_the_small_leaves():
  params = {"w": jnp.ones((64, 64)), "b": jnp.ones(2048), "s": jnp.ones(3)}
  for tx in (memory.with_state_dtype(wrap(RMS)),
             wrap(memory.with_state_dtype(RMS, include="/b$"))):
    _, state = storages.check_stable(tx, params)
    nu = optax.tree.get(state, "nu")
    assert isinstance(nu["w"], memory.QuantizedLeaf)
    assert (nu["b"].dtype, nu["s"].dtype) == (jnp.bfloat16, jnp.float32)
    with raises(ValueError, "'", "/w'", "QuantizedLeaf", "float32[64, 64]"):
      memory.with_state_dtype(RMS, min_size=10**6).update(
        params, memory.WithStateDtypeState(wrap(RMS).init(params).inner_state, *state[1:]), params)


def test_under_scan_and_donation():
  params = {"w": jnp.ones((64, 64))}
  tx = wrap(RMS)

  def loop(state):
    return jax.lax.scan(lambda s, _: (tx.update(params, s)[1], None), state, length=3)[0]

  start = tx.init(params)
  state = jax.jit(loop, donate_argnums=0)(start)
  assert all(x.is_deleted() for x in jax.tree.leaves(start))
  assert int(state.step) == 3


def test_under_vmap():
  tx = wrap(RMS, min_size=16)
  batch = jax.tree.map(lambda x: jnp.stack([x, 3 * x]), storages.small())
  update = jax.jit(tx.update)
  _, state = jax.jit(jax.vmap(tx.update))(batch, jax.vmap(tx.init)(batch))
  for i in range(2):
    one = jax.tree.map(lambda x: x[i], batch)
    trees.assert_close(jax.tree.map(lambda x: x[i], state), update(one, tx.init(one))[1])


SHARDED = """
  import jax, jax.numpy as jnp, numpy as np, optax
  from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
  from hina_optax import memory

  tx = memory.with_quantized_state(optax.rmsprop(1e-2, momentum=0.9), min_size=1)
  mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.{kind},) * 2)
  cases = [
    ((64, 128), ("x", None)), ((64, 128), (None, "y")), ((64, 128), ("x", "y")),
    ((64, 128), (("x", "y"), None)), ((64, 512), ("x", "y")), ((8, 1025), ("x", None)),
    ((4, 8, 64), (None, "x", "y")), ((4100,), ("x",)), ((4, 2, 150), ("x", "y", None)),
  ]
  for shape, axes in cases:
    plain = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    sharded = jax.device_put(plain, NamedSharding(mesh, P(*axes)))
    update = jax.jit(lambda p: tx.update(p, tx.init(p), p)[1])
    alone, apart = update(plain), update(sharded)
    for x, y in zip(jax.tree.leaves(alone), jax.tree.leaves(apart)):
      assert np.array_equal(np.asarray(x), np.asarray(y)), (shape, axes)
    codes = optax.tree.get(apart, "nu").codes
    if "{kind}" == "Explicit" or axes[1:] == (None,) * (len(shape) - 1):
      assert codes.sharding.spec == P(*axes), (shape, axes, codes.sharding)
    if axes[1:] == (None,) * (len(shape) - 1):
      scales = optax.tree.get(apart, "nu").scales
      assert scales.sharding.spec[0] == axes[0], (shape, axes, scales.sharding)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_a_sharded_leaf_has_the_codes_of_an_unsharded_one(kind):
  flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", textwrap.dedent(SHARDED).format(kind=kind)],
    text=True, capture_output=True, env={**os.environ, "XLA_FLAGS": flags})
  assert done.returncode == 0, done.stderr


@every_outer
def test_inside_and_around_optax_wrappers(outer):
  params, place = storages.small(), OUTER[outer]
  expected, _ = storages.check_stable(place(RMS), params)
  for tx in (place(wrap(RMS, min_size=16)), wrap(place(RMS), min_size=16)):
    updates, _ = storages.check_stable(tx, params)
    assert storages.distance(updates, expected) < 0.1


def test_inject_hyperparams():
  params = storages.small()
  gradients = trees.sequence(params, 2)
  plain = trees.run(wrap(RMS, min_size=1, seed=3), params, gradients)
  injected = optax.inject_hyperparams(wrap, static_args=("min_size",))(RMS, min_size=1, seed=3)
  trees.assert_close(trees.run(injected, params, gradients)[:2], plain[:2])


def test_the_state_can_be_searched_and_mapped():
  params = {"w": jnp.ones((64, 64))}
  tx = wrap(RMS)
  state = tx.init(params)
  seen = []
  optax.tree.map_params(
    tx, lambda leaf, p: seen.append((leaf.codes.shape, p.shape)), state, params,
    is_leaf=lambda x: isinstance(x, memory.QuantizedLeaf))
  assert seen == [((64, 64), (64, 64))] * 2
  kept = optax.tree.map_params(tx, lambda x: x, state)
  trees.assert_equal(kept, state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dequantize_state_gives_arrays_of_a_dtype(dtype):
  state = {"a": store(np.ones((4, 256))), "b": jnp.zeros(3)}
  opened = memory.dequantize_state(state, jnp.dtype(dtype))
  assert opened["a"].inner_state.dtype == jnp.dtype(dtype)
  assert opened["b"] is state["b"]


@pytest.mark.parametrize(("arguments", "kind", "parts"), [
  (dict(bits=4), ValueError, ("bits", "8", "4")),
  (dict(bits="8"), ValueError, ("bits", "'8'")),
  (dict(block=8), ValueError, ("block", "16", "8")),
  (dict(block=100.5), ValueError, ("block", "whole", "100.5")),
  (dict(min_size=0), ValueError, ("min_size", "[1", "0")),
  (dict(include="["), ValueError, ("include", "regular expression", "'['")),
  (dict(include=[1]), TypeError, ("include", "[1]")),
  (dict(seed=-3), ValueError, ("seed", "-3")),
])
def test_bad_arguments(arguments, kind, parts):
  with raises(kind, *parts):
    wrap(optax.adam(1e-3), **arguments)


@pytest.mark.parametrize("name", ["block", "bits", "min_size"])
def test_a_traced_size_is_refused(name):
  tx = optax.inject_hyperparams(wrap)(RMS, **{name: 8 if name == "bits" else 64})
  with raises(ValueError, name, f"static_args=('{name}',)"):
    tx.init(storages.small())


PARAMS = {"w": jnp.ones((64, 64))}


@pytest.mark.parametrize(("made", "used", "parts"), [
  (wrap(RMS), wrap(RMS, min_size=5000), ("QuantizedLeaf", "float32[64, 64]")),
  (wrap(RMS, min_size=5000), wrap(RMS), ("float32[64, 64]", "8 bits in blocks of 256")),
  (wrap(RMS, block=64), wrap(RMS), ("bfloat16[64, 1]", "blocks of 256")),
])
def test_a_state_made_with_other_options_is_refused(made, used, parts):
  with raises(ValueError, "state leaf '", "/w'", *parts, "other options"):
    used.update(PARAMS, made.init(PARAMS), PARAMS)


def test_a_state_of_another_wrapper_is_refused():
  state = memory.with_state_dtype(RMS).init(PARAMS)
  with raises(ValueError, "WithStateDtypeState", "WithQuantizedStateState", "another optimizer"):
    wrap(RMS).update(PARAMS, state, PARAMS)
  with raises(ValueError, "state leaf '", "/w'", "bfloat16[64, 64]", "8 bits", "other options"):
    wrap(RMS).update(PARAMS, memory.WithQuantizedStateState(*state), PARAMS)


def test_host_memory_inside_is_refused():
  with raises(ValueError, "/w'", "host memory", "outside"):
    wrap(memory.with_host_offload(RMS, min_bytes=0)).init(PARAMS)
