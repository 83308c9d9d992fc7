"""`MemoryPlan`: how a state is stored and how many bytes that takes, as data and as a table."""

import dataclasses
from typing import Any, NamedTuple

_MB = 1 << 20
_MIN_USEFUL_SHARE, _MIN_SHOWN_SHARE = 0.01, 0.001


class PlanRow(NamedTuple):
  """Arrays of one group, dtype and place.

  Attributes:
    group: `"parameters"`, `"gradients"`, or a field of the state such as `"mu"`.
    dtype: dtype of the arrays.
    place: `"device"` or `"host"`.
    leaves: number of arrays.
    bytes: bytes of all these arrays.
  """

  group: str
  dtype: str
  place: str
  leaves: int
  bytes: int


class PlanStep(NamedTuple):
  """One kind of saving on one field of the state.

  Attributes:
    group: the field.
    change: `"bfloat16"`, `"8-bit"` or `"host memory"`.
    leaves: number of arrays that change.
    saves: bytes that it saves on the device.
  """

  group: str
  change: str
  leaves: int
  saves: int


class Storage(NamedTuple):
  """How each leaf of a state is stored, by its path.

  Attributes:
    narrow: leaves in bf16.
    quantized: leaves in 8 bits.
    hosted: leaves in host memory.
    window: bytes of offloaded leaves that are on the device at once.
    rounding: how the leaves in bf16 are rounded.
  """

  narrow: frozenset[str] = frozenset()
  quantized: frozenset[str] = frozenset()
  hosted: frozenset[str] = frozenset()
  window: int = 0
  rounding: str = "stochastic"


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
  """How state is stored, how many bytes everything takes, and whether it fits.

  Attributes:
    rows: bytes by group, dtype and place.
    steps: the savings that were needed to meet the budget.
    budget_bytes: budget on the device; `None` without a limit.
    reserve_bytes: part of the budget that is kept for something else.
    storage: how each leaf of the state is stored.
    dropped: options that were switched off to save their state.
  """

  rows: tuple[PlanRow, ...]
  steps: tuple[PlanStep, ...]
  budget_bytes: int | None
  reserve_bytes: int
  storage: Storage
  dropped: tuple[str, ...] = ()

  @property
  def state_bytes(self) -> int:
    """Bytes of the state, wherever it is."""
    return sum(r.bytes for r in self.rows if r.group not in ("parameters", "gradients"))

  @property
  def host_bytes(self) -> int:
    """Bytes in host memory."""
    return sum(r.bytes for r in self.rows if r.place == "host")

  @property
  def window_bytes(self) -> int:
    """Largest number of bytes of offloaded state on the device: a window, and its new values."""
    return 2 * min(self.storage.window, self.host_bytes)

  @property
  def device_bytes(self) -> int:
    """Bytes on the device: parameters, gradients, resident state and the window."""
    return sum(r.bytes for r in self.rows if r.place == "device") + self.window_bytes

  @property
  def pressure(self) -> float | None:
    """Share of the budget in use, the reserve included; `None` without a budget."""
    if self.budget_bytes is None:
      return None
    return (self.device_bytes + self.reserve_bytes) / self.budget_bytes

  @property
  def excess_bytes(self) -> int:
    """Bytes above the budget; 0 if all fits."""
    if self.budget_bytes is None:
      return 0
    return max(0, self.device_bytes + self.reserve_bytes - self.budget_bytes)

  @property
  def fits(self) -> bool:
    """Whether the budget is met."""
    return self.excess_bytes == 0

  def to_dict(self) -> dict[str, Any]:
    """The plan as numbers, strings, lists and dicts, for JSON."""
    return {
      "rows": [row._asdict() for row in self.rows],
      "steps": [step._asdict() | {"advice": self._advise_against(step)} for step in self.steps],
      "storage": {
        key: sorted(value) if isinstance(value, frozenset) else value
        for key, value in self.storage._asdict().items()
      },
      "dropped": list(self.dropped),
      **{name: getattr(self, name) for name in (
        "budget_bytes", "reserve_bytes", "device_bytes", "host_bytes", "window_bytes",
        "state_bytes", "pressure", "fits", "excess_bytes")},
    }

  def __str__(self) -> str:
    """A table for people."""
    lines = [f"{'what':<18}{'dtype':<10}{'place':<8}{'arrays':>8}{'MB':>12}"]
    lines += [_format_row(*row) for row in self._select_rows()]
    if self.window_bytes:
      lines.append(f"{'window for the host':<36}{'':>8}{self.window_bytes / _MB:>12,.2f}")
    lines += [
      f"{s.group} to {s.change} saves {s.saves / _MB:,.1f} MB on {s.leaves} arrays"
      f"{self._format_advice(s)}" for s in self.steps
    ]
    lines += [f"dropped to save its state: {name}" for name in self.dropped]
    return "\n".join([*lines, self._format_verdict()])

  def _select_rows(self) -> list[PlanRow]:
    """Returns the rows, with those that are too small to matter merged into one."""
    min_bytes = _MIN_SHOWN_SHARE * sum(r.bytes for r in self.rows)
    minor = [r for r in self.rows if r.bytes < min_bytes]
    merged = PlanRow("other", "", "", sum(r.leaves for r in minor), sum(r.bytes for r in minor))
    return [r for r in self.rows if r.bytes >= min_bytes] + ([merged] if minor else [])

  def _advise_against(self, step: PlanStep) -> str | None:
    """Advises against a step that saves only a small share of what is on the device."""
    if step.saves >= _MIN_USEFUL_SHARE * (self.device_bytes + self.reserve_bytes):
      return None
    return (
      f"saves less than {_MIN_USEFUL_SHARE:.0%} of what is on the device: leave it out if you can")

  def _format_advice(self, step: PlanStep) -> str:
    advice = self._advise_against(step)
    return f" ({advice})" if advice else ""

  def _format_verdict(self) -> str:
    used = f"{(self.device_bytes + self.reserve_bytes) / _MB:,.1f} MB on the device"
    if self.reserve_bytes:
      used += f", of them {self.reserve_bytes / _MB:,.1f} MB in reserve"
    if self.host_bytes:
      used += f"; {self.host_bytes / _MB:,.1f} MB on the host"
    if self.budget_bytes is None:
      return used + "."
    budget = f"the budget of {self.budget_bytes / _MB:,.1f} MB"
    if self.fits:
      return f"{used}. It fits {budget}."
    fixed = sum(r.bytes for r in self.rows if r.group in ("parameters", "gradients"))
    return (
      f"{used}. It does not fit {budget}: {self.excess_bytes / _MB:,.1f} MB too much. Parameters "
      f"and gradients alone take {fixed / _MB:,.1f} MB."
    )


def _format_row(group: str, dtype: str, place: str, leaves: int, size: int) -> str:
  return f"{group:<18}{dtype:<10}{place:<8}{leaves:>8}{size / _MB:>12,.2f}"
