"""What each leaf of a state is kept as, and the bytes on the device, while leaves change."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from hina_optax.memory._plan_table import PlanStep, Storage

FORMS = ("as it is", "bfloat16", "8-bit")
# More does not make the copies faster, less makes many of them.
_WINDOW = 128 << 20
_LEAST_HOSTED = 1 << 14
# Step and seed of the rounding.
_WRAPPER = 8


class StateLeaf(NamedTuple):
  """One leaf of a state that is not stored yet.

  Attributes:
    path: in the state, such as `"0/mu/dense/kernel"`.
    group: the field that holds it, such as `"mu"`.
    owner: path of the parameter it belongs to; empty for counters.
    size: its elements.
    dtype: as the transformation keeps it for parameters of at least fp32, as in a wrapper.
    bare: as it keeps it for the parameters themselves.
    movable: false for counters and for vectors of one number a leaf, which stay as they are.
    sizes: bytes in each of `FORMS`.
  """

  path: str
  group: str
  owner: str
  size: int
  dtype: Any
  bare: Any
  movable: bool
  sizes: tuple[int, int, int]


class Ledger:
  """The forms of all leaves, with the bytes that follow.

  Args:
    leaves: of the state.
    least_form: place in `FORMS` from which every leaf starts.
    host: whether every leaf starts in host memory.
    window: bytes of hosted state on the device at once; `None`: chosen.
  """

  def __init__(
    self, leaves: list[StateLeaf], least_form: int, host: bool, window: int | None
  ):
    self.leaves, self.window = leaves, window
    self.forms = [least_form if x.sizes[least_form] < x.sizes[0] else 0 for x in leaves]
    self.resident = sum(x.sizes[f] for x, f in zip(leaves, self.forms))
    self.resident += _WRAPPER * len(set(self.forms) - {0})
    self.counts = [self.forms.count(form) for form in range(len(FORMS))]
    self.hosted: set[int] = set()
    self.owners: dict[str, int] = {}
    self.on_host = self.largest_owner = 0
    for i in range(len(leaves)) if host else ():
      self._host(i)

  def on_device(self) -> int:
    """Bytes of resident state, of the smallest window and of the window's new values."""
    return self.resident + 2 * min(self.on_host, self.window or self.largest_owner)

  def shrink(self, room: int) -> list[PlanStep]:
    """Changes leaves, the largest first, until `room` bytes are enough."""
    steps: list[PlanStep] = []
    order = sorted(range(len(self.leaves)), key=lambda i: -self.leaves[i].sizes[0])
    for change in (1, 2, len(FORMS)):
      if change == len(FORMS) and not self._hosting_helps():
        break
      for i in order:
        if self.on_device() <= room:
          return steps
        steps += self.apply(i, change)
    return steps

  def apply(self, i: int, change: int) -> list[PlanStep]:
    """Changes leaf `i` if that saves anything."""
    leaf, now = self.leaves[i], self.leaves[i].sizes[self.forms[i]]
    if change == len(FORMS):
      return [PlanStep(leaf.group, "host memory", 1, now)] if self._host(i) else []
    saves = now - leaf.sizes[change]
    if i in self.hosted or self.forms[i] >= change or saves <= 0:
      return []
    # One wrapper more for the first leaf of a form, one less with the last of the form before.
    old = self.forms[i]
    self.counts[old] -= 1
    self.resident += _WRAPPER * ((self.counts[change] == 0) - (old > 0 and self.counts[old] == 0))
    self.counts[change] += 1
    self.forms[i] = change
    self.resident -= saves
    return [PlanStep(leaf.group, FORMS[change], 1, saves)]

  def storage(self, rounding: str, room: int | None) -> Storage:
    """The choice, by path."""
    spare = _WINDOW if room is None else min(_WINDOW, (room - self.resident) // 2)
    return Storage(
      narrow=self._paths(i for i, f in enumerate(self.forms) if f == 1),
      quantized=self._paths(i for i, f in enumerate(self.forms) if f == 2),
      hosted=self._paths(self.hosted),
      window=(self.window or max(self.largest_owner, spare)) if self.hosted else 0,
      rounding=rounding,
    )

  def _host(self, i: int) -> bool:
    size = self.leaves[i].sizes[self.forms[i]]
    if i in self.hosted or size < _LEAST_HOSTED or not self.leaves[i].movable:
      return False
    self.hosted.add(i)
    self.resident -= size
    self.on_host += size
    owner = self.leaves[i].owner
    self.owners[owner] = self.owners.get(owner, 0) + size
    self.largest_owner = max(self.largest_owner, self.owners[owner])
    return True

  def _hosting_helps(self) -> bool:
    """Whether all that can go to the host is more than the window through which it visits."""
    owners: dict[str, int] = {}
    for i, leaf in enumerate(self.leaves):
      size = leaf.sizes[self.forms[i]]
      if size >= _LEAST_HOSTED and leaf.movable:
        owners[leaf.owner] = owners.get(leaf.owner, 0) + size
    window = self.window or max(owners.values(), default=0)
    return sum(owners.values()) > 2 * window

  def _paths(self, places: Iterable[int]) -> frozenset[str]:
    return frozenset(self.leaves[i].path for i in places)
