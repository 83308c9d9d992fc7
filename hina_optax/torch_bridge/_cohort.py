"""Parameters of one group that began together: one state, one compiled update for all of them."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import torch

from hina_optax.torch_bridge import _rules, _tensors


class Launched(NamedTuple):
  """An update that may be on its way.

  Attributes:
    tensors: to write.
    arrays: their new values.
    inputs: held until these are written, since they may be copies that nobody else holds.
  """

  tensors: list[torch.Tensor]
  arrays: list[jax.Array]
  inputs: list[Any]


class Cohort:
  """Parameters with one optimizer state.

  Attributes:
    members: their places in the group.
    names: of all parameters of the group; those of others hold `None` in the trees.
    rule: what updates them.
    state: the optimizer's.
  """

  def __init__(self, group: Mapping[str, Any], names: Sequence[str], members: Sequence[int],
               rule: _rules.Rule, state: Any = None):
    self.members, self.names, self.rule = tuple(members), tuple(names), rule
    self._windows = [_tensors.Window() for _ in self.members]
    self._steps: dict[tuple[bool, ...], Any] = {}
    self._number = np.dtype(jax.dtypes.canonicalize_dtype(np.float64)).type
    params = self.params(group)
    _tensors.check_parameters([self.names[i] for i in self.members], params)
    self._device = _tensors.jax_device(params[0].device)
    self.state = self._begin(params) if state is None else state

  def params(self, group: Mapping[str, Any]) -> list[torch.Tensor]:
    """The members' tensors."""
    return [group["params"][i] for i in self.members]

  def tree(self, values: Sequence[Any]) -> Any:
    """One value a member, under the names of the whole group."""
    found = dict(zip(self.members, values))
    return self.rule.tree((name, found.get(i)) for i, name in enumerate(self.names))

  def arrays(self, group: Mapping[str, Any]) -> Any:
    """The members as arrays over their own memory."""
    return self.tree([window.look(p) for window, p in zip(self._windows, self.params(group))])

  def shapes(self, group: Mapping[str, Any]) -> Any:
    """The members' shapes and dtypes."""
    return jax.eval_shape(lambda tree: tree, self.arrays(group))

  def follow(self, rule: _rules.Rule, state: Any) -> None:
    """Goes on with another rule from a state that fits it."""
    self.rule, self.state, self._steps = rule, state, {}

  def launch(self, group: Mapping[str, Any], value: float | None = None) -> Launched | None:
    """Begins an update; `None` where no member has a gradient. `value` is the loss, if known."""
    params = self.params(group)
    present = tuple(p.grad is not None for p in params)
    if not any(present):
      return None
    self._move_to(params[0].device)
    arrays = [window.look(p) for window, p in zip(self._windows, params)]
    grads = [_tensors.view(p.grad) for p in params if p.grad is not None]
    numbers = {name: self._number(group[name]) for name in self.rule.numbers}
    if value is not None:
      numbers[_rules.VALUE] = self._number(value)
    if present not in self._steps:
      self._steps[present] = self._compiled(present)
    self.state, news = self._steps[present](self.state, arrays, grads, numbers)
    return Launched([p for p, there in zip(params, present) if there], news, [arrays, grads])

  def compilations(self) -> int:
    """How often an update was compiled."""
    return sum(step._cache_size() for step in self._steps.values())

  def _compiled(self, present: tuple[bool, ...]) -> Any:
    gone = (self.names[i] for i, there in zip(self.members, present) if not there)
    rule = _rules.with_missing(self.rule, frozenset(gone))

    # The state is donated and returned first: JAX pairs donated buffers with results in order.
    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, params, grads, numbers):
      given = iter(grads)
      updates = self.tree([next(given) if there else None for there in present])
      updates, state = rule.update(updates, state, self.tree(params), numbers)
      moves = [updates[self.names[i]] for i in self.members]
      kept = [(p, u) for p, u, there in zip(params, moves, present) if there]
      return state, optax.apply_updates(*map(list, zip(*kept)))

    return step

  def _begin(self, params: Sequence[torch.Tensor]) -> Any:
    with jax.default_device(self._device):
      arrays = [window.look(p) for window, p in zip(self._windows, params)]
      state = self.rule.init(self.tree(arrays))
      # Some transformations begin with the parameters themselves: not with torch's memory.
      shared = {x.unsafe_buffer_pointer() for x in arrays if x.size}
      state = jax.tree.map(lambda x: x.copy() if _pointer(x) in shared else x, state)
    # Bound to their device at once, as results are: else the second step would compile again.
    return jax.tree.map(lambda x: put(x, self._device, x.sharding.memory_kind), state)

  def _move_to(self, device: torch.device) -> None:
    device = _tensors.jax_device(device)
    if device != self._device:
      self.state = jax.tree.map(lambda x: put(x, device, x.sharding.memory_kind), self.state)
      self._device, self._steps = device, {}


def put(array: Any, device: jax.Device, memory_kind: str | None) -> jax.Array:
  """An array on a device, in a kind of its memory."""
  return jax.device_put(array, jax.sharding.SingleDeviceSharding(device, memory_kind=memory_kind))


def _pointer(x: Any) -> int | None:
  plain = isinstance(x, jax.Array) and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
  return x.unsafe_buffer_pointer() if plain and x.size else None
