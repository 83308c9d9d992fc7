"""How the cost of compiling and of a step grows with leaves and with parameters.

    python benchmarks/growth.py --leaves 10 100 1000 10000 --parameters 1e5 1e6 1e7 1e8 \\
      --output FILE.json --plot FILE.png

Leaves: equal ones of 16x16. Parameters: ten equal square matrices. A row is skipped, and said
to be, where the next smaller one of the same optimizer took longer than --limit-s in all.
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


def square(parameters: float) -> trees.Tree:
  """Ten square matrices of about so many parameters together."""
  side = max(1, round(math.sqrt(parameters / 10)))
  return trees.equal_leaves(10, (side, side))


def sweeps(arguments: argparse.Namespace) -> dict[str, list[tuple[int, trees.Tree]]]:
  """For each quantity its sizes, ascending, and their trees."""
  return {
    "leaves": [(n, trees.equal_leaves(n, (16, 16))) for n in sorted(arguments.leaves)],
    "parameters": [(_size(t), t) for t in map(square, sorted(arguments.parameters))],
  }


def _size(tree: trees.Tree) -> int:
  return sum(x.size for x in jax.tree.leaves(tree))


def one(make: contenders.Make, shapes: trees.Tree, seconds: float) -> Row:
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


def rows(arguments: argparse.Namespace) -> Iterator[Row]:
  """All rows; of each optimizer from small to large."""
  make = contenders.contenders()
  for quantity, sizes in sweeps(arguments).items():
    for name in NAMES:
      skipped = ""
      for size, shapes in sizes:
        head = {"against": quantity, "size": size, "name": name}
        if skipped:
          yield {**head, "skipped": skipped}
          continue
        row = one(make[name], shapes, arguments.seconds)
        if row["row_s"] > arguments.limit_s:
          skipped = f"{size} took {row['row_s']:.0f} s, over the limit of {arguments.limit_s:g} s"
        yield {**head, **row}


def line(row: Row) -> str:
  """One row of the printed table."""
  cells = [row["against"], f"{row['size']:,}", row["name"]]
  if "skipped" in row:
    cells += [f"skipped: {row['skipped']}", "", "", ""]
  else:
    cells += [f"{row['trace_s']:.2f}", f"{row['compile_s']:.2f}",
              f"{row['step_ms']['median']:.3f}", str(row["kernels"])]
  return f"| {' | '.join(cells)} |"


def plot(found: list[Row], path: pathlib.Path, caption: str) -> None:
  """Both costs against each quantity that was varied, on logarithmic axes."""
  import matplotlib
  matplotlib.use("Agg")
  from matplotlib import pyplot
  timed = [r for r in found if "skipped" not in r]
  varied = list(dict.fromkeys(r["against"] for r in timed))
  figure, axes = pyplot.subplots(
    2, len(varied), figsize=(5 * len(varied), 7), squeeze=False, constrained_layout=True)
  for j, quantity in enumerate(varied):
    for i, (label, cost) in enumerate(COSTS):
      _curves(axes[i, j], [r for r in timed if r["against"] == quantity], cost)
      axes[i, j].set(xscale="log", yscale="log", xlabel=quantity, ylabel=label)
  axes[0, 0].legend(fontsize="small")
  figure.suptitle(caption, fontsize="small")
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=110)
  pyplot.close(figure)


def _curves(axis: Any, found: list[Row], cost: Any) -> None:
  for name in NAMES:
    own = [r for r in found if r["name"] == name]
    axis.plot([r["size"] for r in own], [cost(r) for r in own], marker="o", label=name)
  axis.grid(True, which="major", alpha=0.3)


def parser() -> argparse.ArgumentParser:
  """The options."""
  made = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
  add = made.add_argument
  add("--leaves", type=int, nargs="*", default=[10, 100, 1000, 10000], metavar="N",
      help="numbers of leaves (default: 10 100 1000 10000)")
  add("--parameters", type=float, nargs="*", default=[1e5, 1e6, 1e7, 1e8], metavar="N",
      help="numbers of parameters (default: 1e5 1e6 1e7 1e8)")
  add("--seconds", type=float, default=2.0, help="of timing a row (default: 2)")
  add("--limit-s", type=float, default=60.0, metavar="SECONDS",
      help="after a row that took longer the larger ones are skipped (default: 60)")
  add("--output", type=pathlib.Path, help="JSON file to write")
  add("--plot", type=pathlib.Path, help="PNG file to draw")
  return made


def main(words: list[str] | None = None) -> None:
  """Measures, prints, writes and draws."""
  made = parser()
  arguments = made.parse_args(words)
  if not arguments.leaves and not arguments.parameters:
    made.error("nothing to vary: give --leaves or --parameters")
  at = measure.environment()
  found: list[Row] = []
  print("| against | size | optimizer | trace s | compile s | step ms | kernels |")
  print("|---" * 7 + "|")
  for row in rows(arguments):
    found.append(row)
    print(line(row), flush=True)
    if arguments.output:
      measure.write_json(arguments.output, {"environment": at, "rows": found})
  if arguments.plot:
    plot(found, arguments.plot, f"{at['device']}, {at['cores']} cores, jax {at['jax']}")


if __name__ == "__main__":
  main()
