"""Compiles a step for an absent accelerator, and counts its kernels, bytes, memory and cycles.

    python benchmarks/accelerators.py --target h100 --tree lora420 --output FILE.json
    python benchmarks/accelerators.py --target v5e --tree dense17m --only '^everything$'
    python benchmarks/accelerators.py --target v5e --offload

The compilers for NVIDIA GPUs and TPUs run without such a chip. They compile `update` and
`apply_updates`, with donated parameters and state, for one chip, and the figures are read from the
optimised program. Nothing runs: the output says "compiled for", never "measured on". The step takes
and returns the parameters first, as most training loops do. With --state-first it is the step of
measure.py (the order changes the schedule, and with it the temporaries).

Every instruction of the entry computation, and of its calls and loops (times their trip count), is
a kernel, except for those that only name or group values. (A TPU's loops are assumed to count from
0 to the constant in their condition.) A kernel's bytes are those of its results and its operands.
Of an operand that it only slices, the slice counts; of a result that it updates in place, the
update counts. A conditional counts as its cheaper branch, an asynchronous pair once. Arrays in a
TPU's on-chip memory have no bytes, and copies to and from there are no kernels. The modelled time
of an H100 is the sum over kernels of the larger of bytes / 3.35 TB/s and 2 us. The cycles of a TPU
are its compiler's own estimates, which it gives for most instructions that are not scalar.

With --offload the script counts the temporaries of `with_host_offload(optax.adamw)`, with a window
of 64 MB, on 48 matrices of 16.8 MB, for gradients that are arguments and for gradients that the
same program computes.

The times depend on this machine and on its load: read them as ratios to `optax.adamw`. CPU s is the
processor time of tracing, lowering and compiling, which depends least on the load. Code that calls
`jax.default_backend()` gets the target's platform (with --host-backend: "cpu").

The script needs, in an environment of its own:

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
  "lora_sdxl": lambda: trees.lora_factors(trees.sdxl_unet(), 16),
  "tiny": lambda: trees.equal_leaves(3, (8, 4)),
}
DEFAULT_ROWS = (contenders.BASELINE, "with_leaf_batching(optax.adamw)", "defaults", "everything")
LAST_ROW = f"{contenders.BASELINE}, again"
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

_BYTES_PER_SECOND = 3.35e12
_MIN_KERNEL_SECONDS = 2e-6
_NO_WORK_CUSTOM_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")
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
  """The cost of one or more instructions."""

  kernels: float = 0
  bytes: float = 0
  seconds: float = 0
  cycles: float = 0


def _total(costs: Iterable[Cost]) -> Cost:
  return Cost(*map(sum, zip(Cost(), *costs)))


class Array(NamedTuple):
  """An array in the result of an instruction: its size, and whether it is in on-chip memory."""

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
    """Bytes of all results, in any memory."""
    return sum(x.bytes for x in self.arrays)

  @property
  def on_chip(self) -> bool:
    """Whether a result is in on-chip memory."""
    return any(x.on_chip for x in self.arrays)

  @property
  def bytes_in_main_memory(self) -> int:
    """Bytes of the results that are in main memory."""
    return sum(x.bytes for x in self.arrays if not x.on_chip)

  def get_computation(self, attribute: str) -> str:
    """Returns the name of the computation in an attribute of the instruction."""
    match = re.search(attribute + r"=%?([\w.\-]+)", self.line)
    assert match, self.line
    return match[1]


def _parse_arrays(text: str) -> tuple[Array, ...]:
  def count_bytes(dtype: str, bits: str, dimensions: str) -> int:
    # The names of HLO's dtypes contain their bits. Booleans take a byte.
    bits_per_element = 8 if dtype == "pred" else int(bits or 0)
    return math.ceil(math.prod(int(x) for x in dimensions.split(",") if x) * bits_per_element / 8)

  # S(1) in the layout is a TPU's on-chip memory.
  return tuple(Array(count_bytes(*x.group(1, 2, 3)), "S(1)" in (x[4] or "")) for x in
               _ARRAY.finditer(text))


def _parse_instruction(opcode: str, line: str) -> Instruction:
  left, right = line.split(" = ", 1)
  results, _, arguments = right.partition(f" {opcode}(")
  operands = tuple(_NAME.findall(arguments.split(")", 1)[0]))
  name = left.split("%")[-1].strip()
  return Instruction(name, opcode, _parse_arrays(results), operands, line, "ROOT " in left)


class Program:
  """The instructions of an optimised program, and what they cost."""

  def __init__(self, text: str):
    self.entry, computations = measure.parse_computations(text.splitlines())
    self._computations = {
      name: {x.name: x for x in (_parse_instruction(*pair) for pair in lines)}
      for name, lines in computations.items()}
    self.cost = functools.cache(self._computation_cost)
    self.unknown_loops = 0

  def _computation_cost(self, name: str) -> Cost:
    body = self._computations[name]
    return _total(self._instruction_cost(x, body) for x in body.values())

  def _instruction_cost(self, x: Instruction, body: dict[str, Instruction]) -> Cost:
    if x.opcode in measure.NO_WORK_OPCODES or x.opcode.endswith(("-done", "-update")):
      return Cost()
    if x.opcode == "custom-call" and any(f'"{name}"' in x.line for name in _NO_WORK_CUSTOM_CALLS):
      return Cost()
    if x.opcode in ("call", "async-start"):
      return self.cost(x.get_computation("to_apply" if x.opcode == "call" else "calls"))
    if x.opcode == "conditional":
      return min(map(self.cost, _branches(x)), key=lambda cost: (cost.cycles, cost.seconds))
    if x.opcode == "while":
      return Cost(*(self._trip_count(x) * n for n in self.cost(x.get_computation("body"))))
    return self._kernel_cost(x, body)

  def _trip_count(self, x: Instruction) -> int:
    trips = _TRIPS.search(x.line)
    if trips:
      return int(trips[1])
    condition = self._computations[x.get_computation("condition")].values()
    bounds = [_BOUND.search(y.line) for y in condition if y.opcode == "constant"]
    if len(bounds) == 1 and bounds[0]:
      return int(bounds[0][1])
    self.unknown_loops += 1
    return 1

  def _kernel_cost(self, x: Instruction, body: dict[str, Instruction]) -> Cost:
    match = _CYCLES.search(x.line)
    cycles = int(match[1]) if match else 0
    if x.opcode in _PREFETCHES:
      size = min(y.bytes for y in x.arrays[:2])
      moved = sum(0 if y.on_chip else size for y in x.arrays[:2])
      if x.on_chip:
        return Cost(bytes=moved, seconds=moved / _BYTES_PER_SECOND, cycles=cycles)
    elif x.opcode == "fusion":
      moved = self._fusion_bytes(x, body)
    else:
      moved = self._bytes_written(x, body) + sum(
        self._operand_bytes_read(x, i, body) for i, name in enumerate(x.operands)
        if not body[name].on_chip)
    return Cost(1, moved, max(moved / _BYTES_PER_SECOND, _MIN_KERNEL_SECONDS), cycles)

  def _fusion_bytes(self, x: Instruction, body: dict[str, Instruction]) -> int:
    """Counts the bytes that a fusion reads and writes; `body` is the computation around it."""
    fused = self._computations[x.get_computation("calls")]
    read = sum(self._value_bytes_read(_find_parameter(fused, i), fused, body[name].bytes)
               for i, name in enumerate(x.operands) if not body[name].on_chip)
    roots = [y for y in fused.values() if y.root]
    if roots[0].opcode == "tuple":
      roots = [fused[name] for name in roots[0].operands]
    written = sum(
      0 if array.on_chip else min(array.bytes, self._bytes_written(root, fused, any_memory=True))
      for array, root in zip(x.arrays, roots))
    return read + written

  def _value_bytes_read(self, name: str, body: dict[str, Instruction], max_bytes: int) -> int:
    """Counts the bytes of a value that all its users in a computation read, at most the whole."""
    total = 0
    for x in body.values():
      for i in (i for i, operand in enumerate(x.operands) if operand == name):
        if x.opcode == "fusion":
          fused = self._computations[x.get_computation("calls")]
          total += self._value_bytes_read(_find_parameter(fused, i), fused, max_bytes)
        elif x.opcode in ("bitcast", "copy", "reshape") and not x.root:
          total += self._value_bytes_read(x.name, body, max_bytes)
        else:
          total += self._operand_bytes_read(x, i, body)
    return min(total, max_bytes)

  def _operand_bytes_read(self, x: Instruction, i: int, body: dict[str, Instruction]) -> int:
    if x.opcode in _SLICES and i == 0:
      return x.bytes
    if x.opcode == "dynamic-update-slice" and i == 0:
      return 0
    return body[x.operands[i]].bytes

  def _bytes_written(
    self, x: Instruction, body: dict[str, Instruction], any_memory: bool = False
  ) -> int:
    while x.opcode == "bitcast" and x.operands:
      x = body[x.operands[0]]
    if x.opcode == "dynamic-update-slice":
      return body[x.operands[1]].bytes
    return x.bytes if any_memory else x.bytes_in_main_memory


def _find_parameter(body: dict[str, Instruction], number: int) -> str:
  text = f"parameter({number})"
  return next(name for name, x in body.items() if x.opcode == "parameter" and text in x.line)


def _branches(x: Instruction) -> Sequence[str]:
  listed = _BRANCH_LIST.search(x.line)
  return _NAME.findall(listed[1]) if listed else _BRANCHES.findall(x.line)


# Compiling.


class Compiler:
  """Compiles steps for one chip."""

  def __init__(self, target: str, host_backend: bool = False, state_first: bool = False,
               texts: pathlib.Path | None = None):
    self.target = TARGETS[target]
    self._state_first, self._texts = state_first, texts
    topology = topologies.get_topology_desc(platform=self.target.platform, **self.target.topology)
    self._sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    self._host_backend = host_backend
    # The first compilation takes longer than the others. No row should include that time.
    self._compile(lambda x: x + 1, (), self._place(jax.ShapeDtypeStruct((8,), float)))

  def _place(self, shapes: Any) -> Any:
    """Gives shapes a sharding on the chip."""
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._sharding), shapes)

  def make_row(self, name: str, step: Step, tx: Any, shapes: Any, *rest: Any) -> Row:
    """Compiles `step(params, state, *rest)`, the first two donated, and returns its figures."""
    with self._pretend_backend():
      params = self._place(shapes)
      state = hina_optax.abstract_state(tx, params)
      donated, ordered_step = (params, state), step
      if self._state_first:
        donated = state, params
        ordered_step = lambda state, params, *xs: step(params, state, *xs)[::-1]  # noqa: E731
      compiled, times = self._compile(ordered_step, (0, 1), *donated, *map(self._place, rest))
    text = compiled.as_text()
    if self._texts:
      self._texts.mkdir(parents=True, exist_ok=True)
      (self._texts / f"{name}.hlo").write_text(text)
    program = Program(text)
    cost = program.cost(program.entry)
    sizes = compiled.memory_analysis()
    row = {
      "name": name, "kernels": int(cost.kernels), "bytes": int(cost.bytes),
      "modelled_us": 1e6 * cost.seconds, "cycles": int(cost.cycles),
      **{key: int(getattr(sizes, f"{host}{kind}_size_in_bytes"))
         for kind in ("temp", "argument", "output", "alias") for host in ("", "host_")
         for key in [f"{host}{kind}_bytes"]},
      "state_bytes": measure.tree_bytes(state), **times, "unknown_loops": program.unknown_loops,
    }
    row["peak_bytes"] = (row["argument_bytes"] + row["temp_bytes"] + row["output_bytes"]
                         - row["alias_bytes"])
    unused = "cycles" if self.target.platform == "cuda" else "modelled_us"
    del row[unused]
    return row

  def _compile(self, step: Step, donated: Sequence[int], *shapes: Any) -> tuple[Any, Row]:
    """Returns the compiled program, and the times of tracing and compiling."""
    jax.clear_caches()
    before, start = os.times(), time.perf_counter()
    traced = jax.jit(step, donate_argnums=donated).trace(*shapes)
    lowered = traced.lower(lowering_platforms=(self.target.platform,))
    middle = time.perf_counter()
    compiled = lowered.compile()
    end, after = time.perf_counter(), os.times()
    # The time of this process and of its children, such as the GPU's assembler.
    processor_s = sum(after[:4]) - sum(before[:4])
    return compiled, {"trace_s": middle - start, "compile_s": end - middle,
                      "trace_and_compile_s": end - start, "cpu_s": processor_s}

  def _pretend_backend(self) -> Any:
    """Makes `jax.default_backend()` return the target's platform."""
    if self._host_backend:
      return contextlib.nullcontext()
    return mock.patch.object(jax, "default_backend", return_value=self.target.backend)


