"""How a transformation is driven: init in any way, `apply`, copies, inside of `shard_map`."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import hina_optax as ho
from hina_optax.grouped import xla_cpu
from tests import trees
from tests.cases import EVERYTHING, as_optimizer, every_case, every_driven_case

COPIES = {
  "tree.map": lambda tx: jax.tree.map(lambda x: x, tx),
  "_replace": lambda tx: tx._replace(),
  "copy": copy.copy,
  "deepcopy": copy.deepcopy,
}


def told(state):
  """What a program sees of a state."""
  return jax.tree.structure(state), [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(
    jax.eval_shape(lambda tree: tree, state))]


INITS = {
  "called": lambda tx, params: tx.init(params),
  "jitted": lambda tx, params: jax.jit(tx.init)(params),
  "abstract": lambda tx, params: jax.eval_shape(tx.init, params),
  "abstract, of shapes": lambda tx, params: jax.eval_shape(
    tx.init, jax.eval_shape(lambda: params)),
}


@every_case
@pytest.mark.parametrize("batched", [False, True])
def test_init_gives_the_same_however_and_whenever_it_is_called(case, batched):
  params, found = trees.layers(), []
  for order in (list(INITS), list(INITS)[::-1]):
    tx = ho.with_leaf_batching(case.make()) if batched else case.make()
    found += [told(INITS[name](tx, params)) for name in order]
  assert all(x == found[0] for x in found)


@pytest.mark.parametrize("batched", [False, True])
def test_the_layout_is_that_of_the_argument_not_of_an_earlier_call(batched):
  few, many = {"a": jnp.ones((3, 3))}, trees.layers()
  make = lambda: (  # noqa: E731
    ho.with_leaf_batching(optax.adam(0.1)) if batched else ho.hina_adaptive())
  tx = make()
  with jax.numpy_dtype_promotion("standard"):
    for params in (few, many, few):
      state = tx.init(params)
      assert told(state) == told(make().init(params))
      updates, state = jax.jit(tx.update)(params, state, params)
      assert told(state) == told(make().init(params))
      assert jax.tree.structure(updates) == jax.tree.structure(params)


def driven(case):
  """The case as an optimizer in the loop over groups of leaves, if it is taken there in a chain."""
  tx = as_optimizer(case)
  return tx if case.kind == "alias" or case.looks_across else ho.with_leaf_batching(tx)


def in_two_calls(tx):
  def step(g, state, params):
    updates, state = tx.update(g, state, params)
    return optax.apply_updates(params, updates), state

  return jax.jit(step)


def in_one_call(tx):
  return jax.jit(lambda g, state, params: ho.apply(tx, g, state, params))


def check_apply(tx, params, gradients):
  state = tx.init(params)
  actual, expected = (params, state), (params, state)
  one, two = in_one_call(tx), in_two_calls(tx)
  for g in gradients:
    actual, expected = one(g, actual[1], actual[0]), two(g, expected[1], expected[0])
    assert trees.dtypes(actual) == trees.dtypes(expected)
    trees.assert_close(actual, expected)


@every_driven_case
def test_apply_is_an_update_and_its_addition(case):
  params = trees.layers()
  check_apply(driven(case), params, trees.sequence(params, 2))


@pytest.mark.parametrize("tx", [
  optax.sgd(0.1, momentum=0.9), optax.chain(ho.scale_by_hina(), optax.scale(-0.1)),
  ho.with_state_dtype(optax.sgd(0.1, momentum=0.9), min_size=0),
], ids=["optax", "chain", "bf16"])
def test_apply_takes_any_transformation(tx):
  params = trees.layers()
  check_apply(tx, params, trees.sequence(params, 2))


@pytest.mark.parametrize("make", [
  lambda: ho.hina_adaptive(1e-2), lambda: ho.with_leaf_batching(optax.sgd(0.1, momentum=0.9)),
])
def test_apply_adds_to_parameters_of_several_dtypes_and_leaves_others_alone(make):
  params = trees.layers((jnp.bfloat16, jnp.float32))
  check_apply(make(), params, trees.sequence(params, 2))
  gradients = trees.sequence(params, 1)[0]
  gradients = {**gradients, "bias": None, "layers": {**gradients["layers"], "1": {
    **gradients["layers"]["1"], "square": None}}}
  tx = make()
  new, state = in_one_call(tx)(gradients, tx.init(params), params)
  assert jax.tree.structure(new) == jax.tree.structure(params)
  trees.assert_equal(new["bias"], params["bias"])
  trees.assert_equal(new["layers"]["1"]["square"], params["layers"]["1"]["square"])
  assert float(jnp.abs(new["layers"]["0"]["square"] - params["layers"]["0"]["square"]).max()) > 0
  assert told(state) == told(tx.init(params))


def test_apply_without_parameters_or_with_an_argument_too_many():
  params = trees.few()
  tx = ho.hina_adaptive(1e-2)
  with pytest.raises(ValueError, match=r"hina_optax\.apply"):
    ho.apply(tx, params, tx.init(params), None)
  expected = in_one_call(tx)(params, tx.init(params), params)
  actual = jax.jit(lambda g, s, p: ho.apply(tx, g, s, p, nobody_expects_this=jnp.ones([])))(
    params, tx.init(params), params)
  trees.assert_equal(actual, expected)


@every_case
def test_a_copy_of_a_transformation_is_the_transformation(case):
  tx, params = case.make(), trees.layers()
  gradients = trees.sequence(params, 2)
  expected = trees.run(tx, params, gradients, apply=False)
  stacked = told(jax.eval_shape(ho.with_leaf_batching(tx).init, params))
  for name, make in COPIES.items():
    other = make(tx)
    assert type(other) is type(tx), name
    trees.assert_equal(trees.run(other, params, gradients, apply=False), expected)
    # What the loop over groups asks a transformation for it finds on the copy as well.
    assert told(jax.eval_shape(ho.with_leaf_batching(other).init, params)) == stacked, name


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_knows_its_options_and_its_plan(name):
  tx, params = ho.hina_adaptive(1e-2, vram_budget_gb=1e-6, edge_penalty=0.3), trees.layers()
  other, state = COPIES[name](tx), tx.init(params)
  assert ho.get_optimization_info(state, other) == ho.get_optimization_info(state, tx)
  assert ho.get_optimization_info(state, other)["options"]["edge_penalty"] == 0.3
  assert ho.plan_memory(other, params).to_dict() == ho.plan_memory(tx, params).to_dict()
  moved = [ho.optimize_for_vram(x, state, params, 1.0) for x in (tx, other)]
  assert told(moved[0][1]) == told(moved[1][1])
  assert moved[1][0].options.vram_budget_gb == 1.0


def test_a_copy_of_a_batched_transformation_is_batched():
  tx, params = ho.with_leaf_batching(ho.suppress_edges(), max_elements=20), trees.layers()
  for make in COPIES.values():
    assert told(make(tx).init(params)) == told(tx.init(params))
    wrapped = ho.with_leaf_batching(make(tx), max_elements=1 << 20)
    assert told(wrapped.init(params)) == told(
      ho.with_leaf_batching(tx, max_elements=1 << 20).init(params))


MAPPED = {
  "defaults": lambda: ho.hina_adaptive(1e-2),
  "everything": lambda: ho.hina_adaptive(1e-2, **{
    **EVERYTHING, "relationship_discovery_interval": 2}),
  "importance": lambda: ho.scale_by_importance(ho.scale_by_hina(), interval=2),
  "orthogonal": ho.orthogonalize_to_params,
}


@pytest.mark.parametrize(("name", "devices", "for_cpus"), [
  *(pytest.param(name, devices, False, marks=pytest.mark.slow if name == "everything" else [])
    for name in MAPPED for devices in (1, 8)),
  pytest.param("everything", 8, True, marks=pytest.mark.slow), ("importance", 8, True),
])
def test_a_step_inside_of_shard_map_is_the_step(name, devices, for_cpus, monkeypatch):
  """With JAX's own checks of what is replicated: parameters are, gradients are summed."""
  if for_cpus:
    monkeypatch.setattr(xla_cpu, "MIN_ELEMENTS", 0)
  tx, params, whole = MAPPED[name](), trees.layers(), PartitionSpec()
  mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])

  def step(g, state, params):
    return tx.update(jax.lax.psum(jax.tree.map(lambda x: x[0], g), "data"), state, params)

  mapped = jax.jit(jax.shard_map(
    step, mesh=mesh, in_specs=(PartitionSpec("data"), whole, whole), out_specs=whole))
  update = jax.jit(tx.update)
  expected = actual = (None, tx.init(params))
  for g in trees.sequence(params, 2):
    share = jnp.full((devices,), 1 / devices)
    spread = jax.tree.map(lambda x: jnp.tensordot(share, x, 0), g)
    expected, actual = update(g, expected[1], params), mapped(spread, actual[1], params)
    trees.assert_close(jax.tree.map(np.asarray, actual), jax.tree.map(np.asarray, expected),
                       2e-5, 2e-6)


def arguments_of(jaxpr):
  """Arguments of a program and of all functions that it calls, each time they are called."""
  count = len(jaxpr.invars)
  for equation in jaxpr.eqns:
    for value in equation.params.values():
      for inside in value if isinstance(value, (tuple, list)) else (value,):
        inside = getattr(inside, "jaxpr", inside)
        count += arguments_of(inside) if hasattr(inside, "eqns") else 0
  return count


@pytest.mark.parametrize("for_cpus", [False, True])
def test_tracing_is_linear_in_leaves(for_cpus, monkeypatch):
  """No leaf's turn is handed the state of all others."""
  if for_cpus:
    monkeypatch.setattr(xla_cpu, "MIN_ELEMENTS", 0)
  tx = ho.hina_adaptive(1e-2, leaf_batching=False)

  def arguments(count):
    params = {f"w{i:02}": jnp.ones((3, 4 + i)) for i in range(count)}
    state = jax.eval_shape(tx.init, params)
    return arguments_of(jax.make_jaxpr(tx.update)(params, state, params).jaxpr)

  few, twice, many = (arguments(count) for count in (6, 12, 24))
  assert many - twice < 2.2 * (twice - few)
