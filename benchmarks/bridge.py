"""One step through the PyTorch bridge, against the same step in JAX and torch's own AdamW.

    python benchmarks/bridge.py --tree lora_sdxl --output FILE.json
    python benchmarks/bridge.py --only adamw

Rows of one optimizer are timed in rounds that alternate: JAX alone (parameters and state donated),
the bridge, `torch.optim.AdamW(fused=True)`. Gradients are constant, but the bridge looks at them
anew at each step. `held` is what JAX holds between two steps of the bridge beside the optimizer's
state and torch's own memory. Writes a Markdown table beside the JSON.
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
  "lora_sdxl": lambda: trees.lora_of(trees.sdxl_unet(), 16),
  "tiny": lambda: trees.equal_leaves(3, (8, 4)),
}
OFF = {**dict.fromkeys((
  "use_agr", "background_regularization", "use_tam", "use_adopt_stability", "use_cautious",
  "use_lr_mask", "use_dynamic_adaptation", "use_spd",
), False)}
EVERYTHING = dict(edge_suppression=True, spatial_awareness=True, lora_rank_penalty=True,
                  use_orthogonal_grad=True)
# What JAX runs, and how the bridge is given the same.
OPTIMIZERS: dict[str, tuple[Any, Any]] = {
  "optax.adamw": (
    lambda: optax.adamw(RATE), lambda p: torch_bridge.OptaxOptimizer(p, optax.adamw(RATE))),
  "with_leaf_batching(optax.adamw)": (
    lambda: hina_optax.with_leaf_batching(optax.adamw(RATE)),
    lambda p: torch_bridge.OptaxOptimizer(p, hina_optax.with_leaf_batching(optax.adamw(RATE)))),
  "everything off": (
    lambda: hina_optax.hina_adaptive(RATE, **OFF),
    lambda p: torch_bridge.HinaAdaptive(p, RATE, **OFF)),
  "defaults": (
    lambda: hina_optax.hina_adaptive(RATE), lambda p: torch_bridge.HinaAdaptive(p, RATE)),
  "everything": (
    lambda: hina_optax.hina_adaptive(RATE, **EVERYTHING),
    lambda p: torch_bridge.HinaAdaptive(p, RATE, **EVERYTHING)),
}
COLUMNS = ("optimizer", "JAX alone, ms", "bridge, ms", "overhead, ms", "bridge / JAX",
           "AdamW(fused=True), ms", "first step, s", "compilations", "held MB")


def row(name: str, shapes: Any, seconds: float) -> dict[str, Any]:
  """Times one optimizer in JAX, through the bridge, and torch's beside it."""
  make, bridge = OPTIMIZERS[name]
  params = trees.materialise(shapes, 0)
  gradients = jax.tree.map(jnp.array, trees.materialise(shapes, 1))
  alone = measure.Training(measure.compile_step(make(), shapes), make(), params, gradients)
  through = torch_rows.TorchTraining(bridge, params, gradients)
  fused = torch_rows.TorchTraining(torch_rows.rows(None, RATE)[torch_rows.ADAMW], params, gradients)
  start = time.perf_counter()
  through.block(1)
  first = time.perf_counter() - start
  through.optimizer.param_groups[0]["lr"] *= 0.5
  times = measure.alternate([alone, through, fused], seconds)
  names = "jax_ms", "bridge_ms", "fused_ms"
  return {
    "name": name, "first_step_s": first, "compilations": through.optimizer.compilations(),
    "held_bytes": held_bytes(through.optimizer, [alone, gradients]),
    **{key: measure.quartiles_ms(found) for key, found in zip(names, times)},
  }


def held_bytes(optimizer: Any, others: list[Any]) -> int:
  """Bytes of live arrays that are neither state, nor `others`, nor memory of torch's parameters."""
  gc.collect()
  known = {id(x) for x in jax.tree.leaves(optimizer.states())}
  known |= {id(x) for x in jax.tree.leaves([getattr(o, "arrays", o) for o in others])}
  shared = {p.data_ptr() for group in optimizer.param_groups for p in group["params"]}
  rest = [
    x for x in jax.live_arrays()
    if id(x) not in known and x.size and x.unsafe_buffer_pointer() not in shared]
  return sum(x.nbytes for x in rest)


def table(result: dict[str, Any]) -> str:
  """The result in Markdown."""
  at = result["environment"]
  lines = [
    "# The PyTorch bridge", "",
    f"{result['tree']}: {result['leaves']:,} leaves, "
    f"{result['parameters'] / 1e6:.2f} M parameters; {at['device']}, {at['cores']} cores; "
    f"jax {at['jax']}, torch {at['torch']}; {at['date']}.", "",
    f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}",
  ]
  for r in result["rows"]:
    alone, bridge, fused = (r[k]["median"] for k in ("jax_ms", "bridge_ms", "fused_ms"))
    cells = [r["name"], f"{alone:.1f}", f"{bridge:.1f}", f"{bridge - alone:.1f}",
             f"{bridge / alone:.2f}", f"{fused:.1f}", f"{r['first_step_s']:.1f}",
             str(r["compilations"]), f"{r['held_bytes'] / 1e6:.2f}"]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
  """Times the optimizers asked for."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tree", choices=TREES, default="lora_sdxl")
  parser.add_argument("--only", default="", help="regular expression of the optimizers to time")
  parser.add_argument("--seconds", type=float, default=10.0, help="of timing an optimizer")
  parser.add_argument("--output", type=pathlib.Path, help="JSON; a table is written beside it")
  arguments = parser.parse_args(argv)
  shapes = TREES[arguments.tree]()
  leaves = jax.tree.leaves(shapes)
  result = {
    "environment": measure.environment() | torch_rows.versions(), "tree": arguments.tree,
    "leaves": len(leaves), "parameters": sum(x.size for x in leaves),
    "rows": [row(name, shapes, arguments.seconds)
             for name in OPTIMIZERS if re.search(arguments.only, name)],
  }
  print(table(result))
  if arguments.output:
    measure.write_json(arguments.output, result)
    arguments.output.with_suffix(".md").write_text(table(result))


if __name__ == "__main__":
  main()
