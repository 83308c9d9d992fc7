"""The registry: one entry for every transformation, in every form; it feeds every property test."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import optax
import pytest

import hina_optax as ho


@dataclasses.dataclass(frozen=True)
class Case:
  """One way to build one transformation.

  Attributes:
    name: of the case.
    make: builds the transformation from nothing.
    kind: "regularizer", "core", "modulator", "decay" or "alias".
    identity: builds it with strength 0 (or what switches it off); `None` where nothing does.
    factory: for `inject_hyperparams`: called with `kwargs`; `None` where an argument is a
      transformation.
    kwargs: arguments of `factory`.
    reads_params: whether `update` needs `params`.
    scale_free: whether scaling the gradient scales the update and changes nothing else.
    converges: learning rate and steps with which it minimises a parabola; `None` where it does not
      by itself (a regularizer of the loss moves the minimum).
  """

  name: str
  make: Callable[[], optax.GradientTransformationExtraArgs]
  kind: str
  identity: Callable[[], optax.GradientTransformationExtraArgs] | None = None
  factory: Callable[..., Any] | None = None
  kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
  reads_params: bool = False
  scale_free: bool = False
  converges: bool = True

  def __str__(self) -> str:
    return self.name


def _part(name: str, kind: str, factory: Callable[..., Any], off: dict[str, Any] | None = None,
          label: str = "", *, reads_params: bool = False, scale_free: bool = False,
          converges: bool = True, **kwargs: Any) -> Case:
  return Case(
    name=f"{name}-{label}" if label else name,
    make=functools.partial(factory, **kwargs),
    kind=kind,
    identity=None if off is None else functools.partial(factory, **{**kwargs, **off}),
    factory=factory,
    kwargs=kwargs,
    reads_params=reads_params,
    scale_free=scale_free,
    converges=converges,
  )


def _wrapper(name: str, factory: Callable[..., Any], off: dict[str, Any] | None = None,
             label: str = "", inner: Callable[[], Any] = ho.scale_by_hina,
             **options: Any) -> Case:
  flags = {k: options.pop(k) for k in ("reads_params", "scale_free", "converges") if k in options}

  def make(**changed: Any) -> optax.GradientTransformationExtraArgs:
    return factory(inner(), **{**options, **changed})

  return Case(
    name=f"{name}-{label}" if label else name, make=make, kind="modulator",
    identity=None if off is None else functools.partial(make, **off), **flags,
  )


def _momentum() -> optax.GradientTransformation:
  return optax.ema(0.9)


def _descent() -> optax.GradientTransformationExtraArgs:
  return optax.chain(ho.scale_by_hina(), optax.scale_by_learning_rate(0.05))


REGULARIZERS = (
  _part("suppress_edges", "regularizer", ho.suppress_edges, {"strength": 0.0},
        scale_free=True, strength=0.5, threshold=0.3),
  _part("suppress_high_frequency", "regularizer", ho.suppress_high_frequency, {"strength": 0.0},
        scale_free=True, strength=0.7),
  _part("preserve_detail", "regularizer", ho.preserve_detail, {"detail_preservation": 1.0},
        scale_free=True, detail_preservation=0.3),
  _part("attenuate_background", "regularizer", ho.attenuate_background, {"strength": 0.0},
        scale_free=True, strength=0.8),
  _part("attenuate_background", "regularizer", ho.attenuate_background, {"strength": 0.0}, "fast",
        scale_free=True, strength=0.8, mode="fast"),
  _part("add_rank_penalty", "regularizer", ho.add_rank_penalty, {"strength": 0.0},
        reads_params=True, strength=0.1, emphasis=1.5, unpaired="nuclear", converges=False),
  # AGR takes a gradient that stands in one element for its whole share: there it stops.
  _part("adaptive_gradient_regularization", "regularizer", ho.adaptive_gradient_regularization,
        scale_free=True, converges=False),
  _part("orthogonalize_to_params", "regularizer", ho.orthogonalize_to_params,
        reads_params=True, scale_free=True, converges=False),
)

CORES = (
  _part("scale_by_hina", "core", ho.scale_by_hina),
  _part("scale_by_hina", "core", ho.scale_by_hina, None, "torque", torque="average"),
  _part("scale_by_hina", "core", ho.scale_by_hina, None, "torque-sum", torque="sum"),
  _part("scale_by_hina", "core", ho.scale_by_hina, None, "adopt", stability="adopt"),
  _part("scale_by_hina", "core", ho.scale_by_hina, None, "torque-adopt",
        torque="average", stability="adopt"),
)

MODULATORS = (
  _wrapper("cautious", ho.cautious),
  _wrapper("grams", ho.grams),
  _wrapper("scale_by_sign_agreement", ho.scale_by_sign_agreement, {"bump": 0.0},
           bump=0.3, min_scale=0.25, max_scale=1.7, warmup_steps=15),
  _wrapper("scale_by_importance", ho.scale_by_importance, {"strength": 0.0},
           reads_params=True, interval=3, decay=0.5),
  _wrapper("project_to_init", ho.project_to_init, {"strength": 0.0},
           inner=_descent, reads_params=True, strength=0.5),
)

DECAYS = (
  _part("add_scheduled_weight_decay", "decay", ho.add_scheduled_weight_decay,
        {"weight_decay": 0.0}, reads_params=True, weight_decay=0.5, transition_steps=5,
        converges=False),
)

OFF = {
  name: False
  for name in (
    "use_agr", "use_tam", "use_adopt_stability", "use_cautious", "use_lr_mask",
    "use_dynamic_adaptation", "use_spd", "background_regularization", "dynamic_weight_decay",
  )
}
EVERYTHING: dict[str, Any] = dict(
  edge_suppression=True, spatial_awareness=True, background_regularization=True,
  lora_rank_penalty=True, use_orthogonal_grad=True, relationship_discovery_interval=4,
)


def _alias(label: str, converges: bool = True, **options: Any) -> Case:
  options = {"learning_rate": 1e-2, **options}
  return Case(
    name=f"hina_adaptive-{label}", make=functools.partial(ho.hina_adaptive, **options),
    kind="alias", factory=ho.hina_adaptive, kwargs=options, reads_params=True, converges=converges,
  )


ALIASES = (
  _alias("defaults", weight_decay=0.0),
  _alias("everything", **EVERYTHING, converges=False),
  _alias("grams-fast", use_cautious=False, use_grams=True, background_regularization_mode="fast",
         weight_decay=0.0),
  _alias("compat-everything", **EVERYTHING, sd_scripts_compat=True, converges=False),
  # The stages of the original: those that leave the minimum where it is, and those that move it.
  _alias("compat-damping", **{
    **OFF, **dict.fromkeys((
      "use_agr", "edge_suppression", "spatial_awareness", "background_regularization", "use_tam",
      "use_adopt_stability", "use_cautious", "use_lr_mask"), True)},
    frequency_penalty=0.0, background_regularization_mode="fast", weight_decay=0.0, lr_bump=1e-3,
    min_lr=1e-3, max_lr=1.0, sd_scripts_compat=True),
  _alias("compat-pulling", **{
    **OFF, **dict.fromkeys((
      "spatial_awareness", "lora_rank_penalty", "use_orthogonal_grad", "use_dynamic_adaptation",
      "dynamic_weight_decay", "use_spd"), True)},
    relationship_discovery_interval=3, wd_transition_steps=2, sd_scripts_compat=True,
    converges=False),
)

CASES = (*REGULARIZERS, *CORES, *MODULATORS, *DECAYS, *ALIASES)
# Each costs many compilations of the whole chain; what is its own in it the parts' cases cover.
RARE = ("hina_adaptive-grams-fast",)


def as_optimizer(case: Case, learning_rate: Any = 0.05) -> optax.GradientTransformation:
  """The case as something whose updates can be added to parameters."""
  if case.kind == "alias" or case.name.startswith("project_to_init"):
    return case.make()
  return optax.chain(case.make(), optax.scale_by_learning_rate(learning_rate))


def some(cases: Iterable[Case], slow: Iterable[str]) -> Any:
  """Parametrizes over `cases`, those named in `slow` only where slow tests run."""
  marked = [pytest.param(c, marks=[pytest.mark.slow] if c.name in slow else []) for c in cases]
  return pytest.mark.parametrize("case", marked, ids=str)


every_case = some(CASES, RARE)
# How a transformation is driven, rather than what it computes: of the chain the defaults stand for
# all.
DRIVEN = (*RARE, "hina_adaptive-everything", "hina_adaptive-compat-everything",
          "hina_adaptive-compat-damping", "hina_adaptive-compat-pulling")
every_driven_case = some(CASES, DRIVEN)
