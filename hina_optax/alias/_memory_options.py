"""The memory options of `hina_adaptive`, as demands on a plan."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import optax

from hina_optax import memory, registry
from hina_optax.options import HinaOptions

Build = Callable[[HinaOptions], optax.GradientTransformationExtraArgs]

# The guide's: above the first share of the budget re-plan, above the second simplify.
ADAPT_ABOVE, SIMPLIFY_ABOVE = 0.8, 0.9


def is_planned(o: HinaOptions) -> bool:
  """Whether an option asks for anything but fp32 state on the device."""
  return (
    o.memory_efficient or o.vram_budget_gb is not None or o.reduce_precision
    or o.cpu_offload_states
  )


def demands(o: HinaOptions) -> memory.Demands:
  """What the options ask of a plan."""
  budget = memory.reported_limit() if o.memory_efficient else None
  if o.vram_budget_gb is not None:
    budget = int(o.vram_budget_gb * memory.GB)
  return memory.Demands(
    budget=budget,
    share=ADAPT_ABOVE if o.adaptive_features else 1.0,
    least_form=int(o.reduce_precision),
    host=o.cpu_offload_states,
    window=None if o.max_buffer_memory_mb is None else int(o.max_buffer_memory_mb * (1 << 20)),
    rounding="nearest" if o.sd_scripts_compat else "stochastic",
  )


def decide(o: HinaOptions, build: Build, params: Any, reserve: int = 0) -> memory.Decision:
  """The chain that the options give for these shapes, and how its state is kept."""
  wanted = demands(o)._replace(reserve=reserve)
  o, dropped = _simplified(o, build, params, wanted)
  base = build(o)
  plan = dataclasses.replace(memory.plan_state(base, params, wanted), dropped=dropped)
  if dropped:
    warnings.warn(
      f"emergency_simplify switched off {', '.join(dropped)}: with their state more than "
      f"{SIMPLIFY_ABOVE:.0%} of the memory budget would be used.", UserWarning, stacklevel=2,
    )
  return memory.Decision(base, memory.apply_storage(base, plan.storage), plan)


def _simplified(
  o: HinaOptions, build: Build, params: Any, wanted: memory.Demands
) -> tuple[HinaOptions, tuple[str, ...]]:
  """Options without the optional states that do not fit, and the names of those."""
  dropped: list[str] = []
  if not o.emergency_simplify or wanted.budget is None:
    return o, ()
  free = wanted._replace(budget=None)
  for name in _given_up_first():
    if not getattr(o, name):
      continue
    used = memory.plan_state(build(o), params, free).device_bytes + wanted.reserve
    if used <= SIMPLIFY_ABOVE * wanted.budget:
      break
    o, dropped = o.replace(**{name: False}), [*dropped, name]
  return o, tuple(dropped)


def _given_up_first() -> list[str]:
  """Switches of the parts that may be given up, the least missed first."""
  ordered = sorted((part.given_up, name) for part in registry.parts()
                   if part.given_up is not None for name in part.switches)
  return list(dict.fromkeys(name for _, name in ordered))
