"""Time, memory and program of one step, for each part of the library, against `optax.adamw`.

    python benchmarks/speed.py --tree lora420 dense17m --output FILE.json
    python benchmarks/speed.py --tree lora420 --only '^everything$'
    python benchmarks/speed.py --list

A step is a jitted `update` and `apply_updates`, parameters and state donated, on a constant
gradient; the visits of dynamic adaptation (every 100 steps) fall outside of the median. Each row is
timed in rounds that alternate with `optax.adamw`, which is timed against itself first and last.
Writes a Markdown table beside the JSON. SDXL's 2.6 billion parameters are traced and compiled, but
not stepped. Where torch is installed its AdamW is timed too, and with --reference a user's copy of
the PyTorch class, both on the CPU. Kernels are the instructions of the optimised HLO's entry
computation that do work (fusions, dots, custom calls, loops, copies ...), none of those that only
name or group values; a call counts as what it calls.
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
  "lora_sdxl": lambda: trees.lora_of(trees.sdxl_unet(), 16),
  "dense17m": trees.dense_17m,
  "dit130m": trees.dit_130m,
  "sdxl": trees.sdxl_unet,
  "tiny": lambda: trees.equal_leaves(3, (8, 4)),
}
ABSTRACT = {"sdxl"}
LAST = f"{contenders.BASELINE}, again"
Row = dict[str, Any]


class Bench:
  """One tree: its arrays, and the baseline that every row is timed against."""

  def __init__(self, name: str, arguments: argparse.Namespace):
    self.shapes = TREES[name]()
    self.leaves = len(jax.tree.leaves(self.shapes))
    self.abstract = name in ABSTRACT or arguments.compile_only
    self._seconds = arguments.seconds
    self._most_unbatched = arguments.most_unbatched
    if not self.abstract:
      self._params = trees.materialise(self.shapes, 0)
      self._gradients = jax.tree.map(jnp.array, trees.materialise(self.shapes, 1))
      self._adamw = self._training(contenders.contenders()[contenders.BASELINE])[1]

  def row(self, name: str, make: contenders.Make) -> Row:
    """Compiles, and times unless only shapes are there."""
    if "without batching" in name and self.leaves > self._most_unbatched:
      return {"name": name, "skipped": f"more than {self._most_unbatched} leaves"}
    if self.abstract:
      return {"name": name, **_known(measure.compile_step(make(), self.shapes))}
    program, training = self._training(make)
    timed = self._timed(training)
    rate = program.minimal_bytes / timed["step_ms"]["median"] / 1e6
    return {"name": name, **_known(program), **timed, "gb_s": rate}

  def torch_row(self, name: str, make: Any) -> Row:
    """Times a PyTorch optimizer."""
    training = torch_rows.TorchTraining(make, self._params, self._gradients)
    timed = self._timed(training)
    return {"name": name, "on": "cpu", "state_bytes": training.state_bytes(), **timed}

  def _training(self, make: contenders.Make) -> tuple[measure.Program, measure.Training]:
    tx = make()
    program = measure.compile_step(tx, self.shapes)
    return program, measure.Training(program, tx, self._params, self._gradients)

  def _timed(self, training: measure.Runs) -> Row:
    adamw, own = measure.alternate([self._adamw, training], self._seconds)
    return {
      "step_ms": measure.quartiles_ms(own), "adamw_ms": measure.quartiles_ms(adamw),
      "ratio": float(np.median(own / adamw)), "rounds": len(own),
    }


def _known(program: measure.Program) -> Row:
  return {k: v for k, v in program._asdict().items() if k != "call"}


def tree_rows(bench: Bench, arguments: argparse.Namespace) -> Iterator[Row]:
  """Rows of one tree, `optax.adamw` first and, where steps are timed, last."""
  everything = contenders.contenders()
  baseline = everything.pop(contenders.BASELINE)
  yield bench.row(contenders.BASELINE, baseline)
  for name, make in everything.items():
    if re.search(arguments.only, name):
      yield bench.row(name, make)
  if bench.abstract:
    return
  for name, make in torch_rows.rows(arguments.reference, contenders.RATE).items():
    if re.search(arguments.only, name):
      yield bench.torch_row(name, make)
  yield bench.row(LAST, baseline)


def measure_all(arguments: argparse.Namespace) -> Row:
  """Every tree; prints rows as they come, and writes after each."""
  result: Row = {
    "environment": measure.environment() | torch_rows.versions(),
    "seconds": arguments.seconds, "copy_gb_s": measure.copy_bandwidth(), "trees": [],
  }
  for name in arguments.tree:
    bench = Bench(name, arguments)
    sizes = sum(x.size for x in jax.tree.leaves(bench.shapes))
    found: Row = {"tree": name, "leaves": bench.leaves, "parameters": sizes, "rows": []}
    result["trees"].append(found)
    print(f"\n{report.title(found)}\n\n{report.table_head()}", flush=True)
    for row in tree_rows(bench, arguments):
      found["rows"].append(row)
      print(report.line(row, sizes), flush=True)
      write(arguments.output, result)
  return result


def write(path: pathlib.Path | None, result: Row) -> None:
  """The JSON, and its Markdown beside it."""
  if path:
    measure.write_json(path, result)
    path.with_suffix(".md").write_text(report.render(result))


def parser() -> argparse.ArgumentParser:
  """The options."""
  made = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
  add = made.add_argument
  add("--tree", nargs="+", choices=TREES, default=["lora420"], metavar="TREE",
      help=f"{', '.join(TREES)} (default: lora420)")
  add("--output", type=pathlib.Path, help="JSON file to write, with a .md beside it")
  add("--only", default="", metavar="REGEX", help="rows whose name has it; adamw is always there")
  add("--list", action="store_true", help="print the names of rows and stop")
  add("--seconds", type=float, default=4.0, help="of timing a row (default: 4)")
  add("--compile-only", action="store_true", help="trace and compile, without arrays and steps")
  add("--most-unbatched", type=int, default=500, metavar="LEAVES",
      help="trees of more leaves skip rows without batching: minutes to compile (default: 500)")
  add("--reference", type=pathlib.Path, metavar="FILE",
      help="a copy of hina_adaptive.py, whose class HinaAdaptive is timed; needs torch")
  return made


def main(words: list[str] | None = None) -> None:
  """Measures, prints and writes."""
  made = parser()
  arguments = made.parse_args(words)
  if arguments.reference and not torch_rows.is_installed():
    made.error("--reference needs PyTorch, which is not installed: pip install torch")
  if arguments.reference and not arguments.reference.is_file():
    made.error(f"--reference: there is no file {arguments.reference}")
  try:
    re.compile(arguments.only)
  except re.error as error:
    made.error(f"--only: {error}")
  if arguments.list:
    torch_names = [torch_rows.ADAMW, torch_rows.REFERENCE]
    print(*contenders.contenders(), *torch_names, sep="\n")
    return
  measure_all(arguments)


if __name__ == "__main__":
  main()
