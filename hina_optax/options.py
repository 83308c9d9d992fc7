"""Options of `hina_adaptive`: names, ranges, what was removed, and the guide's presets."""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import optax

from hina_optax.base import checks, lora, paths

P = ParamSpec("P")
R = TypeVar("R")

_REPLACEMENT = (
  "it was removed because frequency has no image meaning in latents. Use edge_suppression, "
  "spatial_awareness or background_regularization instead."
)
# Whatever carries one of these words was an option of the removed Fourier features.
_REMOVED_WORDS = ("fourier", "super_resolution", "adaptive_frequency_weighting")
# They say where state lies, not what is computed.
MEMORY_OPTIONS = (
  "memory_efficient", "vram_budget_gb", "reduce_precision", "cpu_offload_states",
  "max_buffer_memory_mb", "adaptive_features", "emergency_simplify",
)
_OTHER_NAMES = {"lr": "learning_rate", "b1": "betas", "b2": "betas", "mask": "weight_decay_mask"}


@dataclasses.dataclass(frozen=True)
class HinaOptions:
  """The options of one `hina_adaptive`, checked. Defaults stand in its signature alone."""

  learning_rate: optax.ScalarOrSchedule
  betas: tuple[float, float]
  eps: float
  weight_decay: float
  edge_suppression: bool
  edge_penalty: float
  edge_threshold: float
  spatial_awareness: bool
  frequency_penalty: float
  detail_preservation: float
  background_regularization: bool
  background_regularization_mode: str
  lora_rank_penalty: bool
  rank_penalty_strength: float
  low_rank_emphasis: float
  use_agr: bool
  use_orthogonal_grad: bool
  use_tam: bool
  tam_beta: float | None
  use_adopt_stability: bool
  use_cautious: bool
  use_grams: bool
  use_lr_mask: bool
  lr_bump: float | None
  min_lr: float | None
  max_lr: float | None
  warmup_steps: int
  reference_lr: float | None
  use_dynamic_adaptation: bool
  adaptation_strength: float
  relationship_discovery_interval: int
  importance_decay: float
  compatibility_threshold: float
  intrinsic_importance: str
  dynamic_weight_decay: bool
  wd_transition_steps: int
  wd_decay_factor: float
  wd_min_ratio: float
  weight_decay_mask: Any
  use_spd: bool
  spd_lambda: float
  unpaired: str
  lora_pattern: str | None
  spatial_axes: paths.SpatialAxes | None
  sd_scripts_compat: bool
  memory_efficient: bool
  vram_budget_gb: float | None
  reduce_precision: bool
  cpu_offload_states: bool
  max_buffer_memory_mb: float | None
  adaptive_features: bool
  emergency_simplify: bool
  leaf_batching: bool | None
  max_batched_elements: int | None

  def __post_init__(self) -> None:
    """Checks every option under the name the user gave it."""
    for field in dataclasses.fields(self):
      if field.type in (bool, "bool"):
        checks.flag(field.name, getattr(self, field.name))
    for check, names in _RANGES:
      for name in names:
        if (value := getattr(self, name)) is not None:
          check(name, value)
    self._check_betas()
    self._check_choices()
    self._check_combinations()

  def _check_betas(self) -> None:
    if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
      raise ValueError(f"betas must be a pair (b1, b2), got {self.betas!r}.")
    for i, beta in enumerate(self.betas):
      checks.decay(f"betas[{i}]", beta)

  def _check_choices(self) -> None:
    if not callable(self.learning_rate):
      checks.number("learning_rate", self.learning_rate)
    checks.choice(
      "background_regularization_mode", self.background_regularization_mode, ("simple", "fast")
    )
    checks.choice("intrinsic_importance", self.intrinsic_importance, ("full", "estimated"))
    checks.choice("unpaired", self.unpaired, ("ignore", "nuclear"))
    checks.rule("spatial_axes", self.spatial_axes)
    lora.compile_pattern(self.lora_pattern)
    checks.structural("leaf_batching", self.leaf_batching)
    if self.leaf_batching is not None:
      checks.flag("leaf_batching", self.leaf_batching)
    checks.structural("max_batched_elements", self.max_batched_elements)
    if self.max_batched_elements is not None:
      checks.integer("max_batched_elements", self.max_batched_elements, 1)
    for name in ("vram_budget_gb", "max_buffer_memory_mb"):
      checks.structural(name, getattr(self, name))
      if getattr(self, name) is not None:
        checks.number(name, getattr(self, name), open_low=True)

  def _check_combinations(self) -> None:
    if not self.sd_scripts_compat:
      checks.fraction("edge_threshold", self.edge_threshold)
      if self.use_grams and self.use_cautious:
        raise ValueError(
          "use_grams gives every update the sign of its gradient, which leaves use_cautious "
          "nothing to mask. Set one of use_grams and use_cautious to False."
        )
      if self.use_lr_mask and not callable(self.learning_rate):
        if self.max_lr is not None:
          checks.ordered("learning_rate", self.learning_rate, "max_lr", self.max_lr)
        if self.min_lr is not None:
          checks.ordered("min_lr", self.min_lr, "learning_rate", self.learning_rate)
    if self.min_lr is not None and self.max_lr is not None:
      checks.ordered("min_lr", self.min_lr, "max_lr", self.max_lr)

  def as_dict(self) -> dict[str, Any]:
    """The options by name."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


_RANGES: tuple[tuple[Callable[[str, Any], None], tuple[str, ...]], ...] = (
  (functools.partial(checks.number, open_low=True),
   ("eps", "reference_lr", "wd_transition_steps")),
  (checks.number, (
    "weight_decay", "edge_penalty", "edge_threshold", "frequency_penalty", "rank_penalty_strength",
    "lr_bump", "min_lr", "max_lr", "adaptation_strength",
  )),
  (functools.partial(checks.number, low=1.0), ("low_rank_emphasis",)),
  (checks.fraction, (
    "detail_preservation", "compatibility_threshold", "wd_min_ratio", "spd_lambda",
  )),
  (checks.decay, ("tam_beta", "importance_decay")),
  (functools.partial(checks.number, high=1.0, open_low=True), ("wd_decay_factor",)),
  (functools.partial(checks.integer, low=0), ("warmup_steps",)),
  (functools.partial(checks.integer, low=1), ("relationship_discovery_interval",)),
)


def explain_unknown_options(factory: Callable[P, R]) -> Callable[P, R]:
  """Turns an unknown keyword into an error that helps, and keeps the factory's signature."""
  known = tuple(inspect.signature(factory).parameters)

  @functools.wraps(factory)
  def checked(*args: P.args, **kwargs: P.kwargs) -> R:
    for name in kwargs:
      if name not in known:
        raise_unknown_option(name, known)
    return factory(*args, **kwargs)

  return checked


def raise_unknown_option(name: str, known: tuple[str, ...]) -> None:
  """Raises for an option that does not exist: what replaced it, or the nearest name.

  Raises:
    ValueError: always.
  """
  if any(word in name for word in _REMOVED_WORDS):
    raise ValueError(f"{name}: {_REPLACEMENT}")
  near = difflib.get_close_matches(name, known, n=1)
  near = [_OTHER_NAMES[name]] if name in _OTHER_NAMES else near
  hint = f" Did you mean '{near[0]}'?" if near else " See help(hina_optax.hina_adaptive)."
  raise ValueError(f"hina_adaptive has no option '{name}'.{hint}")


def _preset(overrides: Mapping[str, Any], **options: Any) -> dict[str, Any]:
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
  return _preset(
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
  return _preset(
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
  return _preset(
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
  return _preset(
    overrides, learning_rate=1e-4, vram_budget_gb=4.0, reduce_precision=True,
    cpu_offload_states=True, max_buffer_memory_mb=200, adaptive_features=True,
  )
