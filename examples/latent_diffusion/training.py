"""The training loop: steps, averaged weights, records, checkpoints, Ctrl-C."""

import pathlib
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import hina_optax
from latent_diffusion.checkpoints import Checkpoints
from latent_diffusion.errors import Interrupted, UserError
from latent_diffusion.progress import Display

Row = dict[str, Any]


class TrainState(NamedTuple):
  """Everything that a step changes.

  Attributes:
    params: the trained parameters.
    average: exponential moving average of the parameters, for measuring and sampling.
    optimizer: the optimizer's state.
    step: number of steps taken.
  """

  params: Any
  average: Any
  optimizer: Any
  step: jax.Array


class Program:
  """A model's compiled step, shared by all runs with the same model and optimizer.

  Args:
    model: the model; it gives the structure, and the values of the frozen parameters.
    loss: `loss(model, batch, key)`.
    optimizer: an optax transformation.
    wrt: the type of the trained parameters, such as `nnx.LoRAParam`.
    decay: decay of the averaged weights; it is lower during the first steps.
  """

  def __init__(
    self, model: nnx.Module, loss: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation, wrt: Any = nnx.Param, decay: float = 0.99,
  ):
    self.graph, _, self.frozen = nnx.split(model, wrt, ...)
    self.loss, self.optimizer, self.wrt, self.decay = loss, optimizer, wrt, decay
    self.step = jax.jit(self._step, donate_argnums=0)
    self.measure = jax.jit(self.loss_of)
    self._start = jax.jit(self._state_of)

  def start(self, model: nnx.Module) -> TrainState:
    """Makes the state before the first step, from the values of `model`."""
    return self._start(nnx.state(model, self.wrt))

  def model(self, params: Any) -> nnx.Module:
    """Returns the model with these values of the trained parameters."""
    return nnx.merge(self.graph, params, self.frozen)

  def _state_of(self, params: Any) -> TrainState:
    return TrainState(params, jax.tree.map(jnp.copy, params), self.optimizer.init(params),
                      jnp.zeros([], jnp.int32))

  def loss_of(self, params: Any, frozen: Any, batch: jax.Array, key: jax.Array) -> jax.Array:
    """Computes the loss as a function of the trained parameters."""
    return self.loss(nnx.merge(self.graph, params, frozen), batch, key)

  def _step(
    self, state: TrainState, frozen: Any, batch: jax.Array, key: jax.Array
  ) -> tuple[TrainState, jax.Array]:
    key = jax.random.fold_in(key, state.step)
    loss, grads = jax.value_and_grad(self.loss_of)(state.params, frozen, batch, key)
    updates, optimizer = self.optimizer.update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(self.decay, (1.0 + state.step) / (10.0 + state.step))
    average = optax.incremental_update(params, state.average, 1 - decay)
    return TrainState(params, average, optimizer, state.step + 1), loss


class Plan(NamedTuple):
  """The length of a run, its data, and what happens during the run.

  Attributes:
    steps: number of steps in all.
    batch: `batch(step)` returns a batch; it must depend only on the step.
    seed: seed of the noise.
    rate: learning rate by step, for the records.
    held_out: `held_out(average) -> float`, or `None`.
    measured: steps between measurements.
    logged: steps between records of the training loss.
    saved: steps between checkpoints.
    visit: `visit(step, state) -> figures` at every measurement.
  """

  steps: int
  batch: Callable[[int], np.ndarray]
  seed: int
  rate: Callable[[int], Any]
  held_out: Callable[[Any], float] | None = None
  measured: int = 100
  logged: int = 10
  saved: int = 200
  visit: Callable[[int, TrainState], Row] | None = None


def train(
  program: Program, state: TrainState, plan: Plan, folder: pathlib.Path, display: Display
) -> tuple[TrainState, list[Row]]:
  """Trains from the start, or from the last checkpoint in `folder`.

  Raises:
    UserError: if the loss or the parameters are not finite.
    Interrupted: after Ctrl-C, once the state is saved.
  """
  checkpoints = Checkpoints(folder)
  state, rows = checkpoints.restore(state) or (state, [])
  try:
    if int(state.step) < plan.steps:
      loop = Loop(program, plan, checkpoints, display)
      state = loop.run(state, rows)
    return state, rows
  finally:
    display.stop()
    checkpoints.close()


