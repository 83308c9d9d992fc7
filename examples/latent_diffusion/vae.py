"""A variational autoencoder whose latents have a quarter of the side of the photographs."""

import jax
import jax.numpy as jnp
from flax import nnx

FACTOR = 4
KL_WEIGHT = 1e-4


class Residual(nnx.Module):
  """Two convolutions with a residual connection."""

  def __init__(self, width: int, rngs: nnx.Rngs):
    self.norm = nnx.GroupNorm(
      width, num_groups=8, use_scale=False, use_bias=False, rngs=rngs)
    self.first = nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)
    self.second = nnx.Conv(
      width, width, (3, 3), use_bias=False, kernel_init=nnx.initializers.zeros, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Images (batch, height, width, channels) in and out."""
    return x + self.second(nnx.silu(self.first(nnx.silu(self.norm(x)))))


class Vae(nnx.Module):
  """Encoder and decoder; all convolutions work at the latents' resolution."""

  def __init__(self, channels: int, width: int, depth: int, rngs: nnx.Rngs):
    self.channels = channels
    pixels = 3 * FACTOR * FACTOR
    self.encode_in = nnx.Conv(pixels, width, (3, 3), rngs=rngs)
    self.encoder = nnx.List([Residual(width, rngs) for _ in range(depth)])
    self.encode_out = nnx.Conv(width, 2 * channels, (1, 1), rngs=rngs)
    self.decode_in = nnx.Conv(channels, width, (3, 3), rngs=rngs)
    self.decoder = nnx.List([Residual(width, rngs) for _ in range(2 * depth)])
    self.decode_out = nnx.Conv(width, pixels, (3, 3), rngs=rngs)

  def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and log variance of the latents for images in [-1, 1]."""
    x = self.encode_in(fold(images))
    for block in self.encoder:
      x = block(x)
    mean, log_variance = jnp.split(self.encode_out(x), 2, axis=-1)
    return mean, jnp.clip(log_variance, -12.0, 4.0)

  def decode(self, latents: jax.Array) -> jax.Array:
    """Images, about in [-1, 1]."""
    x = self.decode_in(latents)
    for block in self.decoder:
      x = block(x)
    return unfold(self.decode_out(x))


def fold(images: jax.Array) -> jax.Array:
  """Moves each square of `FACTOR` by `FACTOR` pixels into channels."""
  batch, height, width, channels = images.shape
  x = images.reshape(batch, height // FACTOR, FACTOR, width // FACTOR, FACTOR, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, height // FACTOR, width // FACTOR, FACTOR * FACTOR * channels)


def unfold(x: jax.Array) -> jax.Array:
  """The inverse of `fold`."""
  batch, height, width, _ = x.shape
  x = x.reshape(batch, height, width, FACTOR, FACTOR, 3).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, height * FACTOR, width * FACTOR, 3)


def vae_loss(vae: Vae, images: jax.Array, key: jax.Array) -> jax.Array:
  """Adds up the absolute errors of pixels and of their differences, and a small KL divergence."""
  mean, log_variance = vae.encode(images)
  noise = jax.random.normal(key, mean.shape)
  error = vae.decode(mean + jnp.exp(0.5 * log_variance) * noise) - images
  pixels = jnp.mean(jnp.abs(error))
  differences = sum(jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in (1, 2))
  divergence = jnp.mean(mean**2 + jnp.exp(log_variance) - 1 - log_variance) / 2
  return pixels + 0.5 * differences + KL_WEIGHT * divergence
