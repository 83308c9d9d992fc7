"""`HinaAdaptive`: the guide's class, over `hina_adaptive`."""

import collections
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from hina_optax import alias, info, planning
from hina_optax.base import paths
from hina_optax.options import MEMORY_OPTIONS, HinaOptions
from hina_optax.torch_bridge import _rules, _saving
from hina_optax.torch_bridge._cohort import Cohort
from hina_optax.torch_bridge._optimizer import BridgedOptimizer

_NUMBERS = "learning_rate", "weight_decay"
_IN_RATES = "lr_bump", "min_lr", "max_lr"
_NEVER = 2**31 - 1
_MB = 1 << 20


class HinaAdaptive(BridgedOptimizer):
  r"""The guide's optimizer under its own name, for PyTorch.

  Options, defaults and mathematics are those of `hina_optax.hina_adaptive`, which see: the chain

  .. math::
    g \to \text{regularizers} \to \text{SPD}(\text{importance}(\text{sign agreement}(
    \text{cautious}(\text{core}))) \to \text{decay} \to -\eta)

  compiled once for each parameter group. `lr` and `weight_decay` belong to the groups: schedulers
  change them without compiling again. With `sd_scripts_compat=True` it takes the steps of the
  PyTorch original.

  Args:
    params: tensors, named tensors (`model.named_parameters()`), or groups of either with their own
      `lr` and `weight_decay`.
    lr: step size. For presets `learning_rate` is taken too.
    **options: of `hina_adaptive`. `spatial_axes` is `torch_spatial_axes` unless given;
      `reference_lr` is `lr`; `weight_decay_mask` is a dict of booleans by name, or a function
      from the named parameters to one. LoRA pairs (`lora_rank_penalty`) are found by name, and
      without names among neighbours of matching shapes; both factors must be in one group. Parts
      that compare leaves (importance, pairs) look at one group at a time; in compat only the first
      has its importance updated, as in the original. A memory budget is shared among the groups by
      the size of their parameters.

  State: 8 to 22 bytes a parameter in fp32, less with the memory options (`hina_adaptive`).

  Raises:
    ValueError: an unknown or removed option (with what to use), a value out of range, a schedule in
      place of a number, parameters that `OptaxOptimizer` would refuse too.
    TypeError: an option of the wrong type, a parameter that is not floating.

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
    options["weight_decay_mask"] = _in_order(options.get("weight_decay_mask"))
    if options.get("reference_lr") is None and lr > 0:
      options["reference_lr"] = lr
    # Ranges are checked here, before any group.
    self._options = alias.hina_adaptive(lr, **options).options
    super().__init__(params, {"lr": lr, "weight_decay": float(self._options.weight_decay)})

  def _rule(self, index: int, group: Mapping[str, Any]) -> _rules.Rule:
    return _rule(self._group_options(self._options, index, group))

  def _group_options(self, o: HinaOptions, index: int, group: Mapping[str, Any]) -> HinaOptions:
    changed: dict[str, Any] = {}
    if o.sd_scripts_compat and index > 0:
      changed["relationship_discovery_interval"] = _NEVER
    if o.vram_budget_gb is not None:
      everything = sum(map(_bytes_of, self.param_groups)) or 1
      changed["vram_budget_gb"] = o.vram_budget_gb * max(_bytes_of(group) / everything, 1e-9)
    return o.replace(**changed)

  def _identity(self) -> dict[str, Any]:
    return {"optimizer": type(self).__name__, **_described(self._options)}

  def _pack(self) -> dict[str, Any]:
    return super()._pack() | {
      "memory": {name: getattr(self._options, name) for name in MEMORY_OPTIONS}}

  def _unpack(self, packed: Mapping[str, Any], groups: list[dict[str, Any]]) -> list[list[Cohort]]:
    # The state is read as it was saved, and then moved to where the options now say.
    saved = self._options.replace(**packed["memory"])
    rows = []
    for i, (row, group) in enumerate(zip(packed["groups"], groups)):
      rule = _rule(self._group_options(saved, i, group))
      cohorts = [_saving.unpack(s, group, self._group_names[i], rule) for s in row]
      if saved != self._options:
        for cohort in cohorts:
          self._replan(cohort, i, group, saved, self._options)
      rows.append(cohorts)
    return rows

  def _replan(self, cohort: Cohort, index: int, group: Mapping[str, Any], old: HinaOptions,
              new: HinaOptions) -> None:
    """Moves a cohort's state from where one set of memory options has it to another."""
    before = alias.build(self._group_options(old, index, group))
    after = self._group_options(new, index, group)
    state = planning.move_state(before, alias.build(after), cohort.state, cohort.arrays(group))
    cohort.follow(_rule(after), state)

  def get_optimization_info(self) -> dict[str, Any]:
    """Says which features are on, how state is kept, and how training stands.

    Returns:
      What `hina_optax.get_optimization_info` does: `features`, `memory_optimization`, `figures`,
      `options`; over all groups.
    """
    return info.get_optimization_info(self.states(), self._options)

  def get_memory_stats(self) -> dict[str, Any]:
    """Says how much memory is in use, against `vram_budget_gb` if it is given.

    On a CUDA device that is all that is in use there, by torch, JAX and others; on a CPU
    parameters, gradients and state, against the memory of the machine.

    Returns:
      What `hina_optax.get_memory_stats` does: `memory_pressure`, `used_mb`, `limit_mb`, `peak_mb`,
      `source`, `buffer_pool_stats`.
    """
    states = self.states()
    stats = info.get_memory_stats(states, self._options)
    device = self.param_groups[0]["params"][0].device
    if device.type == "cuda":
      free, total = torch.cuda.mem_get_info(device)
      limit = total if self._options.vram_budget_gb is None else stats["limit_mb"] * _MB
      used, source = float(total - free), "device"
    else:
      used, limit, source = self._bytes_here(stats), stats["limit_mb"] * _MB, "counted"
    return stats | {
      "used_mb": used / _MB, "limit_mb": limit / _MB, "memory_pressure": used / limit,
      "source": source,
    }

  def _bytes_here(self, stats: Mapping[str, Any]) -> float:
    tensors = [p for group in self.param_groups for p in group["params"]]
    tensors += [p.grad for p in tensors if p.grad is not None]
    state = stats["buffer_pool_stats"]
    both = state["current_memory_mb"] + state["host_memory_mb"]
    return both * _MB + sum(t.numel() * t.element_size() for t in tensors)

  def optimize_for_vram(self, target_vram_gb: float) -> None:
    """Plans for another budget, and moves the running state into the new plan.

    Training goes on where it was, values rounded once to the new form; the next step compiles.

    Args:
      target_vram_gb: GB (2^30 bytes) for parameters, gradients and state, > 0.

    Raises:
      ValueError: if it is not above 0.
    """
    planning.check_budget("target_vram_gb", target_vram_gb)
    self._begin()
    new = self._options.replace(vram_budget_gb=float(target_vram_gb))
    for i, (group, cohorts) in enumerate(zip(self.param_groups, self._cohorts)):
      for cohort in cohorts:
        self._replan(cohort, i, group, self._options, new)
    self._options = new


