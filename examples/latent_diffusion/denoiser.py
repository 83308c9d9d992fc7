"""A small diffusion transformer over latents of any even height and width."""

import jax
import jax.numpy as jnp
from flax import nnx

PATCH = 2


class Attention(nnx.Module):
  """Self-attention with normalized queries and keys."""

  def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
    self.heads = heads
    self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
    self.query_norm = nnx.RMSNorm(width // heads, use_scale=False, rngs=rngs)
    self.key_norm = nnx.RMSNorm(width // heads, use_scale=False, rngs=rngs)
    self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Mixes tokens: (batch, tokens, width) in and out."""
    batch, tokens, width = x.shape
    qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
    query, key, value = self.query_norm(qkv[:, :, 0]), self.key_norm(qkv[:, :, 1]), qkv[:, :, 2]
    mixed = jax.nn.dot_product_attention(query, key, value)
    return self.out(mixed.reshape(batch, tokens, width))


class Block(nnx.Module):
  """Attention and a two-layer network, both scaled and gated by the noise level."""

  def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
    self.norm_1 = nnx.LayerNorm(width, use_scale=False, use_bias=False, rngs=rngs)
    self.norm_2 = nnx.LayerNorm(width, use_scale=False, use_bias=False, rngs=rngs)
    self.attention = Attention(width, heads, rngs)
    self.up = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
    self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)
    self.modulation = nnx.Param(jnp.zeros((6, width)))

  def __call__(self, x: jax.Array, level: jax.Array) -> jax.Array:
    """Tokens (batch, tokens, width) under `level` (batch, 6, width)."""
    table = (level + self.modulation[...])[:, :, None]
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (table[:, i] for i in range(6))
    x = x + gate_1 * self.attention(self.norm_1(x) * (1 + scale_1) + shift_1)
    return x + gate_2 * self.down(nnx.gelu(self.up(self.norm_2(x) * (1 + scale_2) + shift_2)))


class Denoiser(nnx.Module):
  """Predicts v or the noise from noisy latents (batch, height, width, channels)."""

  def __init__(self, channels: int, width: int, depth: int, heads: int, rngs: nnx.Rngs):
    self.channels, self.width = channels, width
    self.embed = nnx.Linear(PATCH * PATCH * channels, width, use_bias=False, rngs=rngs)
    self.level_1 = nnx.Linear(width, width, use_bias=False, rngs=rngs)
    self.level_2 = nnx.Linear(
      width, 6 * width, use_bias=False, kernel_init=nnx.initializers.zeros, rngs=rngs)
    self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(depth)])
    self.norm = nnx.LayerNorm(width, use_scale=False, use_bias=False, rngs=rngs)
    self.head = nnx.Linear(
      width, PATCH * PATCH * channels, use_bias=False, kernel_init=nnx.initializers.zeros,
      rngs=rngs)

  def __call__(self, noisy: jax.Array, time: jax.Array) -> jax.Array:
    """Returns the prediction in the shape of `noisy`; `time` has a number in [0, 1] per latent."""
    batch, height, width, channels = noisy.shape
    rows, columns = height // PATCH, width // PATCH
    x = self.embed(to_tokens(noisy)) + positions(rows, columns, self.width)
    level = nnx.silu(self.level_1(waves(1000.0 * time, self.width)))
    level = self.level_2(level).reshape(batch, 6, self.width)
    for block in self.blocks:
      x = block(x, level)
    x = self.head(self.norm(x)).reshape(batch, rows, columns, PATCH, PATCH, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(noisy.shape)


def to_tokens(latents: jax.Array) -> jax.Array:
  """Cuts latents into tokens of two by two."""
  batch, height, width, channels = latents.shape
  x = latents.reshape(batch, height // PATCH, PATCH, width // PATCH, PATCH, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, PATCH * PATCH * channels)


def waves(position: jax.Array, width: int, longest: float = 10_000.0) -> jax.Array:
  """Sines and cosines of geometrically spaced wavelengths: (n,) to (n, width)."""
  frequencies = longest ** (-jnp.arange(width // 2) / (width // 2))
  angles = position[:, None] * frequencies
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def positions(rows: int, columns: int, width: int) -> jax.Array:
  """Embeds the position of each token: half of the width for its row, half for its column."""
  row = waves(jnp.arange(rows) * 1.0, width // 2, 100.0)
  column = waves(jnp.arange(columns) * 1.0, width // 2, 100.0)
  grid = jnp.concatenate([
    jnp.repeat(row, columns, axis=0), jnp.tile(column, (rows, 1))], -1)
  return grid[None]
