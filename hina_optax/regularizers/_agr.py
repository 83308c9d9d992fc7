"""Adaptive gradient regularization: shrink each element by its share of the leaf's gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hina_optax import _checks, _leaves, _numerics, _parts, _visits


class AdaptiveGradientRegularizationState(NamedTuple):
  """State of `adaptive_gradient_regularization`: empty, it names the part in a chain's state."""


def adaptive_gradient_regularization(
  form: str = "coefficient",
) -> optax.GradientTransformationExtraArgs:
  r"""Shrinks each gradient element by its share of the leaf's absolute gradient.

  .. math:: g \leftarrow g \left(1 - \frac{|g|}{\sum |g|}\right)

  The sum runs over the leaf, so on a leaf of a million elements this is practically the identity:
  expect nothing of it on large matrices. An all-zero gradient (a LoRA factor at the first step)
  stays zero. Place it before both moments. The effect does not depend on the gradient's scale.

  On small leaves it is harsh: an element that is the only one with a gradient loses all of it, and
  training stops there. A leaf of one element, whose share is always 1, passes for that reason.

  Args:
    form: `"coefficient"` (the paper's), or `"clip"`: what the PyTorch original calls AGR, a clip of
      each leaf to Euclidean norm 1 (in units of the gradient).

  Returns:
    An `optax.GradientTransformationExtraArgs` without state.

  Raises:
    ValueError: if `form` is unknown. TypeError: if a leaf is not floating.

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
  _checks.choice("form", form, ("coefficient", "clip"))

  def init(params: Any) -> AdaptiveGradientRegularizationState:
    _leaves.check_floating(params, "params")
    return AdaptiveGradientRegularizationState()

  def shrink(leaf, g, read, trees, scalars):
    del leaf, read, trees, scalars
    # The paper's formula would keep a scalar parameter from ever moving.
    alone = form == "coefficient" and g.size == 1
    return g if alone else g * _coefficient(g, form), (), ()

  def update(updates, state, params=None, **extra_args):
    del params, extra_args
    return _visits.visit(shrink, updates).updates, state

  return _parts.Part(init, update, params="ignores")


def _coefficient(g: jax.Array, form: str) -> jax.Array:
  if form == "clip":
    return 1 / jnp.maximum(_numerics.wide_norm(g), jnp.ones([], g.dtype))
  size = jnp.abs(g)
  return 1 - size * _numerics.reciprocal(_numerics.total(size))
