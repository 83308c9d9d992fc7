"""Shared by the benchmarks: compiling, timing, counting bytes and kernels, the environment."""

import datetime
import json
import os
import pathlib
import platform
import re
import time
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hina_optax

# Instructions of the optimised HLO that only name, group or reinterpret values.
NO_WORK_OPCODES = frozenset({
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier",
  "partition-id", "replica-id",
})
_OPCODE = re.compile(r"\s([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"to_apply=%?([\w.\-]+)")
_MIN_ROUNDS = 5
_WARM_UP_STEPS = 3


class Program(NamedTuple):
  """A compiled step, and the figures that are known without running it."""

  call: Any
  trace_s: float
  compile_s: float
  state_bytes: int
  minimal_bytes: int
  kernels: int
  temporary_bytes: int | None


class StepRunner(Protocol):
  """An optimizer whose steps can be timed."""

  def run_steps(self, steps: int) -> float:
    """Runs a number of steps, and returns the seconds per step."""


def compile_step(tx: optax.GradientTransformation, params: Any) -> Program:
  """Traces and compiles `update` and `apply_updates`, parameters and state donated.

  Only the shapes of `params` are read. JAX's caches are cleared first, so that no row benefits from
  the compilation of another.
  """

  def step(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
    updates, state = tx.update(gradients, state, params)
    # JAX pairs donated buffers with results in order.
    return state, optax.apply_updates(params, updates)

  shapes = jax.eval_shape(lambda x: x, params)
  state = jax.eval_shape(tx.init, shapes)
  jax.clear_caches()
  start = time.perf_counter()
  traced = jax.jit(step, donate_argnums=(1, 2)).trace(shapes, state, shapes)
  lowered = traced.lower()
  middle = time.perf_counter()
  compiled = lowered.compile()
  end = time.perf_counter()
  return Program(
    compiled, middle - start, end - middle, tree_bytes(state), minimal_bytes(traced.jaxpr),
    count_kernels(compiled.as_text()), _temporary_bytes(compiled))


def tree_bytes(tree: Any) -> int:
  """Counts the bytes of all arrays, or of arrays of these shapes."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def minimal_bytes(jaxpr: Any) -> int:
  """Counts the bytes of a program that reads each input once and writes each output once.

  An input that is returned unchanged is not written.
  """
  inputs, outputs = jaxpr.jaxpr.invars, jaxpr.jaxpr.outvars
  input_ids = {id(x) for x in inputs}
  written = [x for x in outputs if id(x) not in input_ids]
  return tree_bytes([x.aval for x in [*inputs, *written]])


def count_kernels(hlo: str) -> int:
  """Counts the instructions of the entry computation that do work: fusions, dots, copies, loops ...

  Neither those of `NO_WORK_OPCODES` nor the second halves of asynchronous pairs are counted. A
  `call` counts as the computation that it calls; a loop or a conditional counts as one.
  """
  entry, computations = parse_computations(hlo.splitlines())

  def count(name: str) -> int:
    total = 0
    for opcode, line in computations[name]:
      called = _CALLED.search(line) if opcode == "call" else None
      if called and called[1] in computations:
        total += count(called[1])
      else:
        total += opcode not in NO_WORK_OPCODES and not opcode.endswith("-done")
    return total

  return count(entry)


def parse_computations(lines: Iterable[str]) -> tuple[str, dict[str, list[tuple[str, str]]]]:
  """Returns the entry's name, and for each computation the opcode and line of each instruction."""
  computations: dict[str, list[tuple[str, str]]] = {}
  entry = name = ""
  for line in lines:
    if line.endswith("{") and not line.startswith((" ", "HloModule")):
      words = line.replace("ENTRY ", "").split(maxsplit=1)
      name = words[0].lstrip("%")
      entry = name if line.startswith("ENTRY") else entry
      computations[name] = []
    elif name and line.startswith(" ") and " = " in line:
      opcode = _OPCODE.search(line, line.index(" = ") + 2)
      if opcode:
        computations[name].append((opcode[1], line))
  return entry, computations


def _temporary_bytes(compiled: Any) -> int | None:
  analysis = compiled.memory_analysis()
  return None if analysis is None else int(analysis.temp_size_in_bytes)


class Training:
  """Consecutive steps of one compiled program on a constant gradient."""

  def __init__(self, program: Program, tx: optax.GradientTransformation, params: Any,
               gradients: Any):
    """Copies the parameters and the state, since nothing else may use donated arrays."""
    self._call = program.call
    self._gradients = gradients
    self._params = jax.tree.map(jnp.array, params)
    self._state = jax.tree.map(jnp.copy, tx.init(self._params))

  @property
  def arrays(self) -> Any:
    """The arrays that the training keeps alive."""
    return self._state, self._params, self._gradients

  def run_steps(self, steps: int) -> float:
    """Runs a number of steps, and returns the seconds per step."""
    start = time.perf_counter()
    for _ in range(steps):
      self._state, self._params = self._call(self._gradients, self._state, self._params)
    jax.block_until_ready((self._params, self._state))
    return (time.perf_counter() - start) / steps


def alternate(runners: list[StepRunner], seconds: float, block_s: float = 0.1) -> list[np.ndarray]:
  """Times several optimizers in turns, so that changes of the machine's speed affect all of them.

  Args:
    runners: the optimizers.
    seconds: time for all rounds. There are at least five rounds after a warm-up.
    block_s: seconds that each runner takes in a round.

  Returns:
    The seconds per step of each runner, one number per round.
  """
  steps = []
  for runner in runners:
    runner.run_steps(_WARM_UP_STEPS)
    steps.append(max(1, round(block_s / max(runner.run_steps(1), 1e-9))))
  times: list[list[float]] = [[] for _ in runners]
  end = time.perf_counter() + seconds
  while len(times[0]) < _MIN_ROUNDS or time.perf_counter() < end:
    for times_of_runner, runner, count in zip(times, runners, steps):
      times_of_runner.append(runner.run_steps(count))
  return [np.asarray(times_of_runner) for times_of_runner in times]


def quartiles_ms(seconds: np.ndarray) -> dict[str, float]:
  """Returns the median and the quartiles in milliseconds."""
  q1, median, q3 = np.percentile(1e3 * seconds, (25, 50, 75))
  return {"median": float(median), "q1": float(q1), "q3": float(q3)}


def copy_bandwidth(elements: int = 1 << 26) -> float:
  """Measures the GB/s, read and written, of a jitted copy of a large array into existing memory.

  The copy changes the sign, since XLA runs a plain copy on one core. With a new buffer for each
  result the time would include the allocation of its pages by the system.
  """
  copy = jax.jit(lambda x, _: -x, donate_argnums=1, keep_unused=True)
  source, target = jnp.ones(elements, jnp.float32), jnp.zeros(elements, jnp.float32)
  times = []
  for _ in range(_WARM_UP_STEPS + 10):
    start = time.perf_counter()
    target = copy(source, target).block_until_ready()
    times.append(time.perf_counter() - start)
  return 2 * source.nbytes / float(np.median(times[_WARM_UP_STEPS:])) / 1e9


def environment() -> dict[str, Any]:
  """Returns the device, the versions and the date."""
  device = jax.devices()[0]
  return {
    "device": _processor() if device.platform == "cpu" else device.device_kind,
    "platform": device.platform, "cores": len(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    "python": platform.python_version(), "jax": jax.__version__, "optax": optax.__version__,
    "hina_optax": hina_optax.__version__,
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  }


def _processor() -> str:
  info = pathlib.Path("/proc/cpuinfo")
  model = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
  return model[1] if model else platform.processor() or "cpu"


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes a JSON file, and makes its folder if necessary."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content, indent=1) + "\n")
