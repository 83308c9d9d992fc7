"""The diffusion process, the models and the LoRA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from latent_diffusion import denoiser, diffusion, vae
from latent_diffusion.lora import add_lora

PROCESSES = [diffusion.Process(p, snr) for p in ("v", "eps") for snr in (0.0, 5.0)]


@functools.cache
def model(channels=4):
  return denoiser.Denoiser(channels, 32, 1, 4, nnx.Rngs(0))


def test_tokens_are_the_patches():
  x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
  tokens = denoiser.to_tokens(x)
  np.testing.assert_array_equal(tokens[1, 4].reshape(2, 2, 3), x[1, 2:4, 2:4])


def test_positions_differ_everywhere():
  grid = np.asarray(denoiser.positions(5, 7, 32))[0]
  distances = np.linalg.norm(grid[:, None] - grid[None], axis=-1) + np.eye(35)
  assert distances.min() > 0.1


def test_folding_is_undone():
  x = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
  assert vae.fold(x).shape == (2, 2, 3, 48)
  np.testing.assert_array_equal(vae.unfold(vae.fold(x)), x)


@pytest.mark.parametrize("shape", [(8, 8), (6, 10)])
def test_the_vae_keeps_shapes(shape):
  autoencoder = vae.Vae(4, 16, 1, nnx.Rngs(0))
  images = jnp.zeros((1, 4 * shape[0], 4 * shape[1], 3))
  mean, log_variance = autoencoder.encode(images)
  assert mean.shape == log_variance.shape == (1, *shape, 4)
  assert autoencoder.decode(mean).shape == images.shape


@pytest.mark.parametrize("process", PROCESSES)
def test_a_perfect_answer_gives_back_signal_and_noise(process):
  clean, noise = jax.random.normal(jax.random.key(0), (2, 5, 4, 4, 2))
  time = jnp.linspace(0, 1, 5)
  alpha, sigma = diffusion.levels(time)
  noisy = alpha * clean + sigma * noise
  answer = diffusion.target(process, clean, noise, time)
  found, estimated = diffusion.split_signal(process, answer, noisy, time)
  np.testing.assert_allclose(found, clean, atol=1e-4)
  np.testing.assert_allclose(estimated, noise, atol=1e-4)


@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_min_snr_weighs_the_error_of_clean_latents_alike(prediction):
  """For both predictions: error in clean latents, times min(snr, limit)."""
  process, time = diffusion.Process(prediction, 5.0), jnp.linspace(0.1, 0.9, 9)
  alpha, sigma = (level[:, 0, 0, 0] for level in diffusion.levels(time))
  snr = (alpha / sigma) ** 2
  per_unit = sigma**2 if prediction == "v" else (sigma / alpha) ** 2
  np.testing.assert_allclose(
    diffusion.weights(process, time), jnp.minimum(snr, 5.0) * per_unit, rtol=1e-4)


@pytest.mark.parametrize("process", PROCESSES)
def test_ddim_with_a_perfect_model_arrives_at_the_data(process):
  clean = jax.random.normal(jax.random.key(0), (2, 4, 4, 2))

  def oracle(noisy, time):
    alpha, sigma = diffusion.levels(time)
    noise = (noisy - alpha * clean) / jnp.maximum(sigma, 1e-6)
    return diffusion.target(process, clean, noise, time)

  noise = jax.random.normal(jax.random.key(1), clean.shape)
  np.testing.assert_allclose(diffusion.ddim(process, oracle, noise, 8), clean, atol=1e-3)


def test_predicting_the_mean_of_v_costs_one_on_data_of_unit_variance():
  clean = jax.random.normal(jax.random.key(0), (256, 8, 8, 4))
  cost = diffusion.mean_loss(diffusion.Process(), clean, jax.random.key(1))
  assert float(cost) == pytest.approx(1.0, abs=0.02)


def test_an_adapter_changes_nothing_at_first_and_is_all_that_is_trained():
  base = model()
  noisy, time = jnp.ones((2, 8, 8, 4)), jnp.array([0.2, 0.7])
  adapted = add_lora(base, 2, nnx.Rngs(1))
  np.testing.assert_array_equal(adapted(noisy, time), base(noisy, time))
  paths = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(adapted, nnx.LoRAParam))}
  assert paths == {"lora_a", "lora_b"}
  assert not jax.tree.leaves(nnx.state(base, nnx.LoRAParam))


@pytest.mark.parametrize("shape", [(8, 8), (6, 12)])
def test_one_denoiser_takes_every_bucket(shape):
  assert model()(jnp.zeros((1, *shape, 4)), jnp.zeros(1)).shape == (1, *shape, 4)
