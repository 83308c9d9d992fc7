"""State through `torch.save`: bit for bit, or an error that says what differs."""

import io
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
import torch

import hina_optax as ho
from hina_optax.torch_bridge import HinaAdaptive, OptaxOptimizer
from tests.torch_bridge.models import assert_same, dense_model, lora_model, train, trained


@pytest.fixture(autouse=True)
def standard_promotion():
  with jax.numpy_dtype_promotion("standard"):
    yield


def round_trip(state):
  file = io.BytesIO()
  torch.save(state, file)
  file.seek(0)
  return torch.load(file, weights_only=True)


def noisy(learning_rate=1e-2):
  key = jax.random.key(3, impl="rbg")
  return optax.chain(optax.add_noise(0.1, 0.5, key=key), optax.sgd(learning_rate))


def packed():
  return ho.with_quantized_state(optax.adamw(1e-2))


MAKERS = {
  "defaults": lambda p: HinaAdaptive(p, lr=1e-2),
  "compat": lambda p: HinaAdaptive(p, lr=1e-2, sd_scripts_compat=True),
  "bf16-on-the-host": lambda p: HinaAdaptive(
    p, lr=1e-2, reduce_precision=True, cpu_offload_states=True),
  "adamw": lambda p: OptaxOptimizer(p, optax.adamw(1e-2)),
  "injected": lambda p: OptaxOptimizer(p, optax.inject_hyperparams(optax.adamw)(1e-2)),
  "8-bit": lambda p: OptaxOptimizer(p, packed()),
  "random-key": lambda p: OptaxOptimizer(p, noisy()),
}


@pytest.mark.parametrize("make", [
  pytest.param(make, marks=pytest.mark.slow if name == "compat" else [], id=name)
  for name, make in MAKERS.items()])
def test_goes_on_bit_for_bit(make):
  model = dense_model()
  optimizer = make(model.parameters())
  scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)
  train(model, optimizer, 3, scheduler)
  saved = round_trip({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                      "scheduler": scheduler.state_dict()})
  train(model, optimizer, 3, scheduler)

  other = dense_model(seed=5)
  resumed = make(other.parameters())
  again = torch.optim.lr_scheduler.StepLR(resumed, 2, 0.9)
  train(other, resumed, 1)  # a state to be replaced
  other.load_state_dict(saved["model"])
  resumed.load_state_dict(saved["optimizer"])
  again.load_state_dict(saved["scheduler"])
  assert resumed.param_groups[0]["lr"] == saved["optimizer"]["param_groups"][0]["lr"]
  train(other, resumed, 3, again)
  assert_same(model, other)


def test_goes_on_in_another_process(tmp_path):
  code = f"""
import sys; sys.path[:0] = {sys.path!r}
import torch
from tests.torch_bridge.models import dense_model, train
from hina_optax.torch_bridge import HinaAdaptive
model = dense_model(seed=5)
optimizer = HinaAdaptive(model.parameters(), lr=1e-2)
saved = torch.load({str(tmp_path / "run.pt")!r}, weights_only=True)
model.load_state_dict(saved["model"])
optimizer.load_state_dict(saved["optimizer"])
train(model, optimizer, 2)
torch.save(model.state_dict(), {str(tmp_path / "after.pt")!r})
"""
  model = dense_model()
  optimizer = HinaAdaptive(model.parameters(), lr=1e-2)
  train(model, optimizer, 2)
  torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()},
             tmp_path / "run.pt")
  train(model, optimizer, 2)
  subprocess.run([sys.executable, "-c", code], check=True)
  other = dense_model()
  other.load_state_dict(torch.load(tmp_path / "after.pt"))
  assert_same(model, other)


def test_a_saved_state_is_a_copy():
  model = dense_model()
  optimizer = HinaAdaptive(model.parameters(), lr=1e-2)
  train(model, optimizer, 2)
  saved = optimizer.state_dict()
  before = round_trip(saved)
  train(model, optimizer, 2)
  after = saved["state"]["hina_optax"]["groups"][0][0]["arrays"]
  for name, x in before["state"]["hina_optax"]["groups"][0][0]["arrays"].items():
    assert torch.equal(x, after[name]), name


def test_a_state_before_the_first_step_holds_nothing_and_loads():
  model, twin = dense_model(), dense_model()
  optimizer = HinaAdaptive(model.parameters(), lr=1e-2)
  optimizer.load_state_dict(round_trip(optimizer.state_dict()))
  train(model, optimizer, 2)
  train(twin, HinaAdaptive(twin.parameters(), lr=1e-2), 2)
  assert_same(model, twin)


