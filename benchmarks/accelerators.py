"""What a step would be on an accelerator that is not here: kernels, bytes, memory, cycles.

    python benchmarks/accelerators.py --target h100 --tree lora420 --output FILE.json
    python benchmarks/accelerators.py --target v5e --tree dense17m --only '^everything$'
    python benchmarks/accelerators.py --target v5e --offload

The compilers for NVIDIA GPUs and TPUs run without either. They compile `update` and
`apply_updates`, parameters and state donated, for one chip, and what is printed is read from the
optimised program. Nothing runs: it says "compiled for", never "measured on". The step takes and
returns the parameters first, as most training loops do; with --state-first it is that of measure.py
(the order changes the schedule, and with it the temporaries).

Every instruction of the entry computation, and of its calls and loops (times their trip count), is
a kernel, but for those that only name or group values. (A TPU's loops are taken to count from 0 to
the constant in their condition.) A kernel's bytes are its results and its
operands: the slice of an operand that it only slices, the update of a result that it updates in
place. A conditional counts with its cheaper branch, an asynchronous pair once. Arrays in a TPU's
on-chip memory have no bytes, and copies to and from there are no kernels. The modelled time of an
H100 is the sum over kernels of the larger of bytes / 3.35 TB/s and 2 us. The cycles of a TPU are
its compiler's own estimates, which it gives for most instructions that are not scalar.

With --offload: temporaries of `with_host_offload(optax.adamw)`, window 64 MB, on 48 matrices of
16.8 MB, with gradients that are given and with gradients that the same program computes.

Times are of this machine, and of how busy it is: read them as ratios to `optax.adamw`. CPU s is the
time of processors for all of tracing, lowering and compiling, which suffers least. Code that
asks `jax.default_backend()` hears the target's platform (with --host-backend: "cpu").

What it needs, in an environment of its own:

    pip install libtpu==0.0.42.1
    pip install --no-deps jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2
    pip install nvidia-cuda-nvcc-cu12 nvidia-nvjitlink-cu12 nvidia-cuda-runtime-cu12 \
      nvidia-cuda-cupti-cu12 nvidia-cuda-nvrtc-cu12
"""

import argparse
import contextlib
import functools
import importlib.metadata
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import contenders
import jax
import jax.numpy as jnp
import measure
import optax
import report
import trees
from jax.experimental import topologies

import hina_optax

TREES: dict[str, Callable[[], trees.Tree]] = {
  "lora420": trees.lora_420, "dense17m": trees.dense_17m, "dit130m": trees.dit_130m,
  "lora_sdxl": lambda: trees.lora_of(trees.sdxl_unet(), 16),
  "tiny": lambda: trees.equal_leaves(3, (8, 4)),
}
CHOSEN = (contenders.BASELINE, "with_leaf_batching(optax.adamw)", "defaults", "everything")
AGAIN = f"{contenders.BASELINE}, again"
APPLY = "hina_optax.apply"
PACKAGES = ("jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12")
Row = dict[str, Any]
Step = Callable[..., tuple[Any, Any]]


class Target(NamedTuple):
  """A chip: its platform as lowering and as `jax.default_backend()` name it, and the topology."""

  platform: str
  backend: str
  topology: dict[str, Any]


TARGETS = {
  "h100": Target("cuda", "gpu", {
    "topology_name": "h100", "topology": "1x1x1",
    "target_config": (pathlib.Path(__file__).parent / "h100.txtpb").read_text()}),
  "v5e": Target("tpu", "tpu", {"topology_name": "v5e:2x2"}),
}


# Counting.

_PER_SECOND = 3.35e12
_LEAST_SECONDS = 2e-6
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")
_PREFETCHES = ("copy-start", "slice-start", "dynamic-slice-start")
_SLICES = ("slice", "dynamic-slice", "gather")
_ARRAY = re.compile(r"([a-z]+(\d*)\w*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_BRANCHES = re.compile(r"(?:true_computation|false_computation)=%([\w.\-]+)")
_BRANCH_LIST = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r"known_trip_count\W+n\W+(\d+)")
_BOUND = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


