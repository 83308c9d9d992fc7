"""The optimizers that the benchmarks compare, by the names of their rows."""

import functools
from collections.abc import Callable
from typing import Any

import optax

import hina_optax
from hina_optax import memory, registry

RATE = 1e-4
BASELINE = "optax.adamw"
PARTS_OFF = {
  "use_agr": False, "background_regularization": False, "use_tam": False,
  "use_adopt_stability": False, "use_cautious": False, "use_lr_mask": False,
  "use_dynamic_adaptation": False, "use_spd": False, "dynamic_weight_decay": False,
}
EVERYTHING = {
  "edge_suppression": True, "spatial_awareness": True, "lora_rank_penalty": True,
  "use_orthogonal_grad": True,
}
UNBATCHED = {"leaf_batching": False}
BATCHED = {"leaf_batching": True}
# Switches without a row: `use_grams` costs the same as `use_cautious`.
SKIPPED_SWITCHES = ("use_grams",)
Make = Callable[[], optax.GradientTransformation]


def make_hina(**options: Any) -> optax.GradientTransformation:
  """Makes `hina_adaptive` at the common learning rate."""
  return hina_optax.hina_adaptive(RATE, **options)


def make_batched_adamw() -> optax.GradientTransformation:
  """Makes `optax.adamw` on stacked leaves."""
  return memory.with_leaf_batching(optax.adamw(RATE))


def make_quantized_hina() -> optax.GradientTransformation:
  """Makes `hina_adaptive` with everything on and its state in 8 bits."""
  return memory.with_quantized_state(make_hina(**EVERYTHING))


def contenders() -> dict[str, Make]:
  """Returns the function that makes each optimizer, in the order of the tables.

  `core` is `hina_adaptive` with all parts off.
  """
  partial = functools.partial
  return {
    BASELINE: partial(optax.adamw, RATE),
    "with_leaf_batching(optax.adamw)": make_batched_adamw,
    "core": partial(make_hina, **PARTS_OFF),
    "core, with batching": partial(make_hina, **PARTS_OFF, **BATCHED),
    **{f"core + {switch}": partial(make_hina, **PARTS_OFF | {switch: True})
       for switch in registry.switches() if switch not in SKIPPED_SWITCHES},
    "defaults": partial(make_hina),
    "everything": partial(make_hina, **EVERYTHING),
    "everything, bf16 state": partial(make_hina, **EVERYTHING, reduce_precision=True),
    "everything, 8-bit state": make_quantized_hina,
    "everything, without batching": partial(make_hina, **EVERYTHING, **UNBATCHED),
  }
