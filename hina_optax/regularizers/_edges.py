"""Edge suppression: damp the gradient where it changes sharply from place to place."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hina_optax import _checks, _leaves, _numerics, _parts, _stencils, _visits
from hina_optax._numerics import Scalar


class SuppressEdgesState(NamedTuple):
  """State of `suppress_edges`.

  Attributes:
    edge_share: fp32 vector, one number a leaf: share of its elements that were edges at the last
      step, -1 for a leaf without spatial axes. 4 bytes a leaf.
  """

  edge_share: jax.Array


def suppress_edges(
  strength: Scalar = 0.1,
  threshold: Scalar = 0.6,
  *,
  spatial_axes: _leaves.SpatialAxes | None = None,
  relative: bool = True,
  border: str = "replicate",
) -> optax.GradientTransformationExtraArgs:
  r"""Damps the gradient where it has edges along its spatial axes.

  With the second difference `L` of the gradient, summed over the spatial axes, and the edge
  strength :math:`e = |L| / \max |L|` over the leaf,

  .. math:: g \leftarrow \frac{g}{1 + s\, e\, [e > \theta]}

  The sign of the gradient never changes and its size never grows. Edge strength is relative, so
  the effect does not depend on the scale of the gradient. On the rows and columns of a dense weight
  an edge has no meaning beyond this formula: they have no true neighbours, latents do.

  Args:
    strength: `s` >= 0, dimensionless. At the strongest edge the gradient is divided by `1 + s`.
      0 is the identity.
    threshold: :math:`\theta` in [0, 1], as a fraction of the strongest edge of the leaf.
    spatial_axes: `f(path, leaf) -> axes`, the axes along which neighbours are compared; leaves with
      `()` pass through. `None` is `flax_spatial_axes`.
    relative: `False` takes :math:`e = |L|` as it is, and `threshold` in units of the gradient (the
      PyTorch original). It then practically never fires on real gradients, which are far smaller
      than 0.6.
    border: `"replicate"` (a missing neighbour equals the element) or `"zero"` (no second difference
      on the border, as in the original).

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `SuppressEdgesState`: nothing per parameter,
    4 bytes a leaf.

  Raises:
    ValueError: if `strength` is negative or not finite, `threshold` is outside its range, or an
      axis does not exist. TypeError: if a leaf is not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> import hina_optax
    >>> tx = hina_optax.suppress_edges(strength=1.0, threshold=0.5)
    >>> grads = {"w": jnp.zeros((5, 5)).at[2, 2].set(1.0)}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> float(updates["w"][2, 2]), round(float(state.edge_share[0]), 3)
    (0.5, 0.04)

  References:
    `edge_suppression`, `edge_penalty` and `edge_threshold` of `HinaAdaptive` (sd-scripts fork),
    with the threshold made relative.
  """
  _checks.number("strength", strength)
  _checks.number("threshold", threshold, 0.0, 1.0 if relative else float("inf"))
  _checks.choice("border", border, ("replicate", "zero"))
  _checks.rule("spatial_axes", spatial_axes)

  def init(params: Any) -> SuppressEdgesState:
    _leaves.check_floating(params, "params")
    acts = _visits.has_axes(spatial_axes, params)
    return SuppressEdgesState(edge_share=jnp.where(acts, jnp.float32(0), jnp.float32(-1)))

  def damp(leaf, g, read, trees, scalars):
    del read, trees
    grid = _visits.grid(leaf, spatial_axes, g.dtype)
    if not grid.axes or not g.size:
      return g, (), scalars
    field = _stencils.field(g, grid)
    edges, unit = _edges(field, border, relative)
    least = _numerics.scalar(threshold, g.dtype) * unit
    amount = _numerics.scalar(strength, g.dtype) * _numerics.reciprocal(unit)
    fires = edges > least
    factor = 1 + amount * jnp.where(fires, edges, 0)
    return field.values / factor, (), (_numerics.fraction(fires),)

  def update(updates, state, params=None, **extra_args):
    del params, extra_args
    visited = _visits.visit(damp, updates, scalars=(state.edge_share,))
    return visited.updates, SuppressEdgesState(*visited.scalars)

  return _parts.Part(init, update, params="ignores")


def _edges(field: _stencils.Field, border: str, relative: bool) -> tuple[jax.Array, jax.Array]:
  """Second differences, and what an edge strength of 1 is among them."""
  # There are three readers.
  edges = _numerics.written(jnp.abs(_stencils.laplacian(field, border)))
  return edges, jnp.max(edges) if relative else jnp.ones([], edges.dtype)
