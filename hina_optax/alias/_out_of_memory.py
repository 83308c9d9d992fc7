"""The error message for a state that does not fit in memory, with a proposal for a smaller plan."""

import math
from collections.abc import Callable
from typing import Any

import jax

from hina_optax import memory
from hina_optax.options import HinaOptions

_MB = 1 << 20
# A smaller plan should take at most one of these shares of the current plan's memory.
_SHARES = (0.8, 0.6, 0.5, 0.4, 0.3)

Plan = Callable[[HinaOptions], memory.MemoryPlan]


def explain_failures(
  init: Callable[[Any], Any], options: HinaOptions,
  plan: Callable[[HinaOptions, Any], memory.MemoryPlan],
) -> Callable[[Any], Any]:
  """Makes an `init` that runs out of memory report its plan and a smaller one."""

  def guarded(params: Any) -> Any:
    try:
      return init(params)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      raise memory.StateMemoryError(_message(options, lambda o: plan(o, params), error)) from error

  return guarded


def _message(options: HinaOptions, plan: Plan, error: Exception) -> str:
  current = plan(options)
  budget = "no memory plan" if current.budget_bytes is None else (
    f"a plan for vram_budget_gb={current.budget_bytes / memory.GB:.4g}")
  return (
    f"there is no memory for the optimizer's state of {current.state_bytes / _MB:,.1f} MB "
    f"({_describe_state(current)}), kept by {budget}. "
    f"{_propose_plan(options, plan, current)} ({error})"
  )


def _propose_plan(options: HinaOptions, plan: Plan, current: memory.MemoryPlan) -> str:
  for share in _SHARES:
    target = _round_up(share * current.device_bytes / memory.GB)
    smaller = plan(options.replace(vram_budget_gb=target))
    if smaller.fits and smaller.device_bytes < current.device_bytes:
      return (
        f"Try hina_adaptive(..., vram_budget_gb={target:g}), which needs "
        f"{smaller.device_bytes / _MB:,.1f} MB on the device for parameters, gradients and state "
        f"in place of {current.device_bytes / _MB:,.1f} MB ({_describe_state(smaller)})."
      )
  return (
    "Here no plan is smaller: shard the parameters over more devices, train a LoRA, or switch off "
    "parts with state.")


def _round_up(value: float) -> float:
  """Rounds up to three digits, so that a user can type the number."""
  unit = 10.0 ** (math.floor(math.log10(value)) - 2)
  return float(f"{math.ceil(value / unit) * unit:.3g}")


def _describe_state(plan: memory.MemoryPlan) -> str:
  """The four largest portions of the state, by dtype and place."""
  sizes: dict[str, int] = {}
  for row in plan.rows:
    if row.group not in ("parameters", "gradients"):
      name = f"{row.dtype} on the {row.place}"
      sizes[name] = sizes.get(name, 0) + row.bytes
  largest = sorted(sizes.items(), key=lambda item: -item[1])[:4]
  return ", ".join(f"{size / _MB:,.1f} MB {name}" for name, size in largest)
