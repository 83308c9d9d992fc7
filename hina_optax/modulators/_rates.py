"""Learning-rate scales: the product of one or more rules, applied to the wrapped direction."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from hina_optax import _leaves, _numerics


class RateRule(NamedTuple):
  """One source of learning-rate scales.

  Attributes:
    init: `params -> state`.
    prepare: `(gradients, params, state) -> (values, state)`: what needs all leaves at once.
    factor: `(leaf, direction, gradient, trees, values) -> (factor, trees)`: the scale of one leaf,
      a scalar or one number an element, and its new per-element state.
    per_element: names of the state's fields that hold per-element state.
  """

  init: Callable[..., Any]
  prepare: Callable[..., tuple[Any, Any]]
  factor: Callable[..., tuple[Any, tuple]]
  per_element: tuple[str, ...] = ()


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
  inner = optax.with_extra_args_support(inner)

  def init(params: Any) -> ScaleByRatesState:
    _leaves.check_floating(params, "params")
    return ScaleByRatesState(inner.init(params), tuple(rule.init(params) for rule in rules))

  def update(updates, state, params=None, **extra_args):
    directions, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
    prepared = [r.prepare(updates, params, s) for r, s in zip(rules, state.rules)]
    fields = [(i, name) for i, rule in enumerate(rules) for name in rule.per_element]

    def scale(leaf, u, read, trees, scalars):
      del scalars
      new_trees: list[Any] = []
      product, start = jnp.ones([], u.dtype), 0
      for rule, (values, _) in zip(rules, prepared):
        stop = start + len(rule.per_element)
        factor, new = rule.factor(leaf, u, read[0], trees[start:stop], values)
        product, start = product * factor, stop
        new_trees += new
      if bounds is not None:
        product = jnp.clip(product, *(_numerics.scalar(b, u.dtype) for b in bounds))
      return u * product, tuple(new_trees), ()

    visited = _leaves.visit(
      scale, directions, read=(updates,), trees=[getattr(state.rules[i], n) for i, n in fields]
    )
    new_states = [new_state for _, new_state in prepared]
    for (i, name), tree in zip(fields, visited.trees):
      new_states[i] = new_states[i]._replace(**{name: tree})
    return visited.updates, ScaleByRatesState(inner_state, tuple(new_states))

  return optax.GradientTransformationExtraArgs(init, update)
