"""The command `hina-optax`: plans the memory of a training run, and lists the options."""

import argparse
import ast
import json
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hina_optax import memory, options, planning, registry
from hina_optax.checkpoints import headers
from hina_optax.checkpoints.headers import Shapes

_PRESETS = {
  "lora": options.lora_preset, "large": options.large_model_preset,
  "quick": options.quick_preset, "extreme": options.extreme_memory_preset,
}
_ATTENTION = r"to_[qkv]|to_out|[qkvo]_proj|out_proj|qkv"


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status: 0 if the plan fits, 1 if not, 2 on wrong input."""
  given = _parser().parse_args(arguments)
  if given.command == "options":
    print(registry.option_table())
    return 0
  try:
    plan = _plan(given)
  except (ValueError, TypeError, OSError, ImportError) as error:
    print(f"hina-optax: {error}", file=sys.stderr)
    return 2
  print(json.dumps(plan.to_dict(), indent=2) if given.json else plan)
  return 0 if plan.fits else 1


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(prog="hina-optax", description=__doc__)
  commands = parser.add_subparsers(required=True, metavar="command", dest="command")
  commands.add_parser("options", help="all options of hina_adaptive, as a Markdown table")
  plan = commands.add_parser(
    "plan", help="what training a checkpoint needs, and how to make it fit",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  plan.add_argument("model", type=pathlib.Path,
                    help=".safetensors or .npz file, or Orbax folder; only its header is read")
  plan.add_argument("--vram-budget-gb", type=float, help="memory of the device in GB (2^30 bytes)")
  plan.add_argument("--reserve-gb", type=float, default=0.0,
                    help="GB of it for activations and other models")
  plan.add_argument("--lora-rank", type=int,
                    help="train LoRA factors of this rank; the model itself stays frozen")
  plan.add_argument("--target", default=_ATTENTION,
                    help="regular expression searched in the names of weights that get a LoRA")
  plan.add_argument("--preset", choices=_PRESETS, help="the guide's configuration to start from")
  plan.add_argument("--optimizer-arg", action="append", default=[], metavar="KEY=VALUE",
                    help="an option of hina_adaptive; may be repeated")
  plan.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"),
                    help="of the parameters that are trained")
  plan.add_argument("--json", action="store_true", help="print data instead of a table")
  return parser


def _plan(given: argparse.Namespace) -> memory.MemoryPlan:
  shapes, reserve = headers.read_shapes(given.model), given.reserve_gb
  if given.lora_rank is not None:
    reserve += memory.tree_bytes(shapes) / memory.GB
    shapes = lora_factors(shapes, given.lora_rank, given.target)
  dtype = jnp.dtype(given.dtype)
  params = {name: jax.ShapeDtypeStruct(x.shape, dtype) for name, x in shapes.items()}
  chosen: dict[str, Any] = _PRESETS[given.preset]() if given.preset else {}
  chosen |= dict(_option(text) for text in given.optimizer_arg)
  return planning.plan_memory(chosen, params, given.vram_budget_gb, reserve)


def lora_factors(shapes: Shapes, rank: int, target: str) -> Shapes:
  """Factors of a LoRA for each weight whose name matches, in PyTorch's layout.

  Raises:
    ValueError: if the rank is below 1, or no weight matches.
  """
  if rank < 1:
    raise ValueError(f"--lora-rank must be at least 1, got {rank}.")
  factors: Shapes = {}
  for name, x in shapes.items():
    if len(x.shape) >= 2 and re.search(target, name):
      out, into, *window = x.shape
      ones = (1,) * len(window)
      factors[f"{name}/lora_down"] = jax.ShapeDtypeStruct((rank, into, *window), x.dtype)
      factors[f"{name}/lora_up"] = jax.ShapeDtypeStruct((out, rank, *ones), x.dtype)
  if not factors:
    some = ", ".join(list(shapes)[:3])
    raise ValueError(f"--target {target!r} matches no weight; names look like {some}.")
  return factors


def _option(text: str) -> tuple[str, Any]:
  key, separator, value = text.partition("=")
  if not separator:
    raise ValueError(f"--optimizer-arg must be KEY=VALUE, got {text!r}.")
  try:
    return key, ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return key, value


if __name__ == "__main__":
  sys.exit(main())
