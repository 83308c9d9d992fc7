"""One denoiser in Flax and in PyTorch: the same weights, latents and noise, the same optimizer.

    python examples/torch_bridge.py                               # photographs of scikit-image
    python examples/torch_bridge.py --latents ~/cached            # latents cached by sd-scripts
    python examples/torch_bridge.py --reference hina_adaptive.py  # the PyTorch original beside it

The script trains (a) the Flax model with `hina_adaptive` and (b) the PyTorch model with the
bridge's `HinaAdaptive`. With --reference it also trains (c) the PyTorch model with the class of
that file, and again with the bridge and sd_scripts_compat=True, which should follow (c). Latents
are read once. JAX makes the noisy batches from them, and torch reads these without a copy (DLPack).
The script writes the curves and the distances between the parameters as a picture and as JSON.

The two frameworks add up in a different order, so that gradients differ by rounding. Where a sign
decides (cautious updates, element-wise learning rates) training amplifies the difference from step
to step. A second run of Flax with differently rounded gradients shows how much: the bridge should
stay as close. Dynamic adaptation is off by default, since it compares the first elements of
matrices in memory order, and Flax's matrices are transposed.
"""

import argparse
import functools
import importlib.util
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import torch
from flax import nnx
from latent_diffusion import dataset, diffusion, latents, optimizers, options
from latent_diffusion.denoiser import Denoiser
from latent_diffusion.denoiser_torch import in_torch_s_order, twin
from latent_diffusion.errors import UserError
from latent_diffusion.workspace import Workspace

import hina_optax
from hina_optax import torch_bridge

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FLAX, BRIDGE, ROUNDED = "hina_adaptive, Flax", "bridge, PyTorch", "Flax, rounded anew"
COMPAT, ORIGINAL = "bridge, compat", "original, PyTorch"
PROCESS = diffusion.Process()
Run = dict[str, Any]


def cached_latents(args: argparse.Namespace) -> dict[latents.Shape, np.ndarray]:
  """Reads latents, by shape, from sd-scripts' files, or makes them from bundled photographs."""
  words = ["--smoke", "--output", str(args.output / "latents")]
  if args.latents:
    words += ["--latents", str(args.latents)]
  read = options.parse(words)
  return dataset.load(read, Workspace(read)).base.train


@jax.jit
def noised(clean: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
  """Makes the inputs that both models get at a step."""
  moment, noise = diffusion.draw(clean, key)
  alpha, sigma = diffusion.levels(moment)
  return {
    "noisy": alpha * clean + sigma * noise, "time": moment,
    "target": diffusion.target(PROCESS, clean, noise, moment),
    "weight": diffusion.weights(PROCESS, moment),
  }


def batches(stacks: dict[latents.Shape, np.ndarray], args: argparse.Namespace) -> Iterator[Any]:
  """Yields the same batches at every call."""
  for step in range(args.steps):
    clean = jnp.asarray(latents.batch(stacks, args.batch, args.seed, step))
    yield noised(clean, jax.random.fold_in(jax.random.key(args.seed), step))


def rounded_anew(grads: Any, key: jax.Array) -> Any:
  """Moves the last bit of each gradient element at random."""
  leaves, structure = jax.tree.flatten(grads)
  keys = jax.random.split(key, len(leaves))
  return structure.unflatten([
    g * (1 + jax.random.rademacher(k, g.shape, g.dtype) * jnp.finfo(g.dtype).eps)
    for g, k in zip(leaves, keys)])


def flax_run(model: Denoiser, stacks: Any, args: argparse.Namespace, settings: Any,
             nudged: bool = False) -> Run:
  """Trains the Flax model with `hina_adaptive`, run (a)."""
  graph, params = nnx.split(model, nnx.Param)
  tx = hina_optax.hina_adaptive(args.learning_rate, **settings)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(params: Any, state: Any, given: Any) -> tuple[Any, Any, jax.Array]:
    def loss(params: Any) -> jax.Array:
      error = nnx.merge(graph, params)(given["noisy"], given["time"]) - given["target"]
      weighted = given["weight"] * jnp.mean(error**2, (1, 2, 3))
      return jnp.sum(weighted) / jnp.sum(given["weight"])

    value, grads = jax.value_and_grad(loss)(params)
    if nudged:
      grads = rounded_anew(grads, jax.random.key(jax.lax.bitcast_convert_type(value, jnp.uint32)))
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  params = jax.tree.map(jnp.array, params)
  held = [params, tx.init(params)]

  def step(given: Any) -> float:
    held[0], held[1], value = update(*held, given)
    return float(value)

  return run(step, stacks, args, lambda: in_torch_s_order(held[0]))


def torch_run(model: Denoiser, stacks: Any, args: argparse.Namespace, make: Any) -> Run:
  """Trains the PyTorch model with an optimizer of torch, runs (b) and (c)."""
  network = twin(model).to(args.device)
  optimizer = make(network)

  def step(given: Any) -> float:
    shared = {name: torch.from_dlpack(x).to(args.device) for name, x in given.items()}
    noisy, target = (shared[name].permute(0, 3, 1, 2) for name in ("noisy", "target"))
    error = network(noisy, shared["time"]) - target
    loss = (shared["weight"] * (error**2).mean((1, 2, 3))).sum() / shared["weight"].sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())

  def now() -> dict[str, np.ndarray]:
    return {n: p.detach().cpu().numpy().copy() for n, p in network.named_parameters()}

  return run(step, stacks, args, now)


