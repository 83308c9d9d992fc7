"""Learning-rate scales: the product of one or more rules, applied to the wrapped direction."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from hina_optax import _leaves, _numerics, _rows, _stacks, _visits


class RateRule(NamedTuple):
  """One source of learning-rate scales.

  Attributes:
    init: `params -> state`.
    prepare: `(gradients, params, state) -> (values, state)`: what needs all leaves at once.
    factor: `(direction, gradient, trees, value) -> (factor, trees)`: the scale of one leaf, a
      scalar or one number an element, and its new per-element state. `value` is what `prepare`
      gave, or with `per_leaf` this leaf's entry of it.
    per_element: names of the state's fields that hold per-element state.
    per_leaf: whether `prepare` gives a vector with one number a leaf.
  """

  init: Callable[..., Any]
  prepare: Callable[..., tuple[Any, Any]]
  factor: Callable[..., tuple[Any, tuple]]
  per_element: tuple[str, ...] = ()
  per_leaf: bool = False


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
    directions, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
    prepared = [r.prepare(updates, params, s) for r, s in zip(rules, state.rules)]
    fields = [(i, name) for i, rule in enumerate(rules) for name in rule.per_element]

    def scale(leaf, u, read, trees, scalars):
      del leaf
      own = iter(scalars)
      new_trees: list[Any] = []
      product, start = jnp.ones([], u.dtype), 0
      for rule, (values, _) in zip(rules, prepared):
        stop = start + len(rule.per_element)
        value = next(own) if rule.per_leaf else values
        factor, new = rule.factor(u, read[0], trees[start:stop], value)
        product, start = product * factor, stop
        new_trees += new
      if bounds is not None:
        product = jnp.clip(product, *(_numerics.scalar(b, u.dtype) for b in bounds))
      return u * product, tuple(new_trees), ()

    visited = _visits.visit(
      scale, directions, read=(updates,), trees=[getattr(state.rules[i], n) for i, n in fields],
      scalars=[values for rule, (values, _) in zip(rules, prepared) if rule.per_leaf],
    )
    new_states = [new_state for _, new_state in prepared]
    for (i, name), tree in zip(fields, visited.trees):
      new_states[i] = new_states[i]._replace(**{name: tree})
    return visited.updates, ScaleByRatesState(inner_state, tuple(new_states))

  return _stacks.Part(init, update)
