"""Moments (gradient in, direction out) and weight decay."""

from hina_optax.core._moments import ScaleByHinaState, scale_by_hina
from hina_optax.core._weight_decay import AddScheduledWeightDecayState, add_scheduled_weight_decay

__all__ = [
  "AddScheduledWeightDecayState",
  "ScaleByHinaState",
  "add_scheduled_weight_decay",
  "scale_by_hina",
]
