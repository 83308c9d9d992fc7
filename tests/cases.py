"""The registry: one entry for every transformation, in every form; it feeds every property test."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import optax
import pytest

import hina_optax as ho
from hina_optax import registry
from tests import bounds


@dataclasses.dataclass(frozen=True)
class Case:
  """One way to build one transformation.

  Attributes:
    name: of the case.
    make: builds the transformation from nothing.
    kind: the part's stage in the chain (`registry.STAGES`), or "alias".
    identity: builds it with strength 0 (or what switches it off); `None` where nothing does.
    factory: for `inject_hyperparams`: called with `kwargs`; `None` where an argument is a
      transformation.
    kwargs: arguments of `factory`.
    reads_params: whether `update` needs `params`.
    scale_free: whether scaling the gradient scales the update and changes nothing else.
    converges: whether it minimises a parabola (a regularizer of the loss moves the minimum).
    costly: whether it takes so long to compile that tests of how a transformation is driven,
      rather than of what it computes, leave it to `make slow`.
    rare: whether all tests do; what is its own the cases of the parts cover.
    looks_across: whether the update of a leaf may depend on other leaves.
    spreads_bad_numbers: whether a bad number in one leaf may reach the updates of other leaves.
    sharded_every_time: whether the default run tests it on a mesh of 4 by 2 devices.
    explicit_every_time: whether the default run tests it in explicit sharding mode.
    ranges: names of the options of a wrapper that random examples vary.
    faults_every_time: whether the default run feeds it bad numbers.
    bound: checks how large the update of a leaf may be (`tests/bounds.py`).
    ties: whether the last bit of a number may decide on which side of a quantile it falls.
    gathers: whether a step on a mesh may gather what it needs of sharded leaves.
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
  costly: bool = False
  rare: bool = False
  looks_across: bool = False
  spreads_bad_numbers: bool = False
  sharded_every_time: bool = False
  explicit_every_time: bool = False
  faults_every_time: bool = False
  ranges: tuple[str, ...] = ()
  bound: Callable[[bounds.LeafStep], None] | None = None
  ties: bool = False
  gathers: bool = False

  def __str__(self) -> str:
    return self.name

  @property
  def wraps(self) -> bool:
    """Whether the part takes another transformation as its argument."""
    return self.kind in WRAPPING

  @property
  def steps(self) -> bool:
    """Whether its updates can be added to parameters as they are."""
    return self.kind in ("alias", "step")


WRAPPING = ("direction", "rate", "step")


# What tests know of the cases of a part beyond what the part declares; of one case behind a hyphen.
FACTS: dict[str, dict[str, Any]] = {
  "suppress_edges": dict(
    bound=bounds.no_element_grows, explicit_every_time=True, faults_every_time=True),
  "preserve_detail": dict(bound=bounds.no_element_grows, sharded_every_time=True),
  "adaptive_gradient_regularization": dict(bound=bounds.no_element_grows),
  "attenuate_background": dict(bound=bounds.grows_by_a_fifth, ties=True),
  "attenuate_background-fast": dict(sharded_every_time=True),
  "suppress_high_frequency": dict(bound=bounds.no_longer),
  "orthogonalize_to_params": dict(bound=bounds.no_longer),
  "add_rank_penalty": dict(looks_across=True, gathers=True),
  "scale_by_hina": dict(bound=bounds.adam),
  "scale_by_hina-torque-sum": dict(bound=None),
  "scale_by_hina-adopt": dict(bound=bounds.adopt),
  "scale_by_hina-torque-adopt": dict(bound=bounds.adopt, faults_every_time=True),
  "cautious": dict(sharded_every_time=True),
  "grams": dict(bound=bounds.adam),
  "scale_by_sign_agreement": dict(
    bound=bounds.adam_times_rate, ranges=("bump", "min_scale", "max_scale")),
  "scale_by_importance": dict(
    bound=bounds.adam_times_importance, ranges=("strength", "decay"), looks_across=True,
    spreads_bad_numbers=True, faults_every_time=True),
  "add_scheduled_weight_decay": dict(bound=bounds.adds_decay),
  "project_to_init": dict(ranges=("strength",)),
}


def cases_of(part: registry.Part) -> tuple[Case, ...]:
  """One case for each example that the part gives."""
  return tuple(_case(part, label, dict(kwargs)) for label, kwargs in part.examples.items())


def _case(part: registry.Part, label: str, kwargs: dict[str, Any]) -> Case:
  def make(**changed: Any) -> optax.GradientTransformationExtraArgs:
    arguments = {**kwargs, **changed}
    if part.stage not in WRAPPING:
      return part.factory(**arguments)
    return part.factory(_descent() if part.stage == "step" else ho.scale_by_hina(), **arguments)

  name = f"{part.name}-{label}" if label else part.name
  return Case(
    name=name, make=make, kind=part.stage,
    identity=None if part.identity is None else functools.partial(make, **part.identity),
    factory=None if part.stage in WRAPPING else part.factory, kwargs=kwargs,
    reads_params=part.reads_params, scale_free=part.scale_free, converges=not part.moves_minimum,
    **{**FACTS.get(part.name, {}), **FACTS.get(name, {})})


def _descent() -> optax.GradientTransformationExtraArgs:
  return optax.chain(ho.scale_by_hina(), optax.scale_by_learning_rate(0.05))


PARTS = tuple(case for part in registry.parts() for case in cases_of(part))
REGULARIZERS = tuple(case for case in PARTS if case.kind == "gradient")

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


def _alias(label: str, converges: bool = True, costly: bool = True, rare: bool = False,
           **options: Any) -> Case:
  options = {"learning_rate": 1e-2, **options}
  return Case(
    name=f"hina_adaptive-{label}", make=functools.partial(ho.hina_adaptive, **options),
    kind="alias", factory=ho.hina_adaptive, kwargs=options, reads_params=True, converges=converges,
    costly=costly, rare=rare, gathers=bool(options.get("sd_scripts_compat")))


ALIASES = (
  _alias("defaults", costly=False, weight_decay=0.0),
  _alias("everything", **EVERYTHING, converges=False),
  _alias("grams-fast", rare=True, use_cautious=False, use_grams=True,
         background_regularization_mode="fast", weight_decay=0.0),
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

CASES = (*PARTS, *ALIASES)
# The alias with every part on.
EVERY_PART = next(case for case in ALIASES if EVERYTHING.items() <= case.kwargs.items())


def as_optimizer(case: Case, learning_rate: Any = 0.05) -> optax.GradientTransformation:
  """The case as something whose updates can be added to parameters."""
  if case.steps:
    return case.make()
  return optax.chain(case.make(), optax.scale_by_learning_rate(learning_rate))


def some(cases: Iterable[Case], slow: Callable[[Case], bool]) -> Any:
  """Parametrizes over `cases`, those of which `slow` is true only where slow tests run."""
  marked = [pytest.param(c, marks=[pytest.mark.slow] if slow(c) else []) for c in cases]
  return pytest.mark.parametrize("case", marked, ids=str)


def is_rare(case: Case) -> bool:
  """Whether it is tried by slow tests alone."""
  return case.rare


def is_costly(case: Case) -> bool:
  """Whether tests of how a transformation is driven leave it out."""
  return case.rare or case.costly


every_case = some(CASES, is_rare)
every_driven_case = some(CASES, is_costly)
