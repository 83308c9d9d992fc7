"""Decoupled weight decay that fades late in training."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hina_optax import registry
from hina_optax.base import checks, leafwise, numerics
from hina_optax.base.numerics import Scalar
from hina_optax.registry import Option, Part

__all__ = ["AddScheduledWeightDecayState", "add_scheduled_weight_decay"]


class AddScheduledWeightDecayState(NamedTuple):
  """State of `add_scheduled_weight_decay`.

  Attributes:
    count: int32 scalar, steps seen.
  """

  count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name


def add_scheduled_weight_decay(
  weight_decay: Scalar = 0.01,
  *,
  transition_steps: Scalar | None = None,
  factor: Scalar = 0.7,
  min_ratio: Scalar = 0.1,
) -> optax.GradientTransformationExtraArgs:
  r"""Adds weight decay, constant up to a step `T` and fading after it.

  .. math::
    u \leftarrow u + \lambda_t\, p, \qquad \lambda_t = \lambda
    \cdot \begin{cases} 1 & t \le T \\
    \max(\rho, f^{\min((t - T)/T,\, 2)}) & t > T \end{cases}

  where the step `t` is counted from 1. Without `transition_steps` this is
  `optax.add_decayed_weights`. Place it behind the core and before the learning rate. To leave
  biases and norms out, wrap it in `optax.masked`.

  Args:
    weight_decay: :math:`\lambda` >= 0, per unit of learning rate: each step takes
      `learning_rate * lambda` of a parameter away. 0 is the identity.
    transition_steps: `T` > 0 in steps; `None`: constant.
    factor: `f` in (0, 1], the share of the decay that is left `T` steps after it began to fade.
      `2T` steps after that beginning it stays at `f**2`.
    min_ratio: :math:`\rho` in [0, 1], the least share that is left.

  Returns:
    An `optax.GradientTransformationExtraArgs` with an `AddScheduledWeightDecayState`: 4 bytes in
    all.

  Raises:
    ValueError: if an argument lies outside its range, or `params` are missing at the update.
    TypeError: if a leaf is not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> import hina_optax
    >>> tx = hina_optax.add_scheduled_weight_decay(0.5, transition_steps=1, factor=0.5)
    >>> params, state = jnp.array([2.0]), tx.init(jnp.array([2.0]))
    >>> for _ in range(3):
    ...   updates, state = tx.update(jnp.zeros(1), state, params)
    ...   print(float(updates[0]))
    1.0
    0.5
    0.25

  References:
    Loshchilov, Hutter, Decoupled weight decay, arXiv 1711.05101. `dynamic_weight_decay`,
    `wd_transition_steps`, `wd_decay_factor` and `wd_min_ratio` of `HinaAdaptive`.
  """
  checks.number("weight_decay", weight_decay)
  checks.number("factor", factor, 0.0, 1.0, open_low=True)
  checks.unit_interval("min_ratio", min_ratio)
  if transition_steps is not None:
    checks.number("transition_steps", transition_steps, 0.0, open_low=True)

  def decay(leaf, u, p, old):
    del leaf
    ratio = _remaining_share(old.count, transition_steps, factor, min_ratio)
    amount = numerics.scalar(weight_decay, u.dtype) * numerics.scalar(ratio, u.dtype)
    return u + amount * p, old

  return leafwise.part(
    AddScheduledWeightDecayState, decay, reads_params="add_scheduled_weight_decay")


def _remaining_share(
  count: jax.Array, transition_steps: Scalar | None, factor: Scalar, min_ratio: Scalar
) -> jax.Array:
  """Share of the weight decay that is left at step `count`."""
  if transition_steps is None:
    return jnp.ones([], jnp.float32)
  begin, base, least = (
    numerics.scalar(x, jnp.float32) for x in (transition_steps, factor, min_ratio)
  )
  late = jnp.minimum((count.astype(jnp.float32) - begin) / begin, 2)
  return jnp.where(late > 0, jnp.maximum(least, base**late), jnp.ones([], jnp.float32))


def _build(options):
  return add_scheduled_weight_decay(
    options.weight_decay,
    transition_steps=options.wd_transition_steps if options.dynamic_weight_decay else None,
    factor=options.wd_decay_factor, min_ratio=options.wd_min_ratio)


registry.register(Part(
  add_scheduled_weight_decay, AddScheduledWeightDecayState, "decay", 10, (
    Option("weight_decay", 0.01, registry.NUMBER, "decoupled, per unit of learning rate",
           "applied after the step"),
    Option("dynamic_weight_decay", True, registry.FLAG,
           "`add_scheduled_weight_decay`: weight decay fades"),
    Option("wd_transition_steps", 1000, registry.POSITIVE,
           "steps after which weight decay begins to fade"),
    Option("wd_decay_factor", 0.7, registry.POSITIVE_FRACTION,
           "share of weight decay that is left after as many steps again"),
    Option("wd_min_ratio", 0.1, registry.FRACTION, "least share of weight decay that is left"),
    Option("weight_decay_mask", None, registry.ANYTHING,
           "where weight decay acts, as `optax.masked` takes it; `None`: everywhere"),
  ), (), _build, is_on=lambda options: True, reads_params=True, moves_minimum=True,
  identity={"weight_decay": 0.0},
  examples={"": {"weight_decay": 0.5, "transition_steps": 5}}))