def _rule(o: HinaOptions) -> _rules.Rule:
  transformation = alias.build(o)

  def update(updates, state, params, numbers):
    # What was dropped for the budget was said when it was decided.
    now: dict[str, Any] = dict.fromkeys(transformation.decide(params).plan.dropped, False)
    now |= {"learning_rate": numbers["lr"], "weight_decay": numbers["weight_decay"]}
    return alias.build(o.replace(**now)).update(updates, state, params)

  numbers = {"lr": float(o.learning_rate), "weight_decay": float(o.weight_decay)}
  return _rules.Rule(
    transformation.init, update, numbers, True, collections.OrderedDict, o)


def _in_order(mask: Any) -> Any:
  """A mask that comes as a dict, in the order of the parameters."""
  if mask is None:
    return None

  @functools.wraps(mask if callable(mask) else dict)
  def ordered(params: Any) -> Any:
    found = mask(params) if callable(mask) else mask
    return collections.OrderedDict((name, found[name]) for name in params)

  return ordered


def _bytes_of(group: Mapping[str, Any]) -> int:
  return sum(p.numel() * p.element_size() for p in group["params"])


def _described(o: HinaOptions) -> dict[str, Any]:
  """The options that a state belongs to, as strings and numbers."""
  unused = {*_NUMBERS, *MEMORY_OPTIONS}
  if not o.sd_scripts_compat and all(getattr(o, name) is None for name in _IN_RATES):
    unused.add("reference_lr")
  return {name: _plain(x) for name, x in o.as_dict().items() if name not in unused}


def _plain(x: Any) -> Any:
  if isinstance(x, (tuple, list)):
    return [_plain(y) for y in x]
  if callable(x):
    return f"{x.__module__}.{getattr(x, '__qualname__', type(x).__qualname__)}"
  return x if x is None or isinstance(x, (bool, int, float, str)) else repr(x)
