"""The alias trains nnx and linen models and finds the LoRA pairs in both."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import hina_optax as ho
from hina_optax.base import lora, paths

pytestmark = [
  # flax itself mixes dtypes implicitly.
  pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def standard_promotion():
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


class NnxModel(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
    self.dense = nnx.Linear(4, 8, rngs=rngs)
    self.adapter = nnx.LoRA(8, 2, 3, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.conv(x)).mean(axis=(1, 2))
    return self.adapter(nnx.relu(self.dense(x)))


class LinenModel(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x)).mean(axis=(1, 2))
    x = nn.relu(nn.Dense(8, name="dense")(x))
    down = self.param("lora_down", nn.initializers.normal(0.5), (8, 2))
    up = self.param("lora_up", nn.initializers.normal(0.5), (2, 3))
    return x @ down @ up


def data():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(16, 6, 6, 1)), jnp.float32)
  return x, jnp.stack([x.mean((1, 2, 3)), x[:, 0, 0, 0], x[:, -1, -1, 0]], -1)


def options(**changed):
  return {
    **ho.lora_preset(learning_rate=2e-2, vram_budget_gb=None, memory_efficient=False,
                     spatial_awareness=True, rank_penalty_strength=1e-4),
    **changed,
  }


def train_nnx(wrt):
  model = NnxModel(nnx.Rngs(0))
  model.adapter.lora_b.value = model.adapter.lora_b.value + 0.1
  optimizer = nnx.Optimizer(model, ho.hina_adaptive(**options()), wrt=wrt)
  x, y = data()

  @nnx.jit
  def step(model, optimizer):
    loss, grads = nnx.value_and_grad(
      lambda m: jnp.mean((m(x) - y) ** 2), argnums=nnx.DiffState(0, wrt)
    )(model)
    optimizer.update(model, grads)
    return loss

  return model, optimizer, [float(step(model, optimizer)) for _ in range(60)]


@pytest.mark.parametrize("wrt", [nnx.Param, nnx.LoRAParam])
def test_trains_an_nnx_model(wrt):
  before = NnxModel(nnx.Rngs(0))
  model, optimizer, losses = train_nnx(wrt)
  assert losses[-1] < 0.9 * losses[0]
  moved = float(jnp.abs(model.dense.kernel.value - before.dense.kernel.value).max())
  assert (moved == 0) == (wrt is nnx.LoRAParam)
  info = ho.get_optimization_info(optimizer.opt_state)
  assert info["figures"]["step"] == 60
  assert {"lora_rank_penalty", "edge_suppression"} <= set(info["features"])


class Wide(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.layers = nnx.List([nnx.Linear(128, 128, rngs=rngs) for _ in range(6)])

  def __call__(self, x):
    for layer in self.layers:
      x = nnx.relu(layer(x))
    return x


@pytest.mark.parametrize("share", [pytest.param(0.7, marks=pytest.mark.slow), 0.5])
def test_an_nnx_optimizer_keeps_its_state_as_planned(share):
  """Names and plans must not depend on the variables that nnx puts around every array."""
  light = dict(background_regularization=False, use_agr=False, use_lr_mask=False,
               leaf_batching=False)
  model = Wide(nnx.Rngs(0))
  params = nnx.state(model, nnx.Param)
  whole = ho.plan_memory(light, params).device_bytes
  tx = ho.hina_adaptive(1e-2, **light, vram_budget_gb=share * whole / 2**30)
  plan = ho.plan_memory(tx, params)
  assert plan.to_dict() == ho.plan_memory(tx, nnx.as_pure(params)).to_dict()
  changes = {step.change for step in plan.steps}
  assert "8-bit" in changes
  assert ("host memory" in changes) == (share == 0.5)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  x = jnp.ones((2, 128))

  @nnx.jit
  def step(model, optimizer):
    loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1) ** 2))(model)
    optimizer.update(model, grads)
    return loss

  losses = [float(step(model, optimizer)) for _ in range(5)]
  assert losses[-1] < losses[0]
  state = jax.tree.leaves(optimizer.opt_state)
  assert sum(x.nbytes for x in state) == plan.state_bytes
  on_host = sum(x.nbytes for x in state if x.sharding.memory_kind == "pinned_host")
  assert on_host == plan.host_bytes
  assert (on_host > 0) == (share == 0.5)
  figures = ho.get_optimization_info(optimizer.opt_state, tx)["figures"]
  assert figures["step"] == 5
  assert 0 < figures["alignment"] <= 1


def pairs_of(tree):
  places, leaves, _ = paths.flatten(tree)
  return lora.find_pairs(places, leaves, lora.compile_pattern(None))


def test_finds_the_pairs_of_an_nnx_model_on_both_of_its_trees():
  model = NnxModel(nnx.Rngs(0))
  state = nnx.state(model, nnx.LoRAParam)
  for tree in (state, nnx.to_pure_dict(state), nnx.state(model, nnx.Param)):
    assert [p.rank for p in pairs_of(tree)] == [2]
    found = {place.path for place in paths.flatten(tree)[0]}
    assert {"adapter/lora_a", "adapter/lora_b"} <= found


def test_the_rank_penalty_reaches_the_factors_of_an_nnx_model():
  """With the penalty alone to learn from, the product shrinks."""
  model = NnxModel(nnx.Rngs(0))
  model.adapter.lora_b.value = model.adapter.lora_b.value + 1.0
  tx = optax.chain(ho.add_rank_penalty(1.0), optax.sgd(1e-2))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
  size = lambda: float(jnp.linalg.norm(  # noqa: E731
    model.adapter.lora_a.value @ model.adapter.lora_b.value, "nuc"))
  before = size()
  for _ in range(20):
    grads = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.LoRAParam))
    optimizer.update(model, grads)
  assert size() < 0.9 * before


def test_trains_a_linen_model_and_finds_its_pair():
  model, (x, y) = LinenModel(), data()
  params = model.init(jax.random.key(0), x)["params"]
  assert len(pairs_of(params)) == 1
  state = train_state.TrainState.create(
    apply_fn=model.apply, params=params, tx=ho.hina_adaptive(**options())
  )

  @jax.jit
  def step(state):
    loss, grads = jax.value_and_grad(
      lambda p: jnp.mean((state.apply_fn({"params": p}, x) - y) ** 2)
    )(state.params)
    return state.apply_gradients(grads=grads), loss

  losses = []
  for _ in range(60):
    state, loss = step(state)
    losses.append(float(loss))
  assert losses[-1] < 0.9 * losses[0]
  info = ho.get_optimization_info(state.opt_state, state.tx)
  assert info["figures"]["step"] == 60
  assert {"lora_rank_penalty", "edge_suppression", "use_tam"} <= set(info["features"])
