"""Trains a small denoiser on photographs, once with `hina_adaptive` and once with `optax.adamw`.

The photographs come inside scikit-image. Patches are shrunk to eight by eight "latents", noise of a
random strength is added, and the model learns to predict the noise. Held-out loss is taken on the
right halves of the photographs, of which training sees the left ones. One picture is written, and
the figures are printed as they come out.
"""

import argparse
import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import skimage.data
import skimage.transform
from flax import nnx
from tqdm import tqdm

import hina_optax

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIDE, BATCH = 8, 128


class Denoiser(nnx.Module):
  """Convolutions with the strength of the noise as one more channel."""

  def __init__(self, width: int, rngs: nnx.Rngs):
    self.first = nnx.Conv(4, width, (3, 3), rngs=rngs)
    self.blocks = nnx.List([nnx.Conv(width, width, (3, 3), rngs=rngs) for _ in range(3)])
    self.last = nnx.Conv(width, 3, (3, 3), rngs=rngs)

  def __call__(self, x: jax.Array, level: jax.Array) -> jax.Array:
    """The predicted noise."""
    plane = jnp.broadcast_to(level[:, None, None, None], (*x.shape[:3], 1))
    x = nnx.gelu(self.first(jnp.concatenate([x, plane], -1)))
    for block in self.blocks:
      x = x + nnx.gelu(block(x))
    return self.last(x)


def patches() -> tuple[np.ndarray, np.ndarray]:
  """Patches of the left halves of the photographs and of the right ones, of unit variance."""
  left, right = [], []
  for name in ("astronaut", "chelsea", "coffee", "rocket"):
    photo = skimage.transform.rescale(getattr(skimage.data, name)(), 0.25, channel_axis=-1)
    middle = photo.shape[1] // 2
    for half, kept in ((photo[:, :middle], left), (photo[:, middle:], right)):
      windows = np.lib.stride_tricks.sliding_window_view(half, (SIDE, SIDE), axis=(0, 1))
      kept.append(windows[::2, ::2].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
  train, held_out = np.concatenate(left), np.concatenate(right)
  mean, deviation = train.mean((0, 1, 2)), train.std((0, 1, 2))
  return tuple(((x - mean) / deviation).astype(np.float32) for x in (train, held_out))


def loss_of(model: Denoiser, clean: jax.Array, key: jax.Array) -> jax.Array:
  """Mean squared error of the predicted noise, at random strengths."""
  level_key, noise_key = jax.random.split(key)
  level = jax.random.uniform(level_key, (clean.shape[0],))
  noise = jax.random.normal(noise_key, clean.shape)
  angle = level[:, None, None, None] * (jnp.pi / 2)
  noisy = jnp.cos(angle) * clean + jnp.sin(angle) * noise
  return jnp.mean(jnp.square(model(noisy, level) - noise))


@nnx.jit
def step(model: Denoiser, optimizer: nnx.Optimizer, clean: jax.Array, key: jax.Array) -> jax.Array:
  """One update of the model."""
  loss, grads = nnx.value_and_grad(loss_of)(model, clean, key)
  optimizer.update(model, grads)
  return loss


def train(name: str, tx: Any, steps: int, seed: int) -> dict[str, Any]:
  """Trains one model and returns its held-out losses; batches and noise depend on `seed` alone."""
  photographs, held_out = patches()
  model = Denoiser(24, nnx.Rngs(seed))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  rng, key = np.random.default_rng(seed), jax.random.key(seed)
  held_out = held_out[rng.choice(len(held_out), 1024, replace=False)]
  measure = functools.partial(nnx.jit(loss_of), clean=held_out, key=jax.random.key(99))
  curve, start = [(0, float(measure(model)))], time.perf_counter()
  for i in tqdm(range(1, steps + 1), desc=f"{name}, seed {seed}", mininterval=1):
    batch = photographs[rng.integers(0, len(photographs), BATCH)]
    step(model, optimizer, batch, jax.random.fold_in(key, i))
    if i % max(steps // 10, 1) == 0:
      curve.append((i, float(measure(model))))
  state = nnx.to_pure_dict(nnx.state(optimizer))["opt_state"]
  return {"curve": np.array(curve), "seconds": time.perf_counter() - start,
          "bytes": sum(x.nbytes for x in jax.tree.leaves(state))}


def optimizers(rate: float) -> dict[str, Any]:
  """What is compared, all at one learning rate."""
  return {
    "optax.adamw": optax.adamw(rate),
    "hina_adaptive, spatial": hina_optax.hina_adaptive(
      rate, edge_suppression=True, spatial_awareness=True),
    "hina_adaptive, core only": hina_optax.hina_adaptive(
      rate, use_agr=False, background_regularization=False, use_spd=False),
  }


def main() -> None:
  """Trains all, prints a table and writes the curves."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  parser.add_argument("--steps", type=int, default=400, help="updates of each model")
  parser.add_argument("--seeds", type=int, default=2, help="models trained with each optimizer")
  parser.add_argument("--learning-rate", type=float, default=2e-3, help="of all optimizers")
  parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("demo_output"),
                      help="folder for the picture")
  arguments = parser.parse_args()
  figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
  for name, tx in optimizers(arguments.learning_rate).items():
    runs = [train(name, tx, arguments.steps, seed) for seed in range(arguments.seeds)]
    curves = np.stack([run["curve"] for run in runs])
    last = curves[:, -1, 1]
    print(f"{name:26s} held-out loss {last.mean():.4f} "
          f"(from {last.min():.4f} to {last.max():.4f}), "
          f"{runs[0]['bytes'] / 1e6:.2f} MB of state, {runs[0]['seconds']:.0f} s")
    axes.plot(curves[0, :, 0], curves[..., 1].mean(0), label=name)
    axes.fill_between(curves[0, :, 0], curves[..., 1].min(0), curves[..., 1].max(0), alpha=0.2)
  axes.set(xlabel="step", ylabel="held-out loss (1 is the mean)", ylim=(0, 1.1))
  axes.legend()
  arguments.output.mkdir(parents=True, exist_ok=True)
  figure.savefig(arguments.output / "loss.png", dpi=150)
  print(arguments.output / "loss.png")


if __name__ == "__main__":
  main()
