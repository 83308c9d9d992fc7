"""One program for every platform, and another for CPUs that gives its numbers."""

import jax
import jax.numpy as jnp
import pytest

import hina_optax as ho
from hina_optax.grouped import xla_cpu
from tests import trees
from tests.cases import EVERYTHING, every_driven_case

# What only a program for CPUs may hold: calls that are not inlined, and what goes with them.
FOR_CPUS = ("inlineable", "_handed_on", "_never")


def many_leaves():
  """More elements than those from which a program for CPUs is made, most of them in stacks."""
  make = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
  params = {f"l{i}": {"lora_a": make(512, 64), "lora_b": make(64, 512)} for i in range(34)}
  params["conv"] = {"kernel": make(3, 3, 64, 64)}
  assert sum(x.size for x in jax.tree.leaves(params)) > xla_cpu.MIN_ELEMENTS
  return params


MAKERS = {
  "everything": lambda: ho.hina_adaptive(1e-2, **EVERYTHING),
  "compat": lambda: ho.hina_adaptive(1e-2, **EVERYTHING, sd_scripts_compat=True),
  "bf16": lambda: ho.hina_adaptive(1e-2, reduce_precision=True),
  "batched": lambda: ho.with_leaf_batching(ho.scale_by_hina(torque="average")),
}


@pytest.mark.parametrize("how", ["update", "apply"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_program_lowered_for_an_accelerator_knows_nothing_of_cpus(name, how):
  tx, params = MAKERS[name](), many_leaves()
  step = tx.update if how == "update" else lambda g, s, p: ho.apply(tx, g, s, p)
  traced = jax.jit(step).trace(params, jax.eval_shape(tx.init, params), params)
  for platform in ("cuda", "tpu"):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert [word for word in FOR_CPUS if word in text] == []
  assert "inlineable" in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_a_program_exported_for_an_accelerator_knows_nothing_of_cpus():
  tx, params = ho.hina_adaptive(1e-2), many_leaves()
  state = jax.eval_shape(tx.init, params)
  text = jax.export.export(jax.jit(tx.update), platforms=("cuda",))(
    params, state, params).mlir_module()
  assert [word for word in FOR_CPUS if word in text] == []


def test_a_program_exported_for_several_platforms_runs_here(monkeypatch):
  monkeypatch.setattr(xla_cpu, "MIN_ELEMENTS", 0)
  tx, params = ho.hina_adaptive(1e-2, relationship_discovery_interval=1), trees.layers()
  gradients, state = trees.sequence(params, 1)[0], tx.init(params)
  exported = jax.export.export(jax.jit(tx.update), platforms=("cpu", "cuda"))(
    gradients, state, params)
  trees.assert_close(
    exported.call(gradients, state, params), jax.jit(tx.update)(gradients, state, params),
    2e-5, 2e-6)


def test_groups_of_small_trees_are_no_calls(monkeypatch):
  tx, params = ho.hina_adaptive(1e-2), trees.layers()
  state = tx.init(params)

  def count_calls():
    return jax.jit(tx.update).lower(params, state, params).as_text().count("inlineable")

  small = count_calls()
  monkeypatch.setattr(xla_cpu, "MIN_ELEMENTS", 0)
  tx = ho.hina_adaptive(1e-2)
  assert count_calls() >= small + len(params)


def driven(case):
  return case.make() if case.kind == "alias" else ho.with_leaf_batching(case.make())


@every_driven_case
def test_a_program_for_cpus_gives_the_numbers_of_the_plain_one(case, monkeypatch):
  params = trees.layers()
  gradients = trees.sequence(params, 4)
  gradients[2] = {**gradients[2], "bias": None, "layers": {**gradients[2]["layers"], "1": {
    **gradients[2]["layers"]["1"], "square": None}}}
  monkeypatch.setattr(xla_cpu, "MIN_ELEMENTS", 1 << 60)
  expected = trees.run(driven(case), params, gradients, apply=False)
  monkeypatch.setattr(xla_cpu, "MIN_ELEMENTS", 0)
  actual = trees.run(driven(case), params, gradients, apply=False)
  trees.assert_close(actual, expected, 2e-5, 2e-6)