def update_step(tx: Any) -> Step:
  """Makes a step of `update` and `apply_updates`.

  JAX pairs donated buffers with results in order.
  """
  def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  return step


def apply_step(tx: Any) -> Step:
  """Makes the same step by the fused entry point, which older versions of the library lack."""
  return lambda params, state, gradients: hina_optax.apply(tx, gradients, state, params)


def add_ratios(row: Row, baseline: Row) -> Row:
  """Adds the ratio of each number to that of the baseline."""
  ratios = {k: v / baseline[k] for k, v in row.items()
            if isinstance(v, int | float) and baseline.get(k)}
  return row | {"ratios": ratios}


def compile_tree(compiler: Compiler, shapes: Any, only: str | None) -> Iterator[Row]:
  """Yields the rows of one tree, `optax.adamw` first and last."""
  makers = contenders.contenders()
  names = [x for x in makers if x == contenders.BASELINE or (
    x in DEFAULT_ROWS if only is None else re.search(only, x))]
  rows = [(name, makers[name], update_step) for name in names]
  if hasattr(hina_optax, "apply"):
    rows += [(f"{name}, {APPLY}", makers[name], apply_step) for name in names
             if name == "everything"]
  rows.append((LAST_ROW, makers[contenders.BASELINE], update_step))
  baseline: Row = {}
  for name, make, make_step in rows:
    tx = make()
    row = compiler.make_row(name, make_step(tx), tx, shapes, shapes)
    baseline = baseline or row
    yield add_ratios(row, baseline)