class Cost(NamedTuple):
  """What instructions cost together."""

  kernels: float = 0
  bytes: float = 0
  seconds: float = 0
  cycles: float = 0


def _total(costs: Iterable[Cost]) -> Cost:
  return Cost(*map(sum, zip(Cost(), *costs)))


class Array(NamedTuple):
  """An array of a result: its size, and whether it is in on-chip memory."""

  bytes: int
  on_chip: bool


class Instruction(NamedTuple):
  """A line of a program."""

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  line: str
  root: bool

  @property
  def bytes(self) -> int:
    """Of all results, wherever they are."""
    return sum(x.bytes for x in self.arrays)

  @property
  def on_chip(self) -> bool:
    """Whether a result is in on-chip memory."""
    return any(x.on_chip for x in self.arrays)

  @property
  def written(self) -> int:
    """Bytes of results in main memory."""
    return sum(x.bytes for x in self.arrays if not x.on_chip)

  def called(self, attribute: str) -> str:
    """Name of the computation that an attribute names."""
    found = re.search(attribute + r"=%?([\w.\-]+)", self.line)
    assert found, self.line
    return found[1]


def _arrays(text: str) -> tuple[Array, ...]:
  def size(kind: str, bits: str, dimensions: str) -> int:
    of_one = 8 if kind == "pred" else int(bits or 0)
    return math.ceil(math.prod(int(x) for x in dimensions.split(",") if x) * of_one / 8)

  return tuple(Array(size(*x.group(1, 2, 3)), "S(1)" in (x[4] or "")) for x in
               _ARRAY.finditer(text))


def _instruction(opcode: str, line: str) -> Instruction:
  name, rest = line.split(" = ", 1)
  results, _, arguments = rest.partition(f" {opcode}(")
  operands = tuple(_NAME.findall(arguments.split(")", 1)[0]))
  own = name.split("%")[-1].strip()
  return Instruction(own, opcode, _arrays(results), operands, line, "ROOT " in name)


