"""Detail preservation: damp the gradient where it varies locally, to a chosen floor."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hina_optax import registry
from hina_optax.base import checks, leafwise, numerics, paths
from hina_optax.base.leaf import Leaf
from hina_optax.base.numerics import Scalar
from hina_optax.registry import Option
from hina_optax.regularizers._high_frequency import SPATIAL_AWARENESS

__all__ = ["PreserveDetailState", "preserve_detail"]


class PreserveDetailState(NamedTuple):
  """State of `preserve_detail`.

  Attributes:
    count: int32 scalar, steps seen.
    local_variance: like the parameters, fp32: average over steps of the local variance, as a
      multiple of its mean over the leaf. It starts from zero; divide it by `1 - decay**count` to
      correct for that. 4 bytes per parameter.
  """

  count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
  local_variance: Any


def preserve_detail(
  detail_preservation: Scalar = 0.8,
  *,
  decay: Scalar = 0.9,
  spatial_axes: paths.SpatialAxes | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Damps the gradient where its local variance is high, keeping a share of the detail.

  The local variance `V` of an element is the mean over its neighbours along the spatial axes of the
  squared difference to them; `R` is `V` over its mean over the leaf, averaged over steps with the
  start-up bias removed. Then, with :math:`p` = `detail_preservation`,

  .. math:: g \leftarrow g \left(p + \frac{1 - p}{1 + R}\right)

  The factor lies in `[p, 1]`: `p = 1` is the identity, `p = 0` halves the gradient at places of
  mean variance. `R` is relative, so the effect does not depend on the scale of the gradient
  (fp32 squares carry it from about 1e-19 to 1e18; outside of that a leaf counts as flat). Rows and
  columns of a dense weight have no true neighbours, latents do.

  Args:
    detail_preservation: `p` in [0, 1], the smallest factor.
    decay: the decay of the average over steps, in [0, 1).
    spatial_axes: `f(path, leaf) -> axes`; leaves with `()` pass through. `None` is
      `flax_spatial_axes`.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `PreserveDetailState`: 4 bytes per parameter.

  Raises:
    ValueError: if an argument lies outside its range or an axis does not exist.
    TypeError: if a leaf is not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> import hina_optax
    >>> tx = hina_optax.preserve_detail(detail_preservation=0.5)
    >>> grads = {"w": jnp.array([[1.0, 1.0, 1.0, 5.0]])}
    >>> updates, _ = tx.update(grads, tx.init(grads))
    >>> [round(float(x), 3) for x in updates["w"][0]]
    [1.0, 1.0, 0.667, 3.333]

  References:
    `spatial_awareness` and `detail_preservation` of `HinaAdaptive` (sd-scripts fork), where more
    preservation means less detail.
  """
  checks.unit_interval("detail_preservation", detail_preservation)
  checks.decay("decay", decay)
  checks.optional_function("spatial_axes", spatial_axes)

  def damp(leaf, g, old):
    if not leaf.axes or not leaf.size:
      return g, old
    variance = numerics.update_average(old.local_variance, _relative_variance(leaf, g), decay)
    smoothed = variance / numerics.bias_correction(decay, old.count, g.dtype)
    share = numerics.scalar(detail_preservation, g.dtype)
    return g * (share + (1 - share) / (1 + smoothed)), old._replace(local_variance=variance)

  return leafwise.part(
    PreserveDetailState, damp, axes=spatial_axes, elements={"local_variance": 0.0})


def _relative_variance(leaf: Leaf, g: jax.Array) -> jax.Array:
  variance = leaf.squared_differences(g)
  scale = numerics.reciprocal(numerics.mean(variance))
  # If a square overflows, the scale is 0 and infinity times 0 would be NaN. Such a leaf counts as
  # flat.
  return jnp.where(scale > 0, variance * scale, 0)


registry.register(registry.regularizer(
  preserve_detail, PreserveDetailState, 40, SPATIAL_AWARENESS,
  {"detail_preservation": Option(
     "detail_preservation", 0.8, registry.FRACTION,
     "least factor that varied places keep; 1 is the identity", "more of it damps more"),
   "spatial_axes": "spatial_axes"},
  drop_order=2, scale_free=True, identity={"detail_preservation": 1.0},
  examples={"": {"detail_preservation": 0.3}}))
