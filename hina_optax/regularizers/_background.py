"""Background attenuation: damp the gradient of elements that stay quiet over many steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hina_optax import registry
from hina_optax.base import checks, leafwise, numerics, paths
from hina_optax.base.leaf import Leaf
from hina_optax.base.numerics import Scalar
from hina_optax.base.positions import LeafNumbers
from hina_optax.registry import Figure, Option

__all__ = ["AttenuateBackgroundState", "attenuate_background"]

# From the guide, the Traditional Chinese guide to HinaAdaptive that the library implements: the
# shares of background beyond which the fast mode uses other factors, and the factors (background,
# foreground) for a high, a low and a medium share.
_MOSTLY_BACKGROUND, _MOSTLY_FOREGROUND = 0.7, 0.2
_FACTORS = ((0.2, 1.2), (0.5, 1.05), (0.3, 1.1))
_QUIET_SHARE = 0.3
_SHARE_DECAY = 0.95


class AttenuateBackgroundState(NamedTuple):
  """State of `attenuate_background`.

  Attributes:
    count: int32 scalar, steps seen.
    background: like the parameters, fp32: average over steps of whether the element was
      background, from zero. 4 bytes per parameter.
    background_share: fp32, one number per leaf, found by its path: average over steps of the mean
      of `background`. Only the mode `"fast"` updates it. 4 bytes per leaf.
  """

  count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
  background: Any
  background_share: LeafNumbers


def attenuate_background(
  strength: Scalar = 1.0,
  mode: str = "simple",
  *,
  spatial_axes: paths.SpatialAxes | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Damps the gradient of elements that have been quiet compared to the rest of their leaf.

  An element is background at a step if its activity `a` is low. `b` in [0, 1] is the average of
  this over steps, with the start-up bias removed.

  `"simple"`: :math:`a = |g|`, low below `mean(a) - 0.5 std(a)`; `b` decays by 0.95 per step:

  .. math:: g \leftarrow g\,(1 - 0.5\, s\, b)

  `"fast"`: `a` is the mean of `|g|` over three places along each spatial axis (a missing neighbour
  equals the element itself), low below the 30% quantile of the leaf; `b` decays by 0.9 per step.
  With `i` the average over steps of `mean(b)`, and factors (background, foreground) = (0.2, 1.2) if
  `i > 0.7`, (0.5, 1.05) if `i < 0.2`, else (0.3, 1.1):

  .. math:: g \leftarrow g\,(1 + s\,(b f_b + (1 - b) f_f - 1))

  Both compare a leaf with itself, so the effect does not depend on the scale of the gradient. The
  quantile is found by counting; nothing is sorted. An Adam-like core divides a constant factor out
  again. What remains is the effect of the change of `b` over steps, and its effect on momentum.

  Args:
    strength: `s` in [0, 1], dimensionless; 1 is the guide's, 0 is the identity.
    mode: `"simple"` or `"fast"`.
    spatial_axes: `f(path, leaf) -> axes`; leaves with `()` pass through. `None` is
      `flax_spatial_axes`.

  Returns:
    An `optax.GradientTransformationExtraArgs` with an `AttenuateBackgroundState`: 4 bytes per
    parameter and 4 per leaf.

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
  checks.unit_interval("strength", strength)
  checks.choice("mode", mode, ("simple", "fast"))
  checks.optional_function("spatial_axes", spatial_axes)
  decay = 0.95 if mode == "simple" else 0.9

  def damp(leaf, g, old):
    if not leaf.axes or not leaf.size:
      return g, old
    quiet = _is_quiet(leaf, jnp.abs(g), mode)
    background = numerics.update_average(old.background, quiet.astype(g.dtype), decay)
    old = old._replace(background=background)
    level = background / numerics.bias_correction(decay, old.count, g.dtype)
    weight = numerics.scalar(strength, g.dtype)
    if mode == "simple":
      return g * (1 - weight * (0.5 * level)), old
    share = numerics.update_average(old.background_share, numerics.mean(level), _SHARE_DECAY)
    background_factor, foreground_factor = _fast_factors(
      share / numerics.bias_correction(_SHARE_DECAY, old.count, g.dtype))
    factor = level * background_factor + (1 - level) * foreground_factor
    return g * (1 + weight * (factor - 1)), old._replace(background_share=share)

  return leafwise.part(
    AttenuateBackgroundState, damp, axes=spatial_axes,
    elements={"background": 0.0}, numbers={"background_share": 0.0})


def _is_quiet(leaf: Leaf, a: jax.Array, mode: str) -> jax.Array:
  if mode == "simple":
    return a < numerics.mean(a) - 0.5 * jnp.sqrt(numerics.variance(a))
  a = leaf.box_mean(a)
  return a < numerics.order_statistic(a, int(_QUIET_SHARE * leaf.size))


def _fast_factors(share: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The factors of background and foreground for a share of background."""
  def select(i: int) -> jax.Array:
    high, low, medium = (jnp.asarray(pair[i], share.dtype) for pair in _FACTORS)
    return jnp.where(
      share > _MOSTLY_BACKGROUND, high, jnp.where(share < _MOSTLY_FOREGROUND, low, medium)
    )

  return select(0), select(1)


def _measure_share(state: AttenuateBackgroundState) -> jax.Array:
  """Share of the elements that count as background."""
  leaves = [x for x in jax.tree.leaves(state.background) if x.size]
  sums = [jnp.sum(x.astype(jnp.float32)) for x in leaves]
  return sum(sums, jnp.zeros([])) / max(sum(x.size for x in leaves), 1)


registry.register(registry.regularizer(
  attenuate_background, AttenuateBackgroundState, 50,
  Option("background_regularization", True, registry.FLAG,
         "`attenuate_background`: damps what stays quiet", "its average starts from zero"),
  {"mode": Option("background_regularization_mode", "simple",
                  registry.one_of("simple", "fast"), "`mode` of `attenuate_background`",
                  defines_state=True),
   "spatial_axes": "spatial_axes"},
  figures={"background_share": Figure(read=_measure_share)}, drop_order=1, scale_free=True,
  identity={"strength": 0.0},
  examples={"": {"strength": 0.8}, "fast": {"strength": 0.8, "mode": "fast"}}))
