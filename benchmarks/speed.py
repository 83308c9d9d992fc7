"""Time, memory and program of one step, for each part of the library, against `optax.adamw`.

    python benchmarks/speed.py --tree lora420 dense17m --output FILE.json
    python benchmarks/speed.py --tree lora420 --only '^everything$'
    python benchmarks/speed.py --list

A step is a jitted `update` and `apply_updates` with donated parameters and state, on a constant
gradient. The measurements of dynamic adaptation (every 100 steps) do not affect the median. Each
row is timed in rounds that alternate with `optax.adamw`, which is timed against itself first and
last. The script writes a Markdown table beside the JSON. SDXL's 2.6 billion parameters are traced
and compiled, but not stepped. If torch is installed, its AdamW is timed too, and with --reference a
user's copy of the PyTorch class, both on the CPU. Kernels are the instructions of the optimised
HLO's entry computation that do work (fusions, dots, custom calls, loops, copies ...), without those
that only name or group values. A call counts as the computation that it calls.
"""

import argparse
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import contenders
import jax
import jax.numpy as jnp
import measure
import numpy as np
import report
import torch_rows
import trees

TREES: dict[str, Callable[[], trees.Tree]] = {
  "lora420": trees.lora_420,
  "lora_sdxl": lambda: trees.lora_factors(trees.sdxl_unet(), 16),
  "dense17m": trees.dense_17m,
  "dit130m": trees.dit_130m,
  "sdxl": trees.sdxl_unet,
  "tiny": lambda: trees.equal_leaves(3, (8, 4)),
}
# Trees that are too large to be allocated.
ABSTRACT_TREES = {"sdxl"}
# The baseline is measured once more at the end, which shows how much the machine has changed.
LAST_ROW = f"{contenders.BASELINE}, again"
Row = dict[str, Any]


class TreeBenchmark:
  """A tree, its arrays, and the baseline that every row is timed against."""

  def __init__(self, name: str, arguments: argparse.Namespace):
    self.shapes = TREES[name]()
    self.leaves = len(jax.tree.leaves(self.shapes))
    self.abstract = name in ABSTRACT_TREES or arguments.compile_only
    self._seconds = arguments.seconds
    self._max_unbatched_leaves = arguments.most_unbatched
    if not self.abstract:
      self._params = trees.materialise(self.shapes, 0)
      self._gradients = jax.tree.map(jnp.array, trees.materialise(self.shapes, 1))
      self._adamw = self._make_training(contenders.contenders()[contenders.BASELINE])[1]

  def measure_row(self, name: str, make: contenders.Make) -> Row:
    """Compiles an optimizer's step, and times it unless the tree is abstract."""
    if "without batching" in name and self.leaves > self._max_unbatched_leaves:
      return {"name": name, "skipped": f"more than {self._max_unbatched_leaves} leaves"}
    if self.abstract:
      return {"name": name, **_program_figures(measure.compile_step(make(), self.shapes))}
    program, training = self._make_training(make)
    times = self._time(training)
    bandwidth = program.minimal_bytes / times["step_ms"]["median"] / 1e6
    return {"name": name, **_program_figures(program), **times, "gb_s": bandwidth}

  def measure_torch_row(self, name: str, make: Any) -> Row:
    """Times a PyTorch optimizer."""
    training = torch_rows.TorchTraining(make, self._params, self._gradients)
    times = self._time(training)
    return {"name": name, "on": "cpu", "state_bytes": training.state_bytes(), **times}

  def _make_training(self, make: contenders.Make) -> tuple[measure.Program, measure.Training]:
    tx = make()
    program = measure.compile_step(tx, self.shapes)
    return program, measure.Training(program, tx, self._params, self._gradients)

  def _time(self, training: measure.StepRunner) -> Row:
    adamw, seconds = measure.alternate([self._adamw, training], self._seconds)
    return {
      "step_ms": measure.quartiles_ms(seconds), "adamw_ms": measure.quartiles_ms(adamw),
      "ratio": float(np.median(seconds / adamw)), "rounds": len(seconds),
    }


