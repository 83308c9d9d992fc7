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
    formula: `(leaf, u, g, old) -> (u, new)`: the scaled direction of one leaf and the new state.
      With `measure`, the value measured for this leaf comes after `old`.
    elements: the fields with one number per element: their first value, and their dtype if it is
      not fp32.
    numbers: the fields with one number per leaf: their first value.
    shared: returns the fields that all leaves share, at `init` and at every update.
    measure: a `Measure` of what the formula needs to know about other leaves. It counts the steps.
    reads_params: the public name of the rule if it reads the parameters, for its error message.
  """

  state_type: type
  formula: leafwise.Formula
  elements: Mapping[str, float | tuple[float, Any]] | None = None
  numbers: Mapping[str, leafwise.InitialValue] | None = None
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
  functions = [leafwise.lift_formula(rule.formula) for rule in rules]

  def build(inner: Any, guard: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def init(params: Any) -> ScaleByRatesState:
      return ScaleByRatesState(
        inner.init(params), tuple(init_rule_state(rule, params) for rule in rules))

    def update(updates, state, params=None, **extra_args):
      directions, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
      rule_states = []
      for rule, function, old in zip(rules, functions, state.rules):
        values, old = measure_step(rule, updates, old, params, extra_args)
        directions, old = leafwise.map_leaves(
          function, directions, old, [updates], elements=tuple(rule.elements or ()),
          numbers=tuple(rule.numbers or ()) if rule.measure is None else (), values=values,
          guard=guard)
        rule_states.append(old)
      return directions, ScaleByRatesState(inner_state, tuple(rule_states))

    return init, update

  measures = tuple(rule.measure for rule in rules if rule.measure is not None)
  return leafwise.build_guarded(build, inner, Traits(leafwise=True, measures=measures))


def init_rule_state(rule: RateRule, params: Any) -> Any:
  """The initial state of a rule."""
  state = leafwise.init_state(rule.state_type, params, rule.elements or {}, rule.numbers or {})
  return state._replace(**_shared_fields(rule))


def measure_step(
  rule: RateRule, gradients: Any, state: Any, params: Any, extra_args: Mapping[str, Any]
) -> tuple[Any, Any]:
  """The values that the rule measures at this step, and its state with this step counted."""
  if rule.reads_params:
    paths.require_params(params, rule.reads_params)
  values = None
  if rule.measure is not None:
    values, state = rule.measure.evaluate(gradients, state, params, extra_args)
  elif "count" in state._fields:
    state = state._replace(count=optax.safe_increment(state.count))
  return values, state._replace(**_shared_fields(rule))


def _shared_fields(rule: RateRule) -> Mapping[str, Any]:
  return rule.shared() if rule.shared else {}
