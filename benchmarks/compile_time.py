"""Seconds to trace and compile one update, against `optax.adamw` in the same run.

    python benchmarks/compile_time.py --output FILE.json
"""

import argparse
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import measure
import optax
from contenders import EVERYTHING

import hina_optax


def optimizers() -> dict[str, Any]:
  """What is compiled."""
  return {
    "optax.adamw": optax.adamw(1e-3),
    "scale_by_hina": hina_optax.scale_by_hina(),
    "hina_adaptive": hina_optax.hina_adaptive(1e-3),
    "hina_adaptive, everything on": hina_optax.hina_adaptive(1e-3, **EVERYTHING),
  }


def different(count: int) -> Any:
  """Matrices of which no two have one shape."""
  return {f"w{i}": jnp.ones((64, 64 + i)) for i in range(count)}


def lora(count: int) -> Any:
  """LoRA factors of one layer's shape."""
  return {f"l{i}": {"lora_a": jnp.ones((640, 16)), "lora_b": jnp.ones((16, 640))}
          for i in range(count // 2)}


def seconds(tx: Any, params: Any) -> tuple[float, float]:
  """Tracing and compiling, wall clock."""
  state = tx.init(params)
  start = time.perf_counter()
  lowered = jax.jit(tx.update).lower(params, state, params)
  middle = time.perf_counter()
  lowered.compile()
  return middle - start, time.perf_counter() - middle


def main() -> None:
  """Prints a table, and writes it if asked."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
  parser.add_argument("--leaves", type=int, nargs="+", default=[8, 16, 32, 64],
                      help="numbers of leaves, even (default: 8 16 32 64)")
  arguments = parser.parse_args()
  found = []
  print("| tree | leaves | optimizer | trace, s | compile, s |\n|---|---|---|---|---|")
  for tree, make in (("different shapes", different), ("LoRA, equal shapes", lora)):
    for count in arguments.leaves:
      for name, tx in optimizers().items():
        trace, compiling = seconds(tx, make(count))
        found.append({"tree": tree, "leaves": count, "optimizer": name, "trace_s": trace,
                      "compile_s": compiling})
        print(f"| {tree} | {count} | {name} | {trace:.2f} | {compiling:.2f} |", flush=True)
  if arguments.output:
    measure.write_json(arguments.output, {**measure.environment(), "rows": found})


if __name__ == "__main__":
  main()
