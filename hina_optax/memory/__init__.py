"""Storage wrappers: where and in how many bits any transformation keeps its state."""

from hina_optax.memory._host_offload import WithHostOffloadState, with_host_offload
from hina_optax.memory._quantized_state import (
  QuantizedLeaf,
  WithQuantizedStateState,
  dequantize_state,
  with_quantized_state,
)
from hina_optax.memory._rounded_updates import WithRoundedUpdatesState, with_rounded_updates
from hina_optax.memory._state_dtype import WithStateDtypeState, with_state_dtype

__all__ = [
  "QuantizedLeaf",
  "WithHostOffloadState",
  "WithQuantizedStateState",
  "WithRoundedUpdatesState",
  "WithStateDtypeState",
  "dequantize_state",
  "with_host_offload",
  "with_quantized_state",
  "with_rounded_updates",
  "with_state_dtype",
]
