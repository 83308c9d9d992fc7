"""Checkpoints: written under one sharding, plan and batching, read under another."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import hina_optax as ho
from hina_optax import memory
from tests import trees
from tests.memory.storages import raises
from tests.scaling import meshes

OPTIONS = dict(learning_rate=1e-2, spatial_awareness=True, lora_rank_penalty=True)


def adaptive(**options):
  return ho.hina_adaptive(**{**OPTIONS, **options})


FORMS = {
  "plain": lambda: adaptive(leaf_batching=False),
  "stacked": lambda: adaptive(leaf_batching=True),
  "bf16": lambda: adaptive(reduce_precision=True),
  "8-bit": lambda: memory.with_quantized_state(adaptive(leaf_batching=False), min_size=64),
  "8-bit stacked": lambda: adaptive(vram_budget_gb=3e-4),
  "host": lambda: adaptive(cpu_offload_states=True),
}
# Largest error of each number, relative to the largest of its leaf.
ROUNDING = {"bf16": 2**-8, "8-bit": 0.07, "8-bit stacked": 0.07}


def parameters():
  rng = np.random.default_rng(3)
  make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  blocks = {f"l{i}": {"lora_a": make(64, 16), "lora_b": make(16, 32), "bias": make(16)}
            for i in range(3)}
  return {**blocks, "conv": make(3, 3, 16, 32), "empty": make(0, 3), "scale": make()}


def filled(state, seed=0):
  """A state with numbers that tell every element from every other."""
  rng = np.random.default_rng(seed)

  def fill(x):
    if jnp.issubdtype(x.dtype, jnp.floating):
      value = jnp.asarray(rng.normal(size=x.shape), x.dtype)
    else:
      value = jnp.asarray(rng.integers(0, 100, x.shape), x.dtype)
    return jax.device_put(value, x.sharding)

  return jax.tree.map(fill, state)


def numbers(tx, state, params):
  """Every number of a state by its name, in fp32, without the wrappers' own."""
  arrays, stamp = ho.pack_state(tx, state, params)
  plain = FORMS["plain"]()
  opened = ho.unpack_state(plain, arrays, stamp, jax.device_get(params) and parameters())
  return meshes.by_path(opened)


def written(tx, state, params, folder):
  """A round trip through Orbax and JSON; returns what a reader gets."""
  arrays, stamp = ho.pack_state(tx, state, params)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / "state", arrays)
  (folder / "stamp.json").write_text(json.dumps(stamp))
  return json.loads((folder / "stamp.json").read_text())


def read(tx, stamp, params, folder):
  shapes = ho.packed_shapes(stamp, tx, params)
  with ocp.StandardCheckpointer() as checkpointer:
    arrays = checkpointer.restore(folder / "state", shapes)
  return ho.unpack_state(tx, arrays, stamp, params)


def check_like(state, tx, params):
  """Structure, shapes, dtypes and places are those of a fresh state."""
  fresh = tx.init(params)
  assert jax.tree.structure(state) == jax.tree.structure(fresh)
  assert trees.dtypes(state) == trees.dtypes(fresh)
  for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(fresh)):
    assert x.sharding.memory_kind == y.sharding.memory_kind
    if y.size > 64:
      assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


SHOWN = (("plain", "stacked"), ("stacked", "8-bit"), ("bf16", "plain"), ("8-bit stacked", "8-bit"),
         ("8-bit", "bf16"), ("plain", "host"))


@pytest.mark.parametrize(("source", "target"), [
  pytest.param(a, b, marks=[] if (a, b) in SHOWN else [pytest.mark.slow])
  for a in FORMS for b in FORMS
])
def test_from_every_form_to_every_other(source, target):
  old, new, params = FORMS[source](), FORMS[target](), parameters()
  state = old.init(params)
  if source in ("plain", "stacked"):
    state = filled(state)
  else:  # packed from numbers that are told apart, since 8 bits cannot be filled at random
    plain = FORMS["plain"]()
    state = ho.unpack_state(old, *ho.pack_state(plain, filled(plain.init(params)), params), params)
  moved = ho.unpack_state(new, *ho.pack_state(old, state, params), params)
  check_like(moved, new, params)
  before, after = (numbers(tx, s, params) for tx, s in ((old, state), (new, moved)))
  for path, x in before.items():
    assert x.shape == after[path].shape
    if x.size:
      scale = ROUNDING.get(target, 0.0) * np.abs(x).max()
      np.testing.assert_allclose(after[path], x, 0, scale, err_msg=path)
  assert len({float(np.sum(x)) for x in before.values() if x.size > 16}) > 10


