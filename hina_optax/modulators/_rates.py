"""Learning-rate scales: the product of one or more rules, applied to the wrapped direction."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from hina_optax import _in_turn, _leaves, _numerics, _parts, _rows, _visits


class Whole(NamedTuple):
  """All leaves.

  Attributes:
    gradients: gives what goes into the modulator.
    shapes: gives the parameters, with or without their numbers.
    places: gives the places of the leaves that have both.
    look: `(when, function)`: gives what `function(params, places)` finds, to be called for only
      where `when` holds; then alone its numbers are right, and only then it is computed.
  """

  gradients: Callable[[], Any]
  shapes: Callable[[], Any]
  places: Callable[[], list[int]]
  look: Callable[..., Callable[[], Any]]


class RateRule(NamedTuple):
  """One source of learning-rate scales.

  Attributes:
    init: `params -> state`.
    prepare: `(whole, state) -> (values, state)`: what needs all leaves at once.
    factor: `(direction, gradient, trees, value) -> (factor, trees)`: the scale of one leaf, a
      scalar or one number an element, and its new per-element state. `value` is what `prepare`
      gave, or with `per_leaf` this leaf's entry of it.
    per_element: names of the state's fields that hold per-element state.
    per_leaf: whether `prepare` gives a vector with one number a leaf.
    observed: a field of the state with one number a leaf; `None`: there is none.
    observe: what stands in it after a step: `gradient -> number`.
    reads_gradients: whether `prepare` calls for the gradients.
    reads_params: the name of a rule that calls for the parameters.
  """

  init: Callable[..., Any]
  prepare: Callable[..., tuple[Any, Any]]
  factor: Callable[..., tuple[Any, tuple]]
  per_element: tuple[str, ...] = ()
  per_leaf: bool = False
  observed: str | None = None
  observe: Callable[..., Any] = lambda gradient: None
  reads_gradients: bool = False
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
  inner: optax.GradientTransformation,
  rules: Sequence[RateRule],
  bounds: tuple[float, float] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Multiplies the wrapped direction by the product of all rules, clipped to `bounds`.

  One wrapper for several rules, because the PyTorch original clips their product and not each.
  """
  inner = _rows.aware(inner)

  def init(params: Any) -> ScaleByRatesState:
    _leaves.check_floating(params, "params")
    return ScaleByRatesState(inner.init(params), tuple(rule.init(params) for rule in rules))

  def update(updates, state, params=None, **extra_args):
    known, prepared = extra_args.pop(_parts.SURVEYED, None) or (None, None)
    directions, inner_state = inner.update(
      updates, state.inner_state, params, **extra_args, **{_parts.SURVEYED: known})
    for rule in rules:
      if rule.reads_params:
        _leaves.require_params(params, rule.reads_params)
    whole = _all(updates, params)
    prepared = prepared or [rule.prepare(whole, own) for rule, own in zip(rules, state.rules)]
    scaled, new = _scaled(rules, bounds, directions, updates, state.rules, prepared)
    return scaled, ScaleByRatesState(inner_state, new)

  ask_inner = inner.survey

  def survey(params, state):
    assert ask_inner is not None
    known = ask_inner(params, state.inner_state)
    whole = Whole(lambda: None, params.shapes, params.places, params.look)
    prepared = [
      # What is kept for each element each stack brings itself.
      rule.prepare(whole, own._replace(**dict.fromkeys(rule.per_element)))
      for rule, own in zip(rules, state.rules)
    ]
    return lambda *group: (known(*group), _in_turn.rows_of(prepared, *group))

  at_once = ask_inner is None or any(rule.reads_gradients for rule in rules)
  return _parts.Part(init, update, None if at_once else survey)


def _scaled(
  rules: Sequence[RateRule], bounds: tuple[float, float] | None, directions: Any, updates: Any,
  old: Sequence[Any], prepared: Sequence[tuple[Any, Any]],
) -> tuple[Any, tuple[Any, ...]]:
  """The directions times the product of all rules, and the rules' new states."""
  fields = [(i, name) for i, rule in enumerate(rules) for name in rule.per_element]
  watched = [(i, rule.observed) for i, rule in enumerate(rules) if rule.observed]
  per_leaf = [values for rule, (values, _) in zip(rules, prepared) if rule.per_leaf]

  def scale(leaf, u, read, trees, scalars):
    del leaf
    own = iter(scalars[len(watched):])
    values = [next(own) if rule.per_leaf else x for rule, (x, _) in zip(rules, prepared)]
    product, new = _product(rules, values, u, read[0], trees)
    if bounds is not None:
      product = jnp.clip(product, *(_numerics.scalar(b, u.dtype) for b in bounds))
    return u * product, new, tuple(rules[i].observe(read[0]) for i, _ in watched)

  visited = _visits.visit(
    scale, directions, read=(updates,), trees=[getattr(old[i], name) for i, name in fields],
    scalars=[getattr(old[i], name) for i, name in watched] + per_leaf)
  states = [state for _, state in prepared]
  for (i, name), new in zip((*fields, *watched), (*visited.trees, *visited.scalars)):
    states[i] = states[i]._replace(**{name: new})
  return visited.updates, tuple(states)


def _product(
  rules: Sequence[RateRule], values: Sequence[Any], direction: Any, gradient: Any,
  trees: tuple[Any, ...],
) -> tuple[Any, tuple[Any, ...]]:
  """The scale of one leaf by all rules, and their new per-element state."""
  product, found, start = jnp.ones([], direction.dtype), (), 0
  for rule, value in zip(rules, values):
    stop = start + len(rule.per_element)
    factor, new = rule.factor(direction, gradient, trees[start:stop], value)
    product, found, start = product * factor, (*found, *new), stop
  return product, found


def _all(updates: Any, params: Any) -> Whole:
  def places() -> list[int]:
    return _present(updates, params)

  return Whole(lambda: updates, lambda: params, places,
               lambda when, function: lambda: function(params, places()))


def _present(updates: Any, params: Any) -> list[int]:
  """Places of the leaves that have both a gradient and a parameter."""
  gone = _visits.missing(updates)
  gradients, structure = _leaves.flat(updates)
  rows = zip(_visits.nodes(updates), gradients, structure.flatten_up_to(params))
  return sorted(
    place for node, *pair in rows if not any(map(_leaves.is_absent, pair))
    for place in node.places if place not in gone
  )
