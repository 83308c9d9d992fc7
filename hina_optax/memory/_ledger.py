"""`Ledger`: counts the bytes of a state on the device while a plan changes how it is stored."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from hina_optax.memory._plan_table import PlanStep, Storage

PRECISIONS = ("as it is", "bfloat16", "8-bit")
_BF16, _INT8, _HOST = 1, 2, len(PRECISIONS)
# A larger window does not make the copies faster, a smaller one makes many of them.
_MAX_WINDOW_BYTES = 128 << 20
_MIN_OFFLOADED_BYTES = 1 << 14
# Step and seed of the rounding.
_WRAPPER_BYTES = 8


class StateLeaf(NamedTuple):
  """One leaf of a state that is not stored yet.

  Attributes:
    path: path in the state, such as `"0/mu/dense/kernel"`.
    field: the field that holds the leaf, such as `"mu"`.
    owner: path of the parameter it belongs to; empty for counters.
    size: number of elements.
    dtype: dtype in a storage wrapper, which widens parameters to at least fp32.
    unwrapped_dtype: dtype without a storage wrapper.
    movable: false for counters and for vectors of one number per leaf, which are not changed.
    sizes: bytes in each of `PRECISIONS`.
  """

  path: str
  field: str
  owner: str
  size: int
  dtype: Any
  unwrapped_dtype: Any
  movable: bool
  sizes: tuple[int, int, int]


class Ledger:
  """The precision and the place of all leaves, and the bytes that follow from them.

  Args:
    leaves: the leaves of the state.
    initial_precision: index in `PRECISIONS` with which every leaf starts.
    host: whether every leaf starts in host memory.
    window: bytes of offloaded state on the device at once; `None`: the ledger chooses.
  """

  def __init__(
    self, leaves: list[StateLeaf], initial_precision: int, host: bool, window: int | None
  ):
    self.leaves, self.window = leaves, window
    self.precisions = [
      initial_precision if x.sizes[initial_precision] < x.sizes[0] else 0 for x in leaves]
    self.resident_bytes = sum(x.sizes[i] for x, i in zip(leaves, self.precisions))
    self.resident_bytes += _WRAPPER_BYTES * len(set(self.precisions) - {0})
    self.counts = [self.precisions.count(i) for i in range(len(PRECISIONS))]
    self.hosted: set[int] = set()
    self.owner_bytes: dict[str, int] = {}
    self.host_bytes = self.largest_owner_bytes = 0
    for i in range(len(leaves)) if host else ():
      self._offload(i)

  def count_device_bytes(self) -> int:
    """Returns the bytes of resident state, of the smallest window, and of its new values."""
    window = self.window or self.largest_owner_bytes
    return self.resident_bytes + 2 * min(self.host_bytes, window)

  def shrink(self, room: int) -> list[PlanStep]:
    """Changes leaves, the largest first, until the state fits into `room` bytes."""
    steps: list[PlanStep] = []
    order = sorted(range(len(self.leaves)), key=lambda i: -self.leaves[i].sizes[0])
    for change in (_BF16, _INT8, _HOST):
      if change == _HOST and not self._offloading_saves_memory():
        break
      for i in order:
        if self.count_device_bytes() <= room:
          return steps
        steps += self.shrink_leaf(i, change)
    return steps

  def shrink_leaf(self, i: int, change: int) -> list[PlanStep]:
    """Changes leaf `i` if that saves anything; returns the step, or no step."""
    leaf, old = self.leaves[i], self.precisions[i]
    if change == _HOST:
      step = PlanStep(leaf.field, "host memory", 1, leaf.sizes[old])
      return [step] if self._offload(i) else []
    saves = leaf.sizes[old] - leaf.sizes[change]
    if i in self.hosted or old >= change or saves <= 0:
      return []
    # The first leaf of a precision adds its wrapper, the last one of the old precision removes it.
    self.counts[old] -= 1
    adds_wrapper, removes_wrapper = self.counts[change] == 0, old > 0 and self.counts[old] == 0
    self.resident_bytes += _WRAPPER_BYTES * (adds_wrapper - removes_wrapper)
    self.counts[change] += 1
    self.precisions[i] = change
    self.resident_bytes -= saves
    return [PlanStep(leaf.field, PRECISIONS[change], 1, saves)]

  def make_storage(self, rounding: str, room: int | None) -> Storage:
    """Returns how each leaf is stored, by path."""
    spare = _MAX_WINDOW_BYTES
    if room is not None:
      spare = min(_MAX_WINDOW_BYTES, (room - self.resident_bytes) // 2)
    window = self.window or max(self.largest_owner_bytes, spare)
    return Storage(
      narrow=self._find_paths(i for i, x in enumerate(self.precisions) if x == _BF16),
      quantized=self._find_paths(i for i, x in enumerate(self.precisions) if x == _INT8),
      hosted=self._find_paths(self.hosted),
      window=window if self.hosted else 0,
      rounding=rounding,
    )

  def _can_offload(self, i: int) -> bool:
    return (
      self.leaves[i].movable
      and self.leaves[i].sizes[self.precisions[i]] >= _MIN_OFFLOADED_BYTES)

  def _offload(self, i: int) -> bool:
    """Moves leaf `i` to the host; returns whether it moved."""
    if i in self.hosted or not self._can_offload(i):
      return False
    size, owner = self.leaves[i].sizes[self.precisions[i]], self.leaves[i].owner
    self.hosted.add(i)
    self.resident_bytes -= size
    self.host_bytes += size
    self.owner_bytes[owner] = self.owner_bytes.get(owner, 0) + size
    self.largest_owner_bytes = max(self.largest_owner_bytes, self.owner_bytes[owner])
    return True

  def _offloading_saves_memory(self) -> bool:
    """Whether all leaves that can be offloaded take more than their window and its new values."""
    owner_bytes: dict[str, int] = {}
    for i, leaf in enumerate(self.leaves):
      if self._can_offload(i):
        size = leaf.sizes[self.precisions[i]]
        owner_bytes[leaf.owner] = owner_bytes.get(leaf.owner, 0) + size
    window = self.window or max(owner_bytes.values(), default=0)
    return sum(owner_bytes.values()) > 2 * window

  def _find_paths(self, indices: Iterable[int]) -> frozenset[str]:
    return frozenset(self.leaves[i].path for i in indices)
