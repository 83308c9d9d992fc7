"""The registry of parts: the options, the stage, the state and the figures of each part.

`hina_adaptive` and its checks, `get_optimization_info`, memory plans, the table of options, the
benchmarks and the tests read the parts from here. `register` adds a part from outside the package;
CONTRIBUTING.md walks through it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hina_optax.base import checks, lora

# The stages of the chain of `hina_adaptive`, in order. A `"gradient"` part changes the
# gradient. The last `"moments"` part that is on turns the gradient into a direction. A
# `"direction"` part wraps the direction, a `"rate"` part is a rule that scales it, and a `"decay"`
# part adds to it. A `"step"` part wraps everything from `"moments"` on, with the learning rate.
STAGES = ("gradient", "moments", "direction", "rate", "decay", "step")


@dataclasses.dataclass(frozen=True)
class AllowedValues:
  """The values that an option may have.

  Attributes:
    check: `check(name, value)` raises for any other value.
    description: the allowed values in words.
  """

  check: Callable[[str, Any], None]
  description: str


def at_least(low: float) -> AllowedValues:
  """Numbers of at least `low`."""
  return AllowedValues(functools.partial(checks.number, low=low), f">= {low:g}")


def whole_number(low: int) -> AllowedValues:
  """Whole numbers of at least `low`."""
  return AllowedValues(functools.partial(checks.integer, low=low), f"whole, >= {low}")


def one_of(*values: Any) -> AllowedValues:
  """One of `values`."""
  return AllowedValues(
    functools.partial(checks.choice, allowed=values), " or ".join(map(repr, values)))


def require_static(allowed: AllowedValues) -> AllowedValues:
  """The values of `allowed`, but none that is traced: the program's structure depends on it."""
  def check(name: str, value: Any) -> None:
    checks.static_value(name, value)
    allowed.check(name, value)

  return AllowedValues(check, allowed.description)


FLAG = AllowedValues(checks.flag, "True or False")
NUMBER = at_least(0.0)
POSITIVE = AllowedValues(functools.partial(checks.number, open_low=True), "> 0")
FRACTION = AllowedValues(checks.unit_interval, "in [0, 1]")
POSITIVE_FRACTION = AllowedValues(
  functools.partial(checks.number, high=1.0, open_low=True), "in (0, 1]")
DECAY = AllowedValues(checks.decay, "in [0, 1)")
FUNCTION = AllowedValues(checks.optional_function, "a function")
PATTERN = AllowedValues(lambda name, value: _check_pattern(value), "a regular expression")
ANYTHING = AllowedValues(lambda name, value: None, "")


def _check_pattern(value: Any) -> None:
  lora.compile_pattern(value)


@dataclasses.dataclass(frozen=True)
class Option:
  """One option of `hina_adaptive`.

  Attributes:
    name: the keyword.
    default: the default. If it is `None`, `None` is always allowed.
    allowed: the allowed values.
    text: what the option does, in one line.
    compat: what the option does with `sd_scripts_compat=True`; empty if that is the same.
    defines_state: whether the numbers of a saved state mean something else under another value. A
      checkpoint is then refused.
  """

  name: str
  default: Any
  allowed: AllowedValues
  text: str
  compat: str = ""
  defines_state: bool = False

  def check(self, value: Any) -> None:
    """Refuses a value that is not allowed."""
    if value is not None or self.default is not None:
      self.allowed.check(self.name, value)


