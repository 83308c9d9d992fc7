"""`HinaAdaptive`: the guide's class for PyTorch, built on `hina_adaptive`."""

import collections
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from hina_optax import alias, info, planning
from hina_optax.base import paths
from hina_optax.options import MEMORY_OPTIONS, HinaOptions
from hina_optax.torch_bridge import _rules, _state_dict
from hina_optax.torch_bridge._bridged_optimizer import BridgedOptimizer
from hina_optax.torch_bridge._subgroup import Subgroup

# Hyperparameters of the groups, which may differ from those of a saved state.
_HYPERPARAMS = "learning_rate", "weight_decay"
# Options in units of a learning rate, which `reference_lr` makes relative.
_LEARNING_RATE_OPTIONS = "lr_bump", "min_lr", "max_lr"
# An interval, in steps, that no training reaches.
_NEVER = 2**31 - 1
_MB = 1 << 20


class HinaAdaptive(BridgedOptimizer):
  r"""The guide's optimizer under its own name, for PyTorch.

  The options, defaults and mathematics are those of `hina_optax.hina_adaptive`. The chain

  .. math::
    g \to \text{regularizers} \to \text{SPD}(\text{importance}(\text{sign agreement}(
    \text{cautious}(\text{core}))) \to \text{decay} \to -\eta)

  is compiled once for each parameter group. `lr` and `weight_decay` belong to the groups:
  schedulers change them without compiling again. With `sd_scripts_compat=True` the optimizer takes
  the steps of the PyTorch original.

  Args:
    params: tensors, named tensors (`model.named_parameters()`), or groups of either with their own
      `lr` and `weight_decay`.
    lr: step size. `learning_rate` is accepted too, since the presets use that name.
    **options: the options of `hina_adaptive`, with these differences. The default of `spatial_axes`
      is `torch_spatial_axes`, that of `reference_lr` is `lr`. `weight_decay_mask` is a dict of
      booleans by name, or a function from the named parameters to such a dict. LoRA pairs
      (`lora_rank_penalty`) are found by name, or among neighbours of matching shapes if the
      parameters have no names; both factors must be in one group. Parts that compare leaves
      (importance, pairs) see one group at a time; in compat mode only the first group has its
      importance updated, as in the original. A memory budget is divided among the groups by the
      size of their parameters.

  State: 8 to 22 bytes per parameter in fp32, less with the memory options (see `hina_adaptive`).

  Raises:
    ValueError: if an option is unknown or was removed (the message says what to use instead), if a
      value is out of range or a schedule stands in place of a number, and for parameters that
      `OptaxOptimizer` refuses too.
    TypeError: if an option has the wrong type, or a parameter is not floating.

  Example:
    >>> import torch
    >>> from hina_optax.torch_bridge import HinaAdaptive
    >>> model = torch.nn.Linear(8, 4)
    >>> optimizer = HinaAdaptive(model.parameters(), lr=1e-2, edge_suppression=True)
    >>> loss = lambda: (model(torch.ones(2, 8)) ** 2).mean()
    >>> before = loss()
    >>> for _ in range(20):
    ...   optimizer.zero_grad()
    ...   loss().backward()
    ...   optimizer.step()
    >>> bool(loss() < before)
    True
    >>> "edge_suppression" in optimizer.get_optimization_info()["features"]
    True

  References:
    `HinaAdaptive` of a fork of kohya's sd-scripts.
  """

  def __init__(self, params: Iterable[Any], lr: float = 1e-3, **options: Any) -> None:
    if options.pop("maximize", False):
      raise ValueError("maximize is not supported: negate the loss instead.")
    lr = options.pop("learning_rate", lr)
    if callable(lr):
      raise ValueError("lr must be a number: a scheduler of torch.optim.lr_scheduler changes it.")
    lr = float(lr)
    options = {"spatial_axes": paths.torch_spatial_axes, **options}
    options["weight_decay_mask"] = _order_mask(options.get("weight_decay_mask"))
    if options.get("reference_lr") is None and lr > 0:
      options["reference_lr"] = lr
    # This checks the values of the options before any parameter group is added.
    self._options = alias.hina_adaptive(lr, **options).options
    super().__init__(params, {"lr": lr, "weight_decay": float(self._options.weight_decay)})

  def _make_rule(self, index: int, group: Mapping[str, Any]) -> _rules.UpdateRule:
    return _make_rule(self._group_options(self._options, index, group))

  def _group_options(self, o: HinaOptions, index: int, group: Mapping[str, Any]) -> HinaOptions:
    """Adapts the options to a group: its share of the budget, and what compat mode changes."""
    changed: dict[str, Any] = {}
    if o.sd_scripts_compat and index > 0:
      changed["relationship_discovery_interval"] = _NEVER
    if o.vram_budget_gb is not None:
      total = sum(map(_count_bytes, self.param_groups)) or 1
      changed["vram_budget_gb"] = o.vram_budget_gb * max(_count_bytes(group) / total, 1e-9)
    return o.replace(**changed)

  def _identity(self) -> dict[str, Any]:
    return {"optimizer": type(self).__name__, **_describe_options(self._options)}

  def _pack(self) -> dict[str, Any]:
    return super()._pack() | {
      "memory": {name: getattr(self._options, name) for name in MEMORY_OPTIONS}}

  def _unpack(
    self, packed: Mapping[str, Any], groups: list[dict[str, Any]]
  ) -> list[list[Subgroup]]:
    # The state is restored under the memory options it was saved with, and then converted to those
    # of this optimizer.
    saved_options = self._options.replace(**packed["memory"])
    subgroups_by_group = []
    for i, (packed_subgroups, group) in enumerate(zip(packed["groups"], groups)):
      rule = _make_rule(self._group_options(saved_options, i, group))
      subgroups = [_state_dict.unpack_subgroup(packed_subgroup, group, self._group_names[i], rule)
                   for packed_subgroup in packed_subgroups]
      if saved_options != self._options:
        for subgroup in subgroups:
          self._replan(subgroup, i, group, saved_options, self._options)
      subgroups_by_group.append(subgroups)
    return subgroups_by_group

  def _replan(self, subgroup: Subgroup, index: int, group: Mapping[str, Any], old: HinaOptions,
              new: HinaOptions) -> None:
    """Converts a subgroup's state from the plan of the old memory options to that of the new."""
    old_tx = alias.build(self._group_options(old, index, group))
    new_options = self._group_options(new, index, group)
    state = planning.move_state(
      old_tx, alias.build(new_options), subgroup.state, subgroup.arrays(group))
    subgroup.replace_rule(_make_rule(new_options), state)

  def get_optimization_info(self) -> dict[str, Any]:
    """Reports which features are on, how the state is stored, and how training is going.

    Returns:
      The dict of `hina_optax.get_optimization_info`, over all groups: `features`,
      `memory_optimization`, `figures`, `options`.
    """
    return info.get_optimization_info(self.states(), self._options)

  def get_memory_stats(self) -> dict[str, Any]:
    """Reports how much memory is in use, compared with `vram_budget_gb` if that is set.

    On a CUDA device all memory in use counts, whether it belongs to torch, JAX or others. On a CPU
    the parameters, gradients and state count, compared with the memory of the machine.

    Returns:
      The dict of `hina_optax.get_memory_stats`: `memory_pressure`, `used_mb`, `limit_mb`,
      `peak_mb`, `source`, `buffer_pool_stats`.
    """
    states = self.states()
    stats = info.get_memory_stats(states, self._options)
    device = self.param_groups[0]["params"][0].device
    if device.type == "cuda":
      free, total = torch.cuda.mem_get_info(device)
      limit = total if self._options.vram_budget_gb is None else stats["limit_mb"] * _MB
      used, source = float(total - free), "device"
    else:
      used, limit, source = self._count_bytes(stats), stats["limit_mb"] * _MB, "counted"
    return stats | {
      "used_mb": used / _MB, "limit_mb": limit / _MB, "memory_pressure": used / limit,
      "source": source,
    }

  def _count_bytes(self, stats: Mapping[str, Any]) -> float:
    """Counts the bytes of parameters, gradients and state."""
    tensors = [p for group in self.param_groups for p in group["params"]]
    tensors += [p.grad for p in tensors if p.grad is not None]
    state = stats["buffer_pool_stats"]
    state_mb = state["current_memory_mb"] + state["host_memory_mb"]
    return state_mb * _MB + sum(t.numel() * t.element_size() for t in tensors)

  def optimize_for_vram(self, target_vram_gb: float) -> None:
    """Makes a plan for another budget, and converts the running state to it.

    Training continues where it was; values are rounded once to the new storage. The next step
    compiles again.

    Args:
      target_vram_gb: GB (2^30 bytes) for parameters, gradients and state, > 0.

    Raises:
      ValueError: if it is not above 0.
    """
    planning.check_budget("target_vram_gb", target_vram_gb)
    self._add_subgroups()
    new = self._options.replace(vram_budget_gb=float(target_vram_gb))
    for i, (group, subgroups) in enumerate(zip(self.param_groups, self._subgroups)):
      for subgroup in subgroups:
        self._replan(subgroup, i, group, self._options, new)
    self._options = new


