"""Absolute rates of the options, as multiples of one reference rate."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hina_optax.base import checks, numerics

# The original's, which are these multiples of its usual learning rate of 1e-4.
_ORIGINAL = {"lr_bump": 3e-6, "min_lr": 1e-7, "max_lr": 1e-3}
_RELATIVE = {"lr_bump": 0.03, "min_lr": 1e-3, "max_lr": 10.0}
_SAMPLES = 33
# A reference below it counts as none: multiples of it would leave fp32.
_LEAST_RATE = 1e-30


class RateUnits(NamedTuple):
  """Bump and bounds of the learning rates of elements, as multiples of the common rate."""

  bump: numerics.Scalar
  min_scale: numerics.Scalar
  max_scale: numerics.Scalar


def resolve(options: Any) -> RateUnits:
  """Divides what is given in absolute rates by the reference rate."""
  reference = _reference(options)

  def scale(name: str) -> numerics.Scalar:
    value = getattr(options, name)
    if value is None and options.sd_scripts_compat:
      value = _ORIGINAL[name]
    if value is None:
      return _RELATIVE[name]
    if isinstance(value, (int, float)) and isinstance(reference, float):
      return value / reference if reference > _LEAST_RATE else _RELATIVE[name]
    dtype = jnp.float32
    return numerics.safe_divide(
      numerics.scalar(value, dtype), numerics.scalar(reference, dtype), _RELATIVE[name]
    )

  return RateUnits(scale("lr_bump"), scale("min_lr"), scale("max_lr"))


def _reference(options: Any) -> numerics.Scalar:
  if options.reference_lr is not None:
    return options.reference_lr
  rate = options.learning_rate
  if not callable(rate):
    return float(rate) if isinstance(rate, (int, float)) else rate
  checks.structural("warmup_steps", options.warmup_steps)
  last = int(options.warmup_steps)
  steps = sorted({round(i * last / (_SAMPLES - 1)) for i in range(_SAMPLES)})
  # A schedule may be any Python function of one step, so it is asked step by step.
  with jax.ensure_compile_time_eval():
    return max(float(rate(jnp.asarray(step, jnp.int32))) for step in steps)
