"""`hina_optax.apply` is `update` and `apply_updates` in one, whatever keeps the state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hina_optax as ho
from hina_optax import memory
from tests import trees
from tests.memory import storages


def parameters(dtype=jnp.float32):
  rng = np.random.default_rng(2)
  shapes = {**{f"w{i}": (16, 24) for i in range(3)}, "odd": (16, 25), "bias": (5,), "scale": ()}
  return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


def adam():
  return optax.adam(1e-2)


MAKES = {
  "optax": adam,
  "batching": lambda: memory.with_leaf_batching(adam()),
  "bf16": lambda: memory.with_state_dtype(adam(), min_size=0),
  "bf16 stacks": lambda: memory.with_state_dtype(memory.with_leaf_batching(adam()), min_size=0),
  "8 bits": lambda: memory.with_quantized_state(adam(), min_size=16),
  "8-bit stacks": lambda: memory.with_quantized_state(
    memory.with_leaf_batching(adam()), min_size=16),
  "host": lambda: memory.with_host_offload(adam(), min_bytes=0),
  "windows": lambda: memory.with_host_offload(adam(), min_bytes=0, max_buffer_memory_mb=0.007),
  "bf16 in windows": lambda: memory.with_host_offload(
    memory.with_state_dtype(memory.with_leaf_batching(adam()), min_size=0), min_bytes=0,
    max_buffer_memory_mb=0.007),
  "across leaves": lambda: memory.with_state_dtype(
    optax.chain(optax.clip_by_global_norm(0.5), adam()), min_size=0),
  "rounded": lambda: memory.with_rounded_updates(memory.with_state_dtype(adam(), min_size=0)),
  "parts": lambda: memory.with_leaf_batching(
    optax.chain(ho.cautious(ho.scale_by_hina()), optax.scale(-1e-2))),
  "alias": lambda: ho.hina_adaptive(1e-2, leaf_batching=True),
  "narrow alias": lambda: ho.hina_adaptive(1e-2, reduce_precision=True),
}
every_make = pytest.mark.parametrize("name", [
  pytest.param(n, marks=[pytest.mark.slow] if n == "narrow alias" else []) for n in MAKES])


def in_two(tx, grads, state, params, **extra_args):
  updates, state = tx.update(grads, state, params, **extra_args)
  return optax.apply_updates(params, updates), state


@every_make
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_steps_are_those_of_update_and_apply_updates(name, dtype):
  """State that is rounded at random draws the same noise."""
  params = parameters(dtype)
  tx = MAKES[name]()
  both = (params, tx.init(params)), (params, tx.init(params))
  ways = (jax.jit(lambda *args: ho.apply(tx, *args)), jax.jit(lambda *args: in_two(tx, *args)))
  with jax.numpy_dtype_promotion("standard"):
    for g in trees.sequence(params, 2):
      both = [way(g, state, p) for way, (p, state) in zip(ways, both)]
  one, two = both
  assert trees.dtypes(one) == trees.dtypes(two)
  trees.assert_close(one[0], two[0], *((1e-6, 1e-7) if dtype == "float32" else (2.0**-7, 0.0)))
  # Compiled apart, a sum may end in another last bit, and a draw on the other side of it.
  for x, y in zip(jax.tree.leaves(one[1]), jax.tree.leaves(two[1])):
    assert np.isclose(np.float64(x), np.float64(y), 1e-5, 1e-7).mean() > 0.98
  assert [x.sharding.memory_kind for x in jax.tree.leaves(one)] == [
    x.sharding.memory_kind for x in jax.tree.leaves(two)]


@pytest.mark.parametrize("name", ["bf16", "8 bits", "bf16 in windows", "rounded"])
def test_operation_by_operation_they_are_the_same_to_the_bit(name):
  params, tx = storages.small(jnp.bfloat16), MAKES[name]()
  one = two = params, tx.init(params)
  with jax.numpy_dtype_promotion("standard"), jax.disable_jit():
    for g in trees.sequence(params, 2):
      one, two = ho.apply(tx, g, *one[::-1]), in_two(tx, g, *two[::-1])
  trees.assert_equal(one, two)


@pytest.mark.parametrize("name", ["batching", "bf16 stacks", "windows", "parts", "alias"])
def test_a_leaf_without_a_gradient_stays(name):
  """Where leaves are taken by themselves; optax's own optimizers refuse it."""
  params, tx = parameters(), MAKES[name]()
  grads = {**trees.sequence(params, 1)[0], "w1": None}
  with jax.numpy_dtype_promotion("standard"):
    state = tx.init(params)
    moved, kept = jax.jit(lambda *args: ho.apply(tx, *args))(grads, state, params)
    assert jax.tree.structure(kept) == jax.tree.structure(state)
  trees.assert_equal(moved["w1"], params["w1"])
  assert not np.array_equal(moved["w0"], params["w0"])


def test_what_is_donated_is_used_again():
  params = parameters()
  tx = memory.with_leaf_batching(adam())
  step = jax.jit(lambda g, s, p: ho.apply(tx, g, s, p)[::-1], donate_argnums=(1, 2))
  given, start = jax.tree.map(jnp.copy, params), tx.init(params)
  with jax.numpy_dtype_promotion("standard"):
    _, moved = step(params, start, given)
    assert all(x.is_deleted() for x in jax.tree.leaves((start, given)))
    trees.assert_close(moved, in_two(tx, params, tx.init(params), params)[0])


def test_extra_arguments_reach_the_inner():
  def update(updates, state, params=None, *, value, **extra_args):
    return jax.tree.map(lambda x: x * value, updates), state

  inner = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
  params = parameters()
  for tx in (inner, memory.with_state_dtype(inner), memory.with_host_offload(inner)):
    moved, _ = ho.apply(tx, params, tx.init(params), params, value=2.0)
    trees.assert_close(moved, jax.tree.map(lambda x: 3 * x, params))


def test_parameters_must_be_given():
  for tx in (adam(), memory.with_state_dtype(adam())):
    with storages.raises(ValueError, "hina_optax.apply", "parameters"):
      ho.apply(tx, parameters(), tx.init(parameters()), None)
