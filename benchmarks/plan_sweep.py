"""Makes memory plans for SDXL's U-Net and a LoRA of it under several budgets; allocates nothing.

    python benchmarks/plan_sweep.py                       prints the table
    python benchmarks/plan_sweep.py --output FILE.json    and writes it
"""

import argparse
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import trees

import hina_optax

BUDGETS_GB = (1, 2, 4, 6, 8, 12, 16, 20, 24)
EVERYTHING = {"edge_suppression": True, "spatial_awareness": True, "use_orthogonal_grad": True}


def to_bf16(tree: Any) -> Any:
  """Converts shapes to bf16."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), tree)


def make_rows() -> list[dict[str, Any]]:
  """Makes one row for each training run and budget."""
  unet = trees.sdxl_unet()
  frozen_gb = sum(x.size for x in jax.tree.leaves(unet)) * 2 / 2**30
  runs = {
    "all of it, bf16": (to_bf16(unet), 0.0),
    "LoRA of rank 16 beside it in bf16": (trees.lora_factors(unet, 16), frozen_gb),
  }
  rows = []
  for name, (params, reserve_gb) in runs.items():
    for budget_gb in BUDGETS_GB:
      start = time.perf_counter()
      plan = hina_optax.plan_memory(EVERYTHING, params, budget_gb, reserve_gb)
      rows.append({
        "run": name, "budget_gb": budget_gb, "fits": plan.fits,
        "device_gb": (plan.device_bytes + plan.reserve_bytes) / 2**30,
        "host_gb": plan.host_bytes / 2**30, "missing_gb": plan.excess_bytes / 2**30,
        "state": _format_state(plan),
        "seconds": time.perf_counter() - start,
      })
  return rows


def _format_state(plan: hina_optax.MemoryPlan) -> str:
  """Formats the GB of state by dtype and by place."""
  sizes: dict[str, int] = {}
  for row in plan.rows:
    if row.group not in ("parameters", "gradients"):
      name = row.dtype + (" on the host" if row.place == "host" else "")
      sizes[name] = sizes.get(name, 0) + row.bytes
  return ", ".join(f"{v / 2**30:.2f} {k}" for k, v in sizes.items() if v >= 0.01 * 2**30)


def main() -> None:
  """Prints the table, and writes it if there is an output file."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
  arguments = parser.parse_args()
  rows = make_rows()
  print("| training | budget GB | device GB | host GB | missing GB | state |")
  print("|---|---|---|---|---|---|")
  for row in rows:
    print(f"| {row['run']} | {row['budget_gb']} | {row['device_gb']:.2f} | {row['host_gb']:.2f} | "
          f"{row['missing_gb']:.2f} | {row['state']} |")
  if arguments.output:
    device = jax.devices()[0].device_kind
    arguments.output.write_text(json.dumps(
      {"device": device, "jax": jax.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
  main()
