"""Training on a mesh: the sharding, the step, and checkpoints that any mesh can read."""

import argparse
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hina_optax
from latent_diffusion import diffusion, optimizers
from latent_diffusion.denoiser import Denoiser
from latent_diffusion.errors import UserError

SIDE, CHANNELS = 8, 4
# Arrays of up to so many elements are replicated: sharding saves little and costs communication.
SMALL = 512


def make_mesh(text: str) -> jax.sharding.Mesh:
  """Makes a mesh of all devices, with the axes `data` and `model`."""
  count = jax.device_count()
  try:
    shape = tuple(map(int, text.split("x"))) if text else (count, 1)
  except ValueError:
    shape = ()
  if len(shape) != 2 or math.prod(shape) != count:
    raise UserError(f"--mesh must be two numbers whose product is {count}, such as {count}x1.")
  return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def layout(x: Any, mesh: jax.sharding.Mesh) -> NamedSharding:
  """Shards the longest axis over `data` and the next over `model`, if they are divisible."""
  spec: list[str | None] = [None] * x.ndim
  axes = sorted(range(x.ndim), key=lambda i: -x.shape[i]) if x.size > SMALL else []
  for name in mesh.axis_names:
    free = [i for i in axes if spec[i] is None and x.shape[i] % mesh.shape[name] == 0]
    if free and mesh.shape[name] > 1:
      spec[free[0]] = name
  return NamedSharding(mesh, PartitionSpec(*spec))


def batch(step: int, count: int, place: NamedSharding) -> jax.Array:
  """Makes latents of waves in random directions; each device gets only its own part."""
  rng = np.random.default_rng(step)
  rows, columns = np.mgrid[:SIDE, :SIDE] / SIDE
  waves = rng.normal(size=(4, count, 1, 1, CHANNELS))
  angle = 2 * np.pi * (waves[0] * rows[..., None] + waves[1] * columns[..., None] + waves[2])
  values = (np.sin(angle) + 0.1 * waves[3]).astype(np.float32)
  return jax.make_array_from_callback(values.shape, place, lambda index: values[index])


class Run:
  """Model, optimizer and compiled step on one mesh."""

  def __init__(self, args: argparse.Namespace):
    self.args, self.mesh = args, make_mesh(args.mesh)
    self.process = diffusion.Process()
    self.tx = optimizers.hina(args.learning_rate, optimizers.ALL
                              | optimizers.parse_arguments(args.optimizer_arg))
    self.graph, shapes = nnx.split(nnx.eval_shape(self._model), nnx.Param)
    self.places = jax.tree.map(lambda x: layout(x, self.mesh), shapes)
    self.shapes = jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, self.places)
    self.step = jax.jit(self._step, donate_argnums=(0, 1))

  def _model(self) -> Denoiser:
    return Denoiser(CHANNELS, self.args.width, self.args.depth, 4, nnx.Rngs(self.args.seed))

  def start(self) -> tuple[Any, Any]:
    """Makes the parameters on the mesh, and the optimizer's state with the same sharding."""
    params = jax.jit(lambda: nnx.state(self._model(), nnx.Param), out_shardings=self.places)()
    state = self.tx.init(params)
    # Counters too are put on the mesh. After the first step they are there, and from another place
    # the second step would compile again.
    like = hina_optax.abstract_state(self.tx, params)
    return params, jax.tree.map(_placed, state, like)

  def _loss(self, params: Any, latents: jax.Array, key: jax.Array) -> jax.Array:
    model = nnx.merge(self.graph, params)
    return diffusion.denoising_loss(self.process, model, latents, key)

  def _step(self, params: Any, state: Any, latents: jax.Array, key: jax.Array) -> Any:
    loss, grads = jax.value_and_grad(self._loss)(params, latents, key)
    updates, state = self.tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    # Without the constraint the compiler could choose another sharding for the results.
    return jax.lax.with_sharding_constraint(params, self.places), state, loss


def _placed(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
  same = x.sharding.device_set == like.sharding.device_set
  return x if same else jax.device_put(np.asarray(x), like.sharding)


class Checkpoints:
  """Checkpoints that are never incomplete: each is written to a new folder and then renamed."""

  def __init__(self, folder: pathlib.Path):
    self.manager = ocp.CheckpointManager(
      folder.absolute(), options=ocp.CheckpointManagerOptions(
        max_to_keep=2, enable_async_checkpointing=False, create=True))

  def save(self, run: Run, step: int, params: Any, state: Any) -> None:
    """Saves the parameters, and the state with its stamp, under the number of the step."""
    arrays, stamp = hina_optax.pack_state(run.tx, state, params)
    self.manager.save(step, args=ocp.args.Composite(
      params=ocp.args.StandardSave(_by_path(params)), state=ocp.args.StandardSave(arrays),
      stamp=ocp.args.JsonSave(stamp)))

  def restore(self, run: Run) -> tuple[int, Any, Any] | None:
    """Restores the last checkpoint for the mesh of `run`; returns `None` if there is none."""
    step = self.manager.latest_step()
    if step is None:
      return None
    stamp = self.manager.restore(step, args=ocp.args.Composite(stamp=ocp.args.JsonRestore())).stamp
    # Before any array is read, this raises if the checkpoint is of another model or optimizer.
    shapes = hina_optax.packed_shapes(stamp, run.tx, run.shapes)
    found = self.manager.restore(step, args=ocp.args.Composite(
      params=ocp.args.StandardRestore(_by_path(run.shapes)),
      state=ocp.args.StandardRestore(shapes)))
    params = jax.tree.unflatten(jax.tree.structure(run.shapes),
                                [found.params[name] for name in _by_path(run.shapes)])
    return step, params, hina_optax.unpack_state(run.tx, found.state, stamp, params)


def _by_path(tree: Any) -> dict[str, Any]:
  return {f"{i:05d}": x for i, x in enumerate(jax.tree.leaves(tree))}


def run(args: argparse.Namespace) -> None:
  """Trains from the start or the last checkpoint; writes the parameters to `final.npz`."""
  this = Run(args)
  checkpoints = Checkpoints(args.output / "checkpoints")
  first, params, state = checkpoints.restore(this) or (0, *this.start())
  say(f"{jax.process_count()} processes, mesh {dict(this.mesh.shape)}, from step {first}")
  rows, key = NamedSharding(this.mesh, PartitionSpec("data")), jax.random.key(args.seed)
  loss = jnp.zeros([])
  for step in range(first + 1, args.steps + 1):
    latents = batch(step, args.batch, rows)
    params, state, loss = this.step(params, state, latents, jax.random.fold_in(key, step))
    loss.block_until_ready()  # many steps in flight starve virtual devices
    if step % args.save_every == 0 or step == args.steps:
      checkpoints.save(this, step, params, state)
      say(f"step {step}: loss {float(loss):.6f}")
  checkpoints.manager.close()
  whole = multihost_utils.process_allgather(_by_path(params), tiled=True)
  if jax.process_index() == 0:
    np.savez(args.output / "final.npz", **whole)
  mine = jax.local_devices()[0]
  held = sum(s.data.nbytes for x in jax.tree.leaves(state) if isinstance(x, jax.Array)
             for s in x.addressable_shards if s.device == mine)
  say(f"state: {sum(x.nbytes for x in jax.tree.leaves(state)):,} bytes, {held:,} on each device")


def say(text: str) -> None:
  """Prints a text from the first process only."""
  if jax.process_index() == 0:
    print(text, flush=True)
