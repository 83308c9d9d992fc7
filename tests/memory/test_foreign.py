"""Transformations of optax in and around each storage wrapper: right, or refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hina_optax import memory
from tests import trees
from tests.memory import storages
from tests.memory.storages import RMS


def parameters():
  """Leaves alike in shape that masks and labels tell apart, and some that stand alone."""
  rng = np.random.default_rng(11)
  shapes = {**{f"w{i}": (6, 8) for i in range(4)}, **{f"b{i}": (5,) for i in range(3)},
            "odd": (6, 9), "scale": ()}
  return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def told_apart(*names):
  return {name: name in names for name in parameters()}


SOME = told_apart("w0", "w2", "b1", "odd")
LABELS = {name: "x" if there else "y" for name, there in SOME.items()}


def with_a_constant_vector():
  """It has as many entries as there are leaves, and each leaf takes all of them."""
  def update(updates, state, params=None):
    del params
    return jax.tree.map(lambda x: x * jnp.sum(state["table"]), updates), state

  def init(params):
    return {"table": jnp.arange(1.0, len(params) + 1)}

  return optax.GradientTransformation(init, update)


def with_a_vector_that_grows():
  """A shared vector that changes from step to step."""
  def update(updates, state, params=None):
    del params
    table = state["table"] * 2
    return jax.tree.map(lambda x: x * table[3], updates), {"table": table}

  return optax.GradientTransformation(lambda params: {"table": jnp.ones(len(params))}, update)


def scaled_by_value():
  def update(updates, state, params=None, *, value, **extra_args):
    del params, extra_args
    return jax.tree.map(lambda x: x * value, updates), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


INNERS = {
  "adamw": lambda: optax.adamw(1e-2),
  "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
  "muon": lambda: optax.contrib.muon(1e-2),
  "lamb": lambda: optax.lamb(1e-2),
  "schedule": lambda: optax.adam(optax.cosine_decay_schedule(1e-2, 10)),
  "injected": lambda: optax.inject_hyperparams(optax.rmsprop)(1e-2),
  "agc": lambda: optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(1e-2, momentum=0.9)),
  "masked": lambda: optax.masked(RMS, SOME),
  "masked, not the rest": lambda: optax.chain(
    optax.masked(optax.trace(0.9), SOME), optax.masked(optax.set_to_zero(), {
      name: not there for name, there in SOME.items()})),
  "decay by mask": lambda: optax.adamw(1e-2, weight_decay=0.5, mask=SOME),
  "partition": lambda: optax.partition({"x": RMS, "y": optax.adam(1e-2)}, LABELS),
  "frozen": lambda: optax.partition({"x": RMS, "y": optax.set_to_zero()}, LABELS),
  "muon and adam": lambda: optax.partition(
    {"x": optax.contrib.muon(1e-2), "y": optax.adafactor(1e-2, min_dim_size_to_factor=4)}, LABELS),
  "multi": lambda: optax.MultiSteps(RMS, 2),
  "multi by schedule": lambda: optax.MultiSteps(RMS, lambda step: 1 + step % 2),
  "schedule-free": lambda: optax.contrib.schedule_free_adamw(1e-2),
  "constant vector": with_a_constant_vector,
  "growing vector": with_a_vector_that_grows,
  "value": scaled_by_value,
  "clip": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2)),
  "finite": lambda: optax.apply_if_finite(RMS, 3),
  "prodigy": lambda: optax.contrib.prodigy(),
  "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), RMS),
}
# They look across leaves, or number them.
ACROSS = ("clip", "finite", "prodigy", "noise")
EXTRA = {"value": {"value": jnp.float32(0.5)}}

# A leaf's state is 8 to 12 bytes an element here: half of this holds one or two leaves.
WINDOW = 1.5 / 1024
WRAPPERS = {
  "batching": memory.with_leaf_batching,
  "dtype": lambda tx: memory.with_state_dtype(tx, "float32", min_size=0),
  "batching in dtype": lambda tx: memory.with_state_dtype(
    memory.with_leaf_batching(tx), "float32", min_size=0),
  "dtype in batching": lambda tx: memory.with_leaf_batching(
    memory.with_state_dtype(tx, "float32", min_size=0)),
  "host": lambda tx: memory.with_host_offload(tx, min_bytes=0),
  "windows": lambda tx: memory.with_host_offload(tx, min_bytes=0, max_buffer_memory_mb=WINDOW),
  "batching in windows": lambda tx: memory.with_host_offload(
    memory.with_leaf_batching(tx), min_bytes=0, max_buffer_memory_mb=WINDOW),
  "rounded": memory.with_rounded_updates,
}
# What takes leaves by themselves refuses what does not.
BY_LEAF = ("batching", "batching in dtype", "dtype in batching", "windows", "batching in windows")


def taken(tx, name, steps=4, update=None):
  """Updates of some steps, compiled, and the state."""
  params = parameters()
  with jax.numpy_dtype_promotion("standard"):
    state, collected = tx.init(params), []
    update = jax.jit(tx.update) if update is None else update
    for g in trees.sequence(params, steps):
      updates, state = update(g, state, params, **EXTRA.get(name, {}))
      collected.append(updates)
      params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates)
  return collected, state


def in_wrapper(name, wrapper):
  return WRAPPERS[wrapper](optax.with_extra_args_support(INNERS[name]()))


def inside(name, wrapper):
  """Muon's iteration enlarges what a product rounds, which in a stack is another product."""
  exact = "muon" in name and "batching" in wrapper
  return pytest.param(name, wrapper, marks=pytest.mark.exact if exact else [])