class Program:
  """The text of an optimised program."""

  def __init__(self, text: str):
    self.entry, computations = measure._computations(text.splitlines())
    self._computations = {
      name: {x.name: x for x in (_instruction(*pair) for pair in lines)}
      for name, lines in computations.items()}
    self.cost = functools.cache(self._cost)
    self.unknown_loops = 0

  def _cost(self, name: str) -> Cost:
    """Of one computation."""
    inside = self._computations[name]
    return _total(self._of(x, inside) for x in inside.values())

  def _of(self, x: Instruction, inside: dict[str, Instruction]) -> Cost:
    if x.opcode in measure.FREE or x.opcode.endswith(("-done", "-update")):
      return Cost()
    if x.opcode == "custom-call" and any(f'"{name}"' in x.line for name in _FREE_CALLS):
      return Cost()
    if x.opcode in ("call", "async-start"):
      return self.cost(x.called("to_apply" if x.opcode == "call" else "calls"))
    if x.opcode == "conditional":
      return min(map(self.cost, _branches(x)), key=lambda cost: (cost.cycles, cost.seconds))
    if x.opcode == "while":
      return Cost(*(self._trips(x) * n for n in self.cost(x.called("body"))))
    return self._kernel(x, inside)

  def _trips(self, x: Instruction) -> int:
    known = _TRIPS.search(x.line)
    if known:
      return int(known[1])
    condition = self._computations[x.called("condition")].values()
    bounds = [_BOUND.search(y.line) for y in condition if y.opcode == "constant"]
    if len(bounds) == 1 and bounds[0]:
      return int(bounds[0][1])
    self.unknown_loops += 1
    return 1

  def _kernel(self, x: Instruction, inside: dict[str, Instruction]) -> Cost:
    cycles = int(found[1]) if (found := _CYCLES.search(x.line)) else 0
    if x.opcode in _PREFETCHES:
      size = min(y.bytes for y in x.arrays[:2])
      moved = sum(0 if y.on_chip else size for y in x.arrays[:2])
      if x.on_chip:
        return Cost(bytes=moved, seconds=moved / _PER_SECOND, cycles=cycles)
    elif x.opcode == "fusion":
      moved = self._fused(x, inside)
    else:
      moved = self._written(x, inside) + sum(
        self._read(x, i, inside) for i, name in enumerate(x.operands)
        if not inside[name].on_chip)
    return Cost(1, moved, max(moved / _PER_SECOND, _LEAST_SECONDS), cycles)

  def _fused(self, x: Instruction, inside: dict[str, Instruction]) -> int:
    body = self._computations[x.called("calls")]
    read = sum(self._read_of(_parameter(body, i), body, inside[name].bytes)
               for i, name in enumerate(x.operands) if not inside[name].on_chip)
    roots = [y for y in body.values() if y.root]
    if roots[0].opcode == "tuple":
      roots = [body[name] for name in roots[0].operands]
    written = sum(0 if array.on_chip else min(array.bytes, self._written(root, body, True))
                  for array, root in zip(x.arrays, roots))
    return read + written

  def _read_of(self, name: str, body: dict[str, Instruction], most: int) -> int:
    """Bytes that a computation reads of a value: of all its users, at most the whole."""
    found = 0
    for x in body.values():
      for i in (i for i, operand in enumerate(x.operands) if operand == name):
        if x.opcode == "fusion":
          called = self._computations[x.called("calls")]
          found += self._read_of(_parameter(called, i), called, most)
        elif x.opcode in ("bitcast", "copy", "reshape") and not x.root:
          found += self._read_of(x.name, body, most)
        else:
          found += self._read(x, i, body)
    return min(found, most)

  def _read(self, x: Instruction, i: int, inside: dict[str, Instruction]) -> int:
    if x.opcode in _SLICES and i == 0:
      return x.bytes
    if x.opcode == "dynamic-update-slice" and i == 0:
      return 0
    return inside[x.operands[i]].bytes

  def _written(self, x: Instruction, inside: dict[str, Instruction], anywhere: bool = False) -> int:
    while x.opcode == "bitcast" and x.operands:
      x = inside[x.operands[0]]
    if x.opcode == "dynamic-update-slice":
      return inside[x.operands[1]].bytes
    return x.bytes if anywhere else x.written


def _parameter(body: dict[str, Instruction], number: int) -> str:
  text = f"parameter({number})"
  return next(name for name, x in body.items() if x.opcode == "parameter" and text in x.line)


def _branches(x: Instruction) -> Sequence[str]:
  found = _BRANCH_LIST.search(x.line)
  return _NAME.findall(found[1]) if found else _BRANCHES.findall(x.line)


# Compiling.


