"""Composable optax transformations for training diffusion models in latent space."""

from hina_optax.alias import HinaTransformation, hina_adaptive
from hina_optax.base.paths import flax_spatial_axes, torch_spatial_axes
from hina_optax.checkpoints import abstract_state, pack_state, packed_shapes, unpack_state
from hina_optax.core import add_scheduled_weight_decay, scale_by_hina
from hina_optax.grouped.apply import apply
from hina_optax.info import get_memory_stats, get_optimization_info
from hina_optax.memory import (
  MemoryPlan,
  with_host_offload,
  with_leaf_batching,
  with_quantized_state,
  with_rounded_updates,
  with_state_dtype,
)
from hina_optax.modulators import (
  cautious,
  grams,
  project_to_init,
  scale_by_importance,
  scale_by_sign_agreement,
)
from hina_optax.options import (
  HinaOptions,
  extreme_memory_preset,
  large_model_preset,
  lora_preset,
  quick_preset,
)
from hina_optax.planning import optimize_for_vram, plan_memory
from hina_optax.regularizers import (
  adaptive_gradient_regularization,
  add_rank_penalty,
  attenuate_background,
  orthogonalize_to_params,
  preserve_detail,
  suppress_edges,
  suppress_high_frequency,
)

__version__ = "0.2.0"

__all__ = [
  "HinaOptions",
  "HinaTransformation",
  "MemoryPlan",
  "abstract_state",
  "adaptive_gradient_regularization",
  "add_rank_penalty",
  "add_scheduled_weight_decay",
  "apply",
  "attenuate_background",
  "cautious",
  "extreme_memory_preset",
  "flax_spatial_axes",
  "get_memory_stats",
  "get_optimization_info",
  "grams",
  "hina_adaptive",
  "large_model_preset",
  "lora_preset",
  "optimize_for_vram",
  "orthogonalize_to_params",
  "pack_state",
  "packed_shapes",
  "plan_memory",
  "preserve_detail",
  "project_to_init",
  "quick_preset",
  "scale_by_hina",
  "scale_by_importance",
  "scale_by_sign_agreement",
  "suppress_edges",
  "suppress_high_frequency",
  "torch_spatial_axes",
  "unpack_state",
  "with_host_offload",
  "with_leaf_batching",
  "with_quantized_state",
  "with_rounded_updates",
  "with_state_dtype",
]
