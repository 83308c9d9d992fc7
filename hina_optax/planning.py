"""Memory before and during training: `plan_memory` and `optimize_for_vram`."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from hina_optax import alias, memory
from hina_optax.alias import HinaTransformation
from hina_optax.base import checks
from hina_optax.options import HinaOptions


def plan_memory(
  optimizer: Any, params: Any, vram_budget_gb: float | None = None, reserve_gb: float = 0.0
) -> memory.MemoryPlan:
  r"""Says what training needs, and how to keep the state so that it fits a budget.

  Reads shapes and dtypes only; nothing is allocated, and `params` may be `jax.ShapeDtypeStruct`s.
  Counted are parameters, gradients of their dtype, and state, to the byte; activations are not, so
  leave room for them in `reserve_gb`. State goes from fp32 to bf16 to 8 bits to host memory, the
  largest arrays first, until

  .. math:: 2 P + S_{device} + 2 W + R \le B

  with the parameters `P`, a window `W` through which hosted state passes, the reserve `R` and the
  budget `B`. For LoRA state is small: the plan says what a step saves and advises against one that
  saves less than 1% of what is on the device.

  Sizes are those of whole arrays: for parameters sharded over `n` devices give `n` times the memory
  of one.

  Args:
    optimizer: what `hina_adaptive` returned, a dict of its options, or any optax transformation.
    params: tree of parameters, arrays or abstract.
    vram_budget_gb: in GB (2^30 bytes), > 0. `None`: that of the options, else no limit.
    reserve_gb: GB of the budget for what is not counted, >= 0.

  Returns:
    A `MemoryPlan`: `print` it for a table, `to_dict()` for data.

  Raises:
    ValueError: if the budget is not above 0 or the reserve below 0, or an option is wrong.
    TypeError: if `optimizer` is none of the three.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> import hina_optax
    >>> params = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)}
    >>> plan = hina_optax.plan_memory(hina_optax.quick_preset(), params, vram_budget_gb=0.25)
    >>> plan.fits, plan.device_bytes <= 0.25 * 2**30
    (True, True)

  References:
    `vram_budget_gb` and `memory_efficient` of `HinaAdaptive`.
  """
  if vram_budget_gb is not None:
    check_budget("vram_budget_gb", vram_budget_gb)
  checks.number("reserve_gb", reserve_gb)
  reserve = int(reserve_gb * memory.GB)
  shapes = jax.eval_shape(lambda tree: tree, params)
  options = _options(optimizer)
  if options is None:
    budget = None if vram_budget_gb is None else int(vram_budget_gb * memory.GB)
    return memory.plan_state(optimizer, shapes, memory.Demands(budget=budget, reserve=reserve))
  options = _with_budget(options, vram_budget_gb)
  return alias.plan_of(options, params, reserve)


def optimize_for_vram(
  optimizer: HinaTransformation, state: Any, params: Any, target_vram_gb: float,
  reserve_gb: float = 0.0,
) -> tuple[HinaTransformation, Any]:
  """Plans again for another budget, and moves a running state into the new plan.

  Training goes on where it was: values are those of the old state, rounded once to the new form.
  State moves array by array, so that at most one is unpacked at a time; drop the old state to free
  its memory. The new transformation is compiled at its first use.

  Args:
    optimizer: what `hina_adaptive` returned.
    state: its state.
    params: the parameters it was made for.
    target_vram_gb: the new budget in GB (2^30 bytes), > 0.
    reserve_gb: GB of it for what is not counted, >= 0.

  Returns:
    The new transformation and its state. What the plan says is `plan_memory(optimizer, params)`.

  Raises:
    TypeError: if `optimizer` is not from `hina_adaptive`.
    ValueError: if the budget is not above 0, or the state is not of this optimizer.

  Example:
    >>> import jax.numpy as jnp
    >>> import hina_optax
    >>> tx = hina_optax.hina_adaptive(1e-3)
    >>> params = {"w": jnp.ones((512, 512))}
    >>> state = tx.init(params)
    >>> tx, state = hina_optax.optimize_for_vram(tx, state, params, target_vram_gb=0.005)
    >>> hina_optax.plan_memory(tx, params).fits
    True

  References:
    `optimize_for_vram` of `HinaAdaptive`.
  """
  if not isinstance(optimizer, HinaTransformation):
    raise TypeError(
      "optimizer must be what hina_adaptive returned, got "
      f"{type(optimizer).__name__}: of any other only plan_memory knows the state."
    )
  check_budget("target_vram_gb", target_vram_gb)
  checks.number("reserve_gb", reserve_gb)
  # The reserve is taken off the budget, so that the new options alone give the same plan.
  room = max(target_vram_gb - reserve_gb, 1e-9)
  new = alias.build(_with_budget(optimizer.options, room))
  return new, move_state(optimizer, new, state, params)


def check_budget(name: str, gb: float) -> None:
  """Refuses a budget that is not above 0."""
  checks.number(name, gb, open_low=True)


def move_state(
  old: HinaTransformation, new: HinaTransformation, state: Any, params: Any
) -> Any:
  """A state of `old` in the plan of `new`, which differs in memory options only."""
  opened = memory.open_state(old.decide(params, state), state, params)
  return memory.store_state(new.decide(params, state), opened, params)


def _options(optimizer: Any) -> HinaOptions | None:
  """Options of `hina_adaptive`; `None` for another transformation."""
  if isinstance(optimizer, HinaTransformation):
    return optimizer.options
  if isinstance(optimizer, HinaOptions):
    return optimizer
  if isinstance(optimizer, Mapping):
    return alias.hina_adaptive(**optimizer).options
  if isinstance(optimizer, optax.GradientTransformation):
    return None
  raise TypeError(
    "optimizer must be an optax transformation or a dict of options of hina_adaptive, got "
    f"{type(optimizer).__name__}."
  )


def _with_budget(options: HinaOptions, vram_budget_gb: float | None) -> HinaOptions:
  if vram_budget_gb is None:
    return options
  return options.replace(vram_budget_gb=vram_budget_gb)
