"""The memory options of `hina_adaptive`, as constraints on a plan."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import optax

from hina_optax import memory, registry
from hina_optax.options import HinaOptions

Build = Callable[[HinaOptions], optax.GradientTransformationExtraArgs]

# Shares of the budget from the guide, the Traditional Chinese guide to HinaAdaptive that the
# library implements: re-plan above the first share, switch features off above the second.
ADAPT_ABOVE, SIMPLIFY_ABOVE = 0.8, 0.9


def is_planned(o: HinaOptions) -> bool:
  """Whether an option asks for anything but fp32 state on the device."""
  return (
    o.memory_efficient or o.vram_budget_gb is not None or o.reduce_precision
    or o.cpu_offload_states
  )


def make_constraints(o: HinaOptions) -> memory.PlanConstraints:
  """The constraints that the options put on a plan."""
  budget = memory.reported_limit() if o.memory_efficient else None
  if o.vram_budget_gb is not None:
    budget = int(o.vram_budget_gb * memory.GB)
  return memory.PlanConstraints(
    budget=budget,
    share=ADAPT_ABOVE if o.adaptive_features else 1.0,
    initial_precision=int(o.reduce_precision),
    host=o.cpu_offload_states,
    window=None if o.max_buffer_memory_mb is None else int(o.max_buffer_memory_mb * (1 << 20)),
    rounding="nearest" if o.sd_scripts_compat else "stochastic",
  )


def choose_plan(
  o: HinaOptions, build: Build, params: Any, reserve: int = 0
) -> memory.PlannedTransformation:
  """The chain that the options describe, and the plan that says how its state is stored."""
  constraints = make_constraints(o)._replace(reserve=reserve)
  o, dropped = _simplify(o, build, params, constraints)
  base = build(o)
  plan = dataclasses.replace(memory.plan_state(base, params, constraints), dropped=dropped)
  if dropped:
    warnings.warn(
      f"emergency_simplify switched off {', '.join(dropped)}: with their state more than "
      f"{SIMPLIFY_ABOVE:.0%} of the memory budget would be used.", UserWarning, stacklevel=2,
    )
  return memory.PlannedTransformation(base, memory.apply_storage(base, plan.storage), plan)


def _simplify(
  o: HinaOptions, build: Build, params: Any, constraints: memory.PlanConstraints
) -> tuple[HinaOptions, tuple[str, ...]]:
  """Switches off features whose state does not fit; returns new options and the features' names."""
  dropped: list[str] = []
  if not o.emergency_simplify or constraints.budget is None:
    return o, ()
  unlimited = constraints._replace(budget=None)
  for name in _switches_in_drop_order():
    if not getattr(o, name):
      continue
    used = memory.plan_state(build(o), params, unlimited).device_bytes + constraints.reserve
    if used <= SIMPLIFY_ABOVE * constraints.budget:
      break
    o, dropped = o.replace(**{name: False}), [*dropped, name]
  return o, tuple(dropped)


def _switches_in_drop_order() -> list[str]:
  """The switches of the parts that may be switched off, those to drop first at the front."""
  ordered = sorted((part.drop_order, name) for part in registry.parts()
                   if part.drop_order is not None for name in part.switches)
  return list(dict.fromkeys(name for _, name in ordered))
