"""Leaves that the argument `present` calls absent, whatever keeps the state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hina_optax as ho
from tests import trees
from tests.frozen.make import rows_by_name
from tests.memory.test_apply import MAKES, parameters

MAKES = {name: make for name, make in MAKES.items() if name != "optax"}
GONE = ("w1", "bias")
# Their other leaves are scaled by what is found across all that are there.
ACROSS = ("across leaves", "alias", "narrow alias")


def flags(*gone):
  return {name: jnp.asarray(name not in gone) for name in parameters()}


@pytest.mark.parametrize("name", [
  pytest.param(n, marks=[pytest.mark.slow] if n == "narrow alias" else []) for n in MAKES])
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
