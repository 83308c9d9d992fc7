"""Beside accelerate, GradScaler, DataLoaders, and without torch."""

import importlib
import subprocess
import sys
import warnings

import accelerate
import pytest
import torch
from models import assert_same, batch, data, dense_model, loss_of, train

from hina_optax import torch_bridge
from hina_optax.torch_bridge import HinaAdaptive


def run(code, **environment):
  import os

  return subprocess.run(
    [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True,
    env=os.environ | environment)


def test_sd_scripts_makes_it_from_strings():
  """As the trainer does: a dotted name, and one `key=value` an argument."""
  import ast

  module, name = "hina_optax.torch_bridge.HinaAdaptive".rsplit(".", 1)
  optimizer_class = getattr(importlib.import_module(module), name)
  arguments = ["edge_suppression=True", "edge_penalty=0.1", "betas=(0.9,0.99)",
               "background_regularization_mode='fast'", "vram_budget_gb=8"]
  options = {k: ast.literal_eval(v) for k, v in (a.split("=") for a in arguments)}
  model = dense_model()
  groups = [{"params": list(model[0].parameters()), "lr": 1e-4},
            {"params": list(model[2].parameters()), "lr": 5e-5}]
  optimizer = optimizer_class(groups, lr=1e-4, **options)
  scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 2))
  before = float(loss_of(model).detach())
  train(model, optimizer, 4, scheduler)
  assert float(loss_of(model).detach()) < before
  assert [g["lr"] for g in optimizer.param_groups] == [1e-4, 5e-5]
  with pytest.raises(ValueError, match="Did you mean"):
    optimizer_class(groups, lr=1e-4, edge_penality=0.1)


def test_accelerate_wraps_it():
  """Accumulation, clipping, a scheduler, a checkpoint."""
  ours, theirs = dense_model(), dense_model()
  accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
  inner = HinaAdaptive(ours.parameters(), lr=1e-2)
  schedule = torch.optim.lr_scheduler.StepLR(inner, 1, 0.5)
  model, optimizer, scheduler = accelerator.prepare(ours, inner, schedule)
  for i in range(4):
    with accelerator.accumulate(model):
      x, y = map(torch.from_numpy, batch(i))
      accelerator.backward(((model(x) - y) ** 2).mean())
      if accelerator.sync_gradients:
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
      optimizer.step()
      scheduler.step()
      optimizer.zero_grad()

  plain = HinaAdaptive(theirs.parameters(), lr=1e-2)
  for pair in ((0, 1), (2, 3)):
    plain.zero_grad()
    for i in pair:
      x, y = map(torch.from_numpy, batch(i))
      (((theirs(x) - y) ** 2).mean() / 2).backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
    plain.step()
    plain.param_groups[0]["lr"] *= 0.5
  assert_same(ours, theirs)


def test_accelerate_saves_and_loads_it(tmp_path):
  model = dense_model()
  accelerator = accelerate.Accelerator(cpu=True)
  model, optimizer = accelerator.prepare(model, HinaAdaptive(model.parameters(), lr=1e-2))
  train(model, optimizer, 2)
  accelerator.save_state(tmp_path, safe_serialization=False)
  train(model, optimizer, 2)
  expected = [p.detach().clone() for p in model.parameters()]
  accelerator.load_state(tmp_path)
  train(model, optimizer, 2)
  assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected))


def test_a_scaler_unscales_and_skips():
  ours, theirs = dense_model(), dense_model()
  scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
  scaled, plain = (HinaAdaptive(m.parameters(), lr=1e-2) for m in (ours, theirs))
  for step in range(3):
    scaled.zero_grad()
    loss = loss_of(ours) * (float("inf") if step == 1 else 1.0)
    scaler.scale(loss).backward()
    scaler.step(scaled)
    scaler.update()
    if step != 1:
      plain.zero_grad()
      loss_of(theirs).backward()
      plain.step()
  assert_same(ours, theirs, rtol=1e-6, atol=1e-7)
  assert scaler.get_scale() == 2.0**9


class Numbers(torch.utils.data.Dataset):
  def __len__(self):
    return 8

  def __getitem__(self, i):
    return tuple(map(torch.from_numpy, batch(i)))


@pytest.mark.parametrize(
  "context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_loader_change_nothing(context):
  def after(**options):
    model = dense_model()
    optimizer = HinaAdaptive(model.parameters(), lr=1e-2)
    # JAX warns of every fork: a child that called it would hang. These only read data.
    with warnings.catch_warnings():
      warnings.filterwarnings("ignore", message=r"(?s).*fork", category=RuntimeWarning)
      warnings.filterwarnings("ignore", message=r"(?s).*fork", category=DeprecationWarning)
      for x, y in torch.utils.data.DataLoader(Numbers(), batch_size=None, **options):
        optimizer.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        optimizer.step()
    return model

  assert_same(after(num_workers=2, multiprocessing_context=context), after())


def test_jax_leaves_the_gpu_s_memory_to_torch():
  code = """
import os
import hina_optax.torch_bridge
from jax._src import xla_bridge
from jaxlib import xla_client  # what JAX gives a GPU's client
print(os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"], xla_bridge.backends_are_initialized(),
      xla_client.generate_pjrt_gpu_plugin_options().get("preallocate"))
"""
  assert run(code).stdout.split() == ["false", "False", "False"]
  set_by_user = run(code, XLA_PYTHON_CLIENT_PREALLOCATE="true").stdout.split()
  assert set_by_user == ["true", "False", "True"]


def test_without_torch_the_library_works_and_the_bridge_says_what_to_install():
  code = """
import sys
sys.modules["torch"] = None
import hina_optax
hina_optax.hina_adaptive(1e-3)
try:
  import hina_optax.torch_bridge
except ImportError as error:
  print(error)
"""
  done = run(code)
  assert "pip install 'hina-optax[torch]'" in done.stdout, done.stderr


def test_autocast_gradients_reach_fp32_parameters():
  model = dense_model()
  optimizer = HinaAdaptive(model.parameters(), lr=1e-2)
  x, y = data()
  before = float(loss_of(model).detach())
  for _ in range(3):
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
      loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
  assert float(loss_of(model).detach()) < before


@pytest.mark.parametrize("name", torch_bridge.__all__)
def test_docstrings_of_the_bridge_are_complete(name):
  doc = getattr(torch_bridge, name).__doc__
  for part in ("Args:", "State:", "Raises:", "Example:", ">>> ", "References:", ".. math::"):
    assert part in doc, f"{name} lacks {part}"
