"""Parameters sharded on a mesh: the numbers of one device, and what crosses between devices."""

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hina_optax as ho
from hina_optax import memory
from tests import trees
from tests.cases import CASES, as_optimizer
from tests.scaling import meshes

STEPS = 50
MESHES = ((8, 1), (4, 2), (2, 4))


def program(tx):
  """A training step: the gradient pulls to a place that moves from step to step."""

  def step(params, state, gradient):
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  return jax.jit(step, donate_argnums=(0, 1))


def gradients(params):
  """Five of them, in eighths: their sums are exact in whatever order."""
  return [jax.tree.map(lambda x: jnp.round(8 * x) / 8, g) for g in trees.sequence(params, 5)]


def train(tx, params, given, step=None, state=None):
  state = tx.init(params) if state is None else state
  step = program(tx) if step is None else step
  for i in range(STEPS):
    params, state = step(params, state, given[i % len(given)])
    jax.block_until_ready(params)  # many steps in flight starve eight devices of two cores
  return params, state


def paired(state, params):
  """Leaves of a state that are like a parameter, with that parameter."""
  known = meshes.by_path(params)
  for path, leaf in meshes.by_path(state).items():
    owners = [p for p in known if path.endswith("/" + p) and known[p].shape == leaf.shape]
    if owners:
      yield path, leaf, known[max(owners, key=len)]


def check_state(state, params):
  """Every leaf that is like a parameter lies as it does; all others are small and whole."""
  found = dict.fromkeys(path for path, _, _ in paired(state, params))
  for path, leaf, param in paired(state, params):
    assert leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim), path
  for path, leaf in meshes.by_path(state).items():
    assert path in found or leaf.size < 64, path


def bytes_on_first_device(tree):
  first = jax.devices()[0]
  return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards
             if s.device == first)


