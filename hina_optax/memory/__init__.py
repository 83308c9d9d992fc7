"""Storage wrappers: how any transformation stores its state, and memory plans that choose them."""

from hina_optax.grouped.codecs import QuantizedLeaf
from hina_optax.memory._device import DeviceMemory, device_memory, is_on_host, reported_limit
from hina_optax.memory._host_offload import WithHostOffloadState, with_host_offload
from hina_optax.memory._leaf_batching import MAX_ELEMENTS, with_leaf_batching
from hina_optax.memory._plan import (
  GB,
  PlanConstraints,
  StateMemoryError,
  apply_storage,
  plan_state,
  tree_bytes,
)
from hina_optax.memory._plan_cache import PlannedTransformation, cache_plans
from hina_optax.memory._plan_table import MemoryPlan, PlanRow, PlanStep, Storage
from hina_optax.memory._quantized_state import (
  WithQuantizedStateState,
  dequantize_state,
  quantize_leaf,
  with_quantized_state,
)
from hina_optax.memory._rounded_updates import WithRoundedUpdatesState, with_rounded_updates
from hina_optax.memory._state_conversion import convert_state, unwrap_state
from hina_optax.memory._state_dtype import WithStateDtypeState, with_state_dtype

__all__ = [
  "GB",
  "MAX_ELEMENTS",
  "DeviceMemory",
  "MemoryPlan",
  "PlanConstraints",
  "PlanRow",
  "PlanStep",
  "PlannedTransformation",
  "QuantizedLeaf",
  "StateMemoryError",
  "Storage",
  "WithHostOffloadState",
  "WithQuantizedStateState",
  "WithRoundedUpdatesState",
  "WithStateDtypeState",
  "apply_storage",
  "cache_plans",
  "convert_state",
  "dequantize_state",
  "device_memory",
  "is_on_host",
  "plan_state",
  "quantize_leaf",
  "reported_limit",
  "tree_bytes",
  "unwrap_state",
  "with_host_offload",
  "with_leaf_batching",
  "with_quantized_state",
  "with_rounded_updates",
  "with_state_dtype",
]
