"""A result of speed.py as Markdown tables.

    python benchmarks/report.py results/speed.json
"""

import argparse
import json
import pathlib
from typing import Any

COLUMNS = (
  "optimizer", "trace s", "compile s", "step ms", "quartiles ms", "adamw then, ms", "x adamw",
  "state B/parameter", "minimal MB", "GB/s", "kernels", "temporaries MB",
)
NOTES = (
  "`x adamw` is the median of the ratios over rounds of both in turn. Minimal: parameters, "
  "gradients and state read once, parameters and state written once; GB/s is that over the step. "
  "Kernels: instructions of the compiled program's entry that do work."
)


def render(result: dict[str, Any]) -> str:
  """The whole document."""
  parts = [_head(result), NOTES]
  for tree in result["trees"]:
    lines = [table_head(), *(line(row, tree["parameters"]) for row in tree["rows"])]
    parts.append(f"## {title(tree)}\n\n" + "\n".join(lines))
  return "\n\n".join(parts) + "\n"


def title(tree: dict[str, Any]) -> str:
  """Name and size of a tree."""
  return f"{tree['tree']}: {tree['leaves']:,} leaves, {tree['parameters'] / 1e6:,.2f} M parameters"


def table_head() -> str:
  """Names of columns, and the rule below them."""
  return f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def line(row: dict[str, Any], parameters: int) -> str:
  """One row of the table; cells without a number stay empty."""
  cells = [""] * (len(COLUMNS) - 1)
  if "skipped" in row:
    cells[0] = f"skipped: {row['skipped']}"
  else:
    cells = _compiled(row) + _timed(row) + _sizes(row, parameters)
  return f"| {' | '.join([row['name'], *cells])} |"


def _head(result: dict[str, Any]) -> str:
  at = result["environment"]
  versions = ", ".join(f"{k} {at[k]}" for k in ("jax", "optax", "hina_optax", "torch") if at.get(k))
  bandwidth = result.get("copy_gb_s")
  copying = f" A copy runs at {bandwidth:.1f} GB/s." if bandwidth else ""
  return (f"# Speed\n\n{at['device']}, {at['cores']} cores, {at['platform']}; {versions}; "
          f"{at['date']}.{copying}")


def _compiled(row: dict[str, Any]) -> list[str]:
  return [_number(row.get(k), ".2f") for k in ("trace_s", "compile_s")]


def _timed(row: dict[str, Any]) -> list[str]:
  step = row.get("step_ms")
  if not step:
    return [""] * 4
  spread = f"{step['q1']:.2f} to {step['q3']:.2f}"
  return [f"{step['median']:.2f}", spread, f"{row['adamw_ms']['median']:.2f}",
          f"{row['ratio']:.2f}"]


def _sizes(row: dict[str, Any], parameters: int) -> list[str]:
  state, temporary = row.get("state_bytes"), row.get("temporary_bytes")
  return [
    _number(state, ".2f", parameters), _number(row.get("minimal_bytes"), ".1f", 1e6),
    _number(row.get("gb_s"), ".2f"), _number(row.get("kernels"), "d"),
    _number(temporary, ".1f", 1e6),
  ]


def _number(value: float | None, form: str, unit: float = 1) -> str:
  if value is None:
    return ""
  return format(value if form == "d" else value / unit, form)


def main(words: list[str] | None = None) -> None:
  """Prints the document."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("result", type=pathlib.Path, help="JSON file of speed.py")
  arguments = parser.parse_args(words)
  print(render(json.loads(arguments.result.read_text())), end="")


if __name__ == "__main__":
  main()
