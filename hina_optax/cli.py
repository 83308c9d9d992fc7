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
_ATTENTION_WEIGHTS = r"to_[qkv]|to_out|[qkvo]_proj|out_proj|qkv"


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command, and returns its exit status.

  The status is 0 if the plan fits (or if the options were listed), 1 if the plan does not fit, and
  2 on wrong input.
  """
  args = _make_parser().parse_args(arguments)
  if args.command == "options":
    print(registry.option_table())
    return 0
  try:
    plan = _make_plan(args)
  except (ValueError, TypeError, OSError, ImportError) as error:
    print(f"hina-optax: {error}", file=sys.stderr)
    return 2
  print(json.dumps(plan.to_dict(), indent=2) if args.json else plan)
  return 0 if plan.fits else 1


def _make_parser() -> argparse.ArgumentParser:
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
                    help="GB of the budget for activations and other models")
  plan.add_argument("--lora-rank", type=int,
                    help="train LoRA factors of this rank; the model itself stays frozen")
  plan.add_argument("--target", default=_ATTENTION_WEIGHTS,
                    help="regular expression searched in the names of weights that get a LoRA")
  plan.add_argument("--preset", choices=_PRESETS, help="the guide's configuration to start from")
  plan.add_argument("--optimizer-arg", action="append", default=[], metavar="KEY=VALUE",
                    help="an option of hina_adaptive; may be repeated")
  plan.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"),
                    help="dtype of the trained parameters")
  plan.add_argument("--json", action="store_true", help="print data instead of a table")
  return parser


def _make_plan(args: argparse.Namespace) -> memory.MemoryPlan:
  shapes, reserve_gb = headers.read_shapes(args.model), args.reserve_gb
  if args.lora_rank is not None:
    # The frozen model stays on the device beside its LoRA.
    reserve_gb += memory.tree_bytes(shapes) / memory.GB
    shapes = lora_factors(shapes, args.lora_rank, args.target)
  dtype = jnp.dtype(args.dtype)
  params = {name: jax.ShapeDtypeStruct(x.shape, dtype) for name, x in shapes.items()}
  hina_options: dict[str, Any] = _PRESETS[args.preset]() if args.preset else {}
  hina_options |= dict(_parse_option(text) for text in args.optimizer_arg)
  return planning.plan_memory(hina_options, params, args.vram_budget_gb, reserve_gb)


def lora_factors(shapes: Shapes, rank: int, target: str) -> Shapes:
  """Makes LoRA factors, in PyTorch's layout, for each weight whose name matches `target`.

  Raises:
    ValueError: if the rank is below 1, or if no weight matches.
  """
  if rank < 1:
    raise ValueError(f"--lora-rank must be at least 1, got {rank}.")
  factors: Shapes = {}
  for name, x in shapes.items():
    if len(x.shape) >= 2 and re.search(target, name):
      outputs, inputs, *kernel = x.shape
      ones = (1,) * len(kernel)
      factors[f"{name}/lora_down"] = jax.ShapeDtypeStruct((rank, inputs, *kernel), x.dtype)
      factors[f"{name}/lora_up"] = jax.ShapeDtypeStruct((outputs, rank, *ones), x.dtype)
  if not factors:
    first_names = ", ".join(list(shapes)[:3])
    raise ValueError(f"--target {target!r} matches no weight; names look like {first_names}.")
  return factors


def _parse_option(text: str) -> tuple[str, Any]:
  key, separator, value = text.partition("=")
  if not separator:
    raise ValueError(f"--optimizer-arg must be KEY=VALUE, got {text!r}.")
  # Numbers, booleans and lists are written as in Python; anything else is a string.
  try:
    return key, ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return key, value


if __name__ == "__main__":
  sys.exit(main())
