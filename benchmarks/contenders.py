"""The optimizers that are compared, by the names of their rows."""

import functools
from collections.abc import Callable
from typing import Any

import optax

import hina_optax
from hina_optax import memory, registry

RATE = 1e-4
BASELINE = "optax.adamw"
OFF = {
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
# What `cautious` does at the same cost.
SAME = ("use_grams",)
Make = Callable[[], optax.GradientTransformation]


def hina(**options: Any) -> optax.GradientTransformation:
  """`hina_adaptive` at the common rate."""
  return hina_optax.hina_adaptive(RATE, **options)


def batched_adamw() -> optax.GradientTransformation:
  """`optax.adamw` on stacked leaves."""
  return memory.with_leaf_batching(optax.adamw(RATE))


def in_eight_bits() -> optax.GradientTransformation:
  """Everything on, its state in 8 bits."""
  return memory.with_quantized_state(hina(**EVERYTHING))


def contenders() -> dict[str, Make]:
  """What makes each row, in the order of the tables. `core` is `hina_adaptive` with all off."""
  make = functools.partial
  return {
    BASELINE: make(optax.adamw, RATE),
    "with_leaf_batching(optax.adamw)": batched_adamw,
    "core": make(hina, **OFF),
    "core, with batching": make(hina, **OFF, **BATCHED),
    **{f"core + {switch}": make(hina, **OFF | {switch: True})
       for switch in registry.switches() if switch not in SAME},
    "defaults": make(hina),
    "everything": make(hina, **EVERYTHING),
    "everything, bf16 state": make(hina, **EVERYTHING, reduce_precision=True),
    "everything, 8-bit state": in_eight_bits,
    "everything, without batching": make(hina, **EVERYTHING, **UNBATCHED),
  }
