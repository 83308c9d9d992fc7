"""A learning rate per element, raised while the sign of the element's update repeats."""

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

# A rate is `anchor + position * bump`. One int16 per element holds the position (13 bits), the
# index of the anchor (2 bits) and the last polarity (1 bit).
_ANCHOR_MASK = 3
_MAX_BUMPS = 4095


class SignAgreementState(NamedTuple):
  """State of `scale_by_sign_agreement`.

  Attributes:
    count: int32 scalar, steps seen.
    bumps: like the parameters, int16: packed position, anchor and polarity. 2 bytes per
      parameter.
    lattice: fp32 vector (bump, min_scale, max_scale), which turns `bumps` into rates. 12 bytes.
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

  with plus where the polarity equals that of the step before (all false before the first step), and
  minus elsewhere. After `warmup_steps`, `r` stays. It is a bounded random walk: on noise it ends a
  few bumps from 1 by chance. The state is a count of bumps, exact to fp32 whatever the size of `b`,
  and at most 4,095 bumps away from the start or a bound.

  Args:
    inner: any optax transformation whose output still points along the gradient.
    bump: `b` >= 0, as a share of the common learning rate. 0 is the identity.
    min_scale: :math:`r_{\min}` >= 0, as a multiple of the common learning rate.
    max_scale: :math:`r_{\max}` >= `min_scale`, likewise. If the start of 1 lies outside of the two
      bounds, the first step clips it.
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
  checks.order("min_scale", min_scale, "max_scale", max_scale)
  checks.integer("warmup_steps", warmup_steps, 0)

  def scale(leaf, u, g, old):
    del leaf, g
    anchors, step, limits = make_lattice(bump, min_scale, max_scale, u.dtype)
    is_warmup = old.count < jnp.asarray(warmup_steps).astype(jnp.int32)
    bumps = jnp.where(is_warmup, _move_rates(old.bumps, u > 0, anchors, step, limits), old.bumps)
    return u * decode_rates(bumps, anchors, step), old._replace(bumps=bumps)

  def make_shared() -> dict[str, jax.Array]:
    return {"lattice": jnp.stack([jnp.asarray(x, jnp.float32)
                                  for x in (bump, min_scale, max_scale)])}

  return RateRule(
    SignAgreementState, scale, elements={"bumps": (0, jnp.int16)}, shared=make_shared)


def mean_scale(state: SignAgreementState) -> jax.Array:
  """Mean over all elements of the current scale: one pass over the counters."""
  anchors, step, _ = make_lattice(state.lattice[0], state.lattice[1], state.lattice[2], jnp.float32)
  leaves = [x for x in jax.tree.leaves(state.bumps) if x.size]
  sums = [numerics.total(decode_rates(x, anchors, step)) for x in leaves]
  return sum(sums, jnp.zeros([])) / max(sum(x.size for x in leaves), 1)


def make_lattice(bump, min_scale, max_scale, dtype):
  """The anchors (start, lower and upper bound), the step between rates, and the two bounds."""
  low, high, step = (jnp.asarray(x).astype(dtype) for x in (min_scale, max_scale, bump))
  return (jnp.ones([], dtype), low, high), step, (low, high)


def _unpack(word: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Position, index of the anchor, and polarity."""
  bits = word.astype(jnp.int32)
  return bits >> 3, (bits >> 1) & _ANCHOR_MASK, (bits & 1) == 1


def _compute_rate(position: jax.Array, anchor: jax.Array, anchors, step: jax.Array) -> jax.Array:
  start, low, high = anchors
  base = jnp.where(anchor == 0, start, jnp.where(anchor == 1, low, high))
  return base + position.astype(step.dtype) * step


def decode_rates(word: jax.Array, anchors, step: jax.Array) -> jax.Array:
  """The rates that packed `bumps` stand for."""
  position, anchor, _ = _unpack(word)
  return _compute_rate(position, anchor, anchors, step)


def _move_rates(
  word: jax.Array, is_positive: jax.Array, anchors, step: jax.Array, limits
) -> jax.Array:
  """The packed `bumps` after one more step of the random walk."""
  position, anchor, was_positive = _unpack(word)
  position = jnp.clip(position + jnp.where(
    is_positive == was_positive, 1, -1), -_MAX_BUMPS, _MAX_BUMPS)
  rate = _compute_rate(position, anchor, anchors, step)
  is_below, is_above = rate < limits[0], rate > limits[1]
  position = jnp.where(is_below | is_above, 0, position)
  anchor = jnp.where(is_above, 2, jnp.where(is_below, 1, anchor))
  return ((position << 3) | (anchor << 1) | is_positive.astype(jnp.int32)).astype(jnp.int16)


def _build_rule(options):
  units = rate_units.resolve(options)
  return sign_agreement_rule(units.bump, units.min_scale, units.max_scale, options.warmup_steps)


def _check_bounds(options):
  o, pairs = options, []
  if o.use_lr_mask and not o.sd_scripts_compat and not callable(o.learning_rate):
    pairs = [("learning_rate", "max_lr"), ("min_lr", "learning_rate")]
  for low, high in (*pairs, ("min_lr", "max_lr")):
    if getattr(o, low) is not None and getattr(o, high) is not None:
      checks.order(low, getattr(o, low), high, getattr(o, high))


registry.register(Part(
  scale_by_sign_agreement, SignAgreementState, "rate", 10, (
    Option("use_lr_mask", True, registry.FLAG,
           "`scale_by_sign_agreement`: a learning rate for each element"),
    Option("lr_bump", None, registry.NUMBER,
           "by how much a rate moves per step; `None`: 0.03 of the reference rate",
           "`None`: 3e-6"),
    Option("min_lr", None, registry.NUMBER,
           "lower bound of a rate; `None`: 0.001 of the reference rate", "`None`: 1e-7"),
    Option("max_lr", None, registry.NUMBER,
           "upper bound of a rate; `None`: 10 times the reference rate", "`None`: 1e-3"),
    Option("warmup_steps", 500, registry.whole_number(0),
           "first steps, in which `use_lr_mask` moves the rates of elements; no warm-up of the "
           "learning rate"),
    Option("reference_lr", None, registry.POSITIVE,
           "the rate that these three are measured against; `None`: `learning_rate`, for a "
           "schedule its largest value over `warmup_steps`"),
  ), ("use_lr_mask",), _build_rule, check=_check_bounds,
  figures={"mean_rate_scale": Figure(read=mean_scale)}, drop_order=3, identity={"bump": 0.0},
  examples={"": {"bump": 0.3, "min_scale": 0.25, "max_scale": 1.7, "warmup_steps": 15}}))
