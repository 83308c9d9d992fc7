"""`with_host_offload`: state that rests on the host, with the inner's own results."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import optax
import pytest

import hina_optax as ho
from hina_optax import memory
from tests import trees
from tests.memory import storages
from tests.memory.storages import OUTER, RMS, every_inner, raises

wrap = memory.with_host_offload


def kinds(tree):
  return [x.sharding.memory_kind for x in jax.tree.leaves(tree)]


def on_device(tree):
  return sum(x.nbytes for x in jax.tree.leaves(tree) if x.sharding.memory_kind == "device")


def run(tx, params, gradients):
  """As `trees.run_optax`, without the parameters; the state's places must not change."""
  with jax.numpy_dtype_promotion("standard"):
    state, update = tx.init(params), jax.jit(tx.update)
    places, collected = kinds(state), []
    for gradient in gradients:
      updates, state = update(gradient, state, params)
      collected.append(updates)
      params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates)
    assert kinds(state) == places
    assert set(kinds(updates)) == {"device"}
  return collected, state


@every_inner
def test_every_inner_keeps_its_results_to_the_bit(name):
  inner, params = storages.INNERS[name](), storages.for_inner(name)
  gradients = trees.sequence(params, 2)
  expected = trees.run_optax(inner, params, gradients)
  updates, state = run(wrap(inner, min_bytes=64), params, gradients)
  trees.assert_equal(updates, expected[1])
  trees.assert_equal(state.inner_state, expected[2])
  check_places(state)


def check_places(state):
  for leaf in jax.tree.leaves(state):
    hosted = leaf.nbytes >= 64 and leaf.ndim > 0
    assert leaf.sharding.memory_kind == ("pinned_host" if hosted else "device")


WINDOWED = [
  pytest.param(n, marks=[pytest.mark.slow] if n in ("hina", "muon", "schedule_free") else [])
  for n in storages.INNERS if n != "clip_adam"
]


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_change_no_result(name):
  """Operation by operation no bit; XLA compiles other trees to other arithmetic."""
  inner, params = storages.INNERS[name](), storages.for_inner(name)
  gradients = trees.sequence(params, 2)
  tx = wrap(inner, min_bytes=64, max_buffer_memory_mb=0.003)
  expected = trees.run_optax(inner, params, gradients)
  updates, state = run(tx, params, gradients)
  trees.assert_close(updates, expected[1])
  trees.assert_close(state.inner_state, expected[2])
  check_places(state)
  with jax.numpy_dtype_promotion("standard"), jax.disable_jit():
    kept, plain = tx.init(params), inner.init(params)
    for gradient in gradients:
      updates, kept = tx.update(gradient, kept, params)
      wanted, plain = inner.update(gradient, plain, params)
      trees.assert_equal(updates, wanted)
      trees.assert_equal(kept.inner_state, plain)
      check_places(kept)


def test_what_looks_across_leaves_is_refused_in_windows_and_right_outside():
  params = storages.for_inner("clip_adam")
  clip, adam = optax.clip_by_global_norm(1.0), optax.adam(1e-2)
  inside = wrap(optax.chain(clip, adam), min_bytes=64, max_buffer_memory_mb=0.003)
  state = inside.init(params)
  with (jax.numpy_dtype_promotion("standard"),
        raises(ValueError, "with_host_offload", "'bias' depends on", "outside of the wrapper")):
    inside.update(params, state, params)
  gradients = trees.sequence(params, 2)
  outside = optax.chain(clip, wrap(adam, min_bytes=64, max_buffer_memory_mb=0.003))
  updates, state = run(outside, params, gradients)
  trees.assert_close(updates, run(optax.chain(clip, adam), params, gradients)[0])
  assert "pinned_host" in kinds(state)


@pytest.mark.parametrize("put", [
  lambda tx, **o: wrap(memory.with_leaf_batching(tx), **o),
  lambda tx, **o: memory.with_leaf_batching(wrap(tx, **o)),
], ids=["around", "inside"])
def test_stacks_fit_half_a_window(put):
  params = {f"w{i}": jnp.linspace(-1, 1, 1024).reshape(32, 32) * (1 + i) for i in range(7)}
  gradients = trees.sequence(params, 2)
  tx = put(optax.adamw(1e-2), min_bytes=0, max_buffer_memory_mb=48 / 1024)
  updates, state = run(tx, params, gradients)
  mu, nu = (optax.tree.get(state, name) for name in ("mu", "nu"))
  assert sum(len(x) for x in mu.values()) == 7
  for x, y in zip(mu.values(), nu.values()):
    assert x.ndim == 3
    assert x.nbytes + y.nbytes <= 24 * 1024
  assert set(kinds((mu, nu))) == {"pinned_host"}
  trees.assert_close(updates, run(optax.adamw(1e-2), params, gradients)[0])
  roomy = put(optax.adamw(1e-2), min_bytes=0, max_buffer_memory_mb=1.0).init(params)
  assert [x.shape for x in optax.tree.get(roomy, "mu").values()] == [(7, 32, 32)]