def test_several_groups_and_late_parameters_come_back():
  def make(model):
    first, *rest = model.parameters()
    return HinaAdaptive([{"params": [first], "lr": 1e-3}, {"params": rest}], lr=1e-2)

  model = dense_model()
  model[2].weight.requires_grad_(False)
  optimizer = make(model)
  train(model, optimizer, 2)
  model[2].weight.requires_grad_(True)
  train(model, optimizer, 2)
  saved = round_trip({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
  train(model, optimizer, 2)
  other = dense_model(seed=5)
  resumed = make(other)
  other.load_state_dict(saved["model"])
  resumed.load_state_dict(saved["optimizer"])
  assert [g["lr"] for g in resumed.param_groups] == [1e-3, 1e-2]
  train(other, resumed, 2)
  assert_same(model, other)


def test_other_memory_options_move_the_state():
  def train(model, optimizer, steps):
    for _ in range(steps):
      optimizer.zero_grad()
      model(torch.eye(64)).square().mean().backward()
      optimizer.step()

  model, count = torch.nn.Linear(64, 64, bias=False), 64 * 64
  optimizer = HinaAdaptive(model.parameters(), lr=1e-2)
  train(model, optimizer, 3)
  assert optimizer.get_optimization_info()["memory_optimization"]["state_bytes"] > 17 * count
  saved = round_trip(optimizer.state_dict())
  narrow = HinaAdaptive(model.parameters(), lr=1e-2, reduce_precision=True)
  narrow.load_state_dict(saved)
  info = narrow.get_optimization_info()
  assert info["figures"]["step"] == 3
  assert info["memory_optimization"]["state_bytes"] < 11 * count
  train(model, narrow, 2)


def differing():
  model = dense_model()

  def saved_by(optimizer):
    train(model, optimizer, 1)
    return round_trip(optimizer.state_dict())

  default = saved_by(HinaAdaptive(model.parameters(), lr=1e-2))
  adamw = saved_by(OptaxOptimizer(model.parameters(), optax.adamw(1e-2)))
  version = round_trip(default)
  version["state"]["hina_optax"]["version"] = 99
  lora = lora_model()
  named = [(f"layer.{n}", p) for n, p in model.named_parameters()]
  hina = lambda params, **o: HinaAdaptive(params, lr=1e-2, **o)  # noqa: E731
  foreign = torch.optim.AdamW(model.parameters())
  return [
    (hina(model.parameters(), edge_suppression=True, use_spd=False), default,
     r"edge_suppression: saved False, now True\n  use_spd: saved True, now False"),
    (hina(model.parameters()), version, "has version 99"),
    (hina(model.parameters()), adamw, "optimizer: saved 'OptaxOptimizer', now 'HinaAdaptive'"),
    (hina(model.parameters()), foreign.state_dict(), "not saved by HinaAdaptive"),
    (hina(reversed(list(model.parameters()))), default, r"Parameter '0' is \[16\].*\[16, 12\]"),
    (hina(named), default, "named 'layer.0.weight'.*saved for '0'"),
    (hina(list(model.parameters())[:2]), default, "doesn't match the size"),
    (hina([{"params": [p]} for p in trained(lora)[:2]]), default, "number of parameter groups"),
    (OptaxOptimizer(model.parameters(), optax.sgd(1e-2, momentum=0.9)), adamw,
     r"only in the saved state(.|\n)*not in the saved state"),
  ]


def test_what_differs_is_named_and_nothing_is_half_loaded():
  for optimizer, state, words in differing():
    before = [dict(g, params=None) for g in optimizer.param_groups]
    with pytest.raises(ValueError, match=words):
      optimizer.load_state_dict(state)
    assert [dict(g, params=None) for g in optimizer.param_groups] == before
    assert not any(optimizer._subgroups)


def test_state_in_other_shapes_is_named():
  p = torch.nn.Parameter(torch.ones(3))
  make = lambda size: OptaxOptimizer([p], optax.GradientTransformation(  # noqa: E731
    lambda params: jnp.zeros(size), lambda u, s, params=None: (u, s)))
  p.grad = torch.ones(3)
  optimizer = make(4)
  optimizer.step()
  with pytest.raises(ValueError, match=r"saved float32\[4\], now float32\[5\]"):
    make(5).load_state_dict(optimizer.state_dict())
