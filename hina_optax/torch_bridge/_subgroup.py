"""Parameters of a torch parameter group that share one optimizer state and one compiled update."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import torch

from hina_optax.torch_bridge import _rules, _tensors


class PendingUpdate(NamedTuple):
  """An update that JAX may still be computing.

  Attributes:
    tensors: the parameters to write to.
    arrays: their new values.
    inputs: arguments of the compiled update. They may be copies to which nothing else refers, so
      they are kept alive until `arrays` are written.
  """

  tensors: list[torch.Tensor]
  arrays: list[jax.Array]
  inputs: list[Any]


class Subgroup:
  """Parameters of a torch parameter group that became trainable at the same time.

  A group usually has a single subgroup. Parameters that are unfrozen later form another one, with a
  state and a compiled update of its own.

  Attributes:
    members: indices of the parameters in the group.
    names: names of all parameters of the group. In trees of this subgroup the parameters that
      belong to other subgroups are `None`.
    rule: the update rule.
    state: the optimizer state.
  """

  def __init__(self, group: Mapping[str, Any], names: Sequence[str], members: Sequence[int],
               rule: _rules.UpdateRule, state: Any = None):
    self.members, self.names, self.rule = tuple(members), tuple(names), rule
    self._cached_arrays = [_tensors.CachedArray() for _ in self.members]
    # The jitted step for each pattern of present and missing gradients.
    self._steps: dict[tuple[bool, ...], Any] = {}
    # Hyperparameters are passed as NumPy scalars of JAX's default float type.
    self._scalar = np.dtype(jax.dtypes.canonicalize_dtype(np.float64)).type
    params = self.params(group)
    _tensors.check_parameters([self.names[i] for i in self.members], params)
    self._device = _tensors.jax_device(params[0].device)
    self.state = self._init_state(params) if state is None else state

  def params(self, group: Mapping[str, Any]) -> list[torch.Tensor]:
    """Returns the tensors of the members."""
    return [group["params"][i] for i in self.members]

  def to_tree(self, values: Sequence[Any]) -> Any:
    """Maps all names of the group to the members' values, and to `None` for other parameters."""
    value_of = dict(zip(self.members, values))
    return self.rule.tree_type((name, value_of.get(i)) for i, name in enumerate(self.names))

  def arrays(self, group: Mapping[str, Any]) -> Any:
    """Returns a tree of JAX arrays that share the memory of the members' tensors."""
    return self.to_tree(self._share(self.params(group)))

  def shapes(self, group: Mapping[str, Any]) -> Any:
    """Returns a tree of the members' shapes and dtypes."""
    return jax.eval_shape(lambda tree: tree, self.arrays(group))

  def replace_rule(self, rule: _rules.UpdateRule, state: Any) -> None:
    """Continues with another update rule, from a state of that rule."""
    self.rule, self.state, self._steps = rule, state, {}

  def launch_update(
    self, group: Mapping[str, Any], value: float | None = None
  ) -> PendingUpdate | None:
    """Starts an update; returns `None` if no member has a gradient.

    Args:
      group: torch's parameter group, with its tensors and hyperparameters.
      value: the loss, if it is known.
    """
    params = self.params(group)
    has_grad = tuple(p.grad is not None for p in params)
    if not any(has_grad):
      return None
    self._move_state_to(params[0].device)
    arrays = self._share(params)
    grads = [_tensors.view(p.grad) for p in params if p.grad is not None]
    hyperparams = {name: self._scalar(group[name]) for name in self.rule.hyperparams}
    if value is not None:
      hyperparams[_rules.VALUE] = self._scalar(value)
    if has_grad not in self._steps:
      self._steps[has_grad] = self._make_step(has_grad)
    self.state, new_arrays = self._steps[has_grad](self.state, arrays, grads, hyperparams)
    tensors = [p for p, present in zip(params, has_grad) if present]
    return PendingUpdate(tensors, new_arrays, [arrays, grads])

  def compilations(self) -> int:
    """Counts how often an update was compiled."""
    return sum(step._cache_size() for step in self._steps.values())

  def _share(self, params: Sequence[torch.Tensor]) -> list[Any]:
    return [cached.get(p) for cached, p in zip(self._cached_arrays, params)]

  def _make_step(self, has_grad: tuple[bool, ...]) -> Any:
    missing = (self.names[i] for i, present in zip(self.members, has_grad) if not present)
    rule = _rules.handle_missing(self.rule, frozenset(missing))

    # The state is donated and returned first: JAX pairs donated buffers with results in order.
    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, params, grads, hyperparams):
      remaining = iter(grads)
      updates = self.to_tree([next(remaining) if present else None for present in has_grad])
      updates, state = rule.update(updates, state, self.to_tree(params), hyperparams)
      member_updates = [updates[self.names[i]] for i in self.members]
      pairs = [(p, u) for p, u, present in zip(params, member_updates, has_grad) if present]
      return state, optax.apply_updates(*map(list, zip(*pairs)))

    return step

  def _init_state(self, params: Sequence[torch.Tensor]) -> Any:
    with jax.default_device(self._device):
      arrays = self._share(params)
      state = self.rule.init(self.to_tree(arrays))
      # Some transformations put the parameters themselves into their state. Such arrays are copied,
      # since torch overwrites the memory that they share.
      shared = {x.unsafe_buffer_pointer() for x in arrays if x.size}
      state = jax.tree.map(lambda x: x.copy() if _buffer_pointer(x) in shared else x, state)
    # The results of a step are committed to their device. Without committing the initial state too,
    # the second step would compile again.
    return _put_tree(state, self._device)

  def _move_state_to(self, device: torch.device) -> None:
    device = _tensors.jax_device(device)
    if device != self._device:
      self.state = _put_tree(self.state, device)
      self._device, self._steps = device, {}


def put_array(array: Any, device: jax.Device, memory_kind: str | None) -> jax.Array:
  """Commits an array to a device and a memory kind."""
  return jax.device_put(array, jax.sharding.SingleDeviceSharding(device, memory_kind=memory_kind))


def _put_tree(tree: Any, device: jax.Device) -> Any:
  return jax.tree.map(lambda x: put_array(x, device, x.sharding.memory_kind), tree)


def _buffer_pointer(x: Any) -> int | None:
  # Arrays of an extended dtype are PRNG keys.
  is_plain = isinstance(x, jax.Array) and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
  return x.unsafe_buffer_pointer() if is_plain and x.size else None
