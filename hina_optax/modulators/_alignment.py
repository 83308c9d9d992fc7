"""Cautious updates and Grams: make the direction agree in sign with the gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hina_optax import registry
from hina_optax.base import leafwise, numerics
from hina_optax.base.positions import LeafNumbers
from hina_optax.registry import Figure, Option, Part

__all__ = ["CautiousState", "GramsState", "cautious", "grams"]

_MIN_SHARE = 1e-3


class CautiousState(NamedTuple):
  """State of `cautious`.

  Attributes:
    inner_state: the wrapped transformation's state.
    alignment: fp32, one number per leaf, found by its path: share of the elements whose direction
      agreed with the gradient at the last step. 4 bytes per leaf.
  """

  inner_state: Any
  alignment: LeafNumbers


class GramsState(NamedTuple):
  """State of `grams`.

  Attributes:
    inner_state: the wrapped transformation's state.
  """

  inner_state: Any


def cautious(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  r"""Keeps the elements of the wrapped direction that agree in sign with the gradient.

  With the gradient `g` that goes in and the direction `u` that comes out, per leaf,

  .. math:: u \leftarrow \frac{u\,[u g > 0]}{\max(\operatorname{mean}[u g > 0],\, 10^{-3})}

  On pure noise about 65% of the elements of Adam's direction agree anyway. A whole optimizer such
  as `optax.adamw` gives steps that point downhill, against the gradient: this wrapper would
  silently keep the wrong elements. Wrap the core, and put weight decay and learning rate behind it.

  Args:
    inner: any optax transformation whose output still points along the gradient (before
      `optax.scale_by_learning_rate`, which turns the sign).

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `CautiousState`: 4 bytes per leaf beside the
    inner's state.

  Raises:
    TypeError: if a leaf is not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import hina_optax
    >>> tx = hina_optax.cautious(optax.trace(decay=0.9))
    >>> params = jnp.zeros(2)
    >>> _, state = tx.update(jnp.array([1.0, 1.0]), tx.init(params))
    >>> updates, _ = tx.update(jnp.array([1.0, -0.5]), state)
    >>> [round(float(x), 2) for x in updates]
    [3.8, 0.0]

  References:
    Liang et al., Cautious optimizers, 2024, arXiv 2411.16085; `use_cautious` of `HinaAdaptive`.
  """
  def mask_direction(leaf, u, g, old):
    del leaf
    agrees = _agree_in_sign(u, g)
    share = numerics.share_of_true(agrees, u.dtype)
    scale = 1 / jnp.maximum(share, jnp.asarray(_MIN_SHARE, u.dtype))
    return jnp.where(agrees, u * scale, jnp.zeros_like(u)), old._replace(alignment=share)

  return leafwise.part(CautiousState, mask_direction, inner=inner, numbers={"alignment": 0.0})


def grams(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  r"""Takes the magnitude of the wrapped direction and the sign of the gradient.

  .. math:: u \leftarrow \operatorname{sign}(g)\, |u|

  A mask of `cautious` behind it would be all ones, so the two do not go together.

  Args:
    inner: any optax transformation whose output still points along the gradient.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `GramsState`: nothing beside the inner's
    state.

  Raises:
    TypeError: if a leaf is not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import hina_optax
    >>> tx = hina_optax.grams(optax.trace(decay=0.9))
    >>> _, state = tx.update(jnp.array([1.0, 1.0]), tx.init(jnp.zeros(2)))
    >>> updates, _ = tx.update(jnp.array([1.0, -0.5]), state)
    >>> [round(float(x), 2) for x in updates]
    [1.9, -0.4]

  References:
    Cao et al., Grams: gradient descent with adaptive momentum scaling, 2024, arXiv 2412.17107;
    `use_grams` of `HinaAdaptive`, which never applied it.
  """
  def replace_sign(leaf, u, g, old):
    del leaf
    return jnp.sign(g) * jnp.abs(u), old

  return leafwise.part(GramsState, replace_sign, inner=inner)


def _agree_in_sign(u: jax.Array, g: jax.Array) -> jax.Array:
  # `u * g > 0` would be wrong: the product of two small numbers is 0 in fp32.
  return ((u > 0) & (g > 0)) | ((u < 0) & (g < 0))


def _check_options(options):
  if options.use_grams and options.use_cautious and not options.sd_scripts_compat:
    raise ValueError(
      "use_grams gives every update the sign of its gradient, which leaves use_cautious nothing to "
      "mask. Set one of use_grams and use_cautious to False.")


registry.register(Part(
  cautious, CautiousState, "direction", 10,
  (Option("use_cautious", True, registry.FLAG,
          "`cautious`: drops elements whose direction opposes the gradient", "halves a whole leaf"),
   ), ("use_cautious",), lambda options, inner: cautious(inner),
  figures={"alignment": Figure("alignment", -2.0)}))
registry.register(Part(
  grams, GramsState, "direction", 20,
  (Option("use_grams", False, registry.FLAG, "`grams`, in place of `use_cautious`",
          "accepted, without effect, as in the original"),
   ), ("use_grams",), lambda options, inner: grams(inner), check=_check_options))