@pytest.mark.parametrize(("source", "target"), [
  ("stacked", "bf16"),
  pytest.param("8-bit", "8-bit", marks=pytest.mark.slow),
  pytest.param("plain", "plain", marks=pytest.mark.slow),
  pytest.param("bf16", "8-bit", marks=pytest.mark.slow)])
def test_orbax_on_another_mesh(source, target, tmp_path):
  """Written under 4x2, read under 2x4 and on one device."""
  old, new = FORMS[source](), FORMS[target]()
  here, there = (
    jax.device_put(meshes.parameters(), meshes.shardings(meshes.mesh(*s))) for s in ((4, 2), (2, 4))
  )
  state = old.init(here)
  if source != "8-bit":
    state = filled(state)
  stamp = written(old, state, here, tmp_path)
  for params in (there, meshes.parameters()):
    moved = read(new, stamp, params, tmp_path)
    check_like(moved, new, params)
    plain = ho.hina_adaptive(**OPTIONS, leaf_batching=False)
    before, after = (
      meshes.by_path(ho.unpack_state(plain, *ho.pack_state(tx, s, p), meshes.parameters()))
      for tx, s, p in ((old, state, here), (new, moved, params)))
    for path, x in before.items():
      if x.size:
        scale = 0.0 if source == target else ROUNDING.get(target, 0.0) * np.abs(x).max()
        np.testing.assert_allclose(after[path], x, 0, scale, err_msg=path)


def test_training_goes_on_to_the_bit(tmp_path):
  params = parameters()
  given = trees.sequence(params, 6)
  tx = optax.chain(
    memory.with_state_dtype(ho.cautious(ho.scale_by_hina()), min_size=8), optax.scale(-0.1))
  update = jax.jit(tx.update)

  def run(params, state, given):
    for g in given:
      updates, state = update(g, state, params)
      params = optax.apply_updates(params, updates)
    return params, state

  middle, state = run(params, tx.init(params), given[:3])
  end, last = run(middle, state, given[3:])
  stamp = written(tx, state, params, tmp_path)
  again, same = run(middle, read(tx, stamp, middle, tmp_path), given[3:])
  trees.assert_equal(again, end)
  trees.assert_equal(same, last)


def clipped(inner):
  return optax.chain(optax.clip_by_global_norm(1.0), inner)


MASK = {**{f"l{i}": {"lora_a": i != 1, "lora_b": i == 1, "bias": True} for i in range(3)},
        "conv": True, "scale": False}
BATCHED = {
  "adamw": (optax.adamw(1e-3), memory.with_leaf_batching(optax.adamw(1e-3))),
  "clip": (clipped(optax.lion(1e-3)), clipped(memory.with_leaf_batching(optax.lion(1e-3)))),
  "adafactor": (optax.adafactor(1e-3, min_dim_size_to_factor=8),
                memory.with_leaf_batching(optax.adafactor(1e-3, min_dim_size_to_factor=8))),
  "masked": tuple(put(optax.masked(optax.trace(0.9), MASK))
                  for put in (optax.with_extra_args_support, memory.with_leaf_batching)),
}


@pytest.mark.parametrize("name", [*BATCHED, "multi"])
def test_foreign_transformations(name):
  params = {k: v for k, v in parameters().items() if k != "empty"}
  if name == "multi":
    inner = optax.sgd(0.1, momentum=0.9)
    tx, batched = optax.MultiSteps(inner, 2), optax.MultiSteps(memory.with_leaf_batching(inner), 2)
    tx, batched = map(optax.with_extra_args_support, (tx, batched))
  else:
    tx, batched = BATCHED[name]
  state = filled(tx.init(params))
  trees.assert_equal(ho.unpack_state(tx, *ho.pack_state(tx, state, params), params), state)
  moved = ho.unpack_state(batched, *ho.pack_state(tx, state, params), params)
  assert jax.tree.structure(moved) == jax.tree.structure(batched.init(params))
  trees.assert_equal(ho.unpack_state(tx, *ho.pack_state(batched, moved, params), params), state)


def packed(**options):
  tx, params = adaptive(**options), parameters()
  return ho.pack_state(tx, tx.init(params), params)


def without(tree, name):
  return {k: v for k, v in tree.items() if k != name}