# Offload.

MATRICES, SIDE, WINDOW_MB, BATCH = 48, 2048, 64, 64


def _with_given_gradients(step: Step) -> Step:
  return step


def _with_gradients_of_squares(step: Step) -> Step:
  """Adds the gradients of a loss that is a sum over leaves to a step."""
  def loss(params: Any) -> jax.Array:
    return sum(0.5 * jnp.sum(x * x) for x in jax.tree.leaves(params))

  return lambda params, state: step(params, state, jax.grad(loss)(params))


def _with_gradients_of_layers(step: Step) -> Step:
  """Adds the gradients of a chain of dense layers, one per leaf, to a step."""
  def loss(params: Any, x: jax.Array) -> jax.Array:
    for kernel in jax.tree.leaves(params):
      x = jnp.tanh(x @ kernel)
    return jnp.mean(x * x)

  return lambda params, state, x: step(params, state, jax.grad(loss)(params, x))


def compile_offload(compiler: Compiler) -> Iterator[Row]:
  """Yields the temporaries with state in host memory, also beyond those of `optax.adamw`."""
  matrix = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32)
  shapes = {f"{i:02}": matrix for i in range(MATRICES)}
  batch = jax.ShapeDtypeStruct((BATCH, SIDE), jnp.float32)
  settings = {"given": (_with_given_gradients, (shapes,)),
              "of squares": (_with_gradients_of_squares, ()),
              "of layers": (_with_gradients_of_layers, (batch,))}
  adamw = optax.adamw(contenders.RATE)
  hosted = hina_optax.with_host_offload(adamw, max_buffer_memory_mb=WINDOW_MB)
  rows = [(contenders.BASELINE, adamw, update_step),
          (f"with_host_offload({contenders.BASELINE})", hosted, update_step)]
  if hasattr(hina_optax, "apply"):
    rows.append((f"{rows[1][0]}, {APPLY}", hosted, apply_step))
  for gradients, (add_gradients, rest) in settings.items():
    baseline: Row = {}
    for name, tx, make_step in rows:
      title = f"{name}, gradients {gradients}"
      row = compiler.make_row(title, add_gradients(make_step(tx)), tx, shapes, *rest)
      baseline = baseline or row
      excess = row["temp_bytes"] - baseline["temp_bytes"]
      yield add_ratios(row, baseline) | {"temp_bytes_beyond_adamw": excess}