def _program_figures(program: measure.Program) -> Row:
  return {k: v for k, v in program._asdict().items() if k != "call"}


def measure_tree(benchmark: TreeBenchmark, arguments: argparse.Namespace) -> Iterator[Row]:
  """Yields the rows of one tree, `optax.adamw` first and, if steps are timed, last."""
  makers = contenders.contenders()
  baseline = makers.pop(contenders.BASELINE)
  yield benchmark.measure_row(contenders.BASELINE, baseline)
  for name, make in makers.items():
    if re.search(arguments.only, name):
      yield benchmark.measure_row(name, make)
  if benchmark.abstract:
    return
  for name, make in torch_rows.contenders(arguments.reference, contenders.RATE).items():
    if re.search(arguments.only, name):
      yield benchmark.measure_torch_row(name, make)
  yield benchmark.measure_row(LAST_ROW, baseline)


def measure_trees(arguments: argparse.Namespace) -> Row:
  """Measures every tree; prints each row when it is ready, and writes all results after it."""
  result: Row = {
    "environment": measure.environment() | torch_rows.versions(),
    "seconds": arguments.seconds, "copy_gb_s": measure.copy_bandwidth(), "trees": [],
  }
  for name in arguments.tree:
    benchmark = TreeBenchmark(name, arguments)
    parameters = sum(x.size for x in jax.tree.leaves(benchmark.shapes))
    tree: Row = {"tree": name, "leaves": benchmark.leaves, "parameters": parameters, "rows": []}
    result["trees"].append(tree)
    print(f"\n{report.format_title(tree)}\n\n{report.format_header()}", flush=True)
    for row in measure_tree(benchmark, arguments):
      tree["rows"].append(row)
      print(report.format_row(row, parameters), flush=True)
      write_result(arguments.output, result)
  return result


def write_result(path: pathlib.Path | None, result: Row) -> None:
  """Writes the JSON, and its Markdown beside it, if there is a path."""
  if path:
    measure.write_json(path, result)
    path.with_suffix(".md").write_text(report.render(result))


def make_parser() -> argparse.ArgumentParser:
  """Makes the parser of the command line."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add("--tree", nargs="+", choices=TREES, default=["lora420"], metavar="TREE",
      help=f"{', '.join(TREES)} (default: lora420)")
  add("--output", type=pathlib.Path, help="JSON file to write, with a .md beside it")
  add("--only", default="", metavar="REGEX",
      help="rows whose name matches; adamw is always measured")
  add("--list", action="store_true", help="print the names of rows and stop")
  add("--seconds", type=float, default=4.0, help="time for each row (default: 4)")
  add("--compile-only", action="store_true", help="trace and compile, without arrays and steps")
  add("--most-unbatched", type=int, default=500, metavar="LEAVES",
      help="trees of more leaves skip rows without batching, which take minutes to compile "
           "(default: 500)")
  add("--reference", type=pathlib.Path, metavar="FILE",
      help="a copy of hina_adaptive.py, whose class HinaAdaptive is timed; needs torch")
  return parser


def main(argv: list[str] | None = None) -> None:
  """Measures, prints and writes."""
  parser = make_parser()
  arguments = parser.parse_args(argv)
  if arguments.reference and not torch_rows.is_installed():
    parser.error("--reference needs PyTorch, which is not installed: pip install torch")
  if arguments.reference and not arguments.reference.is_file():
    parser.error(f"--reference: there is no file {arguments.reference}")
  try:
    re.compile(arguments.only)
  except re.error as error:
    parser.error(f"--only: {error}")
  if arguments.list:
    torch_names = [torch_rows.ADAMW, torch_rows.REFERENCE]
    print(*contenders.contenders(), *torch_names, sep="\n")
    return
  measure_trees(arguments)


if __name__ == "__main__":
  main()
