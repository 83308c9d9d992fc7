"""Formats a result of speed.py as Markdown tables.

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
  """Formats the whole document."""
  parts = [_format_environment(result), NOTES]
  for tree in result["trees"]:
    lines = [format_header(), *(format_row(row, tree["parameters"]) for row in tree["rows"])]
    parts.append(f"## {format_title(tree)}\n\n" + "\n".join(lines))
  return "\n\n".join(parts) + "\n"


def format_title(tree: dict[str, Any]) -> str:
  """Formats the name and the size of a tree."""
  return f"{tree['tree']}: {tree['leaves']:,} leaves, {tree['parameters'] / 1e6:,.2f} M parameters"


def format_header() -> str:
  """Formats the names of the columns, and the rule below them."""
  return f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def format_row(row: dict[str, Any], parameters: int) -> str:
  """Formats one row of the table; cells without a number stay empty."""
  cells = [""] * (len(COLUMNS) - 1)
  if "skipped" in row:
    cells[0] = f"skipped: {row['skipped']}"
  else:
    cells = _compile_cells(row) + _time_cells(row) + _size_cells(row, parameters)
  return f"| {' | '.join([row['name'], *cells])} |"


def _format_environment(result: dict[str, Any]) -> str:
  environment = result["environment"]
  versions = ", ".join(f"{k} {environment[k]}" for k in ("jax", "optax", "hina_optax", "torch")
                       if environment.get(k))
  bandwidth = result.get("copy_gb_s")
  copying = f" A copy runs at {bandwidth:.1f} GB/s." if bandwidth else ""
  return (f"# Speed\n\n{environment['device']}, {environment['cores']} cores, "
          f"{environment['platform']}; {versions}; {environment['date']}.{copying}")


def _compile_cells(row: dict[str, Any]) -> list[str]:
  return [_format_number(row.get(k), ".2f") for k in ("trace_s", "compile_s")]


def _time_cells(row: dict[str, Any]) -> list[str]:
  step = row.get("step_ms")
  if not step:
    return [""] * 4
  spread = f"{step['q1']:.2f} to {step['q3']:.2f}"
  return [f"{step['median']:.2f}", spread, f"{row['adamw_ms']['median']:.2f}",
          f"{row['ratio']:.2f}"]


def _size_cells(row: dict[str, Any], parameters: int) -> list[str]:
  return [
    _format_number(row.get("state_bytes"), ".2f", parameters),
    _format_number(row.get("minimal_bytes"), ".1f", 1e6),
    _format_number(row.get("gb_s"), ".2f"),
    _format_number(row.get("kernels"), "d"),
    _format_number(row.get("temporary_bytes"), ".1f", 1e6),
  ]


def _format_number(value: float | None, spec: str, unit: float = 1) -> str:
  if value is None:
    return ""
  return format(value if spec == "d" else value / unit, spec)


def main(argv: list[str] | None = None) -> None:
  """Prints the document."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("result", type=pathlib.Path, help="JSON file of speed.py")
  arguments = parser.parse_args(argv)
  print(render(json.loads(arguments.result.read_text())), end="")


if __name__ == "__main__":
  main()
