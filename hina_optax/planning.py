"""Memory plans: `plan_memory` before training, `optimize_for_vram` during it."""

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
  r"""Computes how much memory training needs, and how to store the state so that it fits a budget.

  Only shapes and dtypes are read; nothing is allocated, and `params` may be
  `jax.ShapeDtypeStruct`s. The parameters, gradients of the same dtype, and the state are counted to
  the byte. Activations are not counted: leave room for them in `reserve_gb`. State moves from fp32
  to bf16 to 8 bits to host memory, the largest arrays first, until

  .. math:: 2 P + S_{device} + 2 W + R \le B

  with the bytes of the parameters `P`, of the state on the device `S_device`, of a window `W`
  through which state in host memory passes, of the reserve `R` and of the budget `B`. For LoRA the
  state is small: the plan reports what each move saves, and advises against a move that saves less
  than 1% of what is on the device.

  Sizes are those of whole arrays: for parameters sharded over `n` devices give `n` times the memory
  of one device.

  Args:
    optimizer: the result of `hina_adaptive`, a dict of its options, or any optax transformation.
    params: tree of parameters, arrays or abstract.
    vram_budget_gb: in GB (2^30 bytes), > 0. With `None` the option of that name is the budget; if
      that is not set either, there is no limit.
    reserve_gb: GB of the budget for what is not counted, >= 0.

  Returns:
    A `MemoryPlan`: `print` it for a table, `to_dict()` for data.

  Raises:
    ValueError: if the budget is not above 0, if the reserve is below 0, or if an option is wrong.
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
  options = _read_options(optimizer)
  if options is None:
    budget = None if vram_budget_gb is None else int(vram_budget_gb * memory.GB)
    constraints = memory.PlanConstraints(budget=budget, reserve=reserve)
    return memory.plan_state(optimizer, shapes, constraints)
  options = _with_budget(options, vram_budget_gb)
  return alias.make_plan(options, params, reserve)


def optimize_for_vram(
  optimizer: HinaTransformation, state: Any, params: Any, target_vram_gb: float,
  reserve_gb: float = 0.0,
) -> tuple[HinaTransformation, Any]:
  """Makes a plan for another budget, and converts the state of a running training to it.

  Training continues where it was: the values are those of the old state, rounded once to the new
  storage. The state is converted array by array, so that at most one array is unpacked at a time.
  Drop the old state to free its memory. The new transformation is compiled at its first use.

  Args:
    optimizer: the result of `hina_adaptive`.
    state: its state.
    params: the parameters that the state was made for.
    target_vram_gb: the new budget in GB (2^30 bytes), > 0.
    reserve_gb: GB of the budget for what is not counted, >= 0.

  Returns:
    The new transformation and its state. `plan_memory(optimizer, params)` of the new transformation
    returns the plan.

  Raises:
    TypeError: if `optimizer` is not from `hina_adaptive`.
    ValueError: if the budget is not above 0, or if the state does not belong to this optimizer.

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
      f"{type(optimizer).__name__}: for any other transformation there is only plan_memory."
    )
  check_budget("target_vram_gb", target_vram_gb)
  checks.number("reserve_gb", reserve_gb)
  # The reserve is subtracted from the budget, so that the new options alone give the same plan.
  budget_gb = max(target_vram_gb - reserve_gb, 1e-9)
  new = alias.build(_with_budget(optimizer.options, budget_gb))
  return new, move_state(optimizer, new, state, params)


def check_budget(name: str, gb: float) -> None:
  """Refuses a budget that is not above 0; `name` is the argument's name for the error."""
  checks.number(name, gb, open_low=True)


def move_state(
  old: HinaTransformation, new: HinaTransformation, state: Any, params: Any
) -> Any:
  """Converts a state from the plan of `old` to that of `new`, which differs in memory options."""
  opened = memory.unwrap_state(old.choose_plan(params, state), state, params)
  return memory.convert_state(new.choose_plan(params, state), opened, params)


def _read_options(optimizer: Any) -> HinaOptions | None:
  """Returns the options of `hina_adaptive`, or `None` for another transformation."""
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
  """Replaces the budget of the options, unless the new one is `None`."""
  if vram_budget_gb is None:
    return options
  return options.replace(vram_budget_gb=vram_budget_gb)
