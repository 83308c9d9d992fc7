"""Converts the absolute learning rates of the options to multiples of one reference rate."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hina_optax.base import checks, numerics

# Defaults of the original, the PyTorch class `HinaAdaptive` in a fork of kohya's sd-scripts, and
# the same as multiples of its usual learning rate of 1e-4.
_ORIGINAL = {"lr_bump": 3e-6, "min_lr": 1e-7, "max_lr": 1e-3}
_RELATIVE = {"lr_bump": 0.03, "min_lr": 1e-3, "max_lr": 10.0}
# Steps at which a schedule is evaluated to find its largest value.
_SCHEDULE_SAMPLES = 33
# A smaller reference rate is ignored, because multiples of it would leave the range of fp32.
_MIN_REFERENCE = 1e-30


class RateUnits(NamedTuple):
  """Bump and bounds of the learning rates per element, as multiples of the common rate."""

  bump: numerics.Scalar
  min_scale: numerics.Scalar
  max_scale: numerics.Scalar


def resolve(options: Any) -> RateUnits:
  """Divides the absolute rates of the options by the reference rate."""
  reference = _find_reference(options)

  def scale(name: str) -> numerics.Scalar:
    value = getattr(options, name)
    if value is None and options.sd_scripts_compat:
      value = _ORIGINAL[name]
    if value is None:
      return _RELATIVE[name]
    if isinstance(value, (int, float)) and isinstance(reference, float):
      return value / reference if reference > _MIN_REFERENCE else _RELATIVE[name]
    dtype = jnp.float32
    return numerics.safe_divide(
      numerics.scalar(value, dtype), numerics.scalar(reference, dtype), _RELATIVE[name]
    )

  return RateUnits(scale("lr_bump"), scale("min_lr"), scale("max_lr"))


def _find_reference(options: Any) -> numerics.Scalar:
  if options.reference_lr is not None:
    return options.reference_lr
  rate = options.learning_rate
  if not callable(rate):
    return float(rate) if isinstance(rate, (int, float)) else rate
  checks.static_value("warmup_steps", options.warmup_steps)
  last_step = int(options.warmup_steps)
  steps = sorted({round(i * last_step / (_SCHEDULE_SAMPLES - 1)) for i in range(_SCHEDULE_SAMPLES)})
  # A schedule may be any Python function of one step, so it may not accept an array of steps.
  with jax.ensure_compile_time_eval():
    return max(float(rate(jnp.asarray(step, jnp.int32))) for step in steps)
