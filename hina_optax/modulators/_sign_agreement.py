"""A learning rate for each element, raised while the sign of its update repeats."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hina_optax import registry
from hina_optax.base import checks, numerics
from hina_optax.base.numerics import Scalar
from hina_optax.modulators import rate_units
from hina_optax.modulators._rates import RateRule, scale_by_rates
from hina_optax.registry import Figure, Option, Part

__all__ = ["SignAgreementState", "mean_scale", "scale_by_sign_agreement", "sign_agreement_rule"]

# A rate is `anchor + position * bump`. One int16 per element holds the position (13 bits), which
# anchor it counts from (2 bits) and the last polarity (1 bit).
_ANCHORS = 3
_MOST_BUMPS = 4095


class SignAgreementState(NamedTuple):
  """State of `scale_by_sign_agreement`.

  Attributes:
    count: int32 scalar, steps seen.
    bumps: like the parameters, int16: packed position, anchor and polarity. 2 bytes per
      parameter.
    lattice: fp32 vector (bump, min_scale, max_scale) that `bumps` counts in. 12 bytes.
  """

  count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
  bumps: Any
  lattice: jax.Array


def scale_by_sign_agreement(
  inner: optax.GradientTransformation,
  bump: Scalar = 0.03,
  min_scale: Scalar = 1e-3,
  max_scale: Scalar = 10.0,
  warmup_steps: Scalar = 500,
) -> optax.GradientTransformationExtraArgs:
  r"""Gives each element its own learning rate, relative to the common one.

  While the step is below `warmup_steps`, with the polarity `[u > 0]` of the direction,

  .. math::
    r \leftarrow \operatorname{clip}(r \pm b,\, r_{\min},\, r_{\max}), \qquad u \leftarrow r\, u

  plus where the polarity is that of the step before (all false before the first), minus elsewhere;
  after that `r` stays. It is a bounded random walk: on noise it ends a few bumps from 1 by chance.
  The state is a count of bumps, exact to fp32 whatever the size of `b`; at most 4,095 bumps away
  from the start or a bound.

  Args:
    inner: any optax transformation whose output still points along the gradient.
    bump: `b` >= 0, as a share of the common learning rate. 0 is the identity.
    min_scale: :math:`r_{\min}` >= 0, as a multiple of the common learning rate.
    max_scale: :math:`r_{\max}` >= `min_scale`, likewise. A start of 1 outside of the two is brought
      in at the first step.
    warmup_steps: steps during which rates move.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `ScaleByRatesState` that holds a
    `SignAgreementState`: 2 bytes per parameter beside the inner's state.

  Raises:
    ValueError: if an argument lies outside its range. TypeError: if a leaf is not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import hina_optax
    >>> tx = hina_optax.scale_by_sign_agreement(optax.identity(), bump=0.25)
    >>> state = tx.init(jnp.zeros(2))
    >>> for g in ([1.0, 1.0], [1.0, -1.0]):
    ...   updates, state = tx.update(jnp.array(g), state)
    ...   print(updates.tolist())
    [0.75, 0.75]
    [1.0, -0.5]

  References:
    "automagic" (first version) of ostris/ai-toolkit; `use_lr_mask`, `lr_bump`, `min_lr`, `max_lr`
    and `warmup_steps` of `HinaAdaptive`, there in absolute rates.
  """
  return scale_by_rates(inner, (sign_agreement_rule(bump, min_scale, max_scale, warmup_steps),))


def sign_agreement_rule(
  bump: Scalar, min_scale: Scalar, max_scale: Scalar, warmup_steps: Scalar
) -> RateRule:
  """The rule behind `scale_by_sign_agreement`."""
  checks.number("bump", bump)
  checks.number("min_scale", min_scale)
  checks.number("max_scale", max_scale)
  checks.ordered("min_scale", min_scale, "max_scale", max_scale)
  checks.integer("warmup_steps", warmup_steps, 0)

  def scale(leaf, u, g, old):
    del leaf, g
    anchors, step, limits = _anchors(bump, min_scale, max_scale, u.dtype)
    moving = old.count < jnp.asarray(warmup_steps).astype(jnp.int32)
    bumps = jnp.where(moving, _move(old.bumps, u > 0, anchors, step, limits), old.bumps)
    return u * _decode(bumps, anchors, step), old._replace(bumps=bumps)

  def lattice() -> dict[str, jax.Array]:
    return {"lattice": jnp.stack([jnp.asarray(x, jnp.float32)
                                  for x in (bump, min_scale, max_scale)])}

  return RateRule(
    SignAgreementState, scale, elements={"bumps": (0, jnp.int16)}, shared=lattice)


def mean_scale(state: SignAgreementState) -> jax.Array:
  """Mean over all elements of the current scale: one pass over the counters."""
  anchors, step, _ = _anchors(state.lattice[0], state.lattice[1], state.lattice[2], jnp.float32)
  leaves = [x for x in jax.tree.leaves(state.bumps) if x.size]
  sums = [numerics.total(_decode(x, anchors, step)) for x in leaves]
  return sum(sums, jnp.zeros([])) / max(sum(x.size for x in leaves), 1)


def _anchors(bump, min_scale, max_scale, dtype):
  low, high, step = (jnp.asarray(x).astype(dtype) for x in (min_scale, max_scale, bump))
  return (jnp.ones([], dtype), low, high), step, (low, high)


def _unpack(word: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  wide = word.astype(jnp.int32)
  return wide >> 3, (wide >> 1) & _ANCHORS, (wide & 1) == 1


def _value(position: jax.Array, anchor: jax.Array, anchors, step: jax.Array) -> jax.Array:
  start, low, high = anchors
  base = jnp.where(anchor == 0, start, jnp.where(anchor == 1, low, high))
  return base + position.astype(step.dtype) * step


def _decode(word: jax.Array, anchors, step: jax.Array) -> jax.Array:
  position, anchor, _ = _unpack(word)
  return _value(position, anchor, anchors, step)


def _move(word: jax.Array, positive: jax.Array, anchors, step: jax.Array, limits) -> jax.Array:
  position, anchor, last = _unpack(word)
  position = jnp.clip(position + jnp.where(positive == last, 1, -1), -_MOST_BUMPS, _MOST_BUMPS)
  value = _value(position, anchor, anchors, step)
  under, over = value < limits[0], value > limits[1]
  position = jnp.where(under | over, 0, position)
  anchor = jnp.where(over, 2, jnp.where(under, 1, anchor))
  return ((position << 3) | (anchor << 1) | positive.astype(jnp.int32)).astype(jnp.int16)


def _rule(options):
  units = rate_units.resolve(options)
  return sign_agreement_rule(units.bump, units.min_scale, units.max_scale, options.warmup_steps)


def _check(options):
  o, compared = options, []
  if o.use_lr_mask and not o.sd_scripts_compat and not callable(o.learning_rate):
    compared = [("learning_rate", "max_lr"), ("min_lr", "learning_rate")]
  for low, high in (*compared, ("min_lr", "max_lr")):
    if getattr(o, low) is not None and getattr(o, high) is not None:
      checks.ordered(low, getattr(o, low), high, getattr(o, high))


registry.register(Part(
  scale_by_sign_agreement, SignAgreementState, "rate", 10, (
    Option("use_lr_mask", True, registry.FLAG,
           "`scale_by_sign_agreement`: a learning rate for each element"),
    Option("lr_bump", None, registry.NUMBER, "its step; `None`: 0.03 of the reference rate",
           "`None`: 3e-6"),
    Option("min_lr", None, registry.NUMBER,
           "its lower bound; `None`: 0.001 of the reference rate", "`None`: 1e-7"),
    Option("max_lr", None, registry.NUMBER,
           "its upper bound; `None`: 10 times the reference rate", "`None`: 1e-3"),
    Option("warmup_steps", 500, registry.whole(0), "steps during which it moves"),
    Option("reference_lr", None, registry.POSITIVE,
           "the rate that those are measured against; `None`: `learning_rate`, for a schedule its "
           "largest value over `warmup_steps`"),
  ), ("use_lr_mask",), _rule, check=_check,
  figures={"mean_rate_scale": Figure(read=mean_scale)}, given_up=3, identity={"bump": 0.0},
  examples={"": {"bump": 0.3, "min_scale": 0.25, "max_scale": 1.7, "warmup_steps": 15}}))
