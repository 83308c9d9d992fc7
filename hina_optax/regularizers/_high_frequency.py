"""High-frequency suppression: subtract a share of the difference to the neighbours' mean."""

from typing import NamedTuple

import optax

from hina_optax import registry
from hina_optax.base import checks, leafwise, numerics, paths
from hina_optax.base.numerics import Scalar
from hina_optax.registry import Option

__all__ = ["SuppressHighFrequencyState", "suppress_high_frequency"]


class SuppressHighFrequencyState(NamedTuple):
  """State of `suppress_high_frequency`: empty. It names the part in a chain's state."""


def suppress_high_frequency(
  strength: Scalar = 0.05,
  *,
  spatial_axes: paths.SpatialAxes | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Subtracts a share of the gradient's high-pass part along its spatial axes.

  With the mean over the `2k` neighbours of an element along `k` axes (a missing neighbour equals
  the element itself),

  .. math:: g \leftarrow g - s\,(g - \operatorname{mean}_{\text{neighbours}} g)

  The map is linear and keeps the mean of every line of the leaf; for `s <= 1` it is a contraction
  (its eigenvalues lie in `[1 - 2s, 1]`). "Frequency" here is the finite-difference sense along an
  axis of the array. On the rows and columns of a dense weight it has no image meaning, because they
  have no true neighbours. Latents do.

  Args:
    strength: `s` >= 0, dimensionless. 0 is the identity; more than 1 amplifies the highest
      frequency.
    spatial_axes: `f(path, leaf) -> axes`, the axes along which neighbours are averaged; leaves with
      `()` pass through. `None` is `flax_spatial_axes`.

  Returns:
    An `optax.GradientTransformationExtraArgs` without state.

  Raises:
    ValueError: if `strength` is negative or not finite, or an axis does not exist.
    TypeError: if a leaf is not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> import hina_optax
    >>> tx = hina_optax.suppress_high_frequency(strength=1.0)
    >>> grads = {"w": jnp.array([[0.0, 0.0, 0.0], [0.0, 8.0, 0.0], [0.0, 0.0, 0.0]])}
    >>> updates, _ = tx.update(grads, tx.init(grads))
    >>> updates["w"].tolist()
    [[0.0, 2.0, 0.0], [2.0, 0.0, 2.0], [0.0, 2.0, 0.0]]

  References:
    `spatial_awareness` and `frequency_penalty` of `HinaAdaptive` (sd-scripts fork), made linear and
    unbiased. One explicit step of the diffusion that Laplacian smoothing (Osher et al. 2018,
    arXiv 1806.06317) takes implicitly.
  """
  checks.number("strength", strength)
  checks.optional_function("spatial_axes", spatial_axes)

  def smooth(leaf, g, old):
    if not leaf.axes or not leaf.size:
      return g, old
    high_pass = leaf.laplacian(g) * (-0.5 / len(leaf.axes))
    return g - numerics.scalar(strength, g.dtype) * high_pass, old

  return leafwise.part(SuppressHighFrequencyState, smooth, axes=spatial_axes)


# `suppress_high_frequency` and `preserve_detail` share this option.
SPATIAL_AWARENESS = Option(
  "spatial_awareness", False, registry.FLAG,
  "`suppress_high_frequency` and `preserve_detail`: smooth the gradient, keep its detail",
  "drives the gradient down by the *size* of its differences")

registry.register(registry.regularizer(
  suppress_high_frequency, SuppressHighFrequencyState, 30, SPATIAL_AWARENESS,
  {"strength": Option("frequency_penalty", 0.05, registry.NUMBER,
                      "share of the high-pass part that is subtracted"),
   "spatial_axes": "spatial_axes"},
  drop_order=2, scale_free=True, identity={"strength": 0.0}, examples={"": {"strength": 0.7}}))