# Writing.

_MB = 1e6
# The header, the key in a row, the format and the unit.
Column = tuple[str, str, str, float]
KERNELS: Column = ("kernels", "kernels", "d", 1)
SIZES: tuple[Column, ...] = (
  ("temporaries MB", "temp_bytes", ".1f", _MB), ("arguments MB", "argument_bytes", ".0f", _MB),
  ("outputs MB", "output_bytes", ".0f", _MB), ("peak MB", "peak_bytes", ".0f", _MB))
TIMES: tuple[Column, ...] = (
  ("trace + lower s", "trace_s", ".1f", 1), ("compile s", "compile_s", ".1f", 1),
  ("both s", "trace_and_compile_s", ".1f", 1), ("CPU s", "cpu_s", ".1f", 1))
OFFLOAD: tuple[Column, ...] = (
  SIZES[0], ("beyond adamw's MB", "temp_bytes_beyond_adamw", ".1f", _MB),
  ("host temporaries MB", "host_temp_bytes", ".1f", _MB), *SIZES[1:3],
  ("host arguments MB", "host_argument_bytes", ".0f", _MB), SIZES[3])
NOTE = (
  "Compiled for {chip}, which is not there: nothing ran. In brackets: over `optax.adamw` of the "
  "same run. The docstring of accelerators.py says how kernels and bytes are counted."
)


