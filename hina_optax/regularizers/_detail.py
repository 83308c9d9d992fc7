"""Detail preservation: damp the gradient where it varies locally, to a chosen floor."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hina_optax import _checks, _leaves, _numerics, _parts, _stencils, _visits
from hina_optax._numerics import Scalar

# An average that became infinite would stay so.
_LARGEST = 1e38


class PreserveDetailState(NamedTuple):
  """State of `preserve_detail`.

  Attributes:
    count: int32 scalar, steps seen.
    local_variance: like the parameters, fp32: average over steps of the local variance. 4 bytes a
      parameter; an average from zero (`relative`), to be divided by `1 - decay**count`.
  """

  count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
  local_variance: Any


def preserve_detail(
  detail_preservation: Scalar = 0.8,
  *,
  decay: Scalar = 0.9,
  spatial_axes: _leaves.SpatialAxes | None = None,
  relative: bool = True,
) -> optax.GradientTransformationExtraArgs:
  r"""Damps the gradient where its local variance is high, keeping a share of the detail.

  The local variance `V` of an element is the mean over its neighbours along the spatial axes of the
  squared difference to them; `R` is `V` over its mean on the leaf, averaged over steps with the
  start-up bias removed. Then, with :math:`p` = `detail_preservation`,

  .. math:: g \leftarrow g \left(p + \frac{1 - p}{1 + R}\right)

  The factor lies in `[p, 1]`: `p = 1` is the identity, `p = 0` halves the gradient at places of
  mean variance. `R` is relative, so the effect does not depend on the scale of the gradient
  (fp32 squares carry it from about 1e-19 to 1e18; outside of that a leaf counts as flat). Rows and
  columns of a dense weight have no true neighbours, latents do.

  Args:
    detail_preservation: `p` in [0, 1], the smallest factor.
    decay: of the average over steps, in [0, 1).
    spatial_axes: `f(path, leaf) -> axes`; leaves with `()` pass through. `None` is
      `flax_spatial_axes`.
    relative: `False` is the PyTorch original: :math:`g / (1 + p \bar V)`, where `V` is the sum of
      squared differences in units of the squared gradient and its average starts from one. It
      divides every matrix and kernel by about 1.8 at first, in which more preservation means
      *less* detail.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `PreserveDetailState`: 4 bytes a parameter.

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
    `spatial_awareness` and `detail_preservation` of `HinaAdaptive` (sd-scripts fork), turned the
    right way round.
  """
  _checks.fraction("detail_preservation", detail_preservation)
  _checks.decay("decay", decay)
  _checks.rule("spatial_axes", spatial_axes)

  def init(params: Any) -> PreserveDetailState:
    _visits.has_axes(spatial_axes, params)
    return PreserveDetailState(
      count=jnp.zeros([], jnp.int32),
      local_variance=_leaves.per_element_state(params, 0.0 if relative else 1.0),
    )

  def update(updates, state, params=None, **extra_args):
    del params, extra_args
    count = optax.safe_increment(state.count)

    def damp(leaf, g, read, trees, scalars):
      del read, scalars
      grid = _visits.grid(leaf, spatial_axes, g.dtype)
      share = _numerics.scalar(detail_preservation, g.dtype)
      if not grid.axes and (relative or len(leaf.shape) < 2):
        return g, trees, ()
      field = _stencils.field(g, grid)
      if relative:
        variance = _numerics.average(trees[0], _relative_variance(field), decay)
        smoothed = variance / _numerics.debias(decay, count, g.dtype)
        return field.values * (share + (1 - share) / (1 + smoothed)), (variance,), ()
      squares = jnp.minimum(_stencils.squared_differences(field), _LARGEST)
      variance = _numerics.average(trees[0], squares, decay)
      return field.values / (1 + share * variance), (variance,), ()

    visited = _visits.visit(damp, updates, trees=(state.local_variance,))
    return visited.updates, PreserveDetailState(count, *visited.trees)

  return _parts.Part(init, update, params="ignores")


def _relative_variance(field: _stencils.Field) -> jax.Array:
  variance = _stencils.squared_differences(field)
  scale = _numerics.reciprocal(_numerics.mean(variance))
  # Squares that overflow count as flat: infinity times 0 would be NaN.
  return jnp.where(scale > 0, variance * scale, 0)
