"""What to say, and to propose, when the state of an optimizer does not fit."""

import math
from collections.abc import Callable
from typing import Any

import jax

from hina_optax import memory
from hina_optax.options import HinaOptions

_MB = 1 << 20
# Shares of what the plan takes now that a smaller one is to take at most, the largest first.
_SHARES = (0.8, 0.6, 0.5, 0.4, 0.3)

Plan = Callable[[HinaOptions], memory.MemoryPlan]


def explained(
  init: Callable[[Any], Any], options: HinaOptions,
  plan: Callable[[HinaOptions, Any], memory.MemoryPlan],
) -> Callable[[Any], Any]:
  """`init`, whose failure for want of memory says what was planned and what would be smaller."""

  def guarded(params: Any) -> Any:
    try:
      return init(params)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      raise memory.StateMemoryError(_message(options, lambda o: plan(o, params), error)) from error

  return guarded


def _message(options: HinaOptions, plan: Plan, error: Exception) -> str:
  now = plan(options)
  budget = "no memory plan" if now.budget_bytes is None else (
    f"a plan for vram_budget_gb={now.budget_bytes / memory.GB:.4g}")
  return (
    f"there is no memory for the optimizer's state of {now.state_bytes / _MB:,.1f} MB "
    f"({_forms(now)}), kept by {budget}. {_proposal(options, plan, now)} ({error})"
  )


def _proposal(options: HinaOptions, plan: Plan, now: memory.MemoryPlan) -> str:
  for share in _SHARES:
    target = _rounded_up(share * now.device_bytes / memory.GB)
    smaller = plan(options.replace(vram_budget_gb=target))
    if smaller.fits and smaller.device_bytes < now.device_bytes:
      return (
        f"Try hina_adaptive(..., vram_budget_gb={target:g}), which needs "
        f"{smaller.device_bytes / _MB:,.1f} MB on the device for parameters, gradients and state "
        f"in place of {now.device_bytes / _MB:,.1f} MB ({_forms(smaller)})."
      )
  return (
    "Here no plan is smaller: shard the parameters over more devices, train a LoRA, or switch off "
    "parts with state.")


def _rounded_up(value: float) -> float:
  """To three digits, so that it can be typed."""
  unit = 10.0 ** (math.floor(math.log10(value)) - 2)
  return float(f"{math.ceil(value / unit) * unit:.3g}")


def _forms(plan: memory.MemoryPlan) -> str:
  """What the state consists of, the largest first."""
  sizes: dict[str, int] = {}
  for row in plan.rows:
    if row.group not in ("parameters", "gradients"):
      name = f"{row.dtype} on the {row.place}"
      sizes[name] = sizes.get(name, 0) + row.bytes
  found = sorted(sizes.items(), key=lambda item: -item[1])[:4]
  return ", ".join(f"{size / _MB:,.1f} MB {name}" for name, size in found)
