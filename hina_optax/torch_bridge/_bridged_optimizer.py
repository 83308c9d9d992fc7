"""The base class of the optimizers that run in JAX behind torch's optimizer interface."""

import abc
import collections
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from hina_optax.torch_bridge import _names, _rules, _state_dict, _tensors
from hina_optax.torch_bridge._subgroup import Subgroup

# Keys that torch and its schedulers put into a parameter group. The update does not use them.
_TORCH_KEYS = {"params", "param_names", "name", "initial_lr"}


class BridgedOptimizer(torch.optim.Optimizer, abc.ABC):
  """A `torch.optim.Optimizer` whose update is a compiled JAX program.

  Parameters of a group that become trainable at the same time share one optimizer state (see
  `Subgroup`). torch's own attribute `state` stays empty.
  """

  def __init__(self, params: Iterable[Any], hyperparams: Mapping[str, float]):
    self._subgroups: list[list[Subgroup]] = []
    self._group_names: list[list[str]] = []
    self._hyperparams = dict(hyperparams)
    super().__init__(params, {})
    first = self.param_groups[0]
    names = self._make_rule(0, first).hyperparams
    self.defaults = {name: first[name] for name in names} | self._hyperparams

  @abc.abstractmethod
  def _make_rule(self, index: int, group: Mapping[str, Any]) -> _rules.UpdateRule:
    """Returns the update rule of a group."""

  @abc.abstractmethod
  def _identity(self) -> dict[str, Any]:
    """Returns the class and the options, which must be the same when a saved state is loaded."""

  def add_param_group(self, param_group: dict[str, Any]) -> None:
    """Adds a group of parameters, which may have hyperparameters of its own.

    Its state is made at the first step.

    Raises:
      ValueError: if a key is not a hyperparameter of the optimizer, or if the parameters are on
        several devices.
      TypeError: if a parameter is not floating.
    """
    index = len(self.param_groups)
    super().add_param_group(param_group)
    try:
      group = self.param_groups[index]
      shapes = [tuple(p.shape) for p in group["params"]]
      names = list(group.get("param_names") or _names.infer_names(shapes))
      _refuse_duplicates(names)
      _tensors.check_parameters(names, group["params"])
      self._group_names.append(names)
      initial = self._make_rule(index, group).hyperparams
      _check_keys(group, initial)
      for name, value in initial.items():
        group.setdefault(name, self._hyperparams.get(name, value))
    except Exception:
      # A refused group leaves the optimizer as it was.
      del self.param_groups[index:], self._group_names[index:]
      raise
    self._subgroups.append([])

  @torch.no_grad()
  def step(self, closure: Callable[[], Any] | None = None) -> Any:
    """Updates all parameters that have a gradient.

    Args:
      closure: computes the loss again and returns it. Transformations that take a `value` get the
        loss.

    Returns:
      The loss from `closure`, or `None` without a closure.

    Raises:
      ValueError: if a gradient is sparse. No parameter has changed then.
    """
    loss = value = None
    if closure is not None:
      with torch.enable_grad():
        loss = closure()
      value = loss.item() if isinstance(loss, torch.Tensor) else loss
    self._refuse_sparse()
    self._add_subgroups()
    # All updates are launched before the first result is awaited.
    updates = [
      subgroup.launch_update(group, value)
      for group, subgroups in zip(self.param_groups, self._subgroups) for subgroup in subgroups
    ]
    for update in filter(None, updates):
      _tensors.write_tensors(update.tensors, update.arrays)
    return loss

  def _add_subgroups(self) -> None:
    """Makes the state of parameters that have become trainable since the last call."""
    for i, (group, subgroups) in enumerate(zip(self.param_groups, self._subgroups)):
      assigned = {member for subgroup in subgroups for member in subgroup.members}
      new = [
        j for j, p in enumerate(group["params"])
        if j not in assigned and (p.requires_grad or p.grad is not None)
      ]
      if new:
        rule = self._make_rule(i, group)
        subgroups.append(Subgroup(group, self._group_names[i], new, rule))

  def _refuse_sparse(self) -> None:
    for names, group in zip(self._group_names, self.param_groups):
      for name, p in zip(names, group["params"]):
        if p.grad is not None and p.grad.layout != torch.strided:
          raise ValueError(
            f"Parameter '{name}' has a sparse gradient; only dense ones can be taken. Create its "
            "Embedding with sparse=False, or train it by torch.optim.SparseAdam.")

  def states(self) -> tuple[Any, ...]:
    """Returns the optimizer states as JAX arrays, one for each set of parameters that share it."""
    self._add_subgroups()
    return tuple(subgroup.state for subgroups in self._subgroups for subgroup in subgroups)

  def compilations(self) -> int:
    """Counts how often an update was compiled; a change of the learning rate does not compile."""
    return sum(subgroup.compilations() for subgroups in self._subgroups for subgroup in subgroups)

  def state_dict(self) -> dict[str, Any]:
    """Returns the state as tensors on the CPU, numbers and strings, for `torch.save`.

    Returns:
      `{"state": {"hina_optax": ...}, "param_groups": [...]}`.
    """
    # torch copies what is in `state` into the dict; the packed state is there only meanwhile.
    torch_state: dict[Any, Any] = self.state
    torch_state[_state_dict.KEY] = self._pack()
    try:
      return super().state_dict()
    finally:
      del torch_state[_state_dict.KEY]

  def load_state_dict(self, state_dict: dict[str, Any]) -> None:
    """Restores a saved state bit for bit, on the device where the parameters are now.

    If it raises, nothing has changed.

    Args:
      state_dict: from `state_dict` of the same optimizer with the same options, for parameters of
        the same shapes.

    Raises:
      ValueError: if the optimizer, an option, the version, a group, a parameter's shape or an array
        of the state differs. The message says what differs.
    """
    super().load_state_dict(state_dict)

  def __setstate__(self, state: dict[str, Any]) -> None:
    """Unpacks the state in the last step of torch's `load_state_dict`, before anything changes."""
    packed = state["state"].pop(_state_dict.KEY, None)
    if packed is None:
      raise ValueError(
        f"The state_dict was not saved by {type(self).__name__} of hina_optax: it holds no "
        f"'{_state_dict.KEY}'. A state of another optimizer cannot be taken over.")
    _state_dict.check_identity(packed, self._identity())
    subgroups = self._unpack(packed, state["param_groups"])
    super().__setstate__(state)
    self._subgroups = subgroups

  def _pack(self) -> dict[str, Any]:
    return _state_dict.pack(self._identity(), self._subgroups, self.param_groups)

  def _unpack(
    self, packed: Mapping[str, Any], groups: list[dict[str, Any]]
  ) -> list[list[Subgroup]]:
    return [
      [
        _state_dict.unpack_subgroup(saved, group, self._group_names[i], self._make_rule(i, group))
        for saved in packed["groups"][i]
      ]
      for i, group in enumerate(groups)
    ]

  def __getstate__(self) -> dict[str, Any]:
    """Refuses pickling, since compiled programs cannot be pickled."""
    raise TypeError(
      f"{type(self).__name__} holds compiled programs and cannot be pickled or copied: save "
      "state_dict(), and load it into a new optimizer.")


def _refuse_duplicates(names: list[str]) -> None:
  duplicates = [name for name, count in collections.Counter(names).items() if count > 1]
  if duplicates:
    raise ValueError(
      f"Several parameters of one group are named '{duplicates[0]}': each needs a name of its own, "
      "as model.named_parameters() gives.")


def _check_keys(group: Mapping[str, Any], hyperparams: Mapping[str, float]) -> None:
  if group.get("maximize"):
    raise ValueError("maximize is not supported: negate the loss instead.")
  for key in group:
    if key not in hyperparams and key not in _TORCH_KEYS and key != "maximize":
      raise ValueError(
        f"A parameter group has '{key}', which this optimizer cannot change from group to group: "
        f"it can change {', '.join(sorted(hyperparams))}. Give it to the optimizer as a whole, or, "
        "for any optax transformation, expose it by optax.inject_hyperparams.")