@pytest.mark.parametrize(("name", "wrapper"), [inside(n, w) for n in INNERS for w in WRAPPERS])
def test_inside(name, wrapper):
  if name in ACROSS and wrapper in BY_LEAF:
    with pytest.raises(ValueError, match="outside of the wrapper"):
      taken(in_wrapper(name, wrapper), name)
    return
  expected, _ = taken(optax.with_extra_args_support(INNERS[name]()), name)
  actual, state = taken(in_wrapper(name, wrapper), name)
  trees.assert_close(actual, expected, 2e-6, 1e-7)
  if "host" in wrapper or "window" in wrapper:
    for x in jax.tree.leaves(state):
      if x.ndim and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        assert x.sharding.memory_kind == "pinned_host"


@pytest.mark.parametrize("wrapper", ["batching", "windows", "dtype"])
def test_a_mask_of_whole_blocks(wrapper):
  """It leaves nothing of a block in the state, which no leaf can then be taken out of by itself."""
  params = {block: {"a": jnp.ones((8, 8)), "b": 2 * jnp.ones((8, 8))} for block in ("x", "y")}
  inner = optax.masked(RMS, {"x": True, "y": False})
  tx = WRAPPERS[wrapper](inner)
  if wrapper in BY_LEAF:
    with storages.raises(ValueError, "'x/a'", "outside of the wrapper"):
      tx.update(params, tx.init(params), params)
  else:
    gradients = trees.sequence(params, 2)
    expected = trees.run(inner, params, gradients)[:2]
    trees.assert_close(trees.run(tx, params, gradients)[:2], expected)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("name", [n for n in INNERS if n not in ACROSS])
def test_inside_in_8_bits(name, batched):
  """Close to what it is in fp32, with the same state from step to step."""
  inner = optax.with_extra_args_support(INNERS[name]())
  tx = memory.with_quantized_state(
    memory.with_leaf_batching(inner) if batched else inner, min_size=16,
    include=storages.INCLUDE.get(name.replace("-", "_")))
  fresh = tx.init(parameters())
  expected, kept = taken(inner, name)
  actual, state = taken(tx, name)
  assert storages.distance(actual, expected) < 0.1
  assert jax.tree.structure(state) == jax.tree.structure(fresh)
  assert trees.dtypes(state) == trees.dtypes(fresh)
  if any(x.size >= 40 for x in jax.tree.leaves(kept)):
    assert any(x.dtype == jnp.uint8 for x in jax.tree.leaves(state))


OUTERS = {
  "clip": lambda tx: optax.chain(optax.clip_by_global_norm(0.5), tx, optax.scale(0.7)),
  "masked": lambda tx: optax.masked(tx, SOME),
  "partition": lambda tx: optax.partition(
    {"x": tx, "y": optax.adafactor(1e-2, min_dim_size_to_factor=4)}, LABELS),
  "muon beside": lambda tx: optax.partition({"x": optax.contrib.muon(1e-2), "y": tx}, LABELS),
  "adafactor after": lambda tx: optax.chain(tx, optax.adafactor(1e-2, min_dim_size_to_factor=4)),
  "multi": lambda tx: optax.MultiSteps(tx, 2),
  "finite": lambda tx: optax.apply_if_finite(tx, 3),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", OUTERS)
def test_outside(name, wrapper):
  outer = OUTERS[name]
  tx = outer(WRAPPERS[wrapper](RMS))
  expected, _ = taken(outer(RMS), name)
  actual, _ = taken(tx, name)
  trees.assert_close(actual, expected, 2e-6, 1e-7)