class Compiler:
  """Compiles steps for one chip."""

  def __init__(self, target: str, host_backend: bool = False, state_first: bool = False,
               texts: pathlib.Path | None = None):
    self.target = TARGETS[target]
    self._state_first, self._texts = state_first, texts
    topology = topologies.get_topology_desc(platform=self.target.platform, **self.target.topology)
    self.place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    self._host_backend = host_backend
    # What the first program costs once.
    self._compiled(lambda x: x + 1, (), self.placed(jax.ShapeDtypeStruct((8,), float)))

  def placed(self, shapes: Any) -> Any:
    """`shapes`, as shapes that lie on the chip."""
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.place), shapes)

  def row(self, name: str, step: Step, tx: Any, shapes: Any, *rest: Any) -> Row:
    """What is known of `step(params, state, *rest)`, the first two donated."""
    with self._as_there():
      params = self.placed(shapes)
      state = hina_optax.abstract_state(tx, params)
      held, ordered = (params, state), step
      if self._state_first:
        held, ordered = held[::-1], lambda state, params, *xs: step(params, state, *xs)[::-1]
      compiled, times = self._compiled(ordered, (0, 1), *held, *map(self.placed, rest))
    text = compiled.as_text()
    if self._texts:
      self._texts.mkdir(parents=True, exist_ok=True)
      (self._texts / f"{name}.hlo").write_text(text)
    program = Program(text)
    cost = program.cost(program.entry)
    sizes = compiled.memory_analysis()
    found = {
      "name": name, "kernels": int(cost.kernels), "bytes": int(cost.bytes),
      "modelled_us": 1e6 * cost.seconds, "cycles": int(cost.cycles),
      **{key: int(getattr(sizes, f"{host}{kind}_size_in_bytes"))
         for kind in ("temp", "argument", "output", "alias") for host in ("", "host_")
         for key in [f"{host}{kind}_bytes"]},
      "state_bytes": measure.tree_bytes(state), **times, "unknown_loops": program.unknown_loops,
    }
    found["peak_bytes"] = (found["argument_bytes"] + found["temp_bytes"] + found["output_bytes"]
                           - found["alias_bytes"])
    unused = "cycles" if self.target.platform == "cuda" else "modelled_us"
    del found[unused]
    return found

  def _compiled(self, step: Step, donated: Sequence[int], *shapes: Any) -> tuple[Any, Row]:
    """The program, and how long it took."""
    jax.clear_caches()
    before, start = os.times(), time.perf_counter()
    traced = jax.jit(step, donate_argnums=donated).trace(*shapes)
    lowered = traced.lower(lowering_platforms=(self.target.platform,))
    middle = time.perf_counter()
    compiled = lowered.compile()
    end, after = time.perf_counter(), os.times()
    # Of this process and of its children, such as the GPU's assembler.
    processor_s = sum(after[:4]) - sum(before[:4])
    return compiled, {"trace_s": middle - start, "compile_s": end - middle,
                      "trace_and_compile_s": end - start, "cpu_s": processor_s}

  def _as_there(self) -> Any:
    if self._host_backend:
      return contextlib.nullcontext()
    return mock.patch.object(jax, "default_backend", return_value=self.target.backend)


def update_step(tx: Any) -> Step:
  """`update` and `apply_updates`; donated buffers are paired with results in order."""
  def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  return step


def apply_step(tx: Any) -> Step:
  """The same by the fused entry point, which not every version of the library has."""
  return lambda params, state, gradients: hina_optax.apply(tx, gradients, state, params)


def with_ratios(row: Row, baseline: Row) -> Row:
  """`row`, and each of its numbers over that of the baseline."""
  ratios = {k: v / baseline[k] for k, v in row.items()
            if isinstance(v, int | float) and baseline.get(k)}
  return row | {"ratios": ratios}


def tree_rows(compiler: Compiler, shapes: Any, only: str | None) -> Iterator[Row]:
  """Rows of one tree, `optax.adamw` first and last."""
  known = contenders.contenders()
  names = [x for x in known if x == contenders.BASELINE or (
    x in CHOSEN if only is None else re.search(only, x))]
  rows = [(name, known[name], update_step) for name in names]
  if hasattr(hina_optax, "apply"):
    rows += [(f"{name}, {APPLY}", known[name], apply_step) for name in names
             if name == "everything"]
  rows.append((AGAIN, known[contenders.BASELINE], update_step))
  baseline: Row = {}
  for name, make, step_of in rows:
    tx = make()
    row = compiler.row(name, step_of(tx), tx, shapes, shapes)
    baseline = baseline or row
    yield with_ratios(row, baseline)


# Offload.

MATRICES, SIDE, WINDOW_MB, BATCH = 48, 2048, 64, 64


def _given(step: Step) -> Step:
  return step


def _of_squares(step: Step) -> Step:
  """The gradients of a loss that is a sum over leaves."""
  def loss(params: Any) -> jax.Array:
    return sum(0.5 * jnp.sum(x * x) for x in jax.tree.leaves(params))

  return lambda params, state: step(params, state, jax.grad(loss)(params))


def _of_layers(step: Step) -> Step:
  """The gradients of as many dense layers, one after another."""
  def loss(params: Any, x: jax.Array) -> jax.Array:
    for kernel in jax.tree.leaves(params):
      x = jnp.tanh(x @ kernel)
    return jnp.mean(x * x)

  return lambda params, state, x: step(params, state, jax.grad(loss)(params, x))


