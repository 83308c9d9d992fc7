"""Selective projection decay: pull parameters back when they leave their start the wrong way."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from hina_optax import registry
from hina_optax.base import checks, leafwise, numerics
from hina_optax.base.numerics import Scalar
from hina_optax.registry import Option, Part

__all__ = ["ProjectToInitState", "project_to_init"]


class ProjectToInitState(NamedTuple):
  """State of `project_to_init`.

  Attributes:
    count: int32 scalar, steps seen.
    inner_state: the wrapped transformation's state.
    displacement: like the parameters, fp32: how far each has moved from its start. 4 bytes per
      parameter. The numbers are small, and two bytes hold them well.
  """

  count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
  inner_state: Any
  displacement: Any


def project_to_init(
  inner: optax.GradientTransformation,
  strength: Scalar = 0.06,
) -> optax.GradientTransformationExtraArgs:
  r"""Pulls a leaf back towards its initial value when the gradient asks for it.

  Let `x` be the parameters before and `y` those after the wrapped optimizer's step, and
  :math:`x_0` their initial values. Per leaf, where :math:`\langle g, x - x_0 \rangle > 0`:

  .. math::
    r = \operatorname{clip}\left(\frac{\|y-x_0\| - \|x-x_0\|}{\|y-x_0\|}, 0, 1\right), \qquad
    y \leftarrow y - \lambda\, r\, (y - x_0)

  `lambda = 1` puts a growing deviation back to its old length. It takes the place of weight decay
  when a pretrained model is fine-tuned. For LoRA factors, whose start is zero or random, a pull to
  the start means little: the paper pulls both factors to zero, which plain weight decay does.

  The start is not stored, but the displacement is. It follows what `optax.apply_updates` does to
  the parameters in their own dtype. So wrap the *whole* optimizer, learning rate included, and let
  nothing behind it change the updates.

  Args:
    inner: a complete optimizer: its updates are added to the parameters.
    strength: :math:`\lambda` in [0, 1], not multiplied by the learning rate. 0 is the identity.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `ProjectToInitState`: 4 bytes per parameter
    beside the inner's state.

  Raises:
    ValueError: if `strength` is outside [0, 1], or `params` are missing at the update.
    TypeError: if a leaf is not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import hina_optax
    >>> tx = hina_optax.project_to_init(optax.sgd(1.0), strength=1.0)
    >>> params = jnp.array([0.0])
    >>> state = tx.init(params)
    >>> for g in (-1.0, 4.0):
    ...   updates, state = tx.update(jnp.array([g]), state, params)
    ...   params = optax.apply_updates(params, updates)
    ...   print(float(params[0]))
    1.0
    -1.0

  References:
    Tian, Huang, Kira, Rethinking weight decay for robust fine-tuning of foundation models (SPD),
    NeurIPS 2024, arXiv 2411.01713; `use_spd` and `spd_lambda` of `HinaAdaptive`.
  """
  checks.unit_interval("strength", strength)

  def pull(leaf, u, g, _, old, raw):
    (raw_u, raw_p), u, before = raw, leaf.compute_once(u), old.displacement
    after, amount = before + u, numerics.scalar(strength, u.dtype)
    # Behind the barrier XLA computes `before + u` again for the share, instead of keeping `after`.
    share = _selective_share(g, before, before + lax.optimization_barrier(u))
    u = leaf.compute_once(u - amount * share * after)
    return u, old._replace(displacement=before + applied_update(u, raw_p, raw_u.dtype))

  return leafwise.part(
    ProjectToInitState, pull, inner=inner, elements={"displacement": 0.0}, raw=True,
    reads_params="project_to_init")


def _selective_share(g: jax.Array, before: jax.Array, after: jax.Array) -> jax.Array:
  """The share `r` of the displacement `after` the step that is taken back."""
  norm_before, norm_after = numerics.norm(before), numerics.norm(after)
  share = jnp.clip(numerics.safe_divide(norm_after - norm_before, norm_after), 0, 1)
  return jnp.where(numerics.inner_product(g, before) > 0, share, jnp.zeros_like(share))


def applied_update(u: jax.Array, param: jax.Array, step_dtype: Any) -> jax.Array:
  """What `optax.apply_updates` really adds to a parameter.

  It may round the parameter to bf16, or not move it at all.
  """
  has_same_dtype = param.dtype == step_dtype
  dtype = step_dtype if has_same_dtype else numerics.compute_dtype(param.dtype, step_dtype)
  new = param.astype(dtype) + u.astype(step_dtype).astype(dtype)
  change = _round_trip(new, param.dtype).astype(u.dtype) - param.astype(u.dtype)
  return jnp.where(jnp.isfinite(change), change, jnp.zeros_like(change))


def _round_trip(x: jax.Array, dtype: Any) -> jax.Array:
  """`x`, stored in `dtype` and read again."""
  if jnp.dtype(dtype).itemsize >= 4:
    return x.astype(dtype)
  # Inside jit, XLA would remove a cast to fewer bits and back.
  info, x32 = jnp.finfo(dtype), x.astype(jnp.float32)
  rounded = lax.reduce_precision(x32, info.nexp, info.nmant)
  return jnp.where(jnp.abs(x32) < float(info.tiny), x.astype(dtype).astype(jnp.float32), rounded)


registry.register(Part(
  project_to_init, ProjectToInitState, "step", 10, (
    Option("use_spd", True, registry.FLAG,
           "`project_to_init`: pulls back to the start where the step moves further from it",
           "always pulls"),
    Option("spd_lambda", 0.06, registry.FRACTION, "strength of `use_spd`"),
  ), ("use_spd",), lambda options, inner: project_to_init(inner, options.spd_lambda),
  drop_order=4, reads_params=True, identity={"strength": 0.0}, examples={"": {"strength": 0.5}}))
