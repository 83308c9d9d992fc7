"""Small torch models and their training, shared by the tests of the bridge."""

from typing import Any

import numpy as np
import torch

# torch's threads wait by spinning: beside those of JAX one is enough.
torch.set_num_threads(1)


class LoraLayer(torch.nn.Module):
  """A frozen dense layer with a trained pair beside it, in the spelling and order of sd-scripts."""

  def __init__(self, inputs: int, outputs: int, rank: int):
    super().__init__()
    self.base = torch.nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
    self.lora_down = torch.nn.Linear(inputs, rank, bias=False)
    self.lora_up = torch.nn.Linear(rank, outputs, bias=False)
    torch.nn.init.normal_(self.lora_up.weight, std=0.1)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.base(x) + self.lora_up(self.lora_down(x))


def lora_model(rank: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
  """Three layers of two shapes."""
  torch.manual_seed(seed)
  layers = [LoraLayer(12, 16, rank), torch.nn.Tanh(), LoraLayer(16, 16, rank), torch.nn.Tanh(),
            LoraLayer(16, 16, rank)]
  return torch.nn.Sequential(*layers).to(dtype)


def dense_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
  """Matrices and vectors."""
  torch.manual_seed(seed)
  return torch.nn.Sequential(
    torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16)).to(dtype)


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
  return [p for p in model.parameters() if p.requires_grad]


def data(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
  generator = torch.Generator().manual_seed(7)
  return (torch.randn(32, 12, generator=generator).to(dtype),
          torch.randn(32, 16, generator=generator).to(dtype))


def loss_of(model: torch.nn.Module) -> torch.Tensor:
  x, y = data(next(model.parameters()).dtype)
  return ((model(x) - y) ** 2).mean()


def train(model: torch.nn.Module, optimizer: Any, steps: int, scheduler: Any = None) -> list[float]:
  """Losses before each step."""
  losses = []
  for _ in range(steps):
    optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    optimizer.step()
    if scheduler is not None:
      scheduler.step()
    losses.append(float(loss.detach()))
  return losses


def assert_same(a: torch.nn.Module, b: torch.nn.Module, rtol: float = 0.0, atol: float = 0.0):
  """Compares parameters, bit for bit unless told otherwise."""
  for (name, p), q in zip(a.named_parameters(), b.parameters()):
    torch.testing.assert_close(
      p, q, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
  """Other data at each step, so that gradients do not vanish."""
  x = np.random.default_rng(step).normal(size=(32, 12)).astype(np.float32)
  target = np.random.default_rng(99).normal(size=(12, 16)).astype(np.float32)
  return x, np.tanh(x @ target)
