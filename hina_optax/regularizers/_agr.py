"""Adaptive gradient regularization: shrink each element by its share of the leaf's gradient."""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from hina_optax import registry
from hina_optax.base import leafwise, numerics
from hina_optax.registry import Option

__all__ = ["AdaptiveGradientRegularizationState", "adaptive_gradient_regularization"]


class AdaptiveGradientRegularizationState(NamedTuple):
  """State of `adaptive_gradient_regularization`: empty. It names the part in a chain's state."""


def adaptive_gradient_regularization() -> optax.GradientTransformationExtraArgs:
  r"""Shrinks each gradient element by its share of the leaf's absolute gradient.

  .. math:: g \leftarrow g \left(1 - \frac{|g|}{\sum |g|}\right)

  The sum runs over the leaf, so on a leaf of a million elements this is practically the identity:
  expect nothing of it on large matrices. An all-zero gradient (a LoRA factor at the first step)
  stays zero. Place it before both moments. The effect does not depend on the gradient's scale.

  On small leaves it is harsh: an element that is the only one with a gradient loses all of it, and
  training stops there. A leaf of one element, whose share is always 1, passes for that reason.

  Returns:
    An `optax.GradientTransformationExtraArgs` without state.

  Raises:
    TypeError: if a leaf is not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> import hina_optax
    >>> tx = hina_optax.adaptive_gradient_regularization()
    >>> updates, _ = tx.update({"w": jnp.array([1.0, -3.0])}, tx.init({"w": jnp.zeros(2)}))
    >>> updates["w"].tolist()
    [0.75, -0.75]

  References:
    Jiang et al., Adaptive Gradient Regularization, 2024, arXiv 2407.16944; `use_agr` of
    `HinaAdaptive`.
  """
  def shrink(leaf, g, old):
    # The share would be 1, so the formula would keep a scalar parameter from ever moving.
    if leaf.size == 1:
      return g, old
    magnitude = jnp.abs(g)
    return g * (1 - magnitude * numerics.reciprocal(numerics.total(magnitude))), old

  return leafwise.part(AdaptiveGradientRegularizationState, shrink)


registry.register(registry.regularizer(
  adaptive_gradient_regularization, AdaptiveGradientRegularizationState, 10,
  Option("use_agr", True, registry.FLAG,
         "`adaptive_gradient_regularization`: each element loses its share of the gradient",
         "clips each leaf to norm 1"),
  {}, scale_free=True,
  # If only one element has a gradient, it loses all of it, so training can stop before a minimum.
  moves_minimum=True))
