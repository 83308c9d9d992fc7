"""`with_rounded_updates`: stochastic rounding, so that bf16 parameters keep small updates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hina_optax.base import checks, paths
from hina_optax.base.rounding import Key, make_key, round_to, seed_word
from hina_optax.grouped import codecs
from hina_optax.memory import _arguments

_SUPPORTED_DTYPES = ("bfloat16", "float16")
_PURPOSE = 2


class WithRoundedUpdatesState(NamedTuple):
  """State of `with_rounded_updates`.

  Attributes:
    inner_state: the inner's state, unchanged.
    step: int32 scalar, number of updates so far. It and `seed` determine the rounding noise.
    seed: uint32 scalar.
  """

  inner_state: Any
  step: jax.Array
  seed: jax.Array


def with_rounded_updates(
  inner: optax.GradientTransformation, rounding: str = "stochastic", seed: Any = 0
) -> optax.GradientTransformationExtraArgs:
  r"""Rounds bf16 and f16 parameters stochastically, under plain `optax.apply_updates`.

  An update below 1/512 of its bf16 parameter is lost if the sum is rounded to the nearest, and that
  in every step. Here, for a parameter `p` of fewer than 32 bits and the inner's update `u`,

  .. math::
    t = Q\big(\mathrm{fp32}(p) + \mathrm{fp32}(u)\big), \qquad u' = t - \mathrm{fp32}(p)

  with `Q` the stochastic rounding to the dtype of `p`, unbiased. `u'` is returned in fp32: `p + u'`
  is then an fp32 sum, which `optax.apply_updates` casts to the dtype of `p`, and the result is
  exactly `t`. (A bf16 `u'` cannot do this: the step from -129 to 128 needs nine bits.) It works
  with all code that calls `optax.apply_updates`, such as Flax's `TrainState` and `nnx.Optimizer`.

  fp32 and fp64 parameters, integers and absent leaves pass unchanged, and so do updates whose sum
  is not finite. A finite sum beyond the range of the dtype becomes its largest value.

  Put it outermost. A transformation that changes the updates after it undoes the rounding. A branch
  that returns the gradients' own dtype, as in `optax.apply_if_finite`, clashes with fp32 updates if
  it stands outside, but not if it stands inside. Under `jax_numpy_dtype_promotion="strict"` call
  `optax.apply_updates` within `jax.numpy_dtype_promotion("standard")`. The wrapper does not repair
  the inner's own arithmetic: `optax.adamw` on bf16 parameters computes in bf16 unless
  `with_state_dtype` stands inside. It does nothing for trees in fp32. An fp32 master copy is more
  exact if there is room for one.

  Args:
    inner: any optax transformation whose updates are added to the parameters.
    rounding: `"stochastic"` or `"nearest"`.
    seed: seed of the rounding noise, a whole number >= 0.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `WithRoundedUpdatesState`: 8 bytes in all
    beside the inner's state.

  Raises:
    ValueError: if `rounding` or `seed` is unknown, or `update` is called without parameters.
    TypeError: if `inner` is no transformation, or a parameter is a float of fewer than 16 bits.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import hina_optax.memory as memory
    >>> params = jnp.ones(4096, jnp.bfloat16)
    >>> grads = jnp.full(4096, 1e-3, jnp.bfloat16)
    >>> for tx in (optax.sgd(1.0), memory.with_rounded_updates(optax.sgd(1.0))):
    ...   updates, _ = tx.update(grads, tx.init(params), params)
    ...   with jax.numpy_dtype_promotion("standard"):
    ...     moved = optax.apply_updates(params, updates)
    ...   print(moved.dtype, round(float(jnp.mean(moved.astype(float))), 3))
    bfloat16 1.0
    bfloat16 0.999

  References:
    Zamirai et al., Revisiting BFloat16 training, arXiv 2010.06192.
  """
  inner = _arguments.check_inner(inner)
  checks.choice("rounding", rounding, ("stochastic", "nearest"))
  checks.integer("seed", seed, 0)

  def init(params: Any) -> WithRoundedUpdatesState:
    return WithRoundedUpdatesState(
      inner.init(params), jnp.zeros([], jnp.int32), seed_word(seed)
    )

  def update(updates, state, params=None, **extra_args):
    paths.require_params(params, "with_rounded_updates")
    updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
    step = jnp.asarray(optax.safe_increment(state.step))
    key = make_key(state.seed, step, _PURPOSE)
    places, leaves, structure = paths.flatten(updates)
    targets = structure.flatten_up_to(params)
    rounded = [
      _round_update(place.path, u, p, key.fold(place.index) if rounding == "stochastic" else None)
      for place, u, p in zip(places, leaves, targets)
    ]
    return structure.unflatten(rounded), WithRoundedUpdatesState(inner_state, step, state.seed)

  return optax.GradientTransformationExtraArgs(init, update)


def _round_update(path: str, update: Any, param: Any, key: Key | None) -> Any:
  """Returns the update that takes `param` exactly to the rounded sum."""
  if paths.is_absent(update) or not codecs.is_floating(param) or param.dtype.itemsize >= 4:
    return update
  if param.dtype.name not in _SUPPORTED_DTYPES:
    raise TypeError(
      f"with_rounded_updates: parameter '{path}' has dtype {param.dtype.name}; it rounds to "
      f"{' and '.join(_SUPPORTED_DTYPES)}. Leave the leaf out with optax.masked or optax.partition."
    )
  start, step = param.astype(jnp.float32), update.astype(jnp.float32)
  total = start + step
  rounded = round_to(total, param.dtype, key).astype(jnp.float32)
  # If the sum is infinite the update is not changed, since the difference would be NaN.
  return jnp.where(jnp.isfinite(total), rounded - start, step)
