"""The denoiser of `denoiser.py` in PyTorch, with the same weights: latents are channels first."""

import math
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from torch.nn import functional

from latent_diffusion.denoiser import PATCH, Denoiser, positions

EPSILON = 1e-6


class Attention(torch.nn.Module):
  """Self-attention with normalized queries and keys."""

  def __init__(self, width: int, heads: int):
    super().__init__()
    self.heads = heads
    self.qkv = torch.nn.Linear(width, 3 * width, bias=False)
    self.out = torch.nn.Linear(width, width, bias=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Mixes tokens: (batch, tokens, width) in and out."""
    batch, tokens, width = x.shape
    qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    size = (width // self.heads,)
    mixed = functional.scaled_dot_product_attention(
      functional.rms_norm(query, size, eps=EPSILON), functional.rms_norm(key, size, eps=EPSILON),
      value)
    return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Block(torch.nn.Module):
  """Attention and a two-layer network, both scaled and gated by the noise level."""

  def __init__(self, width: int, heads: int):
    super().__init__()
    self.attention = Attention(width, heads)
    self.up = torch.nn.Linear(width, 4 * width, bias=False)
    self.down = torch.nn.Linear(4 * width, width, bias=False)
    self.modulation = torch.nn.Parameter(torch.zeros(6, width))

  def forward(self, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Tokens (batch, tokens, width) under `level` (batch, 6, width)."""
    table = (level + self.modulation)[:, :, None]
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = table.unbind(1)
    x = x + gate_1 * self.attention(_norm(x) * (1 + scale_1) + shift_1)
    inner = self.up(_norm(x) * (1 + scale_2) + shift_2)
    return x + gate_2 * self.down(functional.gelu(inner, approximate="tanh"))


class TorchDenoiser(torch.nn.Module):
  """Predicts v or the noise from noisy latents (batch, channels, height, width)."""

  def __init__(self, channels: int, width: int, depth: int, heads: int):
    super().__init__()
    self.width = width
    self.embed = torch.nn.Linear(PATCH * PATCH * channels, width, bias=False)
    self.level_1 = torch.nn.Linear(width, width, bias=False)
    self.level_2 = torch.nn.Linear(width, 6 * width, bias=False)
    self.blocks = torch.nn.ModuleList(Block(width, heads) for _ in range(depth))
    self.head = torch.nn.Linear(width, PATCH * PATCH * channels, bias=False)

  def forward(self, noisy: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """Returns the prediction in the shape of `noisy`; `time` has a number in [0, 1] per latent."""
    batch, channels, height, width = noisy.shape
    rows, columns = height // PATCH, width // PATCH
    cut = noisy.reshape(batch, channels, rows, PATCH, columns, PATCH)
    tokens = cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)
    places = torch.from_numpy(np.array(positions(rows, columns, self.width)))
    x = self.embed(tokens) + places.to(noisy)
    level = functional.silu(self.level_1(_waves(1000.0 * time, self.width)))
    level = self.level_2(level).reshape(batch, 6, self.width)
    for block in self.blocks:
      x = block(x, level)
    x = self.head(_norm(x)).reshape(batch, rows, columns, PATCH, PATCH, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(noisy.shape)


def _norm(x: torch.Tensor) -> torch.Tensor:
  return functional.layer_norm(x, x.shape[-1:], eps=EPSILON)


def _waves(position: torch.Tensor, width: int) -> torch.Tensor:
  steps = torch.arange(width // 2, device=position.device, dtype=position.dtype) / (width // 2)
  angles = position[:, None] * torch.exp(-math.log(10_000.0) * steps)
  return torch.cat([angles.sin(), angles.cos()], -1)


def twin(model: Denoiser) -> TorchDenoiser:
  """Makes the same network in PyTorch, with a copy of the weights."""
  heads, depth = model.blocks[0].attention.heads, len(model.blocks)
  other = TorchDenoiser(model.channels, model.width, depth, heads)
  weights = in_torch_s_order(nnx.state(model, nnx.Param))
  other.to(torch.from_numpy(next(iter(weights.values()))).dtype)
  other.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()})
  return other


def in_torch_s_order(params: Any) -> dict[str, np.ndarray]:
  """Returns Flax's parameters by torch's names; dense kernels (in, out) become (out, in)."""
  found = {}
  for path, value in jax.tree_util.tree_leaves_with_path(params):
    names = [str(getattr(k, "key", getattr(k, "name", k))) for k in path]
    names = [n for n in names if n != "value"]
    array = np.asarray(value)
    if names[-1] == "kernel":
      names[-1], array = "weight", array.T
    found[".".join(names)] = np.array(array, order="C")
  return found
