"""What each part declares beside its formula: its options, its place, its state, its figures.

`hina_adaptive` and its checks, `get_optimization_info`, what a memory plan may switch off, the
table of options, the benchmarks and the tests read the parts from here. `register` adds one from
outside of the package; CONTRIBUTING.md walks through it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hina_optax.base import checks, lora

# Where a part stands in the chain of `hina_adaptive`, in this order. A part of the first place
# changes the gradient. The last of `"moments"` that is on makes a direction of it, a `"direction"`
# wraps that, a `"rate"` is a rule that scales it, a `"decay"` adds to it. A `"step"` wraps all of
# them and the learning rate.
PLACES = ("gradient", "moments", "direction", "rate", "decay", "step")


@dataclasses.dataclass(frozen=True)
class Allowed:
  """What an option may be.

  Attributes:
    check: `check(name, value)` raises for any other value.
    words: the same for people.
  """

  check: Callable[[str, Any], None]
  words: str


def at_least(low: float) -> Allowed:
  """Numbers from `low` on."""
  return Allowed(functools.partial(checks.number, low=low), f">= {low:g}")


def whole(low: int) -> Allowed:
  """Whole numbers from `low` on."""
  return Allowed(functools.partial(checks.integer, low=low), f"whole, >= {low}")


def one_of(*values: Any) -> Allowed:
  """One of these values."""
  return Allowed(functools.partial(checks.choice, allowed=values), " or ".join(map(repr, values)))


def structural(allowed: Allowed) -> Allowed:
  """The same, but no traced value: the structure of the program depends on it."""
  def check(name: str, value: Any) -> None:
    checks.structural(name, value)
    allowed.check(name, value)

  return Allowed(check, allowed.words)


FLAG = Allowed(checks.flag, "True or False")
NUMBER = at_least(0.0)
POSITIVE = Allowed(functools.partial(checks.number, open_low=True), "> 0")
FRACTION = Allowed(checks.fraction, "in [0, 1]")
SHARE = Allowed(functools.partial(checks.number, high=1.0, open_low=True), "in (0, 1]")
DECAY = Allowed(checks.decay, "in [0, 1)")
RULE = Allowed(checks.rule, "a function")
PATTERN = Allowed(lambda name, value: _check_pattern(value), "a regular expression")
ANYTHING = Allowed(lambda name, value: None, "")


def _check_pattern(value: Any) -> None:
  lora.compile_pattern(value)


@dataclasses.dataclass(frozen=True)
class Option:
  """One option of `hina_adaptive`.

  Attributes:
    name: the keyword.
    default: what it is if nobody says; `None` is always allowed where it is the default.
    allowed: its values.
    text: what it does, in a line.
    compat: what it does with `sd_scripts_compat=True`; empty where that is the same.
  """

  name: str
  default: Any
  allowed: Allowed
  text: str
  compat: str = ""

  def check(self, value: Any) -> None:
    """Refuses a value that is not allowed."""
    if value is not None or self.default is not None:
      self.allowed.check(self.name, value)


@dataclasses.dataclass(frozen=True)
class Figure:
  """A number that tells how a part is doing, read from its state.

  Attributes:
    field: of the state, with one number per leaf: the figure is their mean.
    least: numbers up to it mark leaves that the part leaves alone; they are not in the mean.
    read: `read(state)` gives the figure itself, in place of `field`. It may trace.
  """

  field: str = ""
  least: float = -1.0
  read: Callable[[Any], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Part:
  """One part of `hina_adaptive`, as its module declares it.

  Attributes:
    factory: the public function.
    state: the NamedTuple class of its state.
    place: one of `PLACES`.
    position: parts of one place follow each other by it. Those of the package have 10, 20, ...
    options: its own options. An option may be shared by several parts.
    switches: names of those that switch it, or a feature of it, on.
    build: makes it: `build(options)`, in the places `"direction"` and `"step"`
      `build(options, inner)`. A `"rate"` is a rule.
    is_on: whether the options ask for it; `None`: whether one of its switches is on.
    check: `check(options)` refuses options that do not go together.
    shows: for each switch, whether a state shows that it is on; without an entry any state does.
    figures: by name.
    given_up: the order in which `emergency_simplify` switches it off; `None`: never.
    reads_params: whether the update needs `params`.
    scale_free: whether scaling the gradient scales the update, and changes nothing else.
    moves_minimum: whether it moves the minimum of the loss, or may stop before it.
    identity: arguments with which it does nothing; `None` where there are none.
    examples: arguments of the factory, by a label; what the tests try.
  """

  factory: Callable[..., Any]
  state: type
  place: str
  position: int
  options: tuple[Option, ...]
  switches: tuple[str, ...]
  build: Callable[..., Any]
  is_on: Callable[[Any], bool] | None = None
  check: Callable[[Any], None] | None = None
  shows: Mapping[str, Callable[[Any], bool]] = dataclasses.field(default_factory=dict)
  figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)
  given_up: int | None = None
  reads_params: bool = False
  scale_free: bool = False
  moves_minimum: bool = False
  identity: Mapping[str, Any] | None = None
  examples: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=lambda: {"": {}})

  @property
  def name(self) -> str:
    """That of its factory."""
    return self.factory.__name__

  def asked_for(self, options: Any) -> bool:
    """Whether the options ask for it."""
    if self.is_on is not None:
      return self.is_on(options)
    return any(getattr(options, name) for name in self.switches)


def regularizer(
  factory: Callable[..., Any], state: type, position: int, switch: Option,
  arguments: Mapping[str, Option | str], **more: Any,
) -> Part:
  """A part that changes the gradient, all of whose arguments are options.

  Args:
    factory: the public function, a gradient transformation.
    state: the class of its state.
    position: among the others; those of the package have 10, 20, ..., 70.
    switch: the option that switches it on.
    arguments: for each argument of `factory` its option, or the name of an option that it shares.
    **more: other attributes of `Part`.
  """
  names = {argument: option if isinstance(option, str) else option.name
           for argument, option in arguments.items()}

  def build(options: Any) -> Any:
    return factory(**{argument: getattr(options, name) for argument, name in names.items()})

  own = tuple(option for option in arguments.values() if isinstance(option, Option))
  return Part(factory, state, "gradient", position, (switch, *own), (switch.name,), build, **more)


_parts: dict[str, Part] = {}
_general: dict[str, Option] = {}
# Called after the options have changed.
_watchers: list[Callable[[], None]] = []


def register(part: Part) -> Part:
  """Makes a part known to `hina_adaptive` and to all that reads its parts.

  Returns:
    `part`.

  Raises:
    ValueError: if its place is unknown, another part has its name, or another option one of its
      options' names.
  """
  if part.place not in PLACES:
    raise ValueError(f"place must be one of {', '.join(PLACES)}; got {part.place!r}.")
  if part.name in _parts:
    raise ValueError(f"a part with the name '{part.name}' is registered already.")
  known = options()
  for option in part.options:
    if known.get(option.name, option) is not option:
      raise ValueError(
        f"'{option.name}', an option of the part '{part.name}', is the name of another option of "
        "hina_adaptive. Choose another name.")
  unknown = set(part.switches) - {option.name for option in part.options}
  if unknown:
    raise ValueError(f"switches {sorted(unknown)} of '{part.name}' are none of its options.")
  _parts[part.name] = part
  _tell()
  return part


def forget(name: str) -> None:
  """Takes back what `register` did for the part with this name."""
  if _parts.pop(name, None) is None:
    raise ValueError(f"no part with the name '{name}' is registered; known: {', '.join(_parts)}.")
  _tell()


def register_options(*general: Option) -> None:
  """Makes options known that belong to no part."""
  _general.update((option.name, option) for option in general)
  _tell()


def watch(call: Callable[[], None]) -> None:
  """Has `call` called now, and whenever the options have changed."""
  _watchers.append(call)
  call()


def parts(place: str | None = None) -> list[Part]:
  """All parts, or those of one place, in the order of the chain."""
  found = [part for part in _parts.values() if place in (None, part.place)]
  return sorted(found, key=lambda part: (PLACES.index(part.place), part.position, part.name))


def options() -> dict[str, Option]:
  """All options by name: general ones first, then those of the parts in their order."""
  return _general | {option.name: option for part in parts() for option in part.options}


def switches() -> Iterator[str]:
  """Names of the options that switch a part or a feature of it on, in the order of the chain."""
  yield from dict.fromkeys(name for part in parts() for name in part.switches)


def option_table() -> str:
  """All options of `hina_adaptive` as a Markdown table."""
  rows = ["| option | default | allowed | what it does | with `sd_scripts_compat=True` |",
          "|---|---|---|---|---|"]
  for option in options().values():
    default = f"`{option.default!r}`"
    cells = (f"`{option.name}`", default, option.allowed.words, option.text,
             option.compat or "the same")
    rows.append(f"| {' | '.join(cells)} |")
  return "\n".join(rows)


def _tell() -> None:
  for call in _watchers:
    call()
