"""The guide's class: its options, its order, its numbers."""

import functools
import json
import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import hina_optax as ho
from hina_optax.torch_bridge import HinaAdaptive
from hina_optax.torch_bridge._names import infer_names
from tests.cases import EVERYTHING
from tests.torch_bridge.models import (
  assert_same,
  batch,
  dense_model,
  lora_model,
  loss_of,
  train,
  trained,
)

FOLDER = pathlib.Path(__file__).parent
PARITY = FOLDER.parent / "parity"
CONFIGS = json.loads((PARITY / "configs.json").read_text())
SNIPPETS = re.findall(r"```python\n(.*?)```", (FOLDER / "guide.zh.md").read_text(), re.DOTALL)


def test_every_snippet_of_the_guide_runs(capsys):
  torch.manual_seed(0)
  scope = {"model": torch.nn.Sequential(torch.nn.Linear(8, 2, bias=False),
                                        torch.nn.Linear(2, 6, bias=False))}
  stepped = set()
  for snippet in SNIPPETS:
    code = snippet.replace("library.hina_adaptive", "hina_optax.torch_bridge")
    exec(code, scope)
    features = tuple(scope["optimizer"].get_optimization_info()["features"])
    if features not in stepped:
      scope["model"](torch.ones(4, 8)).square().mean().backward()
      scope["optimizer"].step()
    stepped.add(features)
  printed = capsys.readouterr().out
  assert re.search(r"啟用的正則化技術: \['background_regularization', .*'use_tam'\]", printed)
  assert re.search(r"記憶體壓力: \d+\.\d+%", printed)
  assert re.search(r"緩衝池記憶體: \d+\.\d+MB", printed)
  assert len(SNIPPETS) == 19
  assert len(stepped) == 7  # what the guide switches on, from the basic to the full configuration


@functools.cache
def recorded():
  inputs, trajectories = np.load(PARITY / "inputs.npz"), np.load(PARITY / "trajectories.npz")
  names = [key.split("/")[1] for key in inputs.files if key.startswith("param0/")]
  return names, inputs, trajectories