def offload_rows(compiler: Compiler) -> Iterator[Row]:
  """Temporaries of hosted state, and how much they are beyond those of `optax.adamw`."""
  matrix = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32)
  shapes = {f"{i:02}": matrix for i in range(MATRICES)}
  batch = jax.ShapeDtypeStruct((BATCH, SIDE), jnp.float32)
  settings = {"given": (_given, (shapes,)), "of squares": (_of_squares, ()),
              "of layers": (_of_layers, (batch,))}
  adamw = optax.adamw(contenders.RATE)
  hosted = hina_optax.with_host_offload(adamw, max_buffer_memory_mb=WINDOW_MB)
  rows = [(contenders.BASELINE, adamw, update_step),
          (f"with_host_offload({contenders.BASELINE})", hosted, update_step)]
  if hasattr(hina_optax, "apply"):
    rows.append((f"{rows[1][0]}, {APPLY}", hosted, apply_step))
  for gradients, (around, rest) in settings.items():
    baseline: Row = {}
    for name, tx, step_of in rows:
      title = f"{name}, gradients {gradients}"
      row = compiler.row(title, around(step_of(tx)), tx, shapes, *rest)
      baseline = baseline or row
      beyond = row["temp_bytes"] - baseline["temp_bytes"]
      yield with_ratios(row, baseline) | {"temp_bytes_beyond_adamw": beyond}


# Writing.

_MB = 1e6
Column = tuple[str, str, str, float]
KERNELS: Column = ("kernels", "kernels", "d", 1)
SIZES: tuple[Column, ...] = (
  ("temporaries MB", "temp_bytes", ".1f", _MB), ("arguments MB", "argument_bytes", ".0f", _MB),
  ("outputs MB", "output_bytes", ".0f", _MB), ("peak MB", "peak_bytes", ".0f", _MB))
TIMES: tuple[Column, ...] = (
  ("trace + lower s", "trace_s", ".1f", 1), ("compile s", "compile_s", ".1f", 1),
  ("both s", "trace_and_compile_s", ".1f", 1), ("CPU s", "cpu_s", ".1f", 1))
HOSTED: tuple[Column, ...] = (
  SIZES[0], ("beyond adamw's MB", "temp_bytes_beyond_adamw", ".1f", _MB),
  ("host temporaries MB", "host_temp_bytes", ".1f", _MB), *SIZES[1:3],
  ("host arguments MB", "host_argument_bytes", ".0f", _MB), SIZES[3])
NOTE = (
  "Compiled for {chip}, which is not there: nothing ran. In brackets: over `optax.adamw` of the "
  "same run. The docstring of accelerators.py says how kernels and bytes are counted."
)


def columns(target: str, parameters: int | None) -> tuple[Column, ...]:
  """Those of a tree with so many parameters; of offload without."""
  if parameters is None:
    return HOSTED + TIMES
  speed: Column = ("modelled us", "modelled_us", ".0f", 1)
  if target != "h100":
    speed = ("cycles M", "cycles", ".2f", 1e6)
  return (KERNELS, ("B/parameter", "bytes", ".0f", parameters), speed, *SIZES, *TIMES)


def head(shown: Sequence[Column]) -> str:
  """Names of columns, and the rule below them."""
  return f"| {' | '.join(['optimizer', *(x[0] for x in shown)])} |\n|{'---|' * (len(shown) + 1)}"


def line(row: Row, shown: Sequence[Column]) -> str:
  """One row of the table."""
  def cell(key: str, form: str, unit: float) -> str:
    text = format(row[key] if form == "d" else row[key] / unit, form)
    ratio = None if key.endswith("_bytes") else row["ratios"].get(key)
    return text if ratio is None else f"{text} ({ratio:.2f})"

  return f"| {' | '.join([row['name'], *(cell(*x[1:]) for x in shown)])} |"