class Loop:
  """One run, from its first step or from a checkpoint to its last step."""

  def __init__(self, program: Program, plan: Plan, checkpoints: Checkpoints, display: Display):
    self.program, self.plan = program, plan
    self.checkpoints, self.display = checkpoints, display
    self.losses: list[jax.Array] = []
    self.since, self.counted, self.busy = time.perf_counter(), 0, 0.0

  def run(self, state: TrainState, rows: list[Row]) -> TrainState:
    """Takes the remaining steps, and appends records to `rows`."""
    plan, key = self.plan, jax.random.key(self.plan.seed)
    first = int(state.step)
    self.megabytes = state_bytes(state.optimizer) / 1e6
    self.display.start(plan.steps, first)
    if first == 0:
      rows.append({"step": 0} | self._measure(0, state))
    with StopSignal() as stop:
      for step in range(first + 1, plan.steps + 1):
        state, loss = self.program.step(state, self.program.frozen, plan.batch(step), key)
        self.losses.append(loss)
        if step == first + 1:
          jax.block_until_ready(loss)
          self.since = time.perf_counter()  # the first step compiles
        self._record(step, state, rows)
        if stop.asked or step == plan.steps or step % plan.saved == 0:
          self._save(step, state, rows)
        if stop.asked and step < plan.steps:
          raise Interrupted(f"{self.display.name}: stopped and saved at step {step}.")
    return state

  def _record(self, step: int, state: TrainState, rows: list[Row]) -> None:
    plan = self.plan
    due = step % plan.measured == 0 or step == plan.steps
    if not due and step % plan.logged:
      return
    row: Row = {"step": step, "loss": self._mean_loss(step), "rate": float(plan.rate(step - 1)),
                "steps_per_second": self._speed(), "state_mb": self.megabytes}
    if due:
      row |= self._measure(step, state)
      self.since = time.perf_counter()
    rows.append(row)
    self.display.show(row)

  def _mean_loss(self, step: int) -> float:
    losses, self.losses = np.array(jax.device_get(self.losses)), []
    self.counted = len(losses)
    if not np.isfinite(losses).all():
      bad = step - len(losses) + 1 + int(np.argmin(np.isfinite(losses)))
      self._refuse(f"the loss of step {bad} is {losses[~np.isfinite(losses)][0]}")
    return float(losses.mean())

  def _speed(self) -> float:
    now = time.perf_counter()
    speed, self.since = self.counted / (now - self.since), now
    return speed

  def _measure(self, step: int, state: TrainState) -> Row:
    row: Row = {}
    if self.plan.held_out is not None:
      row["held_out"] = self.plan.held_out(state.average)
    if self.plan.visit is not None:
      row |= self.plan.visit(step, state)
    return row

  def _save(self, step: int, state: TrainState, rows: list[Row]) -> None:
    if self.losses:
      self._mean_loss(step)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state.params))):
      self._refuse(f"parameters are not finite after step {step}")
    self.checkpoints.save(step, state, rows)
    self.since = time.perf_counter()

  def _refuse(self, what: str) -> None:
    raise UserError(
      f"{self.display.name}: {what}. Nothing was saved over the last good checkpoint in "
      f"{self.checkpoints.folder}. Try a smaller --learning-rate.")


class StopSignal:
  """Turns the first Ctrl-C into a request to stop after the step; a second one stops at once."""

  def __enter__(self) -> "StopSignal":
    self.asked = False
    self._before = signal.signal(signal.SIGINT, self._ask)
    return self

  def __exit__(self, *exception: object) -> None:
    signal.signal(signal.SIGINT, self._before)

  def _ask(self, number: int, frame: object) -> None:
    if self.asked:
      raise KeyboardInterrupt
    self.asked = True


def state_bytes(state: Any) -> int:
  """Bytes of an optimizer's state."""
  return hina_optax.get_optimization_info(state)["memory_optimization"]["state_bytes"]
