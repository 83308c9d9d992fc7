"""Learning-rate scales: one or more rules, applied to the wrapped direction."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import optax

from hina_optax.base import leafwise, paths
from hina_optax.base.traits import Traits

__all__ = ["ScaleByRatesState", "scale_by_rates"]


class RateRule(NamedTuple):
  """One source of learning-rate scales.

  Attributes:
    state_type: a NamedTuple class. Its field `count` counts steps.
    formula: `(leaf, u, g, old) -> (u, new)`: the direction of one leaf, scaled, and the new state.
      With `measure` what it found for this leaf stands behind `old`.
    elements: fields with one number per element: their first value, and their dtype if it is not
      fp32.
    numbers: fields with one number per leaf: their first value.
    shared: gives the fields that all leaves share, at `init` and at every update.
    measure: a `Measure` of what the formula needs to know of other leaves. It counts the steps.
    reads_params: the public name of a rule that reads the parameters.
  """

  state_type: type
  formula: leafwise.Formula
  elements: Mapping[str, float | tuple[float, Any]] | None = None
  numbers: Mapping[str, leafwise.Start] | None = None
  shared: Callable[[], Mapping[str, Any]] | None = None
  measure: Any = None
  reads_params: str | None = None


class ScaleByRatesState(NamedTuple):
  """State of the learning-rate modulators.

  Attributes:
    inner_state: the wrapped transformation's state.
    rules: the state of each rule, in order.
  """

  inner_state: Any
  rules: tuple[Any, ...]


def scale_by_rates(
  inner: optax.GradientTransformation, rules: Sequence[RateRule]
) -> optax.GradientTransformationExtraArgs:
  """The wrapped direction, scaled by one rule after the other."""
  functions = [leafwise.on_leaf(rule.formula) for rule in rules]

  def build(inner: Any, guard: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def init(params: Any) -> ScaleByRatesState:
      return ScaleByRatesState(inner.init(params), tuple(_begin(rule, params) for rule in rules))

    def update(updates, state, params=None, **extra_args):
      directions, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
      new = []
      for rule, function, old in zip(rules, functions, state.rules):
        values, old = _step(rule, updates, old, params, extra_args)
        directions, old = leafwise.map_leaves(
          function, directions, old, [updates], elements=tuple(rule.elements or ()),
          numbers=tuple(rule.numbers or ()) if rule.measure is None else (), values=values,
          guard=guard)
        new.append(old)
      return directions, ScaleByRatesState(inner_state, tuple(new))

    return init, update

  measures = tuple(rule.measure for rule in rules if rule.measure is not None)
  return leafwise.both_forms(build, inner, Traits(leafwise=True, measures=measures))


def _begin(rule: RateRule, params: Any) -> Any:
  state = leafwise.begin(rule.state_type, params, rule.elements or {}, rule.numbers or {})
  return state._replace(**_shared(rule))


def _step(
  rule: RateRule, gradients: Any, state: Any, params: Any, extra_args: Mapping[str, Any]
) -> tuple[Any, Any]:
  """What the rule measures at this step, and its state with this step counted."""
  if rule.reads_params:
    paths.require_params(params, rule.reads_params)
  values = None
  if rule.measure is not None:
    values, state = rule.measure.of_step(gradients, state, params, extra_args)
  elif "count" in state._fields:
    state = state._replace(count=optax.safe_increment(state.count))
  return values, state._replace(**_shared(rule))


def _shared(rule: RateRule) -> Mapping[str, Any]:
  return rule.shared() if rule.shared else {}
