"""Wrappers that compare the direction that comes out with the gradient that went in."""

from hina_optax.modulators._alignment import CautiousState, GramsState, cautious, grams
from hina_optax.modulators._importance import ImportanceState, importance_rule, scale_by_importance
from hina_optax.modulators._projection import ProjectToInitState, project_to_init
from hina_optax.modulators._rates import ScaleByRatesState, scale_by_rates
from hina_optax.modulators._sign_agreement import (
  SignAgreementState,
  mean_scale,
  scale_by_sign_agreement,
  sign_agreement_rule,
)

__all__ = [
  "CautiousState",
  "GramsState",
  "ImportanceState",
  "ProjectToInitState",
  "ScaleByRatesState",
  "SignAgreementState",
  "cautious",
  "grams",
  "importance_rule",
  "mean_scale",
  "project_to_init",
  "scale_by_importance",
  "scale_by_rates",
  "scale_by_sign_agreement",
  "sign_agreement_rule",
]