@pytest.mark.parametrize("with_names", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("config", [
  pytest.param(name, marks=[] if name == "seed_advanced" else pytest.mark.slow) for name in CONFIGS
  if name != "seed_advanced_bf16"])
def test_compat_follows_the_original(config, with_names):
  names, inputs, trajectories = recorded()
  params = {n: torch.nn.Parameter(torch.from_numpy(inputs[f"param0/{n}"].copy())) for n in names}
  options = dict(CONFIGS[config])
  if config.startswith("dynamic_adaptation"):
    options["intrinsic_importance"] = config.rsplit("_", 1)[1]
  optimizer = HinaAdaptive(
    params.items() if with_names else params.values(), sd_scripts_compat=True, **options)
  for i in range(len(inputs[f"grad/{names[0]}"])):
    for n, p in params.items():
      p.grad = torch.from_numpy(inputs[f"grad/{n}"][i].copy())
    optimizer.step()
    for n, p in params.items():
      np.testing.assert_allclose(
        p.detach().numpy(), trajectories[f"{config}/{n}"][i], rtol=0, atol=3e-6, err_msg=n)


def jax_twin(model):
  """The model's loss in JAX, and its trained parameters by name."""
  base = [jnp.asarray(m.base.weight.detach().numpy()) for m in model if hasattr(m, "base")]
  params = {n: jnp.array(p.detach().numpy()) for n, p in named(model)}

  def loss(params, x, y):
    h = x
    for i, weight in enumerate(base):
      down, up = (params[f"{2 * i}.{kind}.weight"] for kind in ("lora_down", "lora_up"))
      h = h @ weight.T + (h @ down.T) @ up.T
      h = jnp.tanh(h) if i < len(base) - 1 else h
    return jnp.mean((h - y) ** 2)

  return loss, params


def named(model):
  return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("options", [
  pytest.param({}, id="defaults"),
  pytest.param(EVERYTHING, marks=pytest.mark.slow, id="everything"),
  pytest.param({"sd_scripts_compat": True}, marks=pytest.mark.slow, id="compat"),
])
def test_two_hundred_steps_are_those_of_jax(options):
  model = lora_model()
  loss, params = jax_twin(model)
  start = params
  tx = ho.hina_adaptive(1e-4, spatial_axes=ho.torch_spatial_axes, **options)
  state, gradient, update = tx.init(params), jax.jit(jax.grad(loss)), jax.jit(tx.update)
  optimizer = HinaAdaptive(named(model), lr=1e-4, **options)
  for i in range(200):
    x, y = batch(i)
    optimizer.zero_grad()
    ((model(torch.from_numpy(x)) - torch.from_numpy(y)) ** 2).mean().backward()
    optimizer.step()
    updates, state = update(gradient(params, x, y), state, params)
    params = optax.apply_updates(params, updates)
  for n, p in named(model):
    theirs, size = np.asarray(params[n]), np.linalg.norm(params[n])
    assert np.linalg.norm(p.detach().numpy() - theirs) <= 1e-6 * size, n
    assert np.linalg.norm(theirs - start[n]) >= 0.1 * size, n


def test_from_the_same_gradients_the_steps_are_the_same_bits():
  model = lora_model()
  params = {n: jnp.array(p.detach().numpy()) for n, p in named(model)}
  tx = ho.hina_adaptive(1e-3, spatial_axes=ho.torch_spatial_axes)
  state, update = tx.init(params), jax.jit(tx.update)
  optimizer = HinaAdaptive(named(model), lr=1e-3)
  for _ in range(20):
    optimizer.zero_grad()
    loss_of(model).backward()
    grads = {n: jnp.array(p.grad.numpy()) for n, p in named(model)}
    optimizer.step()
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
  for n, p in named(model):
    np.testing.assert_array_equal(p.detach().numpy(), np.asarray(params[n]), err_msg=n)


def test_numbers_of_groups_change_without_compiling():
  ours, theirs = dense_model(), dense_model()

  def groups(model):
    first, *rest = model.parameters()
    return [{"params": [first], "lr": 1e-2, "weight_decay": 0.0}, {"params": rest}]

  off = {name: False for name in (
    "use_agr", "background_regularization", "use_tam", "use_adopt_stability", "use_cautious",
    "use_lr_mask", "use_dynamic_adaptation", "use_spd", "dynamic_weight_decay")}
  optimizer = HinaAdaptive(groups(ours), lr=1e-4, weight_decay=0.1, **off)
  other = torch.optim.AdamW(groups(theirs), lr=1e-4, weight_decay=0.1)
  for o, m in ((optimizer, ours), (other, theirs)):
    o.param_groups[0]["lr"] = 2e-4
    train(m, o, 30, torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)))
    o.param_groups[1]["weight_decay"] = 0.5
    train(m, o, 10)
  assert_same(ours, theirs, rtol=0, atol=1e-6)
  assert optimizer.compilations() == 2


def test_the_rates_of_elements_do_not_follow_a_scheduler():
  """Bounds in absolute units are measured against the rate of the constructor."""
  model = dense_model()
  optimizer = HinaAdaptive(model.parameters(), lr=1e-3, min_lr=5e-4, max_lr=2e-3, lr_bump=1e-3)
  scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-3)
  train(model, optimizer, 20, scheduler)
  scale = optimizer.get_optimization_info()["figures"]["mean_rate_scale"]
  assert 0.5 <= scale <= 2.0


def test_in_compat_only_the_first_group_has_its_importance_updated():
  def means(compat):
    model = dense_model()
    first, *rest = model.parameters()
    optimizer = HinaAdaptive(
      [{"params": [first]}, {"params": rest}], lr=1e-3, relationship_discovery_interval=2,
      sd_scripts_compat=compat, memory_efficient=False)
    train(model, optimizer, 4)
    arrays = [group[0]["arrays"] for group in
              optimizer.state_dict()["state"]["hina_optax"]["groups"]]
    return [next(v for k, v in a.items() if ".importance" in k) for a in arrays]

  first, second = means(True)
  assert not torch.allclose(first, torch.tensor(1.0), atol=1e-3)
  assert torch.allclose(second, torch.tensor(1.0), atol=1e-3)
  second = means(False)[1]
  assert not torch.allclose(second, torch.tensor(1.0), atol=1e-3)