def check_bytes(state, params):
  """Bytes on a device are the total over the number of shards."""
  like = list(paired(state, params))
  wanted = sum(x.nbytes // math.prod(
    a // b for a, b in zip(p.shape, p.sharding.shard_shape(p.shape)) if b) for _, x, p in like)
  others = sum(x.nbytes for x in jax.tree.leaves(state)) - sum(x.nbytes for _, x, _ in like)
  assert bytes_on_first_device(state) == wanted + others


def check_traffic(compiled, allowed=()):
  """Nothing of a parameter's size is gathered or moved from device to device."""
  moved = [(kind, size) for kind, size in meshes.traffic(compiled)
           if size >= meshes.SMALLEST and kind not in allowed]
  assert not moved, moved


def on(case, shape):
  shown = case.sharded_every_time and shape == (4, 2)
  name = f"{case.name}-{shape[0]}x{shape[1]}"
  # A place just at the quantile of the background may fall on either side of it.
  marks = [pytest.mark.exact] if case.ties else []
  return pytest.param(case, shape, id=name, marks=marks + ([] if shown else [pytest.mark.slow]))


@pytest.mark.parametrize(("case", "shape"), [on(c, s) for c in CASES for s in MESHES])
def test_sharded_training_is_that_of_one_device(case, shape):
  tx, params = as_optimizer(case, 1e-2), meshes.parameters()
  given = gradients(params)
  expected, _ = train(tx, params, given)
  mesh = meshes.mesh(*shape)
  params = jax.device_put(meshes.parameters(), meshes.shardings(mesh))
  given = [jax.device_put(g, meshes.shardings(mesh)) for g in given]
  state = tx.init(params)
  check_state(state, params)
  check_bytes(state, params)
  compiled = program(tx).lower(params, state, given[0]).compile()
  if not case.gathers:
    check_traffic(compiled)
  params, state = train(tx, params, given, compiled, state)
  check_state(state, params)
  trees.assert_close(params, expected, 0.0, 1e-5)


def few(on=None):
  """A matrix sharded both ways, a LoRA pair, a vector, and whole leaves that are alike."""
  rng = np.random.default_rng(4)
  specs = {"attn": {"lora_a": ((16, 2), ("data", None)), "lora_b": ((2, 16), (None, "model"))},
           "bias": ((16,), (("data", "model"),)), "square": ((8, 8), ("data", "model")),
           "whole": ((6, 5), ()), "other": ((6, 5), ()), "scale": ((), ())}

  def make(leaf):
    shape, spec = leaf
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    return x if on is None else jax.device_put(x, NamedSharding(on, PartitionSpec(*spec)))

  return jax.tree.map(make, specs, is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_on_a_mesh(case):
  """Two steps of eight devices are those of one; state lies as its parameters."""
  tx, plain = case.make(), few()
  given = trees.sequence(plain, 2)
  _, expected, _ = trees.run(tx, plain, given, apply=False)
  params = few(meshes.mesh(4, 2))
  given = [jax.tree.map(lambda x, p: jax.device_put(x, p.sharding), g, params) for g in given]
  _, updates, state = trees.run(tx, params, given, apply=False)
  trees.assert_close(updates, expected, 2e-5, 2e-5)
  check_state(state, params)
  for x, p in zip(jax.tree.leaves(updates[-1]), jax.tree.leaves(params)):
    assert x.sharding.is_equivalent_to(p.sharding, x.ndim)


@pytest.mark.parametrize("case", [
  pytest.param(c, marks=[] if c.explicit_every_time else [pytest.mark.slow]) for c in CASES
], ids=str)
def test_explicit_sharding_mode(case):
  """Where sharding is part of an array's type: the same numbers, and types that stay."""
  tx, params = case.make(), meshes.parameters()
  given = gradients(params)[:2]
  state = tx.init(params)
  expected = []
  update = jax.jit(tx.update)
  for g in given:
    updates, state = update(g, state, params)
    expected.append(updates)
  mesh = meshes.mesh(4, 2, AxisType.Explicit)
  with jax.set_mesh(mesh):
    params, *given = (jax.device_put(t, meshes.shardings(mesh)) for t in (params, *given))
    state = tx.init(params)
    update = jax.jit(tx.update)
    for g, wanted in zip(given, expected):
      updates, new = update(g, state, params)
      for x, y in ((updates, params), (new, state)):
        assert jax.tree.structure(x) == jax.tree.structure(y)
        assert [*map(jax.typeof, jax.tree.leaves(x))] == [*map(jax.typeof, jax.tree.leaves(y))]
      trees.assert_close(updates, wanted, 2e-5, 2e-5)
      state = new
  check_state(state, params)


def alike(on=None):
  """Equal leaves, some of them sharded and some whole on every device."""
  rng = np.random.default_rng(5)
  params = {f"l{i}": {"w": jnp.asarray(rng.normal(size=(64, 48)), jnp.float32),
                      "bias": jnp.asarray(rng.normal(size=64), jnp.float32)} for i in range(3)}
  for name in ("l1", "l2"):
    params[name]["whole"] = jnp.asarray(rng.normal(size=(64, 48)), jnp.float32)
  if on is None:
    return params
  rows, whole = (NamedSharding(on, PartitionSpec(*axes)) for axes in (("data",), ()))
  return {name: {k: jax.device_put(x, rows if k == "w" else whole) for k, x in block.items()}
          for name, block in params.items()}


PLAIN = dict(learning_rate=1e-2, use_agr=False, use_dynamic_adaptation=False)
STACKED = {"l0/w", "l1/w", "l2/w", "*/bias[64]", "*/whole[64x48]"}


MAKES = {
  "alias": lambda: ho.hina_adaptive(**PLAIN),
  "bf16": lambda: ho.hina_adaptive(**PLAIN, reduce_precision=True),
  "8-bit": lambda: ho.hina_adaptive(**PLAIN, vram_budget_gb=3e-4),
  "bf16 of adamw": lambda: memory.with_state_dtype(memory.with_leaf_batching(optax.adamw(1e-2))),
  "8-bit rows": lambda: memory.with_leaf_batching(memory.with_quantized_state(optax.adamw(1e-2))),
}


@pytest.mark.parametrize("make", [
  pytest.param(make, id=name, marks=[] if name == "bf16 of adamw" else pytest.mark.slow)
  for name, make in MAKES.items()
])
def test_only_whole_leaves_are_stacked(make):
  tx, mesh = make(), meshes.mesh(4, 2)
  params = alike(mesh)
  given = trees.sequence(alike(), 3)
  with jax.numpy_dtype_promotion("standard"):
    expected, _, _ = trees.run(make(), alike(), given)
    state, step = tx.init(params), program(tx)
    mu = optax.tree.get(memory.dequantize_state(state), "mu")
    assert set(mu) == STACKED
    wanted = jax.tree.structure(state)
    for g in given:
      g = jax.tree.map(lambda x, p: jax.device_put(x, p.sharding), g, params)
      params, state = step(params, state, g)
  assert step._cache_size() <= 2  # counters of a fresh state are not yet on the mesh
  assert jax.tree.structure(state) == wanted
  for name in ("l0/w", "l2/w"):
    for field in ("mu", "nu"):
      for x in jax.tree.leaves(optax.tree.get(state, field)[name]):
        if x.shape == (64, 48):
          assert x.sharding.spec[0] == "data", (field, name, x.sharding)
  loose = 0.0 if optax.tree.get(state, "mu")["l0/w"].dtype == jnp.float32 else 2e-2
  trees.assert_close(params, expected, 0.0, 1e-5 + loose)


@pytest.mark.slow
def test_the_step_of_a_stacked_tree_gathers_nothing():
  tx, mesh = ho.hina_adaptive(**PLAIN), meshes.mesh(4, 2)
  params = alike(mesh)
  compiled = program(tx).lower(params, tx.init(params), params).compile()
  check_traffic(compiled)


def test_nothing_is_stacked_where_a_mesh_is_set():
  """There traced leaves may be sharded unseen."""
  mesh = meshes.mesh(4, 2)
  params = alike(mesh)
  every = {f"l{i}/{k}" for i in range(3) for k in ("w", "bias")} | {"l1/whole", "l2/whole"}
  for batched in (None, True):
    tx = ho.hina_adaptive(**PLAIN, leaf_batching=batched)
    with jax.set_mesh(mesh):
      for init in (tx.init, jax.jit(tx.init)):
        state = init(params)
        assert set(meshes.by_path(optax.tree.get(state, "mu"))) == every
      updates, after = jax.jit(tx.update)(params, state, params)
      assert jax.tree.structure(after) == jax.tree.structure(state)
    assert updates["l0"]["w"].sharding.spec[0] == "data"
  # Without a mesh around it a traced leaf shows nothing: it counts as whole.
  assert "*[64x48]" in optax.tree.get(jax.eval_shape(tx.init, params), "mu")


def batched_adamw():
  return memory.with_leaf_batching(optax.adamw(1e-2))


INITS = {
  "alias": lambda: ho.hina_adaptive(**PLAIN),
  "adamw": batched_adamw,
  "bf16": lambda: memory.with_state_dtype(batched_adamw(), min_size=0),
  "8 bits": lambda: memory.with_quantized_state(batched_adamw(), min_size=16),
  "host": lambda: memory.with_host_offload(batched_adamw(), min_bytes=0),
}


@pytest.mark.parametrize("name", INITS)
def test_a_jitted_init_is_the_eager_one_for_whole_leaves(name):
  tx, params = INITS[name](), alike()
  eager, jitted = tx.init(params), jax.jit(tx.init)(params)
  shapes = jax.eval_shape(tx.init, params)
  assert jax.tree.structure(eager) == jax.tree.structure(jitted) == jax.tree.structure(shapes)
  assert trees.dtypes(eager) == trees.dtypes(jitted) == trees.dtypes(shapes)
  assert any("*" in path for path in meshes.by_path(eager))
  trees.assert_equal(eager, jitted)


@pytest.mark.parametrize("place", ["whole", "sharded", "mesh set", "explicit"])
@pytest.mark.parametrize("name", [
  pytest.param(n, marks=[] if n in ("alias", "bf16") else [pytest.mark.slow]) for n in INITS])
def test_one_program_may_hold_init_and_update(name, place):
  tx, plain = INITS[name](), alike()
  [gradient] = trees.sequence(plain, 1)

  def both(gradient, params):
    updates, state = tx.update(gradient, tx.init(params), params)
    return updates, state

  with jax.numpy_dtype_promotion("standard"):
    expected = jax.jit(both)(gradient, plain)
    in_two, _ = jax.jit(tx.update)(gradient, tx.init(plain), plain)
    loose = 1e-6 if name in ("alias", "adamw", "host") else 0.1
    trees.assert_close(expected[0], in_two, loose, 1e-7)
    if place == "whole":
      return
    mesh = meshes.mesh(4, 2, AxisType.Explicit if place == "explicit" else AxisType.Auto)
    context = jax.set_mesh(mesh) if place != "sharded" else contextlib.nullcontext()
    with context:
      params = alike(mesh)
      spread = jax.tree.map(lambda x, p: jax.device_put(x, p.sharding), gradient, params)
      updates, state = jax.jit(both)(spread, params)
  trees.assert_close(updates, expected[0], 2e-5 + loose, 2e-5)
  for block in params:
    assert updates[block]["w"].sharding.is_equivalent_to(params[block]["w"].sharding, 2)
  # Seen from outside, what is sharded stands alone, and what is not seen is stacked.
  stacked = any("*" in path for path in meshes.by_path(state))
  assert stacked == (place in ("sharded", "explicit"))
  if place == "explicit":
    assert not any("*/w[" in path for path in meshes.by_path(state))


def boxed():
  """Parameters of Flax, each in a box that names its axes."""
  nn = pytest.importorskip("flax.linen")

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      for i in range(3):
        dense = nn.Dense(8, kernel_init=nn.with_logical_partitioning(
          nn.initializers.normal(), ("embed", "mlp")), name=f"layer{i}")
        x = dense(x)
      return x

  return nn, Model().init(jax.random.key(0), jnp.ones((2, 8)))["params"]


@pytest.mark.parametrize("name", [*INITS, "plain adamw"])
def test_state_of_boxed_parameters_names_its_axes(name):
  nn, params = boxed()
  with jax.numpy_dtype_promotion("standard"):
    tx = optax.adamw(1e-2) if name == "plain adamw" else INITS[name]()
    specs = nn.get_partition_spec(jax.eval_shape(tx.init, params))
    wanted = nn.get_partition_spec(jax.eval_shape(optax.adamw(1e-2).init, params))
    for field in ("mu", "nu"):
      found = meshes.by_path(optax.tree.get(specs, field))
      expected = meshes.by_path(optax.tree.get(wanted, field))
      kernels = {k: x for k, x in expected.items() if "kernel" in k}
      assert len(kernels) == 3
      for path, spec in kernels.items():
        of_leaf = {k: x for k, x in found.items() if k.startswith(path)}
        assert of_leaf, (path, found)
        if name != "8 bits":
          assert list(of_leaf.values()) == [spec]
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(params, state, params)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  assert jax.tree.structure(updates) == jax.tree.structure(params)
  plain = nn.meta.unbox(params)
  with jax.numpy_dtype_promotion("standard"):
    expected, _ = jax.jit(tx.update)(plain, tx.init(plain), plain)
  trees.assert_close(nn.meta.unbox(updates), expected, *((1e-6, 1e-7) if "8" not in name
                                                         and "bf16" not in name else (0.1, 0.0)))


def test_a_jitted_init_with_shardings():
  tx, mesh = ho.hina_adaptive(**PLAIN, leaf_batching=False), meshes.mesh(4, 2)
  params = alike(mesh)
  places = jax.tree.map(lambda x: x.sharding, ho.abstract_state(tx, params))
  state = jax.jit(tx.init, out_shardings=places)(params)
  check_state(state, params)
  check_bytes(state, params)


@pytest.mark.parametrize(("bits", "make"), [
  (16, lambda tx: memory.with_state_dtype(tx)),
  (8, lambda tx: memory.with_quantized_state(tx)),
  pytest.param(32, lambda tx: memory.with_host_offload(tx), marks=pytest.mark.slow),
  pytest.param(16, lambda tx: memory.with_rounded_updates(optax.chain(tx, optax.scale(-0.1))),
               marks=pytest.mark.slow),
], ids=["bf16", "8 bits", "host", "rounded"])
def test_storage_wrappers(bits, make):
  """State lies as its parameters from init on, step after step, and nothing is gathered."""
  mesh = meshes.mesh(4, 2)
  plain = meshes.parameters()
  params = jax.device_put(plain, meshes.shardings(mesh))
  tx = make(ho.scale_by_hina())
  state, update = tx.init(params), jax.jit(tx.update)
  alone, single = tx.init(plain), jax.jit(tx.update)
  for g in trees.sequence(plain, 3):
    expected, alone = single(g, alone, plain)
    updates, state = update(jax.device_put(g, meshes.shardings(mesh)), state, params)
  trees.assert_close(updates, expected, 0.0, 2e-5 if bits == 32 else 2e-2)
  for path, leaf in meshes.by_path(state).items():
    if leaf.size >= meshes.SMALLEST and not path.endswith("whole"):
      path = path.removesuffix("/codes")
      param = next(p for n, p in meshes.by_path(params).items() if path.endswith(n))
      assert leaf.sharding.shard_shape(leaf.shape) == param.sharding.shard_shape(param.shape), path
  check_traffic(update.lower(params, state, params).compile())


def test_stencils_send_borders_only():
  """A second difference over rows and columns, both sharded, sends rows and columns of one."""
  mesh = meshes.mesh(4, 2)
  place = NamedSharding(mesh, PartitionSpec("data", "model"))
  params = {"w": jax.device_put(jnp.ones((64, 64)), place)}
  tx = ho.suppress_high_frequency(0.5)
  compiled = jax.jit(tx.update).lower(params, tx.init(params), params).compile()
  assert sorted(meshes.traffic(compiled)) == [
    ("collective-permute", 16), ("collective-permute", 16),
    ("collective-permute", 32), ("collective-permute", 32)]
