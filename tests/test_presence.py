"""Leaves without an update: `None` in the updates, or the extra argument `present`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hina_optax as ho
from hina_optax.base.positions import LeafNumbers
from tests import trees
from tests.cases import PARTS, every_driven_case

# Which leaves are there, in the order of `trees.layers`: stacks are there in part, pairs of factors
# by half, leaves that stand alone or not.
PATTERNS = (
  (True, True, True, False, True, False, True, False, True),
  (False, True, True, True, True, True, True, True, False),
)


def tree_of(params, flags):
  structure = jax.tree.structure(params)
  return structure.unflatten(list(flags))


def without(g, pattern):
  return jax.tree.map(lambda x, there: x if there else None, g, tree_of(g, pattern))


def step_of(tx, compiled):
  """An update that is told which leaves are there; notes each compilation."""
  @jax.jit
  def step(g, state, params, present):
    compiled.append(1)
    return tx.update(g, state, params, present=present)

  return step


def flags(params, pattern):
  return tree_of(params, [jnp.asarray(x) for x in pattern])


def check_presence(tx, params):
  compiled, gradients = [], trees.sequence(params, 4)
  step, update = step_of(tx, compiled), jax.jit(tx.update)
  _, state = update(gradients[0], tx.init(params), params)
  expected = state
  for g, pattern in zip(gradients[1:], PATTERNS):
    fewer, expected = update(without(g, pattern), expected, params)
    updates, state = step(g, state, params, flags(params, pattern))
    trees.assert_close(without(updates, pattern), fewer)
    absent = without(updates, [not there for there in pattern])
    trees.assert_equal(absent, jax.tree.map(jnp.zeros_like, absent))
    trees.assert_close(state, expected)
  everywhere = flags(params, [True] * len(PATTERNS[0]))
  trees.assert_close(step(gradients[3], state, params, everywhere),
                     update(gradients[3], state, params))
  # Where no leaf is there, what all leaves share, such as counts of steps, stays as well.
  nowhere = flags(params, [False] * len(PATTERNS[0]))
  updates, same = step(gradients[3], state, params, nowhere)
  trees.assert_equal(updates, jax.tree.map(jnp.zeros_like, params))
  trees.assert_equal(same, state)
  assert len(compiled) == 1


@every_driven_case
def test_what_is_called_absent_is_as_if_it_were_none(case):
  check_presence(case.make(), trees.layers())


@pytest.mark.parametrize("case", PARTS, ids=str)
def test_in_stacks_as_well(case):
  check_presence(ho.with_leaf_batching(case.make()), trees.layers())


@pytest.mark.parametrize("make", [
  lambda: ho.with_state_dtype(ho.scale_by_hina(), jnp.float32, min_size=0),
  lambda: ho.with_host_offload(ho.scale_by_hina(torque="average"), min_bytes=0),
  lambda: ho.with_leaf_batching(optax.scale_by_rms()),
], ids=["fp32", "host", "optax"])
def test_in_other_storage_as_well(make):
  with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
    check_presence(make(), trees.layers())


@pytest.mark.parametrize("none", [False, True], ids=["present", "None"])
@pytest.mark.parametrize("store", [
  lambda tx: ho.with_state_dtype(tx, min_size=0),
  lambda tx: ho.with_quantized_state(tx, min_size=1),
], ids=["bf16", "8-bit"])
def test_what_is_stored_of_a_leaf_that_is_not_there_is_not_rounded_again(store, none):
  tx, params = store(ho.scale_by_hina()), trees.layers()
  pattern = (True, False, True, True, False, True, True, True, True)
  first, second = trees.sequence(params, 2)
  _, before = jax.jit(tx.update)(first, tx.init(params), params)
  if none:
    _, after = jax.jit(tx.update)(without(second, pattern), before, params)
  else:
    _, after = jax.jit(tx.update)(second, before, params, present=flags(params, pattern))
  for name in ("['conv']['kernel']", "['layers']['0']['square']"):
    kept, new = ([x for path, x in jax.tree_util.tree_leaves_with_path(state)
                  if name in jax.tree_util.keystr(path)] for state in (before, after))
    assert len(kept) >= 2
    trees.assert_equal(new, kept)


@pytest.mark.parametrize("case", PARTS, ids=str)
def test_the_state_of_a_leaf_that_is_not_there_stays(case):
  tx, params = case.make(), trees.layers()
  first, second = trees.sequence(params, 2)
  _, before = jax.jit(tx.update)(first, tx.init(params), params)
  _, after = jax.jit(tx.update)(without(second, PATTERNS[0]), before, params)
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  absent = [path for path, there in zip(paths, PATTERNS[0]) if not there]
  moved = []
  for (where, old), (_, new) in zip(*map(by_leaf, (before, after))):
    if any(where.endswith(path) for path in absent):
      trees.assert_equal(new, old)
    else:
      moved.append(not np.array_equal(new, old))
  assert any(moved) or not moved


def by_leaf(state):
  """Every number and array of a state, with the path of its leaf at the end of its own."""
  found = []
  for path, x in jax.tree_util.tree_leaves_with_path(
    state, is_leaf=lambda x: isinstance(x, LeafNumbers)):
    where = jax.tree_util.keystr(path)
    if isinstance(x, LeafNumbers):
      found += [(where + "".join(f"['{key}']" for key in name.split("/")), number)
                for name, number in x.items()]
    else:
      found.append((where, x))
  return found


def test_means_are_over_the_leaves_that_are_there():
  params = {"a": jnp.ones((2, 2)), "b": jnp.full((2, 3), 2.0), "c": jnp.full((3,), 3.0)}
  g = {"a": jnp.full((2, 2), 1.0), "b": jnp.full((2, 3), 3.0), "c": jnp.full((3,), 1e6)}
  tx = ho.scale_by_importance(optax.identity(), interval=1, decay=0.0)
  present = {"a": True, "b": True, "c": False}
  updates, state = tx.update(g, tx.init(params), params,
                             present=jax.tree.map(jnp.asarray, present))
  two = {k: params[k] for k in "ab"}
  expected, alone = tx.update({k: g[k] for k in "ab"}, tx.init(two), two)
  trees.assert_close({k: updates[k] for k in "ab"}, expected)
  trees.assert_equal(updates["c"], jnp.zeros(3))
  importance = optax.tree.get(state, "importance")
  assert float(importance["c"]) == 1.0
  for k in "ab":
    np.testing.assert_allclose(
      importance[k], optax.tree.get(alone, "importance")[k], rtol=1e-6)


@pytest.mark.parametrize("make", [
  lambda: ho.hina_adaptive(1e-2), lambda: ho.with_leaf_batching(optax.adam(1e-2)),
])
def test_apply_leaves_absent_parameters_bit_for_bit(make):
  tx, params = make(), trees.layers()
  present = flags(params, PATTERNS[0])
  with jax.numpy_dtype_promotion("standard"):
    new, _ = jax.jit(lambda g, s, p: ho.apply(tx, g, s, p, present=present))(
      trees.sequence(params, 1)[0], tx.init(params), params)
  absent = [not there for there in PATTERNS[0]]
  trees.assert_equal(without(new, absent), without(params, absent))
