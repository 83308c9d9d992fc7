"""Gradient in, gradient out: none of these sees a learning rate."""

from hina_optax.regularizers._agr import (
  AdaptiveGradientRegularizationState,
  adaptive_gradient_regularization,
)
from hina_optax.regularizers._background import AttenuateBackgroundState, attenuate_background
from hina_optax.regularizers._detail import PreserveDetailState, preserve_detail
from hina_optax.regularizers._edges import SuppressEdgesState, suppress_edges
from hina_optax.regularizers._high_frequency import (
  SuppressHighFrequencyState,
  suppress_high_frequency,
)
from hina_optax.regularizers._orthogonal import OrthogonalizeToParamsState, orthogonalize_to_params
from hina_optax.regularizers._rank import AddRankPenaltyState, add_rank_penalty

__all__ = [
  "AdaptiveGradientRegularizationState",
  "AddRankPenaltyState",
  "AttenuateBackgroundState",
  "OrthogonalizeToParamsState",
  "PreserveDetailState",
  "SuppressEdgesState",
  "SuppressHighFrequencyState",
  "adaptive_gradient_regularization",
  "add_rank_penalty",
  "attenuate_background",
  "orthogonalize_to_params",
  "preserve_detail",
  "suppress_edges",
  "suppress_high_frequency",
]
