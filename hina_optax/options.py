"""The options of `hina_adaptive`: the general ones, checks of all options, and presets.

"The guide" is the Traditional Chinese guide to HinaAdaptive that the library implements. "The
original" is the PyTorch class `HinaAdaptive` in a fork of kohya's sd-scripts.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

from hina_optax import registry
from hina_optax.base import checks
from hina_optax.registry import Option

P = ParamSpec("P")
R = TypeVar("R")

_REPLACEMENT = (
  "it was removed because frequency has no image meaning in latents. Use edge_suppression, "
  "spatial_awareness or background_regularization instead."
)
# A name that contains one of these words was an option of the removed Fourier features.
_REMOVED_WORDS = ("fourier", "super_resolution", "adaptive_frequency_weighting")
_ALIASES = {"lr": "learning_rate", "b1": "betas", "b2": "betas", "mask": "weight_decay_mask"}


def _check_learning_rate(name: str, value: Any) -> None:
  if not callable(value):
    checks.number(name, value)


registry.register_options(
  Option("learning_rate", 1e-3, registry.AllowedValues(_check_learning_rate, ">= 0, or a schedule"),
         "step size, a number or an optax schedule"),
  Option("spatial_axes", None, registry.FUNCTION,
         "`f(path, leaf) -> axes` along which neighbours are compared; `None`: "
         "`flax_spatial_axes`", "give `torch_spatial_axes` for PyTorch's order"),
  Option("sd_scripts_compat", False, registry.FLAG,
         "the PyTorch original's arithmetic, step by step, faults included",
         defines_state=True),
)
# These options decide where state is stored, not what is computed.
_MEMORY = (
  Option("memory_efficient", False, registry.FLAG,
         "keep state as `plan_memory` advises for the budget, or without one for what the device "
         "reports"),
  Option("vram_budget_gb", None, registry.require_static(registry.POSITIVE),
         "GB (2^30 bytes) for parameters, gradients and state; implies `memory_efficient`"),
  Option("reduce_precision", False, registry.FLAG, "keep state in bf16, rounded stochastically",
         "rounded to nearest"),
  Option("cpu_offload_states", False, registry.FLAG, "keep state in host memory"),
  Option("max_buffer_memory_mb", None, registry.require_static(registry.POSITIVE),
         "MB (2^20 bytes) of hosted state that are on the device at once; `None`: 128, or the "
         "state of the largest parameter"),
  Option("adaptive_features", False, registry.FLAG, "plan for 80% of the budget"),
  Option("emergency_simplify", False, registry.FLAG,
         "above 90% of the budget first switch off features with large state, with a warning"),
)
MEMORY_OPTIONS = tuple(option.name for option in _MEMORY)
registry.register_options(
  *_MEMORY,
  Option("leaf_batching", None, registry.require_static(registry.FLAG),
         "stack leaves of equal shape; `None`: wherever a part beyond Adam's moments and weight "
         "decay is on"),
  Option("max_batched_elements", None, registry.require_static(registry.whole_number(1)),
         "elements up to which a leaf is stacked; `None`: 2**20"),
)


class HinaOptions(Mapping[str, Any]):
  """The checked options of one `hina_adaptive`, as attributes and as a mapping from their names.

  Options that are not given have the defaults of `hina_optax.registry`.

  Raises:
    ValueError: an option is unknown, lies outside its range, or does not go with another.
    TypeError: an option has the wrong type.
  """

  __slots__ = ("_values",)

  def __init__(self, **options: Any):
    """Checks every option under the name the user gave it."""
    known = registry.options()
    for name in options:
      if name not in known:
        raise_unknown_option(name, known)
    values = {name: options.get(name, option.default) for name, option in known.items()}
    object.__setattr__(self, "_values", values)
    for name, option in known.items():
      option.check(values[name])
    for part in registry.parts():
      if part.check is not None:
        part.check(self)

  def __getattr__(self, name: str) -> Any:
    if name.startswith("_"):  # `copy` looks up special methods before `_values` is set.
      raise AttributeError(name)
    try:
      return self._values[name]
    except KeyError:
      raise AttributeError(f"hina_adaptive has no option '{name}'.") from None

  def __setattr__(self, name: str, value: Any) -> None:
    raise AttributeError(f"options cannot be changed; make others by replace({name}=...).")

  def __getitem__(self, name: str) -> Any:
    return self._values[name]

  def __iter__(self) -> Any:
    return iter(self._values)

  def __len__(self) -> int:
    return len(self._values)

  def __hash__(self) -> int:
    return hash(tuple(self._values))

  def __reduce__(self) -> Any:
    return functools.partial(HinaOptions, **self._values), ()

  def __repr__(self) -> str:
    defaults = {name: option.default for name, option in registry.options().items()}
    changed = (f"{name}={value!r}" for name, value in self._values.items()
               if repr(value) != repr(defaults.get(name)))
    return f"HinaOptions({', '.join(changed)})"

  def replace(self, **changes: Any) -> "HinaOptions":
    """The same options except for `changes`."""
    return HinaOptions(**{**self._values, **changes})

  def as_dict(self) -> dict[str, Any]:
    """The options by name."""
    return dict(self._values)


def accept_registered_options(
  rebuild: Callable[..., Any]
) -> Callable[[Callable[P, R]], Callable[P, R]]:
  """Decorates a factory so that it also takes the options of parts from outside the package.

  Its signature shows these options while their parts are registered. An unknown keyword raises an
  error that suggests a known one.

  Args:
    rebuild: `rebuild(transformation, **options)` returns what the factory made, with these options
      set as well.
  """
  def decorator(factory: Callable[P, R]) -> Callable[P, R]:
    signature = inspect.signature(factory)
    own_parameters = signature.parameters

    @functools.wraps(factory)
    def call_checked(*args: P.args, **kwargs: P.kwargs) -> R:
      known = registry.options()
      for name in kwargs:
        if name not in known:
          raise_unknown_option(name, known)
      external = {name: kwargs.pop(name) for name in list(kwargs) if name not in own_parameters}
      transformation = factory(*args, **kwargs)
      return rebuild(transformation, **external) if external else transformation

    def extend_signature() -> None:
      external = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default)
        for name, option in registry.options().items() if name not in own_parameters]
      call_checked.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*own_parameters.values(), *external])

    registry.add_watcher(extend_signature)
    return call_checked

  return decorator


def raise_unknown_option(name: str, known: Iterable[str]) -> None:
  """Raises for an option that does not exist, naming its replacement or the nearest name.

  Raises:
    ValueError: always.
  """
  if any(word in name for word in _REMOVED_WORDS):
    raise ValueError(f"{name}: {_REPLACEMENT}")
  similar = difflib.get_close_matches(name, known, n=1)
  similar = [_ALIASES[name]] if name in _ALIASES else similar
  hint = f" Did you mean '{similar[0]}'?" if similar else " See help(hina_optax.hina_adaptive)."
  raise ValueError(f"hina_adaptive has no option '{name}'.{hint}")


def _make_preset(overrides: Mapping[str, Any], **options: Any) -> dict[str, Any]:
  return {**options, "memory_efficient": True, **overrides}


def lora_preset(**overrides: Any) -> dict[str, Any]:
  """The guide's configuration for LoRA training, as options of `hina_adaptive`.

  Args:
    **overrides: options that replace or join those of the preset.

  Returns:
    A new dict: `hina_adaptive(**lora_preset())`.

  Example:
    >>> import hina_optax
    >>> hina_optax.lora_preset(edge_penalty=0.05)["edge_penalty"]
    0.05
  """
  return _make_preset(
    overrides, learning_rate=1e-4, lora_rank_penalty=True, rank_penalty_strength=0.01,
    low_rank_emphasis=1.2, edge_suppression=True, edge_penalty=0.08, vram_budget_gb=8.0,
  )


def large_model_preset(**overrides: Any) -> dict[str, Any]:
  """The guide's configuration for large models, as options of `hina_adaptive`.

  Args:
    **overrides: options that replace or join those of the preset.

  Returns:
    A new dict: `hina_adaptive(**large_model_preset())`.

  Example:
    >>> import hina_optax
    >>> hina_optax.large_model_preset()["learning_rate"]
    8e-05
  """
  return _make_preset(
    overrides, learning_rate=8e-5, edge_suppression=True, edge_penalty=0.12,
    spatial_awareness=True, frequency_penalty=0.06, background_regularization=True,
    use_dynamic_adaptation=True, vram_budget_gb=16.0, reduce_precision=True,
    cpu_offload_states=True,
  )


def quick_preset(**overrides: Any) -> dict[str, Any]:
  """The guide's light configuration for quick experiments, as options of `hina_adaptive`.

  Args:
    **overrides: options that replace or join those of the preset.

  Returns:
    A new dict: `hina_adaptive(**quick_preset())`.

  Example:
    >>> import hina_optax
    >>> hina_optax.quick_preset()["edge_suppression"]
    True
  """
  return _make_preset(
    overrides, learning_rate=1e-4, edge_suppression=True, edge_penalty=0.1, vram_budget_gb=6.0
  )


def extreme_memory_preset(**overrides: Any) -> dict[str, Any]:
  """The guide's configuration for the least memory, as options of `hina_adaptive`.

  Args:
    **overrides: options that replace or join those of the preset.

  Returns:
    A new dict: `hina_adaptive(**extreme_memory_preset())`.

  Example:
    >>> import hina_optax
    >>> hina_optax.extreme_memory_preset()["max_buffer_memory_mb"]
    200
  """
  return _make_preset(
    overrides, learning_rate=1e-4, vram_budget_gb=4.0, reduce_precision=True,
    cpu_offload_states=True, max_buffer_memory_mb=200, adaptive_features=True,
  )
