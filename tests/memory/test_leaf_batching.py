"""with_leaf_batching: the same numbers from few arrays, for any per-leaf transformation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import hina_optax as ho
from hina_optax import memory
from tests import trees
from tests.cases import CASES, EVERY_PART, EVERYTHING, is_costly, some
from tests.memory.storages import INNERS


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


@some(CASES, lambda case: is_costly(case) and case is not EVERY_PART)
def test_batched_is_unbatched(case):
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


def large(alone=0, alike=24):
  """More elements than those from which a step on CPUs is a program of its own; most are alike."""
  rng = np.random.default_rng(7)
  make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  params = {f"w{i}": make(256, 300) for i in range(alike)}
  params |= {f"o{i}": make(256, 900 + i) for i in range(alone)}
  params |= {f"half{i}": make(32, 48).astype(jnp.bfloat16) for i in range(4)}
  params |= {f"l{i}": {"lora_a": make(6, 2), "lora_b": make(2, 5), "bias": make(5)}
             for i in range(2)}
  params |= {"scale": make(), "empty": make(0, 3), "conv": make(3, 3, 16, 24)}
  return {**params, "absent": None}


def numbers_by_path(state):
  """Numbers of a state in which nothing is stacked, those of a leaf under its path."""
  found = {}
  for path, x in jax.tree_util.tree_leaves_with_path(
      state, is_leaf=lambda x: hasattr(x, "items") and hasattr(x, "numbers")):
    name = jax.tree_util.keystr(path)
    found |= {name: x} if isinstance(x, jax.Array) else {f"{name}{k}": y for k, y in x.items()}
  return found


# Rounded parameters move by the last bit of a parameter where an update is between two of them.
LAST_BIT = 3e-7


def test_a_large_step_is_that_of_its_halves():
  """Of which each is too small for the program for CPUs; parameters in two dtypes, an infinity."""
  tx, plain = (ho.hina_adaptive(1e-2, **{**EVERYTHING, "use_dynamic_adaptation": False},
                                leaf_batching=b) for b in (True, False))
  params = large(alone=2)
  gradients = [{**g, "w2": None} for g in trees.sequence(params, 3)]
  gradients[1]["w1"] = gradients[1]["w1"].at[0, 0].set(jnp.inf)
  # No leaf is told apart from its twins by where it stands.
  names = list(params)
  halves = [names[0::2], names[1::2]]

  def part(tree, half):
    return {name: tree[name] for name in half}

  _, updates, state = trees.run(tx, params, gradients, apply=False)
  opened = numbers_by_path(ho.unpack_state(plain, *ho.pack_state(tx, state, params), params))
  for half in halves:
    some = part(params, half)
    assert sum(x.size for x in jax.tree.leaves(some)) < 1 << 21 < sum(
      x.size for x in jax.tree.leaves(params))
    _, wanted, kept = trees.run(plain, some, [part(g, half) for g in gradients], apply=False)
    trees.assert_close([part(u, half) for u in updates], wanted, 1e-5, 1e-7)
    for name, x in numbers_by_path(kept).items():
      slack = LAST_BIT if "displacement" in name else 1e-7
      np.testing.assert_allclose(np.float64(opened[name]), np.float64(x), 1e-5, slack, err_msg=name)


# With parts that look across leaves and some that keep state, and quick to run eagerly.
FEW = {"use_agr": False, "background_regularization": False, "use_adopt_stability": False,
       "use_lr_mask": False, "use_cautious": False, "edge_suppression": True,
       "lora_rank_penalty": True}


@pytest.mark.slow
def test_a_large_step_looks_across_leaves_as_a_small_one():
  """Compared with what it does operation by operation, which is no program for CPUs."""
  params = {name: x for name, x in large(alone=2).items() if name in ("l0", "l1", "scale")
            or name[0] in "wo"}
  gradients = trees.sequence(params, 4)
  gradients[2]["w3"] = None
  tx = ho.hina_adaptive(1e-2, **FEW, relationship_discovery_interval=2, leaf_batching=True)
  runs = []
  for update in (jax.jit(tx.update), tx.update):
    state, updates = tx.init(params), []
    for g in gradients:
      u, state = update(g, state, params)
      updates.append(u)
    runs.append((updates, state))
  assert jax.tree.structure(runs[0]) == jax.tree.structure(runs[1])
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(runs[0]), jax.tree.leaves(runs[1])):
    name = jax.tree_util.keystr(path)
    slack = LAST_BIT if "displacement" in name else 1e-7
    np.testing.assert_allclose(np.float64(x), np.float64(y), 1e-5, slack, err_msg=name)


def test_a_chain_of_our_parts_keeps_its_numbers_of_leaves():
  def chain():
    core = ho.cautious(ho.scale_by_hina(torque="average"))
    return optax.chain(ho.suppress_edges(0.5, 0.2), core, optax.scale(-0.1))

  params = layers()
  gradients = trees.sequence(params, 4)
  tx = memory.with_leaf_batching(chain())
  actual, _, state = trees.run(tx, params, gradients)
  trees.assert_close(actual, trees.run(chain(), params, gradients)[0], 2e-6, 1e-6)
  # Found by path, and for NumPy one vector.
  torque = optax.tree.get(state, "torque")
  assert torque["l0/lora_a"] != torque["l1/lora_a"]
  assert np.asarray(torque).shape == (len(jax.tree.leaves(params)),)
  assert 0 < ho.get_optimization_info(state)["figures"]["alignment"] <= 1


@pytest.mark.parametrize("inner", [
  optax.chain(optax.clip_by_global_norm(1.0), optax.scale(0.1)),
  optax.contrib.prodigy(),
  optax.chain(ho.scale_by_importance(ho.scale_by_hina(), interval=2), optax.scale(-0.1)),
])
def test_an_inner_that_looks_across_leaves_is_refused(inner):
  """Already at `init`."""
  tx = memory.with_leaf_batching(inner)
  for init in (tx.init, jax.jit(tx.init)):
    with (jax.numpy_dtype_promotion("standard"),
          pytest.raises(ValueError, match=r"depends on .*'l[01]/") as caught):
      init(layers())
    assert "outside of the wrapper" in str(caught.value)


def test_an_inner_that_cannot_be_asked_at_init_is_refused_at_its_first_update():
  def update(updates, state, params=None, *, value, **extra_args):
    norm = optax.tree.norm(updates)
    return jax.tree.map(lambda x: x * value / norm, updates), jax.tree.map(jnp.add, state, updates)

  inner = optax.GradientTransformationExtraArgs(lambda p: jax.tree.map(jnp.zeros_like, p), update)
  params, tx = layers(), memory.with_leaf_batching(inner)
  state = tx.init(params)
  with pytest.raises(ValueError, match=r"depends on .*outside of the wrapper"):
    tx.update(params, state, params, value=jnp.float32(1.0))


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
  for name in ("torque", "edge_share", "alignment"):
    before, after = (optax.tree.get(s, name) for s in (old, new))
    assert before["l1/lora_a"] == after["l1/lora_a"], name
    assert before["l1/lora_b"] != after["l1/lora_b"], name


def size_of_program(tx, params):
  """In lines of StableHLO."""
  state = jax.eval_shape(tx.init, params)
  return jax.jit(tx.update).lower(params, state, params).as_text().count("\n")


@pytest.mark.parametrize(("stacked", "share"), [(True, 0.05), (False, 0.2)])
def test_leaves_that_are_alike_add_little_to_a_program(stacked, share):
  """A way into a stack and out of it, or the call of a function that is there already."""
  tx = ho.hina_adaptive(1e-3, **EVERYTHING, leaf_batching=stacked)

  def growth(more):
    small, large = (size_of_program(tx, {
      f"l{i}": {"lora_a": jnp.ones((8 + more * i, 2)), "lora_b": jnp.ones((2, 8 + more * i))}
      for i in range(count)}) for count in (4, 8))
    return large - small

  assert growth(0) < share * growth(1)


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


def program_of(tx, params):
  """The compiled step for shapes."""
  state = jax.eval_shape(tx.init, params)
  step = jax.jit(lambda g, s, p: tx.update(g, s, p)[::-1], donate_argnums=(0, 1))
  return step.lower(params, state, params).compile()


def test_memory_beside_the_state_does_not_grow_with_leaves_that_stand_alone():
  def temporaries(count):
    params = {f"w{i}": jax.ShapeDtypeStruct((512, 512 + i), jnp.float32) for i in range(count)}
    program = program_of(memory.with_leaf_batching(ho.preserve_detail()), params)
    flops.append(program.cost_analysis()["flops"] / count)
    return program.memory_analysis().temp_size_in_bytes / (4 * 512 * 512)

  flops = []
  assert temporaries(24) < temporaries(12) + 0.5 < 5
  # No leaf computes the one before again.
  assert flops[0] < 1.05 * flops[1]


def test_parameters_are_stacked_when_they_are_first_read():
  """While stencils are computed there are four arrays like a stack, and none of parameters."""
  params = {f"{kind}{i}": jax.ShapeDtypeStruct(shape, jnp.float32) for i in range(32)
            for kind, shape in {"a": (512, 64), "b": (64, 512)}.items()}
  program = program_of(ho.hina_adaptive(1e-3, edge_suppression=True, leaf_batching=True), params)
  assert program.memory_analysis().temp_size_in_bytes / (4 * 32 * 512 * 64) < 4.5


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
  inner = ho.suppress_edges(0.5, 0.2, spatial_axes=options["spatial_axes"])
  by_path = trees.run(memory.with_leaf_batching(inner), params, gradients)
  trees.assert_close(by_path[0], trees.run(inner, params, gradients)[0], 2e-6, 1e-6)


def test_nothing_to_stack_changes_nothing():
  params = trees.mixed()
  state = memory.with_leaf_batching(optax.adamw(1e-3)).init(params)
  assert jax.tree.structure(state) == jax.tree.structure(optax.adamw(1e-3).init(params))


@pytest.mark.parametrize(("count", "elements"), [(3, 1 << 20), (40, 1 << 14), (1000, 1 << 14)])
def test_leaves_of_one_shape_are_one_stack(count, elements):
  params = {f"l{i}": jax.ShapeDtypeStruct((elements,), jnp.float32) for i in range(count)}
  state = jax.eval_shape(memory.with_leaf_batching(optax.adamw(1e-3)).init, params)
  assert {k: x.shape for k, x in optax.tree.get(state, "mu").items()} == {
    f"*[{elements}]": (count, elements)}


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


@pytest.mark.slow
@pytest.mark.parametrize("storage", [memory.with_quantized_state, memory.with_state_dtype])
def test_stored_state_of_a_large_step(storage):
  """The numbers and the noise of what it does operation by operation, no program for CPUs."""
  params = {name: x for name, x in large(alone=2).items() if name[0] in "wol"}
  gradients, runs = trees.sequence(params, 3), []
  tx = storage(memory.with_leaf_batching(ho.cautious(ho.scale_by_hina(torque="average"))),
               min_size=1)
  for update in (jax.jit(tx.update), tx.update):
    state, updates = tx.init(params), []
    for g in gradients:
      u, state = update(g, state, params)
      updates.append(u)
    runs.append((updates, state))
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
