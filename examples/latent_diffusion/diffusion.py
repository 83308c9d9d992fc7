"""The diffusion process: noise levels, targets, min-SNR weights, sampling by DDIM."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

LEAST_ALPHA = 0.02
# In standard deviations of a channel; keeps the first sampling steps from diverging.
LARGEST = 6.0


class Process(NamedTuple):
  """How noise is added and what is predicted.

  Attributes:
    prediction: `"v"` or `"eps"`.
    snr_limit: signal-to-noise ratio above which a level gets no more weight; 0 gives none.
  """

  prediction: str = "v"
  snr_limit: float = 5.0


def levels(time: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the factors of signal and noise at times in [0, 1], by a cosine; each (n, 1, 1, 1)."""
  last = jnp.arccos(LEAST_ALPHA)
  angle = time[:, None, None, None] * last
  return jnp.cos(angle), jnp.sin(angle)


def target(process: Process, clean: jax.Array, noise: jax.Array, time: jax.Array) -> jax.Array:
  """Returns what the denoiser should predict."""
  if process.prediction == "eps":
    return noise
  alpha, sigma = levels(time)
  return alpha * noise - sigma * clean


def weights(process: Process, time: jax.Array) -> jax.Array:
  """Min-SNR weights, as they are for the mean squared error of the clean latents, over that error.

  The weight of the clean latents is min(snr, limit); an error of v is one of the clean latents
  times snr + 1, one of the noise times snr.
  """
  if not process.snr_limit:
    return jnp.ones_like(time)
  alpha, sigma = (level[:, 0, 0, 0] for level in levels(time))
  snr = (alpha / jnp.maximum(sigma, 1e-3)) ** 2
  return jnp.minimum(snr, process.snr_limit) / (snr + (process.prediction == "v"))


def denoising_loss(
  process: Process, model: nnx.Module, clean: jax.Array, key: jax.Array
) -> jax.Array:
  """Weighted mean squared error at stratified random levels."""
  time, noise = draw(clean, key)
  alpha, sigma = levels(time)
  error = model(alpha * clean + sigma * noise, time) - target(process, clean, noise, time)
  weight = weights(process, time)
  return jnp.sum(weight * jnp.mean(error**2, (1, 2, 3))) / jnp.sum(weight)


def mean_loss(process: Process, clean: jax.Array, key: jax.Array) -> jax.Array:
  """Returns the loss of predicting zero, which is the mean of the targets."""
  return denoising_loss(process, lambda noisy, time: jnp.zeros_like(noisy), clean, key)


def draw(clean: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Draws noise, and stratified times: one time in each of `n` equal parts of [0, 1]."""
  time_key, noise_key = jax.random.split(key)
  count = clean.shape[0]
  time = (jnp.arange(count) + jax.random.uniform(time_key, (count,))) / count
  return time, jax.random.normal(noise_key, clean.shape)


def ddim(process: Process, model: nnx.Module, noise: jax.Array, steps: int) -> jax.Array:
  """Samples deterministically from `noise`, in the given number of steps."""
  times = jnp.linspace(1.0, 0.0, steps + 1)

  def step(x, now_and_next):
    now, following = (jnp.full((x.shape[0],), t) for t in now_and_next)
    clean, estimated = split_signal(process, model(x, now), x, now)
    clean = jnp.clip(clean, -LARGEST, LARGEST)
    alpha, sigma = levels(following)
    return alpha * clean + sigma * estimated, None

  return jax.lax.scan(step, noise, (times[:-1], times[1:]))[0]


def split_signal(
  process: Process, answer: jax.Array, noisy: jax.Array, time: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the clean latents and the noise that the denoiser's prediction implies."""
  alpha, sigma = levels(time)
  if process.prediction == "v":
    return alpha * noisy - sigma * answer, sigma * noisy + alpha * answer
  return (noisy - sigma * answer) / alpha, answer
