"""Measures the seconds to trace and compile one update, against `optax.adamw` in the same run.

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
  """Returns the optimizers to compile."""
  return {
    "optax.adamw": optax.adamw(1e-3),
    "scale_by_hina": hina_optax.scale_by_hina(),
    "hina_adaptive": hina_optax.hina_adaptive(1e-3),
    "hina_adaptive, everything on": hina_optax.hina_adaptive(1e-3, **EVERYTHING),
  }


def matrices_of_different_shapes(count: int) -> Any:
  """Makes matrices of which no two have the same shape."""
  return {f"w{i}": jnp.ones((64, 64 + i)) for i in range(count)}


def equal_lora_factors(count: int) -> Any:
  """Makes the LoRA factors of layers of the same shape, `count` arrays in all."""
  return {f"l{i}": {"lora_a": jnp.ones((640, 16)), "lora_b": jnp.ones((16, 640))}
          for i in range(count // 2)}


def time_compilation(tx: Any, params: Any) -> tuple[float, float]:
  """Returns the seconds of tracing and of compiling, by the wall clock."""
  state = tx.init(params)
  start = time.perf_counter()
  lowered = jax.jit(tx.update).lower(params, state, params)
  middle = time.perf_counter()
  lowered.compile()
  return middle - start, time.perf_counter() - middle


def main() -> None:
  """Prints a table, and writes it if there is an output file."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
  parser.add_argument("--leaves", type=int, nargs="+", default=[8, 16, 32, 64],
                      help="numbers of leaves, even (default: 8 16 32 64)")
  arguments = parser.parse_args()
  rows = []
  print("| tree | leaves | optimizer | trace, s | compile, s |\n|---|---|---|---|---|")
  trees = {"different shapes": matrices_of_different_shapes,
           "LoRA, equal shapes": equal_lora_factors}
  for tree, make_params in trees.items():
    for count in arguments.leaves:
      for name, tx in optimizers().items():
        trace_s, compile_s = time_compilation(tx, make_params(count))
        rows.append({"tree": tree, "leaves": count, "optimizer": name, "trace_s": trace_s,
                     "compile_s": compile_s})
        print(f"| {tree} | {count} | {name} | {trace_s:.2f} | {compile_s:.2f} |", flush=True)
  if arguments.output:
    measure.write_json(arguments.output, {**measure.environment(), "rows": rows})


if __name__ == "__main__":
  main()
