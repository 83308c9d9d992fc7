"""OrthoGrad: keep only the part of the gradient that is orthogonal to the parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hina_optax import registry
from hina_optax.base import checks, leafwise, numerics
from hina_optax.base.leaf import Leaf
from hina_optax.registry import Option

__all__ = ["OrthogonalizeToParamsState", "orthogonalize_to_params"]

_TINY = 1e-30
# Norms of gradients of which fp32 holds the squares of all elements that count.
_LEAST, _MOST = 1e-15, 1e18
_NOISE = 1e-6
# Share of the square of a norm that a difference of squares keeps to within rounding.
_MUCH = 0.25


class OrthogonalizeToParamsState(NamedTuple):
  """State of `orthogonalize_to_params`: empty, it names the part in a chain's state."""


def orthogonalize_to_params(include_vectors: bool = False) -> optax.GradientTransformationExtraArgs:
  r"""Removes from the gradient its component along the parameters, keeping its norm.

  .. math::
    o = g - \frac{\langle w, g \rangle}{\langle w, w \rangle + 10^{-30}}\, w, \qquad
    g \leftarrow o\, \frac{\|g\|}{\|o\| + 10^{-30}}

  per leaf. A leaf whose parameters or gradient are zero passes through, also a gradient of a norm
  below 1e-15 or above 1e18, whose squares fp32 does not hold. Of a gradient parallel to
  the parameters (always so with one element) nothing is left but rounding noise, which the formula
  would scale up to the old norm: below 1e-6 of the gradient the result is 0.

  Args:
    include_vectors: whether leaves of fewer than two axes (biases, norms) are projected too; the
      paper lets them pass through.

  Returns:
    An `optax.GradientTransformationExtraArgs` without state.

  Raises:
    ValueError: if `params` are missing at the update.
    TypeError: if a leaf is not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> import hina_optax
    >>> tx = hina_optax.orthogonalize_to_params()
    >>> params = {"w": jnp.array([[2.0, 0.0]])}
    >>> updates, _ = tx.update({"w": jnp.array([[3.0, 4.0]])}, tx.init(params), params)
    >>> updates["w"].tolist()
    [[0.0, 5.0]]

  References:
    Prieto et al., Grokking at the edge of numerical stability, ICLR 2025, arXiv 2501.04697;
    `use_orthogonal_grad` of `HinaAdaptive`.
  """
  checks.choice("include_vectors", include_vectors, (False, True))

  def project(leaf, g, w, old):
    return (_orthogonal(leaf, g, w) if include_vectors or len(leaf.shape) >= 2 else g), old

  return leafwise.part(
    OrthogonalizeToParamsState, project, reads_params="orthogonalize_to_params")


def _orthogonal(leaf: Leaf, g: jax.Array, w: jax.Array) -> jax.Array:
  product, square = numerics.inner_product(w, g), numerics.inner_product(w, w)
  along = numerics.safe_divide(product, square + _TINY)
  total = numerics.inner_product(g, g)
  # A difference, unless that would lose digits.
  rest = total - along * product
  rest = leaf.seldom(rest > _MUCH * total, rest, _square_of_rest, g, w, along)
  size, left = jnp.sqrt(total), jnp.sqrt(rest)
  scale = jnp.where(left > _NOISE * size, numerics.safe_divide(size, left + _TINY), 0)
  usable = (size > _LEAST) & (size < _MOST) & (jnp.sqrt(square) > _TINY)
  return jnp.where(usable, (g - along * w) * scale, g)


def _square_of_rest(g: jax.Array, w: jax.Array, along: jax.Array) -> jax.Array:
  rest = g - along * w
  return numerics.inner_product(rest, rest)


registry.register(registry.regularizer(
  orthogonalize_to_params, OrthogonalizeToParamsState, 70,
  Option("use_orthogonal_grad", False, registry.FLAG,
         "`orthogonalize_to_params`, on leaves of two axes and more", "on all leaves"),
  {}, reads_params=True, scale_free=True, moves_minimum=True))