@pytest.mark.parametrize(("change", "parts"), [
  (lambda p: without(p, "conv"), ("leaves only in the checkpoint: conv",)),
  (lambda p: {**p, "extra": jnp.ones(3)}, ("leaves only in the model: extra",)),
  (lambda p: {**without(p, "conv"), "convolution": p["conv"]},
   ("only in the checkpoint: conv", "only in the model: convolution")),
  (lambda p: {**p, "conv": jnp.ones((3, 3, 4, 8))},
   ("of another shape: conv ([3, 3, 16, 32] in the checkpoint, [3, 3, 4, 8] in the model)",)),
  (lambda p: {**p, "conv": None}, ("of another shape: conv", "None in the model")),
])
def test_other_leaves_are_named(change, parts):
  arrays, stamp = packed()
  with raises(ValueError, "the checkpoint does not fit", *parts):
    ho.packed_shapes(stamp, adaptive(), change(parameters()))
  with raises(ValueError, "the checkpoint does not fit", *parts):
    ho.unpack_state(adaptive(), arrays, stamp, change(parameters()))


def test_reordered_leaves_are_named():
  tx = ho.cautious(ho.scale_by_hina())
  make = lambda *names: dict.fromkeys(names, jnp.ones(3))  # noqa: E731
  first, second = (tuple(make(name) for name in order) for order in ("ab", "ba"))
  _, stamp = ho.pack_state(tx, tx.init(first), first)
  with raises(ValueError, "leaves only in the checkpoint: 0/a, 1/b"):
    ho.packed_shapes(stamp, tx, second)
  stamp["leaves"].reverse()
  with raises(ValueError, "another order: 1/b (place 0 in the checkpoint, 1 in the model), 0/a"):
    ho.packed_shapes(stamp, tx, first)


@pytest.mark.parametrize(("options", "parts"), [
  (dict(use_spd=False), ("state only in the checkpoint", "displacement", "use_spd (True in")),
  (dict(sd_scripts_compat=True), ("what the state means: sd_scripts_compat (False in",)),
  (dict(lr_bump=1e-3), ("relative rates (lr_bump, min_lr, max_lr)",)),
  (dict(use_adopt_stability=False), ("use_adopt_stability (True in the checkpoint, False now)",)),
])
def test_an_optimizer_that_kept_other_numbers_is_refused(options, parts):
  _, stamp = packed()
  with raises(ValueError, "does not fit", *parts):
    ho.packed_shapes(stamp, adaptive(**options), parameters())


def test_what_may_change():
  _, stamp = packed()
  for options in (dict(learning_rate=3e-3), dict(weight_decay=0.5), dict(detail_preservation=0.5),
                  dict(leaf_batching=False), dict(reduce_precision=True)):
    assert ho.packed_shapes(stamp, adaptive(**options), parameters())


def test_stamps_of_other_things_and_newer_ones_are_refused():
  arrays, stamp = packed()
  with raises(ValueError, "not one of hina_optax.pack_state"):
    ho.packed_shapes({}, adaptive(), parameters())
  newer = copy.deepcopy(stamp)
  newer["version"] += 1
  with raises(ValueError, "version 3", "up to 2"):
    ho.packed_shapes(newer, adaptive(), parameters())
  arrays.pop("00003")
  with raises(ValueError, "1 arrays of the checkpoint are missing: 00003"):
    ho.unpack_state(adaptive(), arrays, stamp, parameters())
  with raises(ValueError, "the state is not of this optimizer"):
    ho.pack_state(adaptive(use_spd=False), adaptive().init(parameters()), parameters())


def test_the_stamp_is_json_whatever_the_options():
  tx = ho.hina_adaptive(
    optax.cosine_decay_schedule(1e-3, 100), reference_lr=1e-3, betas=(np.float32(0.9), 0.99),
    weight_decay_mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
  params = parameters()
  _, stamp = ho.pack_state(tx, tx.init(params), params)
  again = json.loads(json.dumps(stamp))
  assert again == stamp
  assert again["options"]["learning_rate"].startswith("<function cosine_decay_schedule")
  assert ho.packed_shapes(again, tx, params)


@pytest.mark.parametrize("name", [
  pytest.param(n, marks=[] if n in ("plain", "bf16", "host") else [pytest.mark.slow]) for n in FORMS
])
def test_an_abstract_state_is_the_state_without_numbers(name):
  mesh = meshes.mesh(4, 2)
  params = jax.device_put(meshes.parameters(), meshes.shardings(mesh))
  tx = FORMS[name]()
  for given in (params, meshes.parameters()):
    state, shapes = tx.init(given), ho.abstract_state(tx, given)
    assert jax.tree.structure(state) == jax.tree.structure(shapes)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(shapes)):
      assert (x.shape, x.dtype) == (y.shape, y.dtype)
      assert x.sharding.memory_kind == y.sharding.memory_kind
      if x.size > 64:
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim), x.shape
