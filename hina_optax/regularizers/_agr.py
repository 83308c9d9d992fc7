"""Adaptive gradient regularization: shrink each element by its share of the leaf's gradient."""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from hina_optax import registry
from hina_optax.base import checks, leafwise, numerics
from hina_optax.base.numerics import Scalar
from hina_optax.registry import Option

__all__ = ["AdaptiveGradientRegularizationState", "adaptive_gradient_regularization"]


class AdaptiveGradientRegularizationState(NamedTuple):
  """State of `adaptive_gradient_regularization`: empty. It names the part in a chain's state."""


def adaptive_gradient_regularization(
  limit: Scalar = 0.1,
) -> optax.GradientTransformationExtraArgs:
  r"""Shrinks each gradient element by its share of the leaf's absolute gradient.

  .. math:: g \leftarrow g \left(1 - \min\left(\frac{|g|}{\sum |g|}, \ell\right)\right)

  The sum runs over the leaf, so on a leaf of a million elements this is practically the identity:
  expect nothing of it on large matrices. An all-zero gradient (a LoRA factor at the first step)
  stays zero. Place it before both moments. The effect does not depend on the gradient's scale.

  The published rule has no limit. Without one (`limit=1`) an element that is the only one with a
  gradient loses all of it, and training stops there: on small leaves it does not converge. The
  default leaves each element nine tenths. It changes nothing where no element has more than a tenth
  of its leaf's gradient. A leaf of one element, whose share is always 1, passes.

  Args:
    limit: :math:`\ell` in [0, 1], the largest share that an element loses. 0 is the identity.

  Returns:
    An `optax.GradientTransformationExtraArgs` without state.

  Raises:
    ValueError: if `limit` lies outside its range. TypeError: if a leaf is not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> import hina_optax
    >>> tx = hina_optax.adaptive_gradient_regularization(limit=0.5)
    >>> updates, _ = tx.update({"w": jnp.array([1.0, -3.0])}, tx.init({"w": jnp.zeros(2)}))
    >>> updates["w"].tolist()
    [0.75, -1.5]

  References:
    Jiang et al., Adaptive Gradient Regularization, 2024, arXiv 2407.16944; `use_agr` of
    `HinaAdaptive`.
  """
  checks.unit_interval("limit", limit)

  def shrink(leaf, g, old):
    # The share would be 1, so the formula would keep a scalar parameter from ever moving.
    if leaf.size == 1:
      return g, old
    magnitude = jnp.abs(g)
    share = magnitude * numerics.reciprocal(numerics.total(magnitude))
    return g * (1 - jnp.minimum(share, numerics.scalar(limit, g.dtype))), old

  return leafwise.part(AdaptiveGradientRegularizationState, shrink)


registry.register(registry.regularizer(
  adaptive_gradient_regularization, AdaptiveGradientRegularizationState, 10,
  Option("use_agr", True, registry.FLAG,
         "`adaptive_gradient_regularization`: each element loses its share of the gradient",
         "clips each leaf to norm 1"),
  {"limit": Option("agr_limit", 0.1, registry.FRACTION,
                   "largest share that an element loses; 1 is the published rule", "unused")},
  scale_free=True, identity={"limit": 0.0}))
