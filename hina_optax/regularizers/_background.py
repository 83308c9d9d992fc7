"""Background attenuation: damp the gradient of elements that stay quiet over many steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hina_optax import _checks, _leaves, _numerics, _parts, _stencils, _visits
from hina_optax._numerics import Scalar

# Of the guide and the original: how far the share of background may go before the fast mode treats
# it more gently or more firmly, and the factors (background, foreground) for each case.
_MOSTLY_BACKGROUND, _MOSTLY_FOREGROUND = 0.7, 0.2
_FACTORS = ((0.2, 1.2), (0.5, 1.05), (0.3, 1.1))
_QUIET_SHARE = 0.3
_SHARE_DECAY = 0.95


class AttenuateBackgroundState(NamedTuple):
  """State of `attenuate_background`.

  Attributes:
    count: int32 scalar, steps seen.
    background: like the parameters, fp32: average over steps of "was background", from zero. 4
      bytes a parameter.
    background_share: fp32 vector, one number a leaf: average over steps of the mean of
      `background`. Followed in `fast` mode, 4 bytes a leaf.
  """

  count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
  background: Any
  background_share: jax.Array


def attenuate_background(
  strength: Scalar = 1.0,
  mode: str = "simple",
  *,
  spatial_axes: _leaves.SpatialAxes | None = None,
  unbiased: bool = True,
  border: str = "replicate",
) -> optax.GradientTransformationExtraArgs:
  r"""Damps the gradient of elements that have been among the quiet ones of their leaf.

  An element is background at a step when its activity `a` is low; `b` in [0, 1] is the average of
  that over steps, with the start-up bias removed.

  `"simple"`: :math:`a = |g|`, low below `mean(a) - 0.5 std(a)`; `b` decays by 0.95 a step:

  .. math:: g \leftarrow g\,(1 - 0.5\, s\, b)

  `"fast"`: `a` is the mean of `|g|` over three places along each spatial axis, low below the 30%
  quantile of the leaf; `b` decays by 0.9 a step. With `i` the average over steps of `mean(b)`, and
  factors (background, foreground) = (0.2, 1.2) if `i > 0.7`, (0.5, 1.05) if `i < 0.2`, else
  (0.3, 1.1):

  .. math:: g \leftarrow g\,(1 + s\,(b f_b + (1 - b) f_f - 1))

  Both compare a leaf with itself, so the effect does not depend on the scale of the gradient. The
  quantile is found by counting; nothing is sorted. Adam-like cores divide a
  constant factor out again: what remains is the change of `b` over steps and what it does to
  momentum.

  Args:
    strength: `s` in [0, 1], dimensionless; 1 is the guide's, 0 is the identity.
    mode: `"simple"` or `"fast"`.
    spatial_axes: `f(path, leaf) -> axes`; leaves with `()` pass through. `None` is
      `flax_spatial_axes`.
    unbiased: `False` uses the averages as they stand (the PyTorch original).
    border: of the three-place mean: `"replicate"` (a missing neighbour equals the element) or
      `"zero"` (it counts as 0, which makes every border look like background).

  Returns:
    An `optax.GradientTransformationExtraArgs` with an `AttenuateBackgroundState`: 4 bytes a
    parameter and 4 a leaf.

  Raises:
    ValueError: if an argument lies outside its range or an axis does not exist.
    TypeError: if a leaf is not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> import hina_optax
    >>> tx = hina_optax.attenuate_background()
    >>> grads = {"w": jnp.array([[0.1, 4.0, 4.0, 4.0]])}
    >>> updates, _ = tx.update(grads, tx.init(grads))
    >>> [round(float(x), 3) for x in updates["w"][0]]
    [0.05, 4.0, 4.0, 4.0]

  References:
    `background_regularization` and `background_regularization_mode` of `HinaAdaptive` (sd-scripts
    fork), with unbiased averages.
  """
  _checks.fraction("strength", strength)
  _checks.choice("mode", mode, ("simple", "fast"))
  _checks.choice("border", border, ("replicate", "zero"))
  _checks.rule("spatial_axes", spatial_axes)
  decay = 0.95 if mode == "simple" else 0.9

  def init(params: Any) -> AttenuateBackgroundState:
    _visits.has_axes(spatial_axes, params)
    return AttenuateBackgroundState(
      count=jnp.zeros([], jnp.int32),
      background=_leaves.per_element_state(params),
      background_share=_visits.per_leaf_scalars(params, 0.0 if unbiased else 0.5),
    )

  def update(updates, state, params=None, **extra_args):
    del params, extra_args
    count = optax.safe_increment(state.count)

    def seen(rate: float, dtype: Any) -> jax.Array:
      return _numerics.debias(rate, count, dtype) if unbiased else jnp.ones([], dtype)

    def damp(leaf, g, read, trees, scalars):
      del read
      grid = _visits.grid(leaf, spatial_axes, g.dtype)
      if not grid.axes or not g.size:
        return g, trees, scalars
      quiet = _is_quiet(jnp.abs(g), mode, grid, border)
      background = _numerics.average(trees[0], quiet.astype(g.dtype), decay)
      level = background / seen(decay, g.dtype)
      weight = _numerics.scalar(strength, g.dtype)
      if mode == "simple":
        return g * (1 - weight * (0.5 * level)), (background,), scalars
      share = _numerics.average(
        scalars[0], _numerics.mean(level).astype(scalars[0].dtype), _SHARE_DECAY
      )
      behind, front = _fast_factors(share / seen(_SHARE_DECAY, share.dtype), g.dtype)
      factor = level * behind + (1 - level) * front
      return g * (1 + weight * (factor - 1)), (background,), (share,)

    visited = _visits.visit(
      damp, updates, trees=(state.background,), scalars=(state.background_share,)
    )
    return visited.updates, AttenuateBackgroundState(count, *visited.trees, *visited.scalars)

  return _parts.Part(init, update, params="ignores")


def _is_quiet(a: jax.Array, mode: str, grid: _stencils.Grid, border: str) -> jax.Array:
  if mode == "simple":
    return a < _numerics.mean(a) - 0.5 * jnp.sqrt(_numerics.variance(a))
  narrow = min(grid.shape[axis] for axis in grid.axes) <= 2
  if border == "replicate" or not narrow:
    a = _stencils.box_mean(a, grid, border)
  return a < _quantile(a, interpolate=border == "zero" and narrow and len(grid.shape) > 2)


def _quantile(a: jax.Array, interpolate: bool) -> jax.Array:
  if not interpolate:
    return _numerics.order_statistic(a, int(_QUIET_SHARE * a.size))
  place = _QUIET_SHARE * (a.size - 1)
  low = _numerics.order_statistic(a, int(place))
  high = _numerics.order_statistic(a, min(int(place) + 1, a.size - 1))
  return low + (place - int(place)) * (high - low)


def _fast_factors(share: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
  def pick(which: int) -> jax.Array:
    often, seldom, between = (jnp.asarray(pair[which], dtype) for pair in _FACTORS)
    return jnp.where(
      share > _MOSTLY_BACKGROUND, often, jnp.where(share < _MOSTLY_FOREGROUND, seldom, between)
    )

  return pick(0), pick(1)