def test_init_places_at_once_and_update_keeps_the_place():
  params = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
  tx = wrap(RMS)
  for state in (tx.init(params), jax.jit(tx.init)(params)):
    assert kinds(state) == ["device", "pinned_host"] * 2
    eager_updates, eager = tx.update(params, state, params)
    assert kinds(eager) == kinds(state)
    assert set(kinds(eager_updates)) == {"device"}
    assert on_device(eager) == 2 * 64 * 4


def test_counters_stay_even_if_every_size_is_offloaded():
  state = wrap(optax.adam(1e-3), min_bytes=0).init({"w": jnp.ones(3), "e": jnp.ones((0, 2))})
  adam = state.inner_state[0]
  assert adam.count.sharding.memory_kind == "device"
  assert kinds(adam.mu) == ["device", "pinned_host"]


@pytest.mark.parametrize("include", [r"^0/nu/w", lambda path, leaf: path == "0/nu/w"])
def test_only_chosen_leaves_move(include):
  state = wrap(optax.adam(1e-3), include=include).init({"w": jnp.ones((64, 64))})
  assert (kinds(state.inner_state[0].mu), kinds(state.inner_state[0].nu)) == (
    ["device"], ["pinned_host"])


def test_a_step_compiles_once():
  params = jax.device_put({"w": jnp.ones((64, 64)), "b": jnp.ones(3)}, jax.devices()[0])
  # Its counter and seed are made from nothing, so they are bound to no device.
  tx = wrap(memory.with_state_dtype(RMS, "float32"))

  @jax.jit
  def step(params, state):
    updates, state = tx.update(params, state, params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for _ in range(3):
    params, state = step(params, state)
  assert step._cache_size() == 1


def test_under_scan_and_eval_shape():
  params = {"w": jnp.ones((64, 64)), "b": jnp.ones(3)}
  tx = wrap(RMS, max_buffer_memory_mb=0.05)
  storages.check_stable(tx, params)

  def loop(state):
    return jax.lax.scan(lambda s, _: (tx.update(params, s)[1], None), state, length=3)[0]

  state = tx.init(params)
  kept = jax.jit(loop)(state)
  assert kinds(kept) == kinds(state)
  expected = RMS.init(params)
  for _ in range(3):
    _, expected = RMS.update(params, expected)
  trees.assert_close(kept.inner_state, expected)


@pytest.mark.parametrize("order", ["parameters first", "state first", "state alone", "bare"])
def test_donation(order):
  params = {"w": jnp.ones((64, 64)), "b": jnp.ones(3)}
  tx = wrap(RMS, max_buffer_memory_mb=0.05)

  def step(params, state):
    updates, state = tx.update(params, state, params)
    return optax.apply_updates(params, updates), state

  start = jax.tree.map(jnp.copy, params), tx.init(params)
  if order == "parameters first":
    moved, state = jax.jit(step, donate_argnums=(0, 1))(*start)
  elif order == "bare":
    updates, state = jax.jit(tx.update, donate_argnums=(0, 1))(*start)
    moved = optax.apply_updates(params, updates)
  else:
    donated = (0, 1) if order == "state first" else 0
    swapped = jax.jit(lambda s, p: step(p, s)[::-1], donate_argnums=donated)
    state, moved = swapped(*start[::-1])
  assert all(x.is_deleted() for x in jax.tree.leaves(start[1]))
  assert kinds(state) == ["device", "pinned_host"] * 2
  assert set(kinds(moved)) == {"device"}
  trees.assert_close(moved, step(params, tx.init(params))[0])


def test_under_vmap():
  tx = wrap(RMS, min_bytes=64)
  batch = jax.tree.map(lambda x: jnp.stack([x, 3 * x]), storages.small())
  state = jax.vmap(tx.init)(batch)
  updates, after = jax.jit(jax.vmap(tx.update))(batch, state)
  assert kinds(after) == kinds(state) == ["device", "pinned_host"] * 2
  one = jax.tree.map(lambda x: x[1], batch)
  trees.assert_close(jax.tree.map(lambda x: x[1], updates), RMS.update(one, RMS.init(one))[0])


OTHERS = {
  "dtype": lambda tx: memory.with_state_dtype(tx, min_size=0),
  "quantized": lambda tx: memory.with_quantized_state(tx, min_size=16),
  "both": lambda tx: memory.with_state_dtype(
    memory.with_quantized_state(tx, min_size=100), min_size=0),
  "rounded": memory.with_rounded_updates,
  "offload": lambda tx: wrap(tx, include="nu", min_bytes=0),
}


@pytest.mark.parametrize("place", ["chain", "multi", *OTHERS])
def test_around_other_wrappers(place):
  inner = {**OUTER, **OTHERS}[place](RMS)
  params = storages.small()
  gradients = trees.sequence(params, 2)
  expected, expected_state = run(inner, params, gradients)
  updates, state = run(wrap(inner, min_bytes=64, max_buffer_memory_mb=0.01), params, gradients)
  trees.assert_equal(updates, expected)
  trees.assert_equal(state.inner_state, expected_state)
  assert "pinned_host" in kinds(state)


@pytest.mark.parametrize("place", ["chain", "masked", "partition", "rounded"])
def test_inside_wrappers_that_do_not_compute_with_its_state(place):
  put = {**OUTER, **OTHERS}[place]
  params = storages.small()
  gradients = trees.sequence(params, 2)
  updates, state = run(put(wrap(RMS, min_bytes=64)), params, gradients)
  trees.assert_close(updates, run(put(RMS), params, gradients)[0])
  assert "pinned_host" in kinds(state)


def test_bytes_on_the_device():
  params = {f"w{i}": jnp.ones((64, 64)) for i in range(4)}
  state = wrap(optax.adam(1e-3)).init(params)
  assert on_device(state) == 4  # the counter
  assert storages.nbytes(state) == 8 * 4 * 64**2 + 4
  state = wrap(memory.with_quantized_state(optax.adam(1e-3)), min_bytes=32).init(params)
  assert on_device(state) == 4 + 8
  state = wrap(storages.everything(), min_bytes=4096).init(params)
  assert on_device(state) < 1024
  assert sum(kind == "pinned_host" for kind in kinds(state)) == 6  # one stack a tree


# That no more than a window is on the device at once is read from what the compilers of
# accelerators made of a step, by benchmarks/accelerators.py: on a CPU all memory is one.
def test_a_leaf_whose_state_is_larger_than_half_a_window_comes_whole():
  params = {f"w{i}": jnp.linspace(-1, 1 + i, 1024).reshape(32, 32) for i in range(3)}
  gradients = trees.sequence(params, 2)
  tx = wrap(optax.adam(1e-3), min_bytes=0, max_buffer_memory_mb=5 / 1024)
  updates, state = run(tx, params, gradients)
  trees.assert_close(updates, run(optax.adam(1e-3), params, gradients)[0])
  assert kinds(state) == ["device", *["pinned_host"] * 6]


SHARDED = """
  import jax, jax.numpy as jnp, optax
  from jax.sharding import NamedSharding, PartitionSpec
  from hina_optax import memory

  mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.{kind},))
  rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x",), ()))
  params = {{"w": jax.device_put(jnp.ones((64, 128)), rows),
            "b": jax.device_put(jnp.ones(3), whole)}}
  inner = optax.rmsprop(1e-2, momentum=0.9)
  tx = memory.with_host_offload({inner}, min_bytes=1024, max_buffer_memory_mb=0.07)

  def step(params, state):
    updates, state = tx.update(params, state, params)
    return optax.apply_updates(params, updates), state

  expected, kept = dict(params), inner.init(params)
  state = tx.init(params)
  moved, step = jax.tree.map(jnp.copy, params), jax.jit(step, donate_argnums=(0, 1))
  for _ in range(2):
    moved, state = step(moved, state)
    updates, kept = inner.update(expected, kept, expected)
    expected = optax.apply_updates(expected, updates)
    for name in ("nu", "trace"):
      for leaf in jax.tree.leaves(optax.tree.get(state, name)["w"])[:1]:
        assert leaf.sharding.memory_kind == "pinned_host", leaf.sharding
        assert leaf.sharding.spec[0] == "x", leaf.sharding
        assert leaf.addressable_shards[0].data.shape[0] == 32
    assert moved["w"].sharding.memory_kind == "device"
    assert moved["w"].sharding.spec[0] == "x"
  assert jnp.allclose(moved["w"], expected["w"], rtol={rtol}), (moved["w"], expected["w"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
@pytest.mark.parametrize(("inner", "rtol"), [
  ("inner", 1e-6), ("memory.with_state_dtype(inner)", 1e-2),
  ("memory.with_quantized_state(inner)", 1e-2),
])
def test_sharded_state_keeps_its_sharding(kind, inner, rtol):
  code = textwrap.dedent(SHARDED).format(kind=kind, inner=inner, rtol=rtol)
  flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
  done = subprocess.run([sys.executable, "-W", "error", "-c", code], text=True,
                        capture_output=True, env={**os.environ, "XLA_FLAGS": flags})
  assert done.returncode == 0, done.stderr


def test_inject_hyperparams_and_map_params():
  params = {"w": jnp.ones((64, 64))}
  gradients = trees.sequence(params, 2)
  injected = optax.inject_hyperparams(wrap, static_args=("min_bytes", "max_buffer_memory_mb"))(
    RMS, min_bytes=64, max_buffer_memory_mb=1.0)
  trees.assert_equal(run(injected, params, gradients)[0], run(RMS, params, gradients)[0])
  state = wrap(RMS).init(params)
  copied = optax.tree.map_params(wrap(RMS), lambda x: jax.device_put(x, jax.memory.Space.Device),
                                 state)
  assert set(kinds(copied)) == {"device"}
  assert float(optax.tree.get(copied, "nu")["w"][0, 0]) == 0


def test_extra_arguments_reach_the_inner():
  def update(updates, state, params=None, *, value, **extra_args):
    return jax.tree.map(lambda x, s: x * value + s, updates, state), state

  inner = optax.GradientTransformationExtraArgs(
    lambda p: jax.tree.map(jnp.zeros_like, p), update)
  for window in (None, 1.0):
    tx = wrap(inner, min_bytes=0, max_buffer_memory_mb=window)
    params = jnp.ones(8)
    updates, _ = tx.update(params, tx.init(params), params, value=2.0, unknown=1)
    assert updates.tolist() == [2.0] * 8


def test_state_that_is_no_array_stays():
  inner = optax.GradientTransformation(
    lambda p: {"n": 0, "key": jax.random.key(1), "m": jnp.zeros(8)},
    lambda u, s, p=None: (u, {**s, "m": s["m"] + u}))
  tx = wrap(inner, min_bytes=0)
  state = tx.update(jnp.ones(8), tx.init(jnp.ones(8)))[1]
  assert state.inner_state["n"] == 0
  assert kinds(state.inner_state["m"]) == ["pinned_host"]


@pytest.mark.parametrize(("arguments", "kind", "parts"), [
  (dict(include="*"), ValueError, ("include", "regular expression", "'*'")),
  (dict(include=1.5), TypeError, ("include", "1.5")),
  (dict(min_bytes=-1), ValueError, ("min_bytes", "-1")),
  (dict(min_bytes="1MB"), TypeError, ("min_bytes", "'1MB'")),
  (dict(max_buffer_memory_mb=0), ValueError, ("max_buffer_memory_mb", "(0", "0")),
  (dict(max_buffer_memory_mb=-5), ValueError, ("max_buffer_memory_mb", "-5")),
  (dict(max_buffer_memory_mb="64"), TypeError, ("max_buffer_memory_mb", "'64'")),
  (dict(max_buffer_memory_mb=float("nan")), ValueError, ("max_buffer_memory_mb", "nan")),
])
def test_bad_arguments(arguments, kind, parts):
  with raises(kind, *parts):
    wrap(RMS, **arguments)


def test_a_window_smaller_than_a_leaf_says_its_size():
  tx = wrap(optax.adam(1e-3), max_buffer_memory_mb=0.5)
  with raises(ValueError, "max_buffer_memory_mb is 0.5", "'0/mu/w'", "1 MB", "include"):
    tx.init({"w": jnp.ones((512, 512))})


def test_a_traced_window_is_refused():
  tx = optax.inject_hyperparams(wrap)(RMS, max_buffer_memory_mb=64.0)
  with raises(ValueError, "max_buffer_memory_mb", "static_args=('max_buffer_memory_mb',)"):
    tx.init(storages.small())


def test_a_backend_without_host_memory_is_named(monkeypatch):
  class Memory:
    kind = "device"

  class Device:
    platform = "toaster"

    def addressable_memories(self):
      return [Memory()]

  monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
  with raises(ValueError, "pinned_host", "toaster", "it has device", "with_state_dtype"):
    jax.eval_shape(wrap(RMS, min_bytes=0).init, storages.small())


def test_the_alias_in_windows():
  params = storages.for_inner("hina")
  tx = wrap(ho.hina_adaptive(1e-2), min_bytes=64, max_buffer_memory_mb=0.003)
  updates, state = storages.check_stable(tx, params)
  assert "pinned_host" in kinds(state)
  assert set(kinds(updates)) == {"device"}