def choose_columns(target: str, parameters: int | None) -> tuple[Column, ...]:
  """Chooses the columns for a tree with so many parameters, or with `None` those of offload."""
  if parameters is None:
    return OFFLOAD + TIMES
  speed: Column = ("modelled us", "modelled_us", ".0f", 1)
  if target != "h100":
    speed = ("cycles M", "cycles", ".2f", 1e6)
  return (KERNELS, ("B/parameter", "bytes", ".0f", parameters), speed, *SIZES, *TIMES)


def format_header(columns: Sequence[Column]) -> str:
  """Formats the names of the columns, and the rule below them."""
  names = ["optimizer", *(column[0] for column in columns)]
  return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def format_row(row: Row, columns: Sequence[Column]) -> str:
  """Formats one row of the table."""
  def format_cell(key: str, spec: str, unit: float) -> str:
    text = format(row[key] if spec == "d" else row[key] / unit, spec)
    ratio = None if key.endswith("_bytes") else row["ratios"].get(key)
    return text if ratio is None else f"{text} ({ratio:.2f})"

  return f"| {' | '.join([row['name'], *(format_cell(*column[1:]) for column in columns)])} |"


def render(result: Row) -> str:
  """Formats the whole document."""
  environment = result["environment"]
  names = ("jax", "optax", "hina_optax", *(x for x in PACKAGES if x in environment))
  versions = ", ".join(f"{k} {environment[k]}" for k in names)
  backend = "" if result["default_backend"] != "cpu" else " `jax.default_backend()` said cpu."
  order = " The state comes before the parameters." if result["state_first"] else ""
  note = NOTE.format(chip=result["target"]) + backend + order
  parts = [f"# Compiled for {result['target']}", note,
           f"{versions}; {environment['date']}; compiled on {environment['device']}, "
           f"{environment['cores']} cores."]
  for tree in result["trees"]:
    columns = choose_columns(result["target"], tree.get("parameters"))
    lines = [format_header(columns), *(format_row(row, columns) for row in tree["rows"])]
    parts.append(f"## {format_title(tree)}\n\n" + "\n".join(lines))
  return "\n\n".join(parts) + "\n"


