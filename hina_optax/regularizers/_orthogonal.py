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
# Norms of gradients between which fp32 holds the squares of all elements that matter.
_MIN_NORM, _MAX_NORM = 1e-15, 1e18
# Relative norm of the orthogonal part below which it is rounding noise.
_NOISE = 1e-6
# Relative size above which a difference of squared norms loses no digits that matter.
_ACCURATE_ABOVE = 0.25


class OrthogonalizeToParamsState(NamedTuple):
  """State of `orthogonalize_to_params`: empty. It names the part in a chain's state."""


def orthogonalize_to_params(include_vectors: bool = False) -> optax.GradientTransformationExtraArgs:
  r"""Removes from the gradient its component along the parameters, keeping its norm.

  .. math::
    o = g - \frac{\langle w, g \rangle}{\langle w, w \rangle + 10^{-30}}\, w, \qquad
    g \leftarrow o\, \frac{\|g\|}{\|o\| + 10^{-30}}

  per leaf. A leaf whose parameters or gradient are zero passes through. So does a gradient whose
  norm is below 1e-15 or above 1e18, because fp32 does not hold its squares. If the gradient is
  parallel to the parameters (always so with one element), only rounding noise is left, which the
  formula would scale up to the old norm: below 1e-6 of the gradient the result is 0.

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
    return (_project_leaf(leaf, g, w) if include_vectors or len(leaf.shape) >= 2 else g), old

  return leafwise.part(
    OrthogonalizeToParamsState, project, reads_params="orthogonalize_to_params")


def _project_leaf(leaf: Leaf, g: jax.Array, w: jax.Array) -> jax.Array:
  product, square_w = numerics.inner_product(w, g), numerics.inner_product(w, w)
  along = numerics.safe_divide(product, square_w + _TINY)
  square_g = numerics.inner_product(g, g)
  # The square of the orthogonal part is a difference of numbers that are known already. It is
  # summed over the leaf only if the difference loses digits.
  square_o = square_g - along * product
  square_o = leaf.recompute_unless(
    square_o > _ACCURATE_ABOVE * square_g, square_o, _square_of_rest, g, w, along)
  norm_g, norm_o = jnp.sqrt(square_g), jnp.sqrt(square_o)
  scale = jnp.where(norm_o > _NOISE * norm_g, numerics.safe_divide(norm_g, norm_o + _TINY), 0)
  usable = (norm_g > _MIN_NORM) & (norm_g < _MAX_NORM) & (jnp.sqrt(square_w) > _TINY)
  return jnp.where(usable, (g - along * w) * scale, g)


def _square_of_rest(g: jax.Array, w: jax.Array, along: jax.Array) -> jax.Array:
  """Squared norm of the part of `g` that is orthogonal to `w`."""
  rest = g - along * w
  return numerics.inner_product(rest, rest)


registry.register(registry.regularizer(
  orthogonalize_to_params, OrthogonalizeToParamsState, 70,
  Option("use_orthogonal_grad", False, registry.FLAG,
         "`orthogonalize_to_params`, on leaves of two axes and more", "on all leaves"),
  {}, reads_params=True, scale_free=True, moves_minimum=True))
