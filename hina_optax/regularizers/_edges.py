"""Edge suppression: damp the gradient where it changes sharply from place to place."""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from hina_optax import registry
from hina_optax.base import checks, leafwise, numerics, paths
from hina_optax.base.numerics import Scalar
from hina_optax.base.positions import LeafNumbers
from hina_optax.registry import Figure, Option

__all__ = ["SuppressEdgesState", "suppress_edges"]


class SuppressEdgesState(NamedTuple):
  """State of `suppress_edges`.

  Attributes:
    edge_share: fp32, one number per leaf, found by its path: share of its elements that were edges
      at the last step, -1 for a leaf without spatial axes. 4 bytes per leaf.
  """

  edge_share: LeafNumbers


def suppress_edges(
  strength: Scalar = 0.1,
  threshold: Scalar = 0.6,
  *,
  spatial_axes: paths.SpatialAxes | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Damps the gradient where it has edges along its spatial axes.

  With the second difference `L` of the gradient, summed over the spatial axes (a missing neighbour
  equals the element itself), and the edge strength :math:`e = |L| / \max |L|` over the leaf,

  .. math:: g \leftarrow \frac{g}{1 + s\, e\, [e > \theta]}

  The sign of the gradient never changes and its size never grows. Edge strength is relative, so
  the effect does not depend on the scale of the gradient. On the rows and columns of a dense weight
  an edge has no meaning beyond this formula, because they have no true neighbours. Latents do.

  Args:
    strength: `s` >= 0, dimensionless. At the strongest edge the gradient is divided by `1 + s`.
      0 is the identity.
    threshold: :math:`\theta` in [0, 1], as a fraction of the strongest edge of the leaf.
    spatial_axes: `f(path, leaf) -> axes`, the axes along which neighbours are compared; leaves with
      `()` pass through. `None` is `flax_spatial_axes`.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `SuppressEdgesState`: nothing per parameter,
    4 bytes per leaf.

  Raises:
    ValueError: if `strength` is negative or not finite, `threshold` is outside its range, or an
      axis does not exist. TypeError: if a leaf is not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> import hina_optax
    >>> tx = hina_optax.suppress_edges(strength=1.0, threshold=0.5)
    >>> grads = {"w": jnp.zeros((5, 5)).at[2, 2].set(1.0)}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> float(updates["w"][2, 2]), round(float(state.edge_share["w"]), 3)
    (0.5, 0.04)

  References:
    `edge_suppression`, `edge_penalty` and `edge_threshold` of `HinaAdaptive` (sd-scripts fork),
    with the threshold made relative.
  """
  checks.number("strength", strength)
  checks.unit_interval("threshold", threshold)
  checks.optional_function("spatial_axes", spatial_axes)

  def damp(leaf, g, old):
    if not leaf.axes or not leaf.size:
      return g, old
    edges = leaf.compute_once(jnp.abs(leaf.laplacian(g)))
    strongest = jnp.max(edges)
    is_edge = edges > numerics.scalar(threshold, g.dtype) * strongest
    amount = numerics.scalar(strength, g.dtype) * numerics.reciprocal(strongest)
    factor = 1 + amount * jnp.where(is_edge, edges, 0)
    return g / factor, old._replace(edge_share=numerics.share_of_true(is_edge))

  return leafwise.part(
    SuppressEdgesState, damp, axes=spatial_axes,
    numbers={"edge_share": lambda leaf: 0.0 if leaf.axes else -1.0})


def _check_threshold(options):
  # In the original, the PyTorch class `HinaAdaptive` in a fork of kohya's sd-scripts, the threshold
  # is in units of the gradient and may exceed 1.
  if not options.sd_scripts_compat:
    registry.FRACTION.check("edge_threshold", options.edge_threshold)


registry.register(registry.regularizer(
  suppress_edges, SuppressEdgesState, 20,
  Option("edge_suppression", False, registry.FLAG, "`suppress_edges`: damps edges of the gradient",
         "matrices only"),
  {"strength": Option("edge_penalty", 0.1, registry.NUMBER, "strength of `edge_suppression`"),
   "threshold": Option("edge_threshold", 0.6, registry.NUMBER,
                       "share of each leaf's strongest edge, in [0, 1]",
                       "in units of the gradient, >= 0"),
   "spatial_axes": "spatial_axes"},
  check=_check_threshold, figures={"edge_share": Figure("edge_share")}, scale_free=True,
  identity={"strength": 0.0}, examples={"": {"strength": 0.5, "threshold": 0.3}}))
