"""The optimizer that the user chose, and those that it is compared with."""

import argparse
import ast
from typing import Any

import optax

import hina_optax
from latent_diffusion.errors import UserError

PRESETS = {
  "lora": hina_optax.lora_preset,
  "large": hina_optax.large_model_preset,
  "quick": hina_optax.quick_preset,
  "extreme": hina_optax.extreme_memory_preset,
}
WARMUP = 20
WEIGHT_DECAY = 0.01
CORE: dict[str, Any] = {"background_regularization": False, "weight_decay": WEIGHT_DECAY}
EDGES = CORE | {"edge_suppression": True, "edge_penalty": 0.1}
ALL = EDGES | {
  "spatial_awareness": True, "frequency_penalty": 0.05, "background_regularization": True}


def schedule(rate: float, steps: int, kind: str) -> optax.Schedule:
  """Returns a schedule: a short linear warm-up, then a constant rate or half a cosine."""
  if kind == "cosine":
    return optax.warmup_cosine_decay_schedule(rate / WARMUP, rate, WARMUP, max(steps, WARMUP + 1))
  return optax.linear_schedule(rate / WARMUP, rate, WARMUP)


def parse_arguments(pairs: list[str]) -> dict[str, Any]:
  """Parses options of the form `key=value`; a value is a Python literal or else a string."""
  options = {}
  for pair in pairs:
    name, separator, text = pair.partition("=")
    if not separator or not name:
      raise UserError(f"--optimizer-arg: {pair!r} is not key=value.")
    if name == "learning_rate":
      raise UserError("--optimizer-arg: the rate is given by --learning-rate.")
    try:
      options[name] = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      options[name] = text
  return options


def chosen_options(args: argparse.Namespace, preset: str | None) -> dict[str, Any]:
  """Returns options of `hina_adaptive`: a preset or all regularizers, and the user's own on top."""
  base = dict(PRESETS[preset]()) if preset else dict(ALL)
  base.pop("learning_rate", None)
  return base | parse_arguments(args.optimizer_arg)


def hina(rate: optax.ScalarOrSchedule, options: dict[str, Any]) -> optax.GradientTransformation:
  """Makes `hina_adaptive`; its errors about options become a `UserError`."""
  try:
    return hina_optax.hina_adaptive(**({"learning_rate": rate} | options))
  except (ValueError, TypeError) as error:
    raise UserError(f"--optimizer-arg: {error}") from None


def adamw(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
  """Makes AdamW with the same weight decay as the other optimizers."""
  return optax.adamw(rate, weight_decay=WEIGHT_DECAY)


def chosen(args: argparse.Namespace, rate: optax.ScalarOrSchedule,
           preset: str | None) -> optax.GradientTransformation:
  """Makes the optimizer that the user chose."""
  if args.optimizer == "adamw":
    if args.optimizer_arg:
      raise UserError("--optimizer-arg: these are options of hina_adaptive, not of adamw.")
    return adamw(rate)
  return hina(rate, chosen_options(args, preset))


def stages(args: argparse.Namespace, rate: optax.Schedule) -> dict[str, Any]:
  """AdamW and the guide's staged enabling; the last is what the base is trained with.

  AdamW also runs at three times the rate, since `hina_adaptive` raises rates by itself where signs
  of updates agree.
  """
  last = "all regularizers" if not args.preset and not args.optimizer_arg else "as chosen"
  between = {
    "optax.adamw, 3 x rate": adamw(lambda step: 3 * rate(step)),
    "core": hina(rate, CORE),
    "core + edges": hina(rate, EDGES),
  }
  return {"optax.adamw": adamw(rate)} | (between if args.staged else {}) | {
    last: hina(rate, chosen_options(args, args.preset))}
