"""Plans: exact bytes, the order of the steps, what `hina_adaptive` makes of them, moving states."""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hina_optax as ho
from hina_optax import memory
from tests import trees
from tests.cases import OFF

MB = 1 << 20
LIGHT = {**OFF, "use_spd": True, "background_regularization": True}


class Pair(NamedTuple):
  """Parameters of a user who keeps them in a NamedTuple."""

  first: Any
  second: Any


def shapes(**given):
  return {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in given.items()}


def lora(pairs, rank):
  names = [f"{i}/{k}" for i in range(pairs) for k in ("lora_a", "lora_b")]
  sides = [(320, rank), (rank, 320)] * pairs
  return shapes(**dict(zip(names, sides)))


TREES = {
  "matrix": shapes(w=(512, 512)),
  "two-matrices": shapes(a=(512, 512), b=(256, 1024)),
  "with-vectors": shapes(w=(512, 512), bias=(512,), scale=()),
  "lora-8": lora(8, 4),
  "lora-64": lora(20, 64),
  "convolution": shapes(kernel=(3, 3, 64, 128), bias=(128,)),
  "odd-sizes": shapes(a=(511, 513), b=(127,), c=(33, 35, 37)),
  "empty-leaf": shapes(w=(256, 256), nothing=(0, 4)),
  "bf16": {"w": jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)},
  "many-small": shapes(**{f"w{i}": (16, 16) for i in range(40)}),
}


def real(tree):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), tree)


def allocated(state):
  found = {}
  for x in jax.tree.leaves(state):
    key = x.dtype.name, "host" if memory.is_on_host(x) else "device"
    found[key] = found.get(key, 0) + x.nbytes
  return found


def planned(plan):
  found = {}
  for row in plan.rows:
    if row.group not in ("parameters", "gradients"):
      key = row.dtype, row.place
      found[key] = found.get(key, 0) + row.bytes
  return found


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("share", [1.0, 0.75, 0.6, 0.45])
def test_the_plan_s_bytes_are_the_allocated_ones(tree, share):
  """For budgets from all that fp32 needs down to what only the least form meets."""
  params = TREES[tree]
  whole = ho.plan_memory(dict(LIGHT), params).device_bytes
  tx = ho.hina_adaptive(1e-3, **LIGHT, vram_budget_gb=share * whole / 2**30)
  plan = ho.plan_memory(tx, params)
  assert planned(plan) == allocated(tx.init(real(params)))
  assert (plan.device_bytes <= share * whole) == plan.fits


def test_offloaded_bytes_are_the_allocated_ones():
  params = TREES["lora-64"]
  tx = ho.hina_adaptive(1e-3, **LIGHT, cpu_offload_states=True, reduce_precision=True)
  plan, found = ho.plan_memory(tx, params), allocated(tx.init(real(params)))
  assert planned(plan) == found
  assert plan.host_bytes == found["bfloat16", "host"] > 30 * sum(
    size for (_, place), size in found.items() if place == "device")


def test_smaller_budgets_take_the_steps_in_their_order():
  params = shapes(**{f"w{i}": (512, 512) for i in range(12)})
  light = {**LIGHT, "leaf_batching": False}  # a stack goes as one
  whole = ho.plan_memory(light, params).device_bytes
  seen, last = [], whole + 1
  for share in (1.0, 0.85, 0.7, 0.55, 0.5, 0.45, 0.42):
    plan = ho.plan_memory(light, params, share * whole / 2**30)
    assert plan.fits
    assert plan.device_bytes <= last
    last = plan.device_bytes
    seen.append({s.change for s in plan.steps})
  assert seen[0] == set()
  assert seen[1] == {"bfloat16"}
  assert {"bfloat16", "8-bit"} in seen
  assert seen[-1] == {"bfloat16", "8-bit", "host memory"}


def test_the_largest_leaf_goes_first():
  params = shapes(large=(1024, 1024), small=(256, 256))
  whole = ho.plan_memory(optax.adamw(1e-3), params).device_bytes
  plan = ho.plan_memory(optax.adamw(1e-3), params, (whole - MB) / 2**30)
  assert plan.storage.narrow == {"0/mu/large"}
  assert [(s.group, s.change, s.leaves, s.saves) for s in plan.steps] == [
    ("mu", "bfloat16", 1, 2 * MB)]


def test_what_does_not_fit_is_said_plainly():
  plan = ho.plan_memory(optax.adamw(1e-3), TREES["matrix"], 1.5 / 1024)
  assert not plan.fits
  assert plan.excess_bytes == plan.device_bytes - int(1.5 * MB)
  assert "does not fit the budget of 1.5 MB" in str(plan)
  assert "Parameters and gradients alone take 2.0 MB" in str(plan)