def test_pairs_are_found_by_shape_and_by_name():
  # A first convolution, its partner of one by one, a vector, and a layer that is no pair.
  assert infer_names([(4, 8, 3, 3), (16, 4, 1, 1), (16,), (8, 8), (8, 8)]) == [
    "0.lora_down", "0.lora_up", "2", "3", "4"]
  assert infer_names([(16, 8), (8, 16)]) == ["0", "1"]  # wider inside: no low rank
  assert infer_names([]) == []

  def after(params):
    model = lora_model()
    optimizer = HinaAdaptive(
      params(model), lr=1e-2, lora_rank_penalty=True, rank_penalty_strength=1.0)
    train(model, optimizer, 3)
    return model

  unnamed = after(trained)
  assert_same(unnamed, after(named))
  hidden = after(lambda m: [(f"{i}", p) for i, p in enumerate(trained(m))])
  with pytest.raises(AssertionError):
    assert_same(unnamed, hidden)


def test_rank_penalty_accepts_a_frozen_partner():
  model = lora_model()
  for layer in model:
    if hasattr(layer, "lora_down"):
      layer.lora_down.requires_grad_(False)
  start = {name: p.detach().clone() for name, p in model.named_parameters()}
  optimizer = HinaAdaptive(model.named_parameters(), lr=1e-2, lora_rank_penalty=True)
  train(model, optimizer, 2)
  trained_factors = [name for name in start if "lora_up" in name]
  assert trained_factors
  for name, p in model.named_parameters():
    if "lora_down" in name:
      assert torch.equal(p, start[name]), name
    elif name in trained_factors:
      assert torch.isfinite(p).all(), name
      assert not torch.equal(p, start[name]), name


def test_kernels_are_taken_in_torch_s_order():
  kernel = torch.nn.Parameter(torch.zeros(4, 3, 3, 3))
  off = {name: False for name in (
    "use_agr", "background_regularization", "use_tam", "use_adopt_stability", "use_cautious",
    "use_lr_mask", "use_dynamic_adaptation", "use_spd")}
  gradient = torch.randn(4, 3, 3, 3)
  optimizer = HinaAdaptive([kernel], lr=1e-2, spatial_awareness=True, frequency_penalty=1.0,
                           detail_preservation=1.0, weight_decay=0.0, betas=(0.0, 0.0), eps=1.0,
                           **off)
  kernel.grad = gradient
  optimizer.step()
  smooth = ho.suppress_high_frequency(1.0, spatial_axes=lambda path, leaf: (2, 3))
  expected, _ = smooth.update(jnp.asarray(gradient.numpy()), smooth.init(jnp.zeros((4, 3, 3, 3))))
  expected = -1e-2 * expected / (jnp.abs(expected) + 1.0)
  np.testing.assert_allclose(kernel.detach().numpy(), np.asarray(expected), rtol=1e-4, atol=1e-7)


def test_a_parameter_without_a_gradient_is_left_alone():
  model = dense_model()
  optimizer = HinaAdaptive(model.parameters(), lr=1e-2)
  train(model, optimizer, 2)
  weight = model[2].weight
  before = weight.detach().clone()
  optimizer.zero_grad()
  loss_of(model).backward()
  weight.grad = None
  optimizer.step()
  assert torch.equal(weight, before)
  assert not torch.equal(model[0].weight.grad, torch.zeros(16, 12))


