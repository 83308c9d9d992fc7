"""The same denoiser in both frameworks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_bridge
from flax import nnx
from latent_diffusion import latents
from latent_diffusion.denoiser import Denoiser
from latent_diffusion.denoiser_torch import in_torch_s_order, twin


@pytest.fixture
def model():
  made = Denoiser(4, 16, 2, 2, nnx.Rngs(0))
  # Gates and head begin as zeros, behind which nothing could differ.
  filled = jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape),
    nnx.state(made, nnx.Param))
  nnx.update(made, filled)
  return made


def test_the_twin_answers_as_the_denoiser(model):
  noisy = np.random.default_rng(0).normal(size=(3, 6, 8, 4)).astype(np.float32)
  time = np.array([0.1, 0.5, 0.9], np.float32)
  expected = np.asarray(model(jnp.asarray(noisy), jnp.asarray(time)))
  answer = twin(model)(torch.from_numpy(noisy).permute(0, 3, 1, 2), torch.from_numpy(time))
  np.testing.assert_allclose(
    answer.detach().permute(0, 2, 3, 1).numpy(), expected, rtol=2e-4, atol=2e-5)


def test_the_twin_has_every_weight(model):
  names = dict(twin(model).named_parameters())
  weights = in_torch_s_order(nnx.state(model, nnx.Param))
  assert set(names) == set(weights)
  assert weights["embed.weight"].shape == (16, 16)
  assert weights["blocks.0.up.weight"].shape == (64, 16)


@pytest.fixture
def folder(tmp_path):
  rng = np.random.default_rng(0)
  for i in range(10):
    x, flipped = (rng.normal(size=(6, 6, 4)).astype(np.float32) for _ in range(2))
    latents.write(tmp_path / f"{i}{latents.SUFFIX}", x, flipped, (48, 48), (0, 0, 48, 48))
  return tmp_path


ORIGINAL = """
import torch
class HinaAdaptive(torch.optim.SGD):
  def __init__(self, params, lr, **options):
    assert options["edge_suppression"] and not options["reduce_precision"]
    super().__init__(params, lr)
"""


@pytest.mark.slow
def test_both_frameworks_train_alike(folder, tmp_path, capsys):
  original = tmp_path / "original.py"
  original.write_text(ORIGINAL)
  output = tmp_path / "out"
  code = torch_bridge.main([
    "--latents", str(folder), "--steps", "20", "--width", "32", "--depth", "1", "--output",
    str(output), "--reference", str(original), "--learning-rate", "1e-3"])
  assert code == 0
  result = json.loads((output / "bridge.json").read_text())
  flax, bridge, compat, other = (
    result["runs"][name]["losses"] for name in (
      torch_bridge.FLAX, torch_bridge.BRIDGE, torch_bridge.COMPAT, torch_bridge.ORIGINAL))
  np.testing.assert_allclose(bridge, flax, rtol=1e-5)
  assert abs(other[-1] - flax[-1]) > 1e-4 * flax[-1]
  assert abs(compat[-1] - flax[-1]) > 1e-6 * flax[-1]
  apart = result["distances"][f"{torch_bridge.FLAX} - {torch_bridge.BRIDGE}"]
  assert max(apart.values()) < 1e-5
  assert f"{torch_bridge.ORIGINAL} - {torch_bridge.COMPAT}" in result["distances"]
  assert (output / "bridge.png").read_bytes().startswith(b"\x89PNG")
  assert "parameters apart" in capsys.readouterr().out


def test_a_reference_that_is_none_is_named(folder, tmp_path, capsys):
  empty = tmp_path / "empty.py"
  empty.write_text("")
  for path, words in ((empty, "no class HinaAdaptive"), (tmp_path / "gone.py", "no Python file")):
    assert torch_bridge.main(["--latents", str(folder), "--steps", "1", "--reference", str(path),
                              "--output", str(tmp_path / "out")]) == 1
    assert words in capsys.readouterr().err