def test_a_step_that_saves_little_is_advised_against():
  params = TREES["lora-8"]
  need = ho.plan_memory(optax.adamw(1e-3), params).device_bytes / 2**30
  plan = ho.plan_memory(optax.adamw(1e-3), params, 1.0 + need * 0.9, reserve_gb=1.0)
  assert plan.fits
  assert plan.steps
  assert all(step["advice"] for step in plan.to_dict()["steps"])
  assert "leave it out if you can" in str(plan)
  alone = ho.plan_memory(optax.adamw(1e-3), params, need * 0.9)
  assert not any(step["advice"] for step in alone.to_dict()["steps"])


def test_a_plan_is_data():
  plan = ho.plan_memory(ho.extreme_memory_preset(), TREES["lora-64"])
  data = json.loads(json.dumps(plan.to_dict()))
  assert data["device_bytes"] == plan.device_bytes
  assert data["fits"] is True
  assert sum(row["bytes"] for row in data["rows"]) + data["window_bytes"] >= data["device_bytes"]


@pytest.mark.parametrize(
  ("arguments", "words"),
  [((0.0,), "vram_budget_gb"), ((-1.0,), "vram_budget_gb"), ((float("nan"),), "vram_budget_gb"),
   ((1.0, -0.5), "reserve_gb")],
)
def test_wrong_budgets_are_named(arguments, words):
  with pytest.raises(ValueError, match=words):
    ho.plan_memory(optax.adamw(1e-3), TREES["matrix"], *arguments)


def test_what_is_no_optimizer_is_refused():
  with pytest.raises(TypeError, match="dict of options"):
    ho.plan_memory(3, TREES["matrix"])
  with pytest.raises(TypeError, match="hina_adaptive"):
    ho.optimize_for_vram(optax.adamw(1e-3), None, TREES["matrix"], 1.0)


def test_a_window_below_the_largest_leaf_says_its_size():
  tx = ho.hina_adaptive(
    1e-3, **LIGHT, cpu_offload_states=True, max_buffer_memory_mb=0.5, vram_budget_gb=1.0)
  with pytest.raises(ValueError, match=r"max_buffer_memory_mb is 0\.5.*'.*/w'.* 1 MB"):
    tx.init(real(TREES["matrix"]))
  with pytest.raises(ValueError, match=r"max_buffer_memory_mb is 0\.5"):
    ho.plan_memory(tx, TREES["matrix"])


def test_training_follows_the_plan_and_stays_close_to_fp32():
  params = real(TREES["two-matrices"])
  whole = ho.plan_memory(dict(LIGHT), params).device_bytes
  gradients = trees.sequence(params, 8)
  plain, _, _ = trees.run(ho.hina_adaptive(1e-2, **LIGHT), params, gradients)
  tight = ho.hina_adaptive(1e-2, **LIGHT, vram_budget_gb=0.5 * whole / 2**30)
  ours, _, state = trees.run(tight, params, gradients)
  kinds = {x.dtype.name for x in jax.tree.leaves(state)}
  assert "uint8" in kinds
  assert allocated(state) == planned(ho.plan_memory(tight, params))
  for name in params:
    moved = jnp.linalg.norm(plain[name] - params[name])
    assert float(jnp.linalg.norm(ours[name] - plain[name]) / moved) < 0.2


def test_a_budget_that_fits_changes_no_bit():
  params = real(TREES["with-vectors"])
  gradients = trees.sequence(params, 2)
  plain = trees.run(ho.hina_adaptive(1e-2, **LIGHT), params, gradients)
  roomy = trees.run(ho.hina_adaptive(1e-2, **LIGHT, vram_budget_gb=8.0), params, gradients)
  trees.assert_equal(roomy[0], plain[0])
  assert jax.tree.structure(roomy[2]) == jax.tree.structure(plain[2])


def test_adaptive_features_plan_for_80_percent():
  params = TREES["two-matrices"]
  budget = ho.plan_memory(dict(LIGHT), params).device_bytes / 0.9 / 2**30
  assert ho.plan_memory(dict(LIGHT), params, budget).pressure > 0.85
  options = {**LIGHT, "adaptive_features": True, "vram_budget_gb": budget}
  assert ho.plan_memory(options, params).pressure <= 0.8


def test_emergency_simplify_drops_state_before_it_packs_and_says_what():
  params = TREES["two-matrices"]
  budget = 0.8 * ho.plan_memory(dict(LIGHT), params).device_bytes / 2**30
  options = {**LIGHT, "emergency_simplify": True, "vram_budget_gb": budget}
  with pytest.warns(UserWarning, match="switched off background_regularization"):
    plan = ho.plan_memory(options, params)
  assert plan.dropped[0] == "background_regularization"
  assert plan.fits
  assert "background" not in {row.group for row in plan.rows}
  assert "dropped to save its state: background_regularization" in str(plan)


