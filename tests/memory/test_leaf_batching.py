"""with_leaf_batching: the same numbers from few arrays, for any per-leaf transformation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import trees
from cases import CASES, EVERYTHING, RARE
from storages import INNERS

import hina_optax as ho
from hina_optax import _in_turn, _stacks, memory


def layers(count=3, dtype=jnp.float32):
  """Leaves that are alike, under names in an order that mixes the shapes, and some that are not."""
  rng = np.random.default_rng(7)
  make = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
  tree = {
    f"l{i}": {"bias": make(5), "lora_a": make(6, 2), "lora_b": make(2, 5)} for i in range(count)
  }
  other = {"lora_a": make(8, 2), "lora_b": make(2, 5)}
  return {**tree, "other": other, "scale": make(), "shift": make(), "empty": make(0, 3),
          "conv": {"a": make(3, 3, 2, 4), "b": make(3, 3, 2, 4)}, "absent": None}


def both(case):
  if case.kind == "alias":
    return (case.factory(**case.kwargs, leaf_batching=False),
            case.factory(**case.kwargs, leaf_batching=True))
  return case.make(), memory.with_leaf_batching(case.make())


def steps(params, count=4):
  """Gradients, of which the second misses a row of a stack and a leaf of its own."""
  gradients = trees.sequence(params, count)
  gradients[1]["l1"]["lora_b"] = None
  gradients[1]["l1"]["lora_a"] = None
  gradients[1]["empty"] = None
  return gradients


# What these have on is in the case with everything on, or batched as a part by itself.
COVERED = (*RARE, "hina_adaptive-defaults", "hina_adaptive-compat-everything",
           "scale_by_hina-torque")


@pytest.mark.parametrize("case", [
  pytest.param(c, marks=[pytest.mark.slow] if c.name in COVERED else []) for c in CASES
], ids=str)
def test_batched_is_unbatched(case, monkeypatch):
  # Stack by stack, but at the step at which a gradient is missing.
  monkeypatch.setattr(_in_turn, "LEAST", 0)
  params = layers()
  plain, batched = both(case)
  expected = trees.run(plain, params, steps(params), apply=False)[1]
  actual = trees.run(batched, params, steps(params), apply=False)[1]
  trees.assert_close(actual, expected, 2e-6, 2e-6)


@pytest.mark.parametrize("name", [n for n in INNERS if n not in ("clip_adam", "hina")])
def test_foreign_transformations(name):
  params = {k: v for k, v in layers().items() if k not in ("absent", "empty")}
  gradients = trees.sequence(params, 4)
  expected = trees.run_optax(INNERS[name](), params, gradients)[0]
  actual = trees.run_optax(memory.with_leaf_batching(INNERS[name]()), params, gradients)[0]
  trees.assert_close(actual, expected, 1e-5, 1e-6)


def test_stack_by_stack_is_all_at_once(monkeypatch):
  """Updates and state, with parameters in two dtypes and a gradient that is not finite."""
  params = layers(4) | {f"half{i}": jnp.full((6, 2), 0.1 * i, jnp.bfloat16) for i in range(3)}
  gradients = trees.sequence(params, 5)
  gradients[2]["l1"]["lora_a"] = gradients[2]["l1"]["lora_a"].at[0, 0].set(jnp.inf)
  runs = []
  for least in (0, 1 << 21):
    monkeypatch.setattr(_in_turn, "LEAST", least)
    tx = ho.hina_adaptive(1e-2, **EVERYTHING, leaf_batching=True)
    runs.append(trees.run(tx, params, gradients, apply=False)[1:])
  for x, y in zip(*map(jax.tree.leaves, runs)):
    np.testing.assert_allclose(np.float64(x), np.float64(y), 1e-5, 1e-7)


@pytest.mark.parametrize(("change", "expected"), [
  (dict(), True), (dict(count=4), False), (dict(size=2), False), (dict(compat=True), False),
  (dict(platform="gpu"), False), (dict(missing=True), False),
])
def test_where_steps_go_stack_by_stack(change, expected, monkeypatch):
  asked = dict(count=40, size=256, compat=False, platform="cpu", missing=False) | change
  monkeypatch.setattr(jax, "default_backend", lambda: asked["platform"])
  found = []
  monkeypatch.setattr(_in_turn, "update", lambda part, layout, leaves, state, *rest: (
    found.append(True) or (leaves, state)))
  tx = ho.hina_adaptive(1e-2, sd_scripts_compat=asked["compat"])
  shapes = {"a": (asked["size"],) * 2, "b": (asked["size"], 2 * asked["size"])}
  params = {f"{kind}{i}": jax.ShapeDtypeStruct(shape, jnp.float32)
            for i in range(asked["count"] // 2) for kind, shape in shapes.items()}
  gradients = {**params, "a0": None} if asked["missing"] else params
  jax.eval_shape(tx.update, gradients, jax.eval_shape(tx.init, params), params)
  assert bool(found) == expected


def test_a_chain_of_our_parts_keeps_its_numbers_of_leaves():
  def chain():
    core = ho.cautious(ho.scale_by_hina(torque="average"))
    return optax.chain(ho.suppress_edges(0.5, 0.2), core, optax.scale(-0.1))

  params = layers()
  gradients = trees.sequence(params, 4)
  tx = memory.with_leaf_batching(chain())
  actual, _, state = trees.run(tx, params, gradients)
  trees.assert_close(actual, trees.run(chain(), params, gradients)[0], 2e-6, 1e-6)
  assert optax.tree.get(state, "torque")["*/lora_a[6x2]"].shape == (3, 1)
  assert 0 < ho.get_optimization_info(state)["figures"]["alignment"] <= 1


@pytest.mark.parametrize("inner", [
  optax.chain(optax.clip_by_global_norm(1.0), optax.scale(0.1)),
  optax.contrib.prodigy(),
  optax.chain(ho.scale_by_importance(ho.scale_by_hina(), interval=2), optax.scale(-0.1)),
])
def test_an_inner_that_looks_across_leaves_is_refused(inner):
  params = layers()
  tx = memory.with_leaf_batching(inner)
  with (jax.numpy_dtype_promotion("standard"),
        pytest.raises(ValueError, match=r"depends on .*'l[01]/") as caught):
    tx.update(params, tx.init(params), params)
  assert "outside of the wrapper" in str(caught.value)


def test_state_is_one_dict_of_stacks_in_the_structure_of_the_inner():
  params = layers()
  tx = memory.with_leaf_batching(optax.adamw(1e-3))
  state = tx.init(params)
  shapes = {name: x.shape for name, x in optax.tree.get(state, "mu").items()}
  assert shapes == {
    "*/bias[5]": (3, 5), "*/lora_a[6x2]": (3, 6, 2), "*/lora_b[2x5]": (4, 2, 5), "*[]": (2,),
    "conv/*[3x3x2x4]": (2, 3, 3, 2, 4), "other/lora_a": (8, 2), "empty": (0, 3),
  }
  assert isinstance(optax.tree.get(state, "count"), jax.Array)
  assert optax.tree.get(state, "count").shape == ()
  noted = []
  optax.tree.map_params(tx, lambda x: noted.append(x.shape) or x, state)
  assert sorted(noted) == sorted(2 * list(shapes.values()))
  paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state)]
  assert len([p for p in paths if re.search("mu.*lora_b", p)]) == 1


def test_a_missing_gradient_leaves_its_row_alone():
  params = layers()
  tx = ho.hina_adaptive(1e-2, **EVERYTHING, leaf_batching=True)
  gradients = trees.sequence(params, 3)
  _, _, old = trees.run(tx, params, gradients[:2], apply=False)
  gradients[2]["l1"]["lora_a"] = None
  updates, new = jax.jit(tx.update)(gradients[2], old, params)
  assert updates["l1"]["lora_a"] is None
  for name in ("mu", "nu", "displacement", "bumps", "local_variance", "background"):
    before, after = (optax.tree.get(s, name)["*/lora_a[6x2]"] for s in (old, new))
    trees.assert_equal(after[1], before[1])
    assert not np.array_equal(after[0], before[0]), name
  place = [p for p, _ in jax.tree_util.tree_leaves_with_path(params)]
  place = next(i for i, p in enumerate(place) if jax.tree_util.keystr(p) == "['l1']['lora_a']") + 1
  torque = [optax.tree.get(s, "torque") for s in (old, new)]
  assert torque[0][place] == torque[1][place]
  assert torque[0][place - 1] != torque[1][place - 1]


def test_the_program_does_not_grow_with_equal_leaves():
  def operations(count):
    params = {f"l{i}": {"lora_a": jnp.ones((8, 2)), "lora_b": jnp.ones((2, 8))}
              for i in range(count)}
    tx = ho.hina_adaptive(1e-3, **EVERYTHING, leaf_batching=True)
    text = jax.jit(tx.update).lower(params, tx.init(params), params).as_text()
    return text.count("dot_general"), text.count("sqrt"), text.count("stablehlo.select")

  assert operations(6) == operations(40)


@pytest.mark.parametrize(("count", "dtype"), [
  (3, jnp.float32), (12, jnp.float32), (12, jnp.bfloat16), (100, jnp.float32), (1200, jnp.float32),
], ids=str)
def test_rows_come_out_of_a_stack_as_they_went_in(count, dtype):
  """In functions of their own, the last with fewer; more than one concatenation holds."""
  params = {f"p{i:04}": jnp.full((3,), i, dtype) for i in range(count)}
  params["p0000"] = jnp.array([jnp.nan, -1, jnp.inf], dtype)
  tx = memory.with_leaf_batching(optax.identity())
  for run in (tx.update, jax.jit(tx.update)):
    updates, _ = run(params, tx.init(params), params)
    trees.assert_equal(updates, params)


def test_rows_are_taken_out_by_few_functions():
  """XLA takes a time that is quadratic in what stands in one."""
  params = {f"p{i}": jnp.ones((4, 4)) for i in range(100)}
  tx = memory.with_leaf_batching(optax.scale(2.0))
  program = jax.jit(tx.update).lower(params, tx.init(params)).compile().as_text()
  assert len(re.findall(r" call\(", program)) == 10


def test_a_leaf_does_not_compute_the_one_before_again(monkeypatch):
  """Stack by stack each waits for one number of the last, and for no more."""
  monkeypatch.setattr(_in_turn, "LEAST", 0)

  def most_operands(count):
    params = {f"w{i}": jnp.ones((8, 8 + i)) for i in range(count)}
    params |= {f"v{i}": jnp.ones((8, 7)) for i in range(2)}
    tx = memory.with_leaf_batching(ho.suppress_high_frequency(0.1))
    state = tx.init(params)
    step = jax.jit(lambda g, params: optax.apply_updates(params, tx.update(g, state, params)[0]))
    program = step.lower(params, params).compile().as_text()
    fusions = re.findall(r" = f32\[8,\d+\]\S* fusion\(([^)]*)\)", program)
    return max(x.count("%") for x in fusions)

  assert most_operands(8) == most_operands(16)


# With parts that look across leaves and some that keep state, and quick to compile.
FEW = {"use_agr": False, "background_regularization": False, "use_adopt_stability": False,
       "use_lr_mask": False, "use_cautious": False, "edge_suppression": True,
       "lora_rank_penalty": True}


def test_leaves_that_are_not_alike_go_one_by_one(monkeypatch):
  """The same numbers, the state as it was."""
  params = {f"w{i}": jnp.linspace(-1, 1, 6 * (3 + i)).reshape(6, 3 + i) for i in range(8)}
  params |= {"lora_a": jnp.ones((5, 2)), "lora_b": jnp.ones((2, 4)), "bias": jnp.ones(3)}
  params |= {"absent": None}
  gradients, runs = trees.sequence(params, 5), []
  for least in (1 << 21, 0):
    monkeypatch.setattr(_in_turn, "LEAST", least)
    tx = ho.hina_adaptive(1e-2, **FEW, leaf_batching=True)
    runs.append(trees.run(tx, params, gradients, apply=False)[1:])
  assert jax.tree.structure(runs[0]) == jax.tree.structure(runs[1])
  for x, y in zip(*map(jax.tree.leaves, runs)):
    np.testing.assert_allclose(np.float64(x), np.float64(y), 1e-5, 1e-7)


def program_of(tx, params):
  """The compiled step for shapes."""
  state = jax.eval_shape(tx.init, params)
  step = jax.jit(lambda g, s, p: tx.update(g, s, p)[::-1], donate_argnums=(0, 1))
  return step.lower(params, state, params).compile()


def test_memory_beside_the_state_does_not_grow_with_leaves_that_stand_alone():
  def temporaries(count):
    params = {f"w{i}": jax.ShapeDtypeStruct((512, 512 + i), jnp.float32) for i in range(count)}
    program = program_of(memory.with_leaf_batching(ho.preserve_detail()), params)
    return program.memory_analysis().temp_size_in_bytes / (4 * 512 * 512)

  assert temporaries(24) < temporaries(12) + 0.5 < 5


def test_parameters_are_stacked_when_they_are_first_read():
  """While stencils are computed there are four arrays like a stack, and none of parameters."""
  params = {f"{kind}{i}": jax.ShapeDtypeStruct(shape, jnp.float32) for i in range(32)
            for kind, shape in {"a": (512, 64), "b": (64, 512)}.items()}
  program = program_of(ho.hina_adaptive(1e-3, edge_suppression=True, leaf_batching=True), params)
  assert program.memory_analysis().temp_size_in_bytes / (4 * 32 * 512 * 64) < 4.5


@pytest.mark.parametrize(("axes", "expected"), [
  (None, 2), (lambda path, leaf: (0, 1) if path < "w3" else (1,), 3)])
def test_groups_that_are_alike_are_traced_once(axes, expected, monkeypatch):
  monkeypatch.setattr(_in_turn, "LEAST", 0)
  params = {f"w{i}": jnp.ones((6, 5)) for i in range(9)} | {"z": jnp.ones((4, 4))}
  tx = ho.hina_adaptive(1e-2, edge_suppression=True, spatial_axes=axes, leaf_batching=True,
                        max_batched_elements=1)
  program = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
  calls = [x for x in program.eqns if x.params.get("name") == "update_one"]
  assert len(calls) == 10
  assert len({id(x.params["jaxpr"]) for x in calls}) == expected


def test_nan_and_infinity_reach_their_own_leaf_alone():
  params = layers()
  g = trees.sequence(params, 1)[0]
  g["l0"]["lora_a"] = jnp.full((6, 2), jnp.nan)
  tx = memory.with_leaf_batching(ho.scale_by_hina())
  updates, state = jax.jit(tx.update)(g, tx.init(params), params)
  assert jnp.isnan(updates["l0"]["lora_a"]).all()
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((updates["l1"], updates["l2"], state)))


def test_groups_of_one_dtype_one_kind_and_a_limit():
  params = layers()
  params["l0"] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["l0"])

  def names(**options):
    tx = memory.with_leaf_batching(ho.scale_by_hina(), **options)
    return {name for name in tx.init(params).mu if "*" in name}

  assert names() == {"*/bias[5]", "*/lora_a[6x2]", "*/lora_b[2x5]", "*[]", "conv/*[3x3x2x4]"}
  assert names(max_elements=5) == {"*/bias[5]", "*[]"}
  assert "*/bias[5]" not in names(kind=lambda path, leaf: path)
  state = memory.with_leaf_batching(ho.scale_by_hina()).init(params)
  assert state.mu["*/bias[5]"].shape == (2, 5)
  tx = ho.hina_adaptive(1e-3, leaf_batching=True)
  u, _ = jax.jit(tx.update)(params, tx.init(params), params)
  assert [x.dtype for x in jax.tree.leaves(u)] == [x.dtype for x in jax.tree.leaves(params)]


def test_gradients_of_mixed_dtypes_in_one_stack():
  params = {f"l{i}": jnp.ones((4, 4)) for i in range(3)}
  g = {**params, "l1": jnp.ones((4, 4), jnp.bfloat16)}
  tx, plain = (ho.hina_adaptive(1e-3, leaf_batching=b) for b in (True, False))
  trees.assert_close(tx.update(g, tx.init(params), params)[0],
                     plain.update(g, plain.init(params), params)[0])


def test_a_weight_decay_mask_and_axes_by_path_split_the_stacks():
  params = {f"l{i}": jnp.ones((4, 4)) for i in range(4)}
  options = dict(
    use_agr=False, weight_decay=0.5, edge_suppression=True,
    weight_decay_mask={"l0": True, "l1": False, "l2": True, "l3": False},
    spatial_axes=lambda path, leaf: (0,) if path in ("l2", "l3") else (0, 1),
  )
  gradients = trees.sequence(params, 3)
  tx = ho.hina_adaptive(1e-2, **options, leaf_batching=True)
  actual, _, state = trees.run(tx, params, gradients)
  plain = trees.run(ho.hina_adaptive(1e-2, **options, leaf_batching=False), params, gradients)[0]
  trees.assert_close(actual, plain, 2e-6, 1e-6)
  assert set(optax.tree.get(state, "mu")) == {"l0", "l1", "l2", "l3"}
  by_path = memory.with_leaf_batching(ho.suppress_edges(spatial_axes=options["spatial_axes"]))
  with pytest.raises(ValueError, match="'l0' and another answer for 'l2'"):
    by_path.init(params)


def test_nothing_to_stack_changes_nothing():
  params = trees.mixed()
  state = memory.with_leaf_batching(optax.adamw(1e-3)).init(params)
  assert jax.tree.structure(state) == jax.tree.structure(optax.adamw(1e-3).init(params))


@pytest.mark.parametrize(("count", "elements", "expected"), [
  (40, 1 << 14, [40]), (73, 1 << 14, [73]), (74, 1 << 14, [37, 37]), (147, 1 << 14, [49] * 3),
  (221, 1 << 14, [55, 55, 55, 56]), (1000, 1 << 14, [50] * 20), (7, 1 << 20, [7]),
  (17, 1 << 20, [8, 9]),
])
def test_many_elements_are_several_stacks_of_equal_size_or_nearly(count, elements, expected):
  params = {f"l{i}": jax.ShapeDtypeStruct((elements,), jnp.float32) for i in range(count)}
  state = jax.eval_shape(memory.with_leaf_batching(optax.adamw(1e-3)).init, params)
  assert sorted(len(x) for x in optax.tree.get(state, "mu").values()) == expected


def test_several_stacks_of_one_shape_are_one(monkeypatch):
  params = layers(9)
  run = lambda: trees.run(  # noqa: E731
    memory.with_leaf_batching(ho.scale_by_hina()), params, steps(params), apply=False)[1]
  expected = run()
  monkeypatch.setattr(_stacks, "LARGEST", 12)
  monkeypatch.setattr(_stacks, "_FEW_LARGE", 3)
  state = memory.with_leaf_batching(ho.scale_by_hina()).init(params)
  assert sum("lora_a[6x2]" in x for x in optax.tree.get(state, "mu")) == 3
  trees.assert_equal(run(), expected)


def test_masks_outside_donation_shapes_and_the_limit_of_the_alias(tmp_path):
  params = {name: x for name, x in layers().items() if name != "empty"}  # Orbax saves none
  tx = ho.hina_adaptive(1e-2, leaf_batching=True)
  masked = optax.masked(tx, jax.tree.map(lambda x: x.ndim == 2, params))
  updates, _ = jax.jit(masked.update)(params, masked.init(params), params)
  trees.assert_equal(updates["conv"], params["conv"])
  state = tx.init(params)
  assert trees.dtypes(jax.eval_shape(tx.init, params)) == trees.dtypes(state)
  small = memory.with_leaf_batching(tx, max_elements=5)
  assert set(optax.tree.get(small.init(params), "mu")) >= {"l0/lora_a", "*/bias[5]"}
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", state)
    checkpointer.wait_until_finished()
    trees.assert_equal(checkpointer.restore(tmp_path / "state", state), state)
  step = jax.jit(lambda g, s, p: tx.update(g, s, p), donate_argnums=(0, 1))
  gradients = jax.tree.map(jnp.copy, params)
  for _ in range(2):
    gradients, state = step(gradients, state, params)
  assert ho.get_optimization_info(state, tx)["figures"]["step"] == 2


@pytest.mark.parametrize(("storage", "alike"), [
  (memory.with_quantized_state, True), (memory.with_state_dtype, False),
  pytest.param(memory.with_quantized_state, False, marks=pytest.mark.slow),
  pytest.param(memory.with_state_dtype, True, marks=pytest.mark.slow),
])
def test_stored_state_is_opened_stack_by_stack(storage, alike, monkeypatch):
  """With the same numbers and noise as at once, also of vectors with one entry a leaf."""
  params = {f"w{i}": jnp.linspace(-1, 1, 6 * (8 + i)).reshape(6, 8 + i) for i in range(9)}
  if alike:
    params |= {f"v{i}": jnp.full((4, 8), 0.1 * i) for i in range(3)}
  gradients, runs = trees.sequence(params, 4), []
  for least in (1 << 21, 0):
    monkeypatch.setattr(_in_turn, "LEAST", least)
    inner = ho.cautious(ho.scale_by_hina(torque="average"))
    tx = storage(memory.with_leaf_batching(inner), min_size=1)
    runs.append(trees.run(tx, params, gradients, apply=False)[1:])
  assert trees.dtypes(runs[0]) == trees.dtypes(runs[1])
  # A sum in another order may round a number of few bits to its other neighbour.
  for x, y in zip(*map(jax.tree.leaves, runs)):
    assert np.isclose(np.float64(x), np.float64(y), 1e-5, 1e-7).mean() > 0.98


def test_stored_state_of_one_stack_is_open_at_a_time():
  params = {f"{kind}{i}": jax.ShapeDtypeStruct(shape, jnp.float32) for i in range(96)
            for kind, shape in {"a": (256, 64), "b": (64, 256)}.items()}

  def temporaries(storage):
    return program_of(storage(ho.hina_adaptive(1e-3)), params).memory_analysis().temp_size_in_bytes

  state = 18 * 2 * 96 * 256 * 64
  assert temporaries(memory.with_state_dtype) < temporaries(lambda inner: inner) + state / 2


@pytest.mark.parametrize("storage", ["reduce_precision", "vram"])
def test_plans_store_stacks(storage):
  params = {f"l{i}": jnp.ones((64, 32)) for i in range(6)}
  narrow = storage == "reduce_precision"
  options = {"reduce_precision": True} if narrow else {"vram_budget_gb": 3e-4}
  tx = ho.hina_adaptive(1e-2, **options, leaf_batching=True)
  state = tx.init(params)
  assert ho.plan_memory(tx, params).state_bytes == sum(x.nbytes for x in jax.tree.leaves(state))
  smaller, moved = ho.optimize_for_vram(tx, state, params, 1.0)
  updates, _ = jax.jit(smaller.update)(params, moved, params)
  assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.parametrize(("arguments", "error"), [
  ({"max_elements": 0}, "max_elements must lie in"),
  ({"max_elements": 2.5}, "whole number"),
  ({"kind": 3}, "kind must be None or a function"),
])
def test_bad_arguments(arguments, error):
  with pytest.raises((ValueError, TypeError), match=error):
    memory.with_leaf_batching(optax.adam(1e-3), **arguments)
  with pytest.raises(TypeError, match="inner must be an optax transformation"):
    memory.with_leaf_batching(3)
