"""Leaves that the extra argument `present` calls absent, whatever keeps the state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from cases import EVERYTHING
from frozen.make import rows_by_name
from test_apply import MAKES, parameters

import hina_optax as ho

MAKES = {
  **{name: make for name, make in MAKES.items() if name != "optax"},
  "bare parts": lambda: ho.cautious(ho.scale_by_sign_agreement(ho.scale_by_hina(torque="average"))),
  "importance": lambda: ho.scale_by_importance(ho.scale_by_hina(), interval=2),
  "everything": lambda: ho.hina_adaptive(1e-2, **EVERYTHING, leaf_batching=True),
  "everything, leaf by leaf": lambda: ho.hina_adaptive(1e-2, **EVERYTHING, leaf_batching=False),
  "compat": lambda: ho.hina_adaptive(1e-2, sd_scripts_compat=True),
}
GONE = ("w1", "bias")
SLOW = ("everything", "everything, leaf by leaf", "compat", "narrow alias")
# Their other leaves are scaled by what is found across all that are there.
ACROSS = ("across leaves", "importance", "alias", "narrow alias", *SLOW)


def flags(*gone):
  return {name: jnp.asarray(name not in gone) for name in parameters()}


@pytest.mark.parametrize("name", [
  pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in MAKES])
def test_absent_leaves_keep_their_state_and_get_0(name):
  params, tx = parameters(), MAKES[name]()
  given = trees.sequence(params, 4)
  with jax.numpy_dtype_promotion("standard"):
    state, update = tx.init(params), jax.jit(tx.update)
    for g in given[:2]:
      updates, state = update(g, state, params, present=flags())
    numbers = rows_by_name(*ho.pack_state(tx, state, params))
    wanted, _ = jax.jit(lambda *args: tx.update(*args))(given[2], state, params)
    updates, new = update(given[2], state, params, present=flags(*GONE))
    after = rows_by_name(*ho.pack_state(tx, new, params))
    # Another choice is not another program.
    last, _ = update(given[3], new, params, present=flags("w0"))
  assert update._cache_size() == 1
  assert trees.dtypes(new) == trees.dtypes(state)
  for leaf in GONE:
    assert not np.any(updates[leaf])
    kept = [key for key in numbers if key.endswith(f"/{leaf}")]
    assert kept
    for key in kept:
      for x, y in zip(numbers[key], after[key]):
        np.testing.assert_array_equal(y, x, err_msg=key)
  for leaf in set(params) - set(GONE):
    assert np.any(updates[leaf])
    if name not in ACROSS:
      trees.assert_close(updates[leaf], wanted[leaf])
    assert any(not np.array_equal(after[key][0], numbers[key][0])
               for key in numbers if key.endswith(f"/{leaf}"))
  assert not np.any(last["w0"])
  assert np.any(last["w1"])


@pytest.mark.parametrize("batched", [False, True])
def test_a_leaf_that_is_not_present_is_one_without_a_gradient(batched):
  """Means across leaves are over those that are there."""
  options = {**EVERYTHING, "relationship_discovery_interval": 2}
  params, tx = parameters(), ho.hina_adaptive(1e-2, **options, leaf_batching=batched)
  given = trees.sequence(params, 4)
  state = missing = tx.init(params)
  update = jax.jit(tx.update)
  for g in given:
    updates, state = update(g, state, params, present=flags(*GONE))
    wanted, missing = update(g | dict.fromkeys(GONE), missing, params)
    for leaf in set(params) - set(GONE):
      trees.assert_close(updates[leaf], wanted[leaf], 2e-6, 1e-7)
  trees.assert_close(state, missing, 2e-6, 1e-7)
