"""`with_state_dtype`: two bytes per number, rounded so that averages stay correct."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hina_optax.base import checks
from hina_optax.base.rounding import Key, round_to
from hina_optax.grouped import codecs, driver
from hina_optax.grouped.codecs import Codec
from hina_optax.memory import _arguments

_DTYPES = ("bfloat16", "float16", "float32")
MIN_SIZE = 1024
_PURPOSE = 1


class WithStateDtypeState(NamedTuple):
  """State of `with_state_dtype`.

  Attributes:
    inner_state: the inner's state, with its selected leaves in the storage dtype.
    step: int32 scalar, number of updates so far. It and `seed` determine the rounding noise.
    seed: uint32 scalar.
  """

  inner_state: Any
  step: jax.Array
  seed: jax.Array


def with_state_dtype(
  inner: optax.GradientTransformation,
  dtype: Any = "bfloat16",
  rounding: str = "stochastic",
  min_size: int | None = None,
  include: _arguments.Include = None,
  seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Computes in fp32 and stores the state of any transformation in fewer bits.

  Parameters and updates of fewer than 32 bits are cast to fp32 before the inner's `init` and
  `update`, and its updates are cast back. Between steps a number `x` of the state is rounded to one
  of its neighbours in `dtype`, with the probabilities that make the mean exact:

  .. math::
    Q(x) = x^+ \text{ with probability } \frac{x - x^-}{x^+ - x^-},\ x^- \text{ otherwise}

  Rounding to the nearest loses every change that is smaller than half the distance of two
  neighbours: bf16 has 8 significant bits, so an average that moves by 1/1000 of itself never
  changes. With `b2 = 0.999`, a second moment that is 1 for 6,000 steps and 0.01 for 6,000 more ends
  at 0.0124 in fp32, and at the same value here on average, but stays at 1.72 if it is rounded to
  the nearest. For the same reason `optax.adamw` on bf16 parameters, without a wrapper, never decays
  its second moment.

  Integer state, counters, small leaves and leaves that are already as narrow as `dtype` are not
  changed. The 8-bit leaves of `with_quantized_state` are among them, so the two wrappers nest in
  any order. `with_host_offload` must stand outside.

  Around `hina_adaptive`, `with_leaf_batching` and parts of this library, one group of leaves is
  decoded at a time. The same holds around any other transformation that treats each leaf by itself.
  Around a transformation that looks across leaves (`optax.clip_by_global_norm` in a chain), all of
  its state is decoded at once.

  State that accumulates small steps into a precise value, such as the `z` of
  `optax.contrib.schedule_free`, is not an average: exclude it by `include`. Under
  `optax.inject_hyperparams` write `include` as a regular expression, since it takes a function for
  a schedule.

  The wrapper does not help if the state is small beside parameters and activations (LoRA). It does
  not make a step faster on CPUs, where conversion costs more than the memory traffic it saves. f16
  holds no number below 6e-8, so it suits first moments, but not second moments.

  Args:
    inner: any optax transformation.
    dtype: `"bfloat16"`, `"float16"` or `"float32"`, as a name or a dtype. `"float32"` narrows fp64
      state only, rounded to the nearest; on fp32 trees it changes nothing. (Under
      `optax.inject_hyperparams` write a name: it takes `jnp.bfloat16`, a callable, for a schedule.)
    rounding: `"stochastic"` or `"nearest"`.
    min_size: smallest number of elements of a leaf that is narrowed; `None` is 1024.
    include: which leaves of the state are narrowed: a regular expression searched in the leaf's
      path (such as `"0/nu/dense/kernel"`), a function `(path, leaf) -> bool`, or `None` for all.
    seed: seed of the rounding noise, a whole number >= 0.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `WithStateDtypeState`: in bf16 or f16 2 bytes
    per number of the inner's state (Adam: 4 bytes per parameter instead of 8), and 8 bytes in all.

  Raises:
    ValueError: if an argument is unknown, out of range or traced where it shapes the program; if a
      state was made with other options; if the inner keeps its state in host memory.
    TypeError: if `inner` is no transformation or `include` no rule.

  Example:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import hina_optax.memory as memory
    >>> tx = memory.with_state_dtype(optax.rmsprop(1e-3), "bfloat16")
    >>> params = {"kernel": jnp.ones((64, 32), jnp.bfloat16), "bias": jnp.ones(32, jnp.bfloat16)}
    >>> state = tx.init(params)
    >>> nu = optax.tree.get(state, "nu")
    >>> print(nu["kernel"].dtype, nu["bias"].dtype)
    bfloat16 float32
    >>> updates, state = tx.update(params, state, params)
    >>> print(updates["kernel"].dtype)
    bfloat16

  References:
    Zamirai et al., Revisiting BFloat16 training, arXiv 2010.06192. `reduce_precision` of
    `HinaAdaptive`, which rounds to the nearest.
  """
  target = _check_dtype(dtype)
  checks.choice("rounding", rounding, ("stochastic", "nearest"))
  min_elements = _arguments.check_static_integer("min_size", min_size, MIN_SIZE, 0)
  is_included = _arguments.compile_include(include)
  checks.integer("seed", seed, 0)

  def selects(path: str, leaf: Any) -> bool:
    return (
      codecs.is_floating(leaf) and leaf.dtype.itemsize > target.itemsize
      and leaf.size >= min_elements
      and bool(is_included(path, leaf))
    )

  def encode(leaf: jax.Array, key: Key) -> jax.Array:
    return round_to(leaf, target, key if rounding == "stochastic" else None)

  def matches(stored: Any, like: Any) -> bool:
    return getattr(stored, "dtype", None) == target and stored.shape == like.shape

  codec = Codec(
    target.name, WithStateDtypeState, selects, encode,
    lambda stored, like, key: stored.astype(like.dtype), matches, seed=seed, purpose=_PURPOSE)
  return driver.with_codec(_arguments.check_inner(inner), codec)


def _check_dtype(dtype: Any) -> Any:
  checks.static_value("dtype", dtype)
  try:
    parsed = jnp.dtype(dtype)
  except TypeError:
    parsed = None
  if parsed is None or parsed.name not in _DTYPES:
    allowed = ", ".join(repr(name) for name in _DTYPES)
    shown = repr(dtype) if parsed is None else repr(parsed.name)
    raise ValueError(
      f"dtype must be one of {allowed}; got {shown}. For 8 bits use with_quantized_state."
    )
  return parsed
