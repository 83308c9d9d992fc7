"""Times one step through the PyTorch bridge, against the same step in JAX and torch's own AdamW.

    python benchmarks/bridge.py --tree lora_sdxl --output FILE.json
    python benchmarks/bridge.py --only adamw

Each optimizer is timed in rounds that alternate between JAX alone (with donated parameters and
state), the bridge, and `torch.optim.AdamW(fused=True)`. The gradients are constant, but the bridge
reads them again at each step. `held` is the memory that JAX holds between two steps of the bridge
in addition to the optimizer's state and torch's own memory. The script writes a Markdown table
beside the JSON.
"""

import argparse
import gc
import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import measure
import optax
import torch_rows
import trees

import hina_optax
from hina_optax import torch_bridge

RATE = 1e-4
TREES = {
  "lora420": trees.lora_420,
  "lora_sdxl": lambda: trees.lora_factors(trees.sdxl_unet(), 16),
  "tiny": lambda: trees.equal_leaves(3, (8, 4)),
}
PARTS_OFF = dict.fromkeys((
  "use_agr", "background_regularization", "use_tam", "use_adopt_stability", "use_cautious",
  "use_lr_mask", "use_dynamic_adaptation", "use_spd",
), False)
EVERYTHING = dict(edge_suppression=True, spatial_awareness=True, lora_rank_penalty=True,
                  use_orthogonal_grad=True)
# By name: a function that makes the transformation, and one that makes the same with the bridge.
OPTIMIZERS: dict[str, tuple[Any, Any]] = {
  "optax.adamw": (
    lambda: optax.adamw(RATE), lambda p: torch_bridge.OptaxOptimizer(p, optax.adamw(RATE))),
  "with_leaf_batching(optax.adamw)": (
    lambda: hina_optax.with_leaf_batching(optax.adamw(RATE)),
    lambda p: torch_bridge.OptaxOptimizer(p, hina_optax.with_leaf_batching(optax.adamw(RATE)))),
  "everything off": (
    lambda: hina_optax.hina_adaptive(RATE, **PARTS_OFF),
    lambda p: torch_bridge.HinaAdaptive(p, RATE, **PARTS_OFF)),
  "defaults": (
    lambda: hina_optax.hina_adaptive(RATE), lambda p: torch_bridge.HinaAdaptive(p, RATE)),
  "everything": (
    lambda: hina_optax.hina_adaptive(RATE, **EVERYTHING),
    lambda p: torch_bridge.HinaAdaptive(p, RATE, **EVERYTHING)),
}
COLUMNS = ("optimizer", "JAX alone, ms", "bridge, ms", "overhead, ms", "bridge / JAX",
           "AdamW(fused=True), ms", "first step, s", "compilations", "held MB")


def measure_row(name: str, shapes: Any, seconds: float) -> dict[str, Any]:
  """Times an optimizer in JAX and through the bridge, and torch's AdamW beside it."""
  make, make_bridged = OPTIMIZERS[name]
  make_fused = torch_rows.contenders(None, RATE)[torch_rows.ADAMW]
  params = trees.materialise(shapes, 0)
  gradients = jax.tree.map(jnp.array, trees.materialise(shapes, 1))
  in_jax = measure.Training(measure.compile_step(make(), shapes), make(), params, gradients)
  bridged = torch_rows.TorchTraining(make_bridged, params, gradients)
  fused = torch_rows.TorchTraining(make_fused, params, gradients)
  start = time.perf_counter()
  bridged.run_steps(1)
  first_step = time.perf_counter() - start
  # Changed as by a scheduler: the count of compilations shows whether this compiles again.
  bridged.optimizer.param_groups[0]["lr"] *= 0.5
  times = measure.alternate([in_jax, bridged, fused], seconds)
  keys = "jax_ms", "bridge_ms", "fused_ms"
  return {
    "name": name, "first_step_s": first_step, "compilations": bridged.optimizer.compilations(),
    "held_bytes": count_held_bytes(bridged.optimizer, [*in_jax.arrays, gradients]),
    **{key: measure.quartiles_ms(seconds) for key, seconds in zip(keys, times)},
  }


def count_held_bytes(optimizer: Any, excluded: list[Any]) -> int:
  """Counts the bytes of live arrays beside the state, torch's parameters and what is excluded."""
  gc.collect()
  excluded_ids = {id(x) for x in jax.tree.leaves([optimizer.states(), excluded])}
  shared = {p.data_ptr() for group in optimizer.param_groups for p in group["params"]}
  held = [
    x for x in jax.live_arrays()
    if id(x) not in excluded_ids and x.size and x.unsafe_buffer_pointer() not in shared]
  return sum(x.nbytes for x in held)


def render(result: dict[str, Any]) -> str:
  """Formats the result as Markdown."""
  environment = result["environment"]
  lines = [
    "# The PyTorch bridge", "",
    f"{result['tree']}: {result['leaves']:,} leaves, "
    f"{result['parameters'] / 1e6:.2f} M parameters; {environment['device']}, "
    f"{environment['cores']} cores; jax {environment['jax']}, torch {environment['torch']}; "
    f"{environment['date']}.", "",
    f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}",
  ]
  for row in result["rows"]:
    in_jax, bridged, fused = (row[k]["median"] for k in ("jax_ms", "bridge_ms", "fused_ms"))
    cells = [row["name"], f"{in_jax:.1f}", f"{bridged:.1f}", f"{bridged - in_jax:.1f}",
             f"{bridged / in_jax:.2f}", f"{fused:.1f}", f"{row['first_step_s']:.1f}",
             str(row["compilations"]), f"{row['held_bytes'] / 1e6:.2f}"]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
  """Times the chosen optimizers."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tree", choices=TREES, default="lora_sdxl")
  parser.add_argument("--only", default="", help="regular expression of the optimizers to time")
  parser.add_argument("--seconds", type=float, default=10.0, help="time for each optimizer")
  parser.add_argument("--output", type=pathlib.Path, help="JSON; a table is written beside it")
  arguments = parser.parse_args(argv)
  shapes = TREES[arguments.tree]()
  leaves = jax.tree.leaves(shapes)
  result = {
    "environment": measure.environment() | torch_rows.versions(), "tree": arguments.tree,
    "leaves": len(leaves), "parameters": sum(x.size for x in leaves),
    "rows": [measure_row(name, shapes, arguments.seconds)
             for name in OPTIMIZERS if re.search(arguments.only, name)],
  }
  print(render(result))
  if arguments.output:
    measure.write_json(arguments.output, result)
    arguments.output.with_suffix(".md").write_text(render(result))


if __name__ == "__main__":
  main()