def test_information_and_memory_are_those_of_all_groups():
  model = dense_model()
  first, *rest = model.parameters()
  optimizer = HinaAdaptive(
    [{"params": [first]}, {"params": rest}], lr=1e-3, edge_suppression=True, vram_budget_gb=2.0)
  info = optimizer.get_optimization_info()
  assert {"edge_suppression", "use_tam", "use_spd"} <= set(info["features"])
  assert info["memory_optimization"]["vram_budget_gb"] == 2.0
  count = sum(p.numel() for p in model.parameters())
  assert 22 * count > info["memory_optimization"]["state_bytes"] > 18 * count
  train(model, optimizer, 2)
  stats = optimizer.get_memory_stats()
  state = info["memory_optimization"]["state_bytes"]
  assert stats["used_mb"] * 2**20 == pytest.approx(state + 8 * count)
  assert stats["memory_pressure"] == pytest.approx((state + 8 * count) / 2**31)
  assert optimizer.get_optimization_info()["figures"]["step"] == 2


def test_optimize_for_vram_moves_a_running_state():
  model, twin = (torch.nn.Linear(64, 64, bias=False) for _ in range(2))
  twin.load_state_dict(model.state_dict())
  optimizers = [HinaAdaptive(m.parameters(), lr=1e-2) for m in (model, twin)]

  def go(steps):
    for m, o in zip((model, twin), optimizers):
      for _ in range(steps):
        o.zero_grad()
        (m(torch.eye(64)) - torch.eye(64)).square().mean().backward()
        o.step()

  def stored():
    info = optimizers[0].get_optimization_info()
    return info["memory_optimization"]["state_bytes"], info["figures"]["step"]

  go(5)
  before = stored()
  # Room for parameters, gradients and about half of the state in fp32.
  optimizers[0].optimize_for_vram(target_vram_gb=(8 + 10) * 64 * 64 / 2**30)
  assert stored()[0] <= 10 * 64 * 64 < before[0]
  assert stored()[1] == before[1] == 5
  go(10)
  torch.testing.assert_close(model.weight, twin.weight, rtol=0, atol=5e-3)
  assert stored()[1] == 15
  with pytest.raises(ValueError, match="target_vram_gb"):
    optimizers[0].optimize_for_vram(target_vram_gb=0)


def test_emergency_simplify_says_it_once():
  model = dense_model()
  count = sum(p.numel() for p in model.parameters())
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    optimizer = HinaAdaptive(
      model.parameters(), lr=1e-3, emergency_simplify=True, vram_budget_gb=(8 + 12) * count / 2**30)
    train(model, optimizer, 3)
  assert len([w for w in caught if "emergency_simplify" in str(w.message)]) == 1


@pytest.mark.parametrize(("options", "error", "words"), [
  ({"fourier_feature_loss": True}, ValueError, "frequency has no image meaning"),
  ({"edge_suppresion": True}, ValueError, "Did you mean 'edge_suppression'"),
  ({"lr": lambda step: 1e-3}, ValueError, "lr must be a number"),
  ({"edge_threshold": 2.0}, ValueError, "edge_threshold"),
  ({"use_tam": "yes"}, TypeError, "use_tam"),
  ({"maximize": True}, ValueError, "negate the loss"),
])
def test_bad_options_are_named(options, error, words):
  with pytest.raises(error, match=words):
    HinaAdaptive([torch.nn.Parameter(torch.ones(3))], **options)


def test_presets_are_taken_as_they_are():
  model = lora_model()
  optimizer = HinaAdaptive(trained(model), **ho.lora_preset())
  assert optimizer.param_groups[0]["lr"] == 1e-4


def test_a_mask_is_a_dict_by_name():
  def after(mask):
    model = dense_model()
    train(model, HinaAdaptive(model.named_parameters(), lr=1e-2, weight_decay=1.0,
                              weight_decay_mask=mask), 2)
    return model

  names = [n for n, _ in dense_model().named_parameters()]
  by_function = after(lambda params: {n: n.endswith("weight") for n in params})
  assert_same(by_function, after({n: n.endswith("weight") for n in names}))
  with pytest.raises(AssertionError):
    assert_same(by_function, after(None))
