"""What the benchmarks share: compiling, timing, counting bytes and kernels, the record of a run."""

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

# Of the optimised HLO: what names, groups or reinterprets values, and no work of its own.
FREE = frozenset({
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier",
  "partition-id", "replica-id",
})
_OPCODE = re.compile(r"\s([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"to_apply=%?([\w.\-]+)")
_MIN_ROUNDS = 5
_WARM_UP = 3


class Program(NamedTuple):
  """A compiled step and what is known of it without running it."""

  call: Any
  trace_s: float
  compile_s: float
  state_bytes: int
  minimal_bytes: int
  kernels: int
  temporary_bytes: int | None


class Runs(Protocol):
  """Whatever can be timed."""

  def block(self, steps: int) -> float:
    """Runs steps; gives seconds a step."""


def compile_step(tx: optax.GradientTransformation, params: Any) -> Program:
  """Traces and compiles `update` and `apply_updates`, parameters and state donated.

  Only shapes are read of `params`. Caches are emptied first, so that no row profits from another.
  """

  def step(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
    updates, state = tx.update(gradients, state, params)
    # Donated buffers are paired with results in order.
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
  """Bytes of all arrays or shapes."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def minimal_bytes(jaxpr: Any) -> int:
  """Each input read once, each output written once; what is handed through is not written."""
  inputs, outputs = jaxpr.jaxpr.invars, jaxpr.jaxpr.outvars
  known = {id(x) for x in inputs}
  written = [x for x in outputs if id(x) not in known]
  return tree_bytes([x.aval for x in [*inputs, *written]])


def count_kernels(hlo: str) -> int:
  """Instructions of the entry computation that do work: fusions, dots, copies, loops, calls ...

  Those of `FREE` are not counted, neither are the second halves of asynchronous pairs. A `call` is
  counted as what it calls; a loop or a conditional as one.
  """
  entry, computations = _computations(hlo.splitlines())

  def count(name: str) -> int:
    total = 0
    for opcode, line in computations[name]:
      called = _CALLED.search(line) if opcode == "call" else None
      if called and called[1] in computations:
        total += count(called[1])
      else:
        total += opcode not in FREE and not opcode.endswith("-done")
    return total

  return count(entry)


def _computations(lines: Iterable[str]) -> tuple[str, dict[str, list[tuple[str, str]]]]:
  """Name of the entry, and each computation's opcodes with their lines."""
  found: dict[str, list[tuple[str, str]]] = {}
  entry = name = ""
  for line in lines:
    if line.endswith("{") and not line.startswith((" ", "HloModule")):
      words = line.replace("ENTRY ", "").split(maxsplit=1)
      name = words[0].lstrip("%")
      entry = name if line.startswith("ENTRY") else entry
      found[name] = []
    elif name and line.startswith(" ") and " = " in line:
      opcode = _OPCODE.search(line, line.index(" = ") + 2)
      if opcode:
        found[name].append((opcode[1], line))
  return entry, found


def _temporary_bytes(compiled: Any) -> int | None:
  analysis = compiled.memory_analysis()
  return None if analysis is None else int(analysis.temp_size_in_bytes)


class Training:
  """Steps of one compiled program, each from where the last one ended, on a constant gradient."""

  def __init__(self, program: Program, tx: optax.GradientTransformation, params: Any,
               gradients: Any):
    """Copies `params`, and the state too: what is donated may be nobody else's."""
    self._call = program.call
    self._gradients = gradients
    self._params = jax.tree.map(jnp.array, params)
    self._state = jax.tree.map(jnp.copy, tx.init(self._params))

  @property
  def arrays(self) -> Any:
    """What it holds."""
    return self._state, self._params, self._gradients

  def block(self, steps: int) -> float:
    """Runs steps; gives seconds a step."""
    start = time.perf_counter()
    for _ in range(steps):
      self._state, self._params = self._call(self._gradients, self._state, self._params)
    jax.block_until_ready((self._params, self._state))
    return (time.perf_counter() - start) / steps


def alternate(runs: list[Runs], seconds: float, block_s: float = 0.1) -> list[np.ndarray]:
  """Seconds a step of each, in rounds of one block each; at least five rounds after a warm-up."""
  steps = []
  for run in runs:
    run.block(_WARM_UP)
    steps.append(max(1, round(block_s / max(run.block(1), 1e-9))))
  found: list[list[float]] = [[] for _ in runs]
  end = time.perf_counter() + seconds
  while len(found[0]) < _MIN_ROUNDS or time.perf_counter() < end:
    for times, run, count in zip(found, runs, steps):
      times.append(run.block(count))
  return [np.asarray(times) for times in found]


def quartiles_ms(seconds: np.ndarray) -> dict[str, float]:
  """Median and quartiles in milliseconds."""
  low, middle, high = np.percentile(1e3 * seconds, (25, 50, 75))
  return {"median": float(middle), "q1": float(low), "q3": float(high)}


def copy_bandwidth(elements: int = 1 << 26) -> float:
  """GB/s, read and written, of a jitted copy of a large array into memory that is already there.

  The copy changes the sign, since XLA runs a plain one on one core; a new buffer for each result
  would measure how fast the system hands out pages.
  """
  copy = jax.jit(lambda x, _: -x, donate_argnums=1, keep_unused=True)
  source, target = jnp.ones(elements, jnp.float32), jnp.zeros(elements, jnp.float32)
  times = []
  for _ in range(_WARM_UP + 10):
    start = time.perf_counter()
    target = copy(source, target).block_until_ready()
    times.append(time.perf_counter() - start)
  return 2 * source.nbytes / float(np.median(times[_WARM_UP:])) / 1e9


def environment() -> dict[str, Any]:
  """Device, versions and date."""
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
  found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
  return found[1] if found else platform.processor() or "cpu"


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes, and makes the folder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content, indent=1) + "\n")