class TestOptimizeForVram:
  def trained(self, **options):
    params = real(TREES["two-matrices"])
    tx = ho.hina_adaptive(1e-2, **LIGHT, **options)
    params, _, state = trees.run(tx, params, trees.sequence(params, 3))
    return tx, state, params

  def budget(self, tx, params, share):
    return share * ho.plan_memory(tx, params).device_bytes / 2**30

  def test_values_are_those_of_the_old_state(self):
    tx, state, params = self.trained()
    packed, packed_state = ho.optimize_for_vram(tx, state, params, self.budget(tx, params, 0.5))
    assert "uint8" in {x.dtype.name for x in jax.tree.leaves(packed_state)}
    assert allocated(packed_state) == planned(ho.plan_memory(packed, params))
    _, again = ho.optimize_for_vram(packed, packed_state, params, 1.0)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state)):
      assert a.dtype == b.dtype
      scale = float(jnp.abs(b).max()) if b.size else 0.0
      np.testing.assert_allclose(a, b, rtol=0.1, atol=0.03 * scale)

  def test_the_new_state_is_the_one_that_the_new_optimizer_expects(self):
    tx, state, params = self.trained()
    packed, packed_state = ho.optimize_for_vram(tx, state, params, self.budget(tx, params, 0.6))
    assert trees.dtypes(packed_state) == trees.dtypes(packed.init(params))
    g = trees.sequence(params, 1)[0]
    updates, new = jax.jit(packed.update)(g, packed_state, params)
    expected, _ = jax.jit(tx.update)(g, state, params)
    assert jax.tree.structure(new) == jax.tree.structure(packed_state)
    # The step goes on from the moments, not from zero.
    for u, e in zip(jax.tree.leaves(updates), jax.tree.leaves(expected)):
      assert float(jnp.linalg.norm(u - e) / jnp.linalg.norm(e)) < 0.1
    assert ho.get_optimization_info(new)["figures"]["step"] == 4

  def test_dropped_features_leave_the_others_where_they_were(self):
    tx, state, params = self.trained(emergency_simplify=True, vram_budget_gb=1.0)
    with pytest.warns(UserWarning, match="switched off background_regularization"):
      small, moved = ho.optimize_for_vram(tx, state, params, self.budget(tx, params, 0.8))
    trees.assert_equal(optax.tree.get(moved, "mu"), optax.tree.get(state, "mu"))
    trees.assert_equal(optax.tree.get(moved, "nu"), optax.tree.get(state, "nu"))
    assert "background_regularization" not in ho.get_optimization_info(moved)["features"]
    assert allocated(moved) == planned(small.choose_plan(params).plan)

  @pytest.mark.parametrize("tree", [list, tuple, Pair._make], ids=["list", "tuple", "named"])
  def test_parameters_may_be_in_sequences(self, tree):
    params = tree([jnp.ones((128, 128)), jnp.ones((128, 64))])
    tx = ho.hina_adaptive(1e-2, **LIGHT)
    _, _, state = trees.run(tx, params, trees.sequence(params, 2))
    _, moved = ho.optimize_for_vram(tx, state, params, 1.0)
    trees.assert_equal(moved, state)

  def test_another_state_is_refused(self):
    tx, state, params = self.trained()
    other = ho.hina_adaptive(1e-2, **LIGHT, reduce_precision=True)
    with pytest.raises(ValueError, match=r"WithStateDtypeState.*another plan"):
      ho.optimize_for_vram(other, state, params, 1.0)
    with pytest.raises(ValueError, match="not of this optimizer"):
      ho.optimize_for_vram(tx, optax.adamw(1e-3).init(params), params, 1.0)


def test_memory_stats_see_where_state_lies():
  params = real(TREES["lora-64"])
  tx = ho.hina_adaptive(1e-3, **LIGHT, vram_budget_gb=0.5, cpu_offload_states=True,
                        max_buffer_memory_mb=200)
  state = tx.init(params)
  stats = ho.get_memory_stats(state, tx)
  plan = ho.plan_memory(tx, params)
  pool = stats["buffer_pool_stats"]
  assert pool["host_memory_mb"] * MB == plan.host_bytes > 0
  assert pool["current_memory_mb"] * MB == plan.state_bytes - plan.host_bytes
  assert pool["max_memory_mb"] == 200
  assert stats["limit_mb"] == 512
  assert stats["memory_pressure"] == stats["used_mb"] / 512
  # Without a budget the limit is the machine's.
  assert ho.get_memory_stats()["limit_mb"] > 512
  held = jnp.zeros((1024, 1024)).block_until_ready()
  assert ho.get_memory_stats(state, tx)["used_mb"] >= stats["used_mb"] + 3.9
  del held