def _make_rule(o: HinaOptions) -> _rules.UpdateRule:
  transformation = alias.build(o)

  def update(updates, state, params, hyperparams):
    # The plan has already warned about the features that it dropped. Switching them off here keeps
    # the warning from being repeated.
    changed: dict[str, Any] = dict.fromkeys(transformation.choose_plan(params).plan.dropped, False)
    changed |= {"learning_rate": hyperparams["lr"], "weight_decay": hyperparams["weight_decay"]}
    return alias.build(o.replace(**changed)).update(updates, state, params)

  return _rules.UpdateRule(
    transformation.init, update,
    hyperparams={"lr": float(o.learning_rate), "weight_decay": float(o.weight_decay)},
    handles_none=True, tree_type=collections.OrderedDict, options=o)


def _order_mask(mask: Any) -> Any:
  """Makes a mask function whose dict is in the order of the parameters, as their tree is."""
  if mask is None:
    return None

  def ordered_mask(params: Any) -> Any:
    values = mask(params) if callable(mask) else mask
    return collections.OrderedDict((name, values[name]) for name in params)

  # Saved states contain the qualified name of the mask. `wraps` takes it from the user's function.
  # A mask without one, such as a `functools.partial`, gets the name that hina_optax 0.1 saved.
  ordered_mask.__qualname__ = "_in_order.<locals>.ordered"
  return functools.wraps(mask if callable(mask) else dict)(ordered_mask)


def _count_bytes(group: Mapping[str, Any]) -> int:
  return sum(p.numel() * p.element_size() for p in group["params"])


def _describe_options(o: HinaOptions) -> dict[str, Any]:
  """Describes the options that determine what a state means, as strings and numbers."""
  omitted = {*_HYPERPARAMS, *MEMORY_OPTIONS}
  if not o.sd_scripts_compat and all(getattr(o, name) is None for name in _LEARNING_RATE_OPTIONS):
    omitted.add("reference_lr")
  return {name: _to_saved(x) for name, x in o.as_dict().items() if name not in omitted}


def _to_saved(x: Any) -> Any:
  """Converts an option to strings, numbers and lists; a function becomes its qualified name."""
  if isinstance(x, (tuple, list)):
    return [_to_saved(y) for y in x]
  if callable(x):
    return f"{x.__module__}.{getattr(x, '__qualname__', type(x).__qualname__)}"
  return x if x is None or isinstance(x, (bool, int, float, str)) else repr(x)
