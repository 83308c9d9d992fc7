"""Cautious updates and Grams: make the direction agree in sign with the gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hina_optax import _checks, _leaves, _numerics, _parts, _rows, _visits
from hina_optax._numerics import Scalar

_LEAST_SHARE = 1e-3


class CautiousState(NamedTuple):
  """State of `cautious`.

  Attributes:
    inner_state: the wrapped transformation's state.
    alignment: fp32 vector, one number a leaf: share of elements whose direction agreed with the
      gradient at the last step (`per="element"`), or their cosine (`per="leaf"`). 4 bytes a leaf.
  """

  inner_state: Any
  alignment: jax.Array


class GramsState(NamedTuple):
  """State of `grams`.

  Attributes:
    inner_state: the wrapped transformation's state.
  """

  inner_state: Any


def cautious(
  inner: optax.GradientTransformation,
  *,
  per: str = "element",
  threshold: Scalar = 0.1,
  factor: Scalar = 0.5,
) -> optax.GradientTransformationExtraArgs:
  r"""Keeps of the wrapped direction what agrees in sign with the gradient.

  With the gradient `g` that goes in and the direction `u` that comes out, per leaf,

  .. math:: u \leftarrow \frac{u\,[u g > 0]}{\max(\operatorname{mean}[u g > 0],\, 10^{-3})}

  On pure noise about 65% of the elements of Adam's direction agree anyway. Whole optimizers such as
  `optax.adamw` give steps that point downhill, against the gradient: of them the wrong elements
  would be kept, silently. Wrap the core, and put weight decay and learning rate behind it.

  Args:
    inner: any optax transformation whose output still points along the gradient (before
      `optax.scale_by_learning_rate`, which turns the sign).
    per: `"element"`, or `"leaf"`: the PyTorch original, which multiplies the whole leaf by `factor`
      where the cosine of `u` and `g` is below `threshold`.
    threshold: in [-1, 1], a cosine; read with `per="leaf"`.
    factor: in [0, 1]; read with `per="leaf"`.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `CautiousState`: 4 bytes a leaf beside the
    inner's state.

  Raises:
    ValueError: if an argument lies outside its range. TypeError: if a leaf is not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import hina_optax
    >>> tx = hina_optax.cautious(optax.trace(decay=0.9))
    >>> params = jnp.zeros(2)
    >>> _, state = tx.update(jnp.array([1.0, 1.0]), tx.init(params))
    >>> updates, _ = tx.update(jnp.array([1.0, -0.5]), state)
    >>> [round(float(x), 2) for x in updates]
    [3.8, 0.0]

  References:
    Liang et al., Cautious optimizers, 2024, arXiv 2411.16085; `use_cautious` of `HinaAdaptive`.
  """
  _checks.choice("per", per, ("element", "leaf"))
  _checks.number("threshold", threshold, -1.0, 1.0)
  _checks.fraction("factor", factor)
  inner = _rows.aware(inner)

  def init(params: Any) -> CautiousState:
    _leaves.check_floating(params, "params")
    return CautiousState(inner.init(params), _visits.per_leaf_scalars(params))

  def by_element(leaf, u, read, trees, scalars):
    del leaf, trees, scalars
    agrees = _same_sign(u, read[0])
    share = _numerics.fraction(agrees, u.dtype)
    scale = 1 / jnp.maximum(share, jnp.asarray(_LEAST_SHARE, u.dtype))
    return jnp.where(agrees, u * scale, jnp.zeros_like(u)), (), (share,)

  def by_leaf(leaf, u, read, trees, scalars):
    del leaf, trees, scalars
    g = read[0]
    angle = _numerics.cosine(u, g)
    apart = _numerics.have_directions(u, g) & (angle < _numerics.scalar(threshold, u.dtype))
    return u * jnp.where(apart, _numerics.scalar(factor, u.dtype), 1), (), (angle,)

  def update(updates, state, params=None, **extra_args):
    directions, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
    visited = _visits.visit(
      by_element if per == "element" else by_leaf,
      directions, read=(updates,), scalars=(state.alignment,),
    )
    return visited.updates, CautiousState(inner_state, *visited.scalars)

  return _parts.Part(init, update, _parts.inner_survey(inner), "hands on")


def grams(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  r"""Takes the size of the wrapped direction and the sign of the gradient.

  .. math:: u \leftarrow \operatorname{sign}(g)\, |u|

  A cautious mask behind it would be all ones, so the two do not go together.

  Args:
    inner: any optax transformation whose output still points along the gradient.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `GramsState`: nothing beside the inner's
    state.

  Raises:
    TypeError: if a leaf is not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import hina_optax
    >>> tx = hina_optax.grams(optax.trace(decay=0.9))
    >>> _, state = tx.update(jnp.array([1.0, 1.0]), tx.init(jnp.zeros(2)))
    >>> updates, _ = tx.update(jnp.array([1.0, -0.5]), state)
    >>> [round(float(x), 2) for x in updates]
    [1.9, -0.4]

  References:
    Cao et al., Grams: gradient descent with adaptive momentum scaling, 2024, arXiv 2412.17107;
    `use_grams` of `HinaAdaptive`, which never applied it.
  """
  inner = _rows.aware(inner)

  def init(params: Any) -> GramsState:
    _leaves.check_floating(params, "params")
    return GramsState(inner.init(params))

  def turn(leaf, u, read, trees, scalars):
    del leaf, trees, scalars
    return jnp.sign(read[0]) * jnp.abs(u), (), ()

  def update(updates, state, params=None, **extra_args):
    directions, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
    visited = _visits.visit(turn, directions, read=(updates,))
    return visited.updates, GramsState(inner_state)

  return _parts.Part(init, update, _parts.inner_survey(inner), "hands on")


def _same_sign(u: jax.Array, g: jax.Array) -> jax.Array:
  # Not u * g > 0: the product of two small numbers is 0 in fp32.
  return ((u > 0) & (g > 0)) | ((u < 0) & (g < 0))