@dataclasses.dataclass(frozen=True)
class Figure:
  """A number that shows how a part is doing, read from its state.

  Attributes:
    field: the field of the state, with one number per leaf, whose mean is the figure.
    skip_up_to: numbers up to this one mark leaves that the part does not change. The mean leaves
      them out.
    read: `read(state)` gives the figure itself, in place of `field`. It may use traced operations.
  """

  field: str = ""
  skip_up_to: float = -1.0
  read: Callable[[Any], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Part:
  """One part of `hina_adaptive`, as its module declares it.

  Attributes:
    factory: the public function.
    state: the NamedTuple class of its state.
    stage: one of `STAGES`.
    position: the order of the parts of one stage. The package's own parts have 10, 20, ...
    options: the options of the part. Several parts may share an option.
    switches: the names of the options that switch the part, or a feature of it, on.
    build: `build(options)` makes the part; in the stages `"direction"` and `"step"` it is
      `build(options, inner)`. In the stage `"rate"` it returns a rule.
    is_on: `is_on(options)` says whether the options ask for the part; `None`: the part is on if one
      of its switches is.
    check: `check(options)` refuses options that do not go together.
    shows: for each switch, a function of a state that says whether the switch is on. A switch
      without an entry is on in any state of the part.
    figures: the figures of the part by name.
    drop_order: the order in which `emergency_simplify` switches parts off; `None`: never.
    reads_params: whether the update needs `params`.
    scale_free: whether scaling the gradient scales the update, and changes nothing else.
    moves_minimum: whether it moves the minimum of the loss, or may stop before it.
    identity: arguments with which it does nothing; `None` where there are none.
    examples: arguments of the factory, by a label; what the tests try.
  """

  factory: Callable[..., Any]
  state: type
  stage: str
  position: int
  options: tuple[Option, ...]
  switches: tuple[str, ...]
  build: Callable[..., Any]
  is_on: Callable[[Any], bool] | None = None
  check: Callable[[Any], None] | None = None
  shows: Mapping[str, Callable[[Any], bool]] = dataclasses.field(default_factory=dict)
  figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)
  drop_order: int | None = None
  reads_params: bool = False
  scale_free: bool = False
  moves_minimum: bool = False
  identity: Mapping[str, Any] | None = None
  examples: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=lambda: {"": {}})

  @property
  def name(self) -> str:
    """The name of its factory."""
    return self.factory.__name__

  def is_enabled(self, options: Any) -> bool:
    """Whether the options ask for the part."""
    if self.is_on is not None:
      return self.is_on(options)
    return any(getattr(options, name) for name in self.switches)


def regularizer(
  factory: Callable[..., Any], state: type, position: int, switch: Option,
  arguments: Mapping[str, Option | str], **attributes: Any,
) -> Part:
  """A `"gradient"` part, all of whose arguments are options.

  Args:
    factory: the public function, a gradient transformation.
    state: the class of its state.
    position: the order among the gradient parts. The package's own have 10, 20, ..., 70.
    switch: the option that switches it on.
    arguments: for each argument of `factory` its option, or the name of an option of another part.
    **attributes: other attributes of `Part`.
  """
  names = {argument: option if isinstance(option, str) else option.name
           for argument, option in arguments.items()}

  def build(options: Any) -> Any:
    return factory(**{argument: getattr(options, name) for argument, name in names.items()})

  own_options = tuple(option for option in arguments.values() if isinstance(option, Option))
  return Part(factory, state, "gradient", position, (switch, *own_options), (switch.name,), build,
              **attributes)


_parts: dict[str, Part] = {}
# Options that belong to no part.
_general: dict[str, Option] = {}
# Functions to call after the options have changed.
_watchers: list[Callable[[], None]] = []


def register(part: Part) -> Part:
  """Registers a part, so that `hina_adaptive` and all other readers of the registry know it.

  Returns:
    `part`.

  Raises:
    ValueError: if the stage is unknown, or another part has the same name, or another option has
      the name of one of the part's options.
  """
  if part.stage not in STAGES:
    raise ValueError(f"stage must be one of {', '.join(STAGES)}; got {part.stage!r}.")
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
  _notify_watchers()
  return part


def unregister(name: str) -> None:
  """Removes the part with this name from the registry."""
  if _parts.pop(name, None) is None:
    raise ValueError(f"no part with the name '{name}' is registered; known: {', '.join(_parts)}.")
  _notify_watchers()


def register_options(*general: Option) -> None:
  """Registers options that belong to no part."""
  _general.update((option.name, option) for option in general)
  _notify_watchers()


def add_watcher(watcher: Callable[[], None]) -> None:
  """Calls `watcher` now, and again whenever the options have changed."""
  _watchers.append(watcher)
  watcher()


def parts(stage: str | None = None) -> list[Part]:
  """All parts, or those of one stage, in the order of the chain."""
  chosen = [part for part in _parts.values() if stage in (None, part.stage)]
  return sorted(chosen, key=lambda part: (STAGES.index(part.stage), part.position, part.name))


def options() -> dict[str, Option]:
  """All options by name: the general ones first, then those of the parts in their order."""
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
    cells = (f"`{option.name}`", default, option.allowed.description, option.text,
             option.compat or "the same")
    rows.append(f"| {' | '.join(cells)} |")
  return "\n".join(rows)


def _notify_watchers() -> None:
  for watcher in _watchers:
    watcher()
