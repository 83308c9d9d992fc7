"""What every bridged optimizer does as a `torch.optim.Optimizer`."""

import abc
import collections
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from hina_optax.torch_bridge import _names, _rules, _saving, _tensors
from hina_optax.torch_bridge._cohort import Cohort

# Of torch and its schedulers: they mean nothing to the update.
_FOREIGN_KEYS = {"params", "param_names", "name", "initial_lr"}


class BridgedOptimizer(torch.optim.Optimizer, abc.ABC):
  """A `torch.optim.Optimizer` whose update is a compiled JAX program.

  Parameters of a group that begin together share one state. What torch calls `state` stays empty.
  """

  def __init__(self, params: Iterable[Any], numbers: Mapping[str, float]):
    self._cohorts: list[list[Cohort]] = []
    self._group_names: list[list[str]] = []
    self._numbers = dict(numbers)
    super().__init__(params, {})
    first = self.param_groups[0]
    self.defaults = {name: first[name] for name in self._rule(0, first).numbers} | self._numbers

  @abc.abstractmethod
  def _rule(self, index: int, group: Mapping[str, Any]) -> _rules.Rule:
    """The rule of a group."""

  @abc.abstractmethod
  def _identity(self) -> dict[str, Any]:
    """What a saved state must agree with."""

  def add_param_group(self, param_group: dict[str, Any]) -> None:
    """Adds parameters with numbers of their own, which begin at their first step.

    Raises:
      ValueError: a key that is no number of the optimizer, a device that JAX does not know.
      TypeError: a parameter that is not floating.
    """
    index = len(self.param_groups)
    super().add_param_group(param_group)
    try:
      group = self.param_groups[index]
      shapes = [tuple(p.shape) for p in group["params"]]
      names = list(group.get("param_names") or _names.names_of(shapes))
      _refuse_equal(names)
      _tensors.check_parameters(names, group["params"])
      self._group_names.append(names)
      numbers = self._rule(index, group).numbers
      _check_keys(group, numbers)
      for name, value in numbers.items():
        group.setdefault(name, self._numbers.get(name, value))
    except Exception:
      del self.param_groups[index:], self._group_names[index:]
      raise
    self._cohorts.append([])

  @torch.no_grad()
  def step(self, closure: Callable[[], Any] | None = None) -> Any:
    """One update of all parameters that have a gradient.

    Args:
      closure: computes the loss again and returns it; transformations that ask for a `value` get
        it.

    Returns:
      What `closure` returned, else `None`.

    Raises:
      ValueError: a sparse gradient. No parameter has changed then.
    """
    loss = value = None
    if closure is not None:
      with torch.enable_grad():
        loss = closure()
      value = loss.item() if isinstance(loss, torch.Tensor) else loss
    self._refuse_sparse()
    self._begin()
    launched = [
      cohort.launch(group, value)
      for group, cohorts in zip(self.param_groups, self._cohorts) for cohort in cohorts
    ]
    for one in filter(None, launched):
      _tensors.write(one.tensors, one.arrays)
    return loss

  def _begin(self) -> None:
    """Gives state to parameters that have become trainable."""
    for i, (group, cohorts) in enumerate(zip(self.param_groups, self._cohorts)):
      known = {member for cohort in cohorts for member in cohort.members}
      new = [
        j for j, p in enumerate(group["params"])
        if j not in known and (p.requires_grad or p.grad is not None)
      ]
      if new:
        cohorts.append(Cohort(group, self._group_names[i], new, self._rule(i, group)))

  def _refuse_sparse(self) -> None:
    for names, group in zip(self._group_names, self.param_groups):
      for name, p in zip(names, group["params"]):
        if p.grad is not None and p.grad.layout != torch.strided:
          raise ValueError(
            f"Parameter '{name}' has a sparse gradient; only dense ones can be taken. Create its "
            "Embedding with sparse=False, or train it by torch.optim.SparseAdam.")

  def states(self) -> tuple[Any, ...]:
    """The optimizer states, one for parameters that began together, as JAX arrays."""
    self._begin()
    return tuple(cohort.state for cohorts in self._cohorts for cohort in cohorts)

  def compilations(self) -> int:
    """How often an update was compiled so far; other learning rates do not add to it."""
    return sum(cohort.compilations() for cohorts in self._cohorts for cohort in cohorts)

  def state_dict(self) -> dict[str, Any]:
    """The state as tensors on the CPU, numbers and strings, for `torch.save`.

    Returns:
      `{"state": {"hina_optax": ...}, "param_groups": [...]}`.
    """
    beside: dict[Any, Any] = self.state
    beside[_saving.KEY] = self._pack()
    try:
      return super().state_dict()
    finally:
      del beside[_saving.KEY]

  def load_state_dict(self, state_dict: dict[str, Any]) -> None:
    """Goes on from what `state_dict` gave, bit for bit, on the parameters' present device.

    Nothing has changed if it raises.

    Args:
      state_dict: of the same optimizer with the same options, for parameters of the same shapes.

    Raises:
      ValueError: what differs: the optimizer, an option, the version, a group, a parameter's shape,
        a piece of state.
    """
    super().load_state_dict(state_dict)

  def __setstate__(self, state: dict[str, Any]) -> None:
    """The last step of torch's `load_state_dict`: nothing has changed yet."""
    packed = state["state"].pop(_saving.KEY, None)
    if packed is None:
      raise ValueError(
        f"The state_dict was not saved by {type(self).__name__} of hina_optax: it holds no "
        f"'{_saving.KEY}'. A state of another optimizer cannot be taken over.")
    _saving.check(packed, self._identity())
    cohorts = self._unpack(packed, state["param_groups"])
    super().__setstate__(state)
    self._cohorts = cohorts

  def _pack(self) -> dict[str, Any]:
    return _saving.pack(self._identity(), self._cohorts, self.param_groups)

  def _unpack(self, packed: Mapping[str, Any], groups: list[dict[str, Any]]) -> list[list[Cohort]]:
    return [
      [
        _saving.unpack(saved, group, self._group_names[i], self._rule(i, group))
        for saved in packed["groups"][i]
      ]
      for i, group in enumerate(groups)
    ]

  def __getstate__(self) -> dict[str, Any]:
    """Refuses to be pickled: compiled programs cannot be."""
    raise TypeError(
      f"{type(self).__name__} holds compiled programs and cannot be pickled or copied: save "
      "state_dict(), and load it into a new optimizer.")


def _refuse_equal(names: list[str]) -> None:
  equal = [name for name, count in collections.Counter(names).items() if count > 1]
  if equal:
    raise ValueError(
      f"Several parameters of one group are named '{equal[0]}': each needs a name of its own, as "
      "model.named_parameters() gives.")


def _check_keys(group: Mapping[str, Any], numbers: Mapping[str, float]) -> None:
  if group.get("maximize"):
    raise ValueError("maximize is not supported: negate the loss instead.")
  for key in group:
    if key not in numbers and key not in _FOREIGN_KEYS and key != "maximize":
      raise ValueError(
        f"A parameter group has '{key}', which this optimizer cannot change from group to group: "
        f"it can {', '.join(sorted(numbers))}. Give it to the optimizer as a whole, or, for any "
        "optax transformation, let it out by optax.inject_hyperparams.")