def render(result: Row) -> str:
  """The whole document."""
  at = result["environment"]
  names = ("jax", "optax", "hina_optax", *(x for x in PACKAGES if x in at))
  versions = ", ".join(f"{k} {at[k]}" for k in names)
  backend = "" if result["default_backend"] != "cpu" else " `jax.default_backend()` said cpu."
  order = " The state comes before the parameters." if result["state_first"] else ""
  note = NOTE.format(chip=result["target"]) + backend + order
  parts = [f"# Compiled for {result['target']}", note,
           f"{versions}; {at['date']}; compiled on {at['device']}, {at['cores']} cores."]
  for tree in result["trees"]:
    shown = columns(result["target"], tree.get("parameters"))
    lines = [head(shown), *(line(x, shown) for x in tree["rows"])]
    parts.append(f"## {title(tree)}\n\n" + "\n".join(lines))
  return "\n\n".join(parts) + "\n"


def title(tree: Row) -> str:
  """Of a tree, or of offload."""
  if "parameters" in tree:
    return report.title(tree)
  return f"{tree['tree']}: {MATRICES} matrices of {SIDE} x {SIDE}, window {WINDOW_MB} MB"


def measure_all(arguments: argparse.Namespace) -> Row:
  """Every tree; prints rows as they come, and writes after each."""
  compiler = Compiler(arguments.target, arguments.host_backend, arguments.state_first,
                      arguments.texts)
  result: Row = {
    "environment": measure.environment() | dict(versions()), "target": arguments.target,
    "default_backend": "cpu" if arguments.host_backend else compiler.target.backend,
    "state_first": arguments.state_first, "trees": []}

  def add(found: Row, rows: Iterable[Row]) -> None:
    result["trees"].append(found)
    shown = columns(arguments.target, found.get("parameters"))
    print(f"\n{title(found)}\n\n{head(shown)}", flush=True)
    for row in rows:
      found["rows"].append(row)
      print(line(row, shown), flush=True)
      write(arguments.output, result)

  for name in arguments.tree:
    shapes = TREES[name]()
    leaves = jax.tree.leaves(shapes)
    found = {"tree": name, "leaves": len(leaves), "parameters": sum(x.size for x in leaves),
             "rows": []}
    add(found, tree_rows(compiler, shapes, arguments.only))
  if arguments.offload:
    add({"tree": "offload", "rows": []}, offload_rows(compiler))
  return result


def versions() -> Iterator[tuple[str, str]]:
  """Of the compilers that are installed."""
  for name in PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      yield name, importlib.metadata.version(name)


def write(path: pathlib.Path | None, result: Row) -> None:
  """The JSON, and its Markdown beside it."""
  if path:
    measure.write_json(path, result)
    path.with_suffix(".md").write_text(render(result))


def parser() -> argparse.ArgumentParser:
  """The options."""
  made = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
  add = made.add_argument
  add("--target", required=True, choices=TARGETS, help="chip; one in a process")
  add("--tree", nargs="+", choices=TREES, default=[], metavar="TREE", help=", ".join(TREES))
  add("--offload", action="store_true", help="rows of with_host_offload")
  add("--only", metavar="REGEX", help="contenders whose name has it, instead of "
      f"{', '.join(CHOSEN[1:])}; adamw is always there")
  add("--output", type=pathlib.Path, help="JSON file to write, with a .md beside it")
  add("--host-backend", action="store_true", help='jax.default_backend() goes on to say "cpu"')
  add("--state-first", action="store_true", help="in arguments and results, as in measure.py")
  add("--texts", type=pathlib.Path, metavar="FOLDER", help="where to write the programs' texts")
  return made


def main(words: list[str] | None = None) -> None:
  """Compiles, prints and writes."""
  made = parser()
  arguments = made.parse_args(words)
  if not arguments.tree and not arguments.offload:
    made.error("name a --tree, or --offload")
  # The process itself runs on the CPU. Autotuning would need the GPU.
  jax.config.update("jax_platforms", "cpu")
  flags = os.environ.get("XLA_FLAGS", "")
  os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  measure_all(arguments)


if __name__ == "__main__":
  main()