def run(step: Callable[[Any], float], stacks: Any, args: argparse.Namespace,
        now: Callable[[], dict[str, np.ndarray]]) -> Run:
  """Trains, and returns the losses, the time per step, and parameters at ten points of the run."""
  losses, seconds, kept = [], [], {}
  for i, given in enumerate(batches(stacks, args)):
    jax.block_until_ready(given)
    start = time.perf_counter()
    losses.append(step(given))
    seconds.append(time.perf_counter() - start)
    if (i + 1) % max(1, args.steps // 10) == 0:
      kept[i + 1] = now()
  return {"losses": losses, "ms": 1e3 * float(np.median(seconds)), "parameters": kept}


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
  """Returns the norm of the difference over the norm, taking all parameters together."""
  apart = sum(float(np.sum((one[n].astype(np.float64) - other[n]) ** 2)) for n in one)
  return (apart / sum(float(np.sum(x.astype(np.float64) ** 2)) for x in one.values())) ** 0.5


def distances(runs: dict[str, Run]) -> dict[str, dict[int, float]]:
  """Returns the distances of the pairs that should agree, at each step with saved parameters."""
  pairs = [(FLAX, BRIDGE), (FLAX, ROUNDED), (ORIGINAL, COMPAT)]
  return {
    f"{a} - {b}": {step: distance(x, runs[b]["parameters"][step])
                   for step, x in runs[a]["parameters"].items()}
    for a, b in pairs if a in runs and b in runs}


def train_all(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Run]:
  """Trains every run, starting from the same weights."""
  stacks = cached_latents(args)
  channels = next(iter(stacks))[-1]
  model = Denoiser(channels, args.width, args.depth, args.heads, nnx.Rngs(args.seed))
  rate = args.learning_rate
  makers: dict[str, Callable[[torch.nn.Module], Any]] = {
    BRIDGE: lambda m: torch_bridge.HinaAdaptive(m.named_parameters(), lr=rate, **settings)}
  if args.reference:
    original = load_class(args.reference)
    makers[ORIGINAL] = lambda m: original(
      m.parameters(), lr=rate, reduce_precision=False, cpu_offload_states=False, **settings)
    makers[COMPAT] = lambda m: torch_bridge.HinaAdaptive(
      m.named_parameters(), lr=rate, sd_scripts_compat=True, **settings)
  runs = {FLAX: flax_run(model, stacks, args, settings),
          ROUNDED: flax_run(model, stacks, args, settings, nudged=True)}
  return runs | {name: torch_run(model, stacks, args, make) for name, make in makers.items()}


def load_class(path: pathlib.Path) -> Any:
  """Imports the class `HinaAdaptive` from a file."""
  spec = importlib.util.spec_from_file_location("original_hina_adaptive", path)
  if spec is None or spec.loader is None or not path.exists():
    raise UserError(f"--reference: {path} is no Python file.")
  module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "HinaAdaptive"):
    raise UserError(f"--reference: {path} has no class HinaAdaptive.")
  return module.HinaAdaptive


def plot(runs: dict[str, Run], apart: dict[str, dict[int, float]], path: pathlib.Path) -> None:
  """Plots losses on the left and distances on the right."""
  figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
  for i, (name, found) in enumerate(runs.items()):
    left.plot(found["losses"], label=f"{name}, {found['ms']:.0f} ms a step",
              linewidth=max(1.0, 4.0 - i), alpha=0.7)
  for name, values in apart.items():
    right.semilogy(list(values), [max(v, 1e-9) for v in values.values()], marker="o", label=name)
  left.set(xlabel="step", ylabel="loss")
  right.set(xlabel="step", ylabel="relative distance between parameters")
  for axes in (left, right):
    axes.legend(fontsize=8)
  figure.savefig(path, dpi=120)
  plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
  """Parses the command line."""
  p = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--latents", type=pathlib.Path, metavar="DIR", help=".npz files of sd-scripts")
  p.add_argument("--reference", type=pathlib.Path, metavar="FILE", help="the original's source")
  p.add_argument("--steps", type=options.positive, default=200)
  p.add_argument("--batch", type=options.positive, default=8)
  p.add_argument("--width", type=options.positive, default=64)
  p.add_argument("--depth", type=options.positive, default=2)
  p.add_argument("--heads", type=options.positive, default=4)
  p.add_argument("--learning-rate", type=options.rate, default=1e-4)
  p.add_argument("--optimizer-arg", action="append", default=[], metavar="KEY=VALUE",
                 help="an option of hina_adaptive, for every run; may be repeated")
  p.add_argument("--device", default="cpu", help="device of the PyTorch model: cpu or cuda")
  p.add_argument("--threads", type=options.positive, default=1,
                 help="threads of torch on a CPU; for a model of this size one is fastest")
  p.add_argument("--seed", type=options.natural, default=0)
  p.add_argument("--output", type=pathlib.Path, default=pathlib.Path("bridge_output"))
  return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
  """Trains, compares, and prints the path of the results."""
  args = parse(argv)
  torch.set_num_threads(args.threads)
  settings = {"use_dynamic_adaptation": False, "edge_suppression": True, "spatial_awareness": True}
  try:
    settings |= optimizers.parse_arguments(args.optimizer_arg)
    runs = train_all(args, settings)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  apart = distances(runs)
  plot(runs, apart, args.output / "bridge.png")
  result = {"distances": apart, "runs": {
    name: {k: v for k, v in found.items() if k != "parameters"} for name, found in runs.items()}}
  (args.output / "bridge.json").write_text(json.dumps(result, indent=1) + "\n")
  for name, found in runs.items():
    print(f"{name}: last loss {found['losses'][-1]:.6f}, {found['ms']:.1f} ms a step")
  for name, values in apart.items():
    print(f"{name}: parameters apart by {list(values.values())[-1]:.1e} of their norm")
  print(args.output / "bridge.png")
  return 0


if __name__ == "__main__":
  sys.exit(main())