def format_title(tree: Row) -> str:
  """Formats the name and the size of a tree, or of the matrices of offload."""
  if "parameters" in tree:
    return report.format_title(tree)
  return f"{tree['tree']}: {MATRICES} matrices of {SIDE} x {SIDE}, window {WINDOW_MB} MB"


def compile_all(arguments: argparse.Namespace) -> Row:
  """Compiles for every tree; prints each row when it is ready, and writes all results after it."""
  compiler = Compiler(arguments.target, arguments.host_backend, arguments.state_first,
                      arguments.texts)
  result: Row = {
    "environment": measure.environment() | dict(versions()), "target": arguments.target,
    "default_backend": "cpu" if arguments.host_backend else compiler.target.backend,
    "state_first": arguments.state_first, "trees": []}

  def add_tree(tree: Row, rows: Iterable[Row]) -> None:
    result["trees"].append(tree)
    columns = choose_columns(arguments.target, tree.get("parameters"))
    print(f"\n{format_title(tree)}\n\n{format_header(columns)}", flush=True)
    for row in rows:
      tree["rows"].append(row)
      print(format_row(row, columns), flush=True)
      write_result(arguments.output, result)

  for name in arguments.tree:
    shapes = TREES[name]()
    leaves = jax.tree.leaves(shapes)
    tree = {"tree": name, "leaves": len(leaves), "parameters": sum(x.size for x in leaves),
            "rows": []}
    add_tree(tree, compile_tree(compiler, shapes, arguments.only))
  if arguments.offload:
    add_tree({"tree": "offload", "rows": []}, compile_offload(compiler))
  return result


def versions() -> Iterator[tuple[str, str]]:
  """Yields the names and versions of the compilers that are installed."""
  for name in PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      yield name, importlib.metadata.version(name)


def write_result(path: pathlib.Path | None, result: Row) -> None:
  """Writes the JSON, and its Markdown beside it, if there is a path."""
  if path:
    measure.write_json(path, result)
    path.with_suffix(".md").write_text(render(result))


def make_parser() -> argparse.ArgumentParser:
  """Makes the parser of the command line."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add("--target", required=True, choices=TARGETS, help="chip; one in a process")
  add("--tree", nargs="+", choices=TREES, default=[], metavar="TREE", help=", ".join(TREES))
  add("--offload", action="store_true", help="rows of with_host_offload")
  add("--only", metavar="REGEX", help="contenders whose name matches, instead of "
      f"{', '.join(DEFAULT_ROWS[1:])}; adamw is always compiled")
  add("--output", type=pathlib.Path, help="JSON file to write, with a .md beside it")
  add("--host-backend", action="store_true", help='jax.default_backend() still returns "cpu"')
  add("--state-first", action="store_true",
      help="the state precedes the parameters in arguments and results, as in measure.py")
  add("--texts", type=pathlib.Path, metavar="FOLDER", help="where to write the programs' texts")
  return parser


def main(argv: list[str] | None = None) -> None:
  """Compiles, prints and writes."""
  parser = make_parser()
  arguments = parser.parse_args(argv)
  if not arguments.tree and not arguments.offload:
    parser.error("name a --tree, or --offload")
  # This process runs on the CPU. XLA's autotuning would need the GPU.
  jax.config.update("jax_platforms", "cpu")
  flags = os.environ.get("XLA_FLAGS", "")
  os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  compile_all(arguments)


if __name__ == "__main__":
  main()
