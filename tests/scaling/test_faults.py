"""Gradients that are not numbers, memory that does not suffice: nothing is lost, and it is said."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hina_optax as ho
from hina_optax import memory
from tests import trees
from tests.cases import CASES, EVERYTHING, as_optimizer
from tests.memory.storages import raises

BAD = (jnp.nan, jnp.inf, -jnp.inf)
some_cases = pytest.mark.parametrize("case", [
  pytest.param(c, marks=[] if c.faults_every_time else [pytest.mark.slow]) for c in CASES], ids=str)


def spoiled(tree, value, everywhere):
  """One leaf, or all, with one element that is no number."""
  def spoil(x):
    return x.at[(0,) * x.ndim].set(value) if x.size else x

  return jax.tree.map(spoil, tree) if everywhere else {**tree, "square": spoil(tree["square"])}


@some_cases
def test_state_stays_finite(case):
  """Bad numbers in one leaf or in all, then good ones: the state has only finite numbers."""
  tx, params = as_optimizer(case), trees.mixed()
  good = trees.sequence(params, 3)
  update = jax.jit(tx.update)
  for everywhere in (False, True):
    state = tx.init(params)
    for value in BAD:
      updates, state = update(spoiled(good[0], value, everywhere), state, params)
      assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state))
      if not everywhere and not case.spreads_bad_numbers:
        others = {k: v for k, v in updates.items() if k != "square"}
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(others))
    for g in good:
      updates, state = update(g, state, params)
      assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((updates, state)))


def test_the_whole_chain_takes_0_for_what_is_no_number():
  """It passes as it is, in the dtype of its parameter; all else is as with 0 in its place."""
  tx = ho.hina_adaptive(1e-2, **EVERYTHING)
  params = trees.mixed((jnp.float32, jnp.bfloat16))
  good = trees.sequence(params, 2)
  update = jax.jit(tx.update)
  _, start = update(good[0], tx.init(params), params)
  expected, expected_state = update(spoiled(good[1], 0.0, True), start, params)
  for value in BAD:
    updates, state = update(spoiled(good[1], value, True), start, params)
    trees.assert_equal(state, expected_state)
    trees.assert_equal(updates, spoiled(expected, value, True))
    assert trees.dtypes(updates) == trees.dtypes(params)


@some_cases
def test_a_guarded_step_is_skipped_whole(case):
  """In optax's guards a bad step leaves no trace: neither in the parameters nor in the state."""
  params, guarded = trees.mixed(), as_optimizer(case)
  good = trees.sequence(params, 3)
  bad = [spoiled(good[0], value, everywhere) for value in BAD for everywhere in (False, True)]
  with jax.numpy_dtype_promotion("standard"):
    for tx in (
      optax.apply_if_finite(guarded, max_consecutive_errors=10),
      optax.MultiSteps(guarded, 1, should_skip_update_fn=optax.skip_not_finite),
    ):
      state, update = tx.init(params), jax.jit(tx.update)
      expected, plain = tx.init(params), []
      for g in good:
        updates, expected = update(g, expected, params)
        plain.append(updates)
      for i, g in enumerate(good):
        for b in bad[2 * i:2 * i + 2]:
          updates, state = update(b, state, params)
          trees.assert_equal(updates, jax.tree.map(jnp.zeros_like, params))
        updates, state = update(g, state, params)
        trees.assert_equal(updates, plain[i])
      inner = [getattr(s, "inner_state", getattr(s, "inner_opt_state", None))
               for s in (state, expected)]
      trees.assert_equal(*inner)


def exhausted(monkeypatch, above):
  """Makes every array of more than so many bytes impossible, as a full device does."""
  real = jax.numpy.full_like

  def full_like(x, *args, **kwargs):
    if not isinstance(x, jax.core.Tracer) and np.size(x) * 4 > above:
      raise jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 268435456 bytes.")
    return real(x, *args, **kwargs)

  monkeypatch.setattr(jnp, "full_like", full_like)


def test_out_of_memory_names_the_plan_and_a_smaller_one(monkeypatch):
  params = {"w": jnp.ones((512, 512)), "b": jnp.ones(8)}
  exhausted(monkeypatch, 1 << 18)
  tx = ho.hina_adaptive(1e-3, memory_efficient=True, vram_budget_gb=1.0)
  with raises(memory.StateMemoryError, "state of 4.5 MB", "float32", "plan for vram_budget_gb=1",
              "Try", "which needs", "RESOURCE_EXHAUSTED"):
    tx.init(params)
  with raises(memory.StateMemoryError, "no memory plan", "vram_budget_gb="):
    ho.hina_adaptive(1e-3).init(params)


def test_the_plan_that_is_proposed_is_smaller(monkeypatch):
  params = {"w": jnp.ones((512, 512)), "b": jnp.ones(8)}
  tx = ho.hina_adaptive(1e-3)
  before = ho.plan_memory(tx, params)
  exhausted(monkeypatch, 1 << 18)
  with pytest.raises(memory.StateMemoryError) as caught:
    tx.init(params)
  budget = float(re.search(r"vram_budget_gb=([\d.e-]+)", str(caught.value)).group(1))
  after = ho.plan_memory(ho.hina_adaptive(1e-3, vram_budget_gb=budget), params)
  assert after.fits
  assert after.device_bytes < before.device_bytes


def test_where_no_plan_is_smaller_it_says_so(monkeypatch):
  params = {"w": jnp.ones((512, 512))}
  tx = ho.hina_adaptive(1e-3, vram_budget_gb=1e-6)
  exhausted(monkeypatch, 1 << 10)
  with raises(memory.StateMemoryError, "no plan is smaller", "devices"):
    tx.init(params)


def test_other_errors_pass(monkeypatch):
  def broken(*args, **kwargs):
    raise jax.errors.JaxRuntimeError("INTERNAL: something else")

  monkeypatch.setattr(jnp, "full_like", broken)
  with raises(jax.errors.JaxRuntimeError, "something else"):
    ho.hina_adaptive(1e-3).init({"w": jnp.ones((8, 8))})
