"""Measures how the cost of compiling and of a step grows with leaves and with parameters.

    python benchmarks/growth.py --leaves 10 100 1000 10000 --parameters 1e5 1e6 1e7 1e8 \\
      --output FILE.json --plot FILE.png

For leaves the tree has equal matrices of 16x16, for parameters ten equal square matrices. A row is
skipped, with a note, if the next smaller one of the same optimizer took longer than --limit-s.
"""

import argparse
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import contenders
import jax
import jax.numpy as jnp
import measure
import trees

NAMES = (contenders.BASELINE, "with_leaf_batching(optax.adamw)", "core", "everything")
COSTS = (("trace and compile, s", lambda row: row["trace_s"] + row["compile_s"]),
         ("step, ms", lambda row: row["step_ms"]["median"]))
Row = dict[str, Any]


def ten_matrices(parameters: float) -> trees.Tree:
  """Ten square matrices with about `parameters` elements together."""
  side = max(1, round(math.sqrt(parameters / 10)))
  return trees.equal_leaves(10, (side, side))


def sweeps(arguments: argparse.Namespace) -> dict[str, list[tuple[int, trees.Tree]]]:
  """Returns, for each quantity, the sizes in ascending order and their trees."""
  return {
    "leaves": [(n, trees.equal_leaves(n, (16, 16))) for n in sorted(arguments.leaves)],
    "parameters": [
      (_count_parameters(tree), tree) for tree in map(ten_matrices, sorted(arguments.parameters))],
  }


def _count_parameters(tree: trees.Tree) -> int:
  return sum(x.size for x in jax.tree.leaves(tree))


def measure_optimizer(make: contenders.Make, shapes: trees.Tree, seconds: float) -> Row:
  """Compiles and times one optimizer on one tree."""
  start = time.perf_counter()
  tx = make()
  program = measure.compile_step(tx, shapes)
  gradients = jax.tree.map(jnp.array, trees.materialise(shapes, 1))
  training = measure.Training(program, tx, trees.materialise(shapes, 0), gradients)
  [times] = measure.alternate([training], seconds)
  return {
    "trace_s": program.trace_s, "compile_s": program.compile_s, "kernels": program.kernels,
    "step_ms": measure.quartiles_ms(times), "row_s": time.perf_counter() - start,
  }


def measure_all(arguments: argparse.Namespace) -> Iterator[Row]:
  """Yields all rows, those of each optimizer from small to large."""
  makers = contenders.contenders()
  for quantity, sizes in sweeps(arguments).items():
    for name in NAMES:
      skipped = ""
      for size, shapes in sizes:
        row = {"against": quantity, "size": size, "name": name}
        if skipped:
          yield {**row, "skipped": skipped}
          continue
        row |= measure_optimizer(makers[name], shapes, arguments.seconds)
        if row["row_s"] > arguments.limit_s:
          skipped = f"{size} took {row['row_s']:.0f} s, over the limit of {arguments.limit_s:g} s"
        yield row


def format_row(row: Row) -> str:
  """Formats one row of the printed table."""
  cells = [row["against"], f"{row['size']:,}", row["name"]]
  if "skipped" in row:
    cells += [f"skipped: {row['skipped']}", "", "", ""]
  else:
    cells += [f"{row['trace_s']:.2f}", f"{row['compile_s']:.2f}",
              f"{row['step_ms']['median']:.3f}", str(row["kernels"])]
  return f"| {' | '.join(cells)} |"


def plot(rows: list[Row], path: pathlib.Path, caption: str) -> None:
  """Plots both costs against each quantity that was varied, on logarithmic axes."""
  import matplotlib
  matplotlib.use("Agg")
  from matplotlib import pyplot
  timed = [row for row in rows if "skipped" not in row]
  varied = list(dict.fromkeys(row["against"] for row in timed))
  figure, axes = pyplot.subplots(
    2, len(varied), figsize=(5 * len(varied), 7), squeeze=False, constrained_layout=True)
  for j, quantity in enumerate(varied):
    for i, (label, cost) in enumerate(COSTS):
      _plot_curves(axes[i, j], [row for row in timed if row["against"] == quantity], cost)
      axes[i, j].set(xscale="log", yscale="log", xlabel=quantity, ylabel=label)
  axes[0, 0].legend(fontsize="small")
  figure.suptitle(caption, fontsize="small")
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=110)
  pyplot.close(figure)


def _plot_curves(axes: Any, rows: list[Row], cost: Any) -> None:
  for name in NAMES:
    curve = [row for row in rows if row["name"] == name]
    axes.plot([row["size"] for row in curve], [cost(row) for row in curve], marker="o", label=name)
  axes.grid(True, which="major", alpha=0.3)


def make_parser() -> argparse.ArgumentParser:
  """Makes the parser of the command line."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add("--leaves", type=int, nargs="*", default=[10, 100, 1000, 10000], metavar="N",
      help="numbers of leaves (default: 10 100 1000 10000)")
  add("--parameters", type=float, nargs="*", default=[1e5, 1e6, 1e7, 1e8], metavar="N",
      help="numbers of parameters (default: 1e5 1e6 1e7 1e8)")
  add("--seconds", type=float, default=2.0, help="time for each row (default: 2)")
  add("--limit-s", type=float, default=60.0, metavar="SECONDS",
      help="if a row took longer than this, the larger ones are skipped (default: 60)")
  add("--output", type=pathlib.Path, help="JSON file to write")
  add("--plot", type=pathlib.Path, help="PNG file to draw")
  return parser


def main(argv: list[str] | None = None) -> None:
  """Measures, prints, writes and draws."""
  parser = make_parser()
  arguments = parser.parse_args(argv)
  if not arguments.leaves and not arguments.parameters:
    parser.error("nothing to vary: give --leaves or --parameters")
  environment = measure.environment()
  rows: list[Row] = []
  print("| against | size | optimizer | trace s | compile s | step ms | kernels |")
  print("|---" * 7 + "|")
  for row in measure_all(arguments):
    rows.append(row)
    print(format_row(row), flush=True)
    if arguments.output:
      measure.write_json(arguments.output, {"environment": environment, "rows": rows})
  if arguments.plot:
    caption = (f"{environment['device']}, {environment['cores']} cores, "
               f"jax {environment['jax']}")
    plot(rows, arguments.plot, caption)


if __name__ == "__main__":
  main()
