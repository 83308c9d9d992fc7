"""OrthoGrad: keep only the part of the gradient that is orthogonal to the parameters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hina_optax import _checks, _leaves, _numerics, _parts, _visits

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
    include_vectors: `False` lets leaves of fewer than two axes (biases, norms) pass through, as
      the paper does; `True` takes every leaf, as the PyTorch original does.

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
  _checks.choice("include_vectors", include_vectors, (False, True))

  def init(params: Any) -> OrthogonalizeToParamsState:
    _leaves.check_floating(params, "params")
    return OrthogonalizeToParamsState()

  def project(leaf, g, read, trees, scalars):
    del trees, scalars
    return (_orthogonal(g, read[0]) if include_vectors or len(leaf.shape) >= 2 else g), (), ()

  def update(updates, state, params=None, **extra_args):
    del extra_args
    _leaves.require_params(params, "orthogonalize_to_params")
    return _visits.visit(project, updates, read=(params,)).updates, state

  return _parts.Part(init, update)


def _orthogonal(g: jax.Array, w: jax.Array) -> jax.Array:
  product, square = _numerics.inner_product(w, g), _numerics.inner_product(w, w)
  along = _numerics.safe_divide(product, square + _TINY)
  total = _numerics.inner_product(g, g)
  size, left = jnp.sqrt(total), jnp.sqrt(_left(g, w, along, product, total))
  scale = jnp.where(left > _NOISE * size, _numerics.safe_divide(size, left + _TINY), 0)
  usable = (size > _LEAST) & (size < _MOST) & (jnp.sqrt(square) > _TINY)
  return jnp.where(usable, (g - along * w) * scale, g)


def _left(
  g: jax.Array, w: jax.Array, along: jax.Array, product: jax.Array, total: jax.Array
) -> jax.Array:
  """Square of the norm of `g - along * w`: a difference, unless that would lose digits."""
  def summed(g: jax.Array, w: jax.Array, along: jax.Array) -> jax.Array:
    rest = g - along * w
    return _numerics.inner_product(rest, rest)

  found = total - along * product
  return _numerics.usually(found > _MUCH * total, found, summed, g, w, along)
