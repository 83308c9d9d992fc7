"""The two ends of a chain: between them every update is finite, in bounds and of at least fp32."""

from typing import Any

import jax
import jax.numpy as jnp

from hina_optax import _leaves, _numerics, _parts, _visits


def in_bounds(inner: _parts.Part) -> _parts.Part:
  """`inner` on updates of at least fp32, with 0 for what is not finite and squares that fp32 holds.

  What is not finite passes unchanged, the rest comes out in the dtype of its parameter. Each part
  would see to it by itself, at the price of a pass over the updates or two: here it is done once.
  Parameters are handed on as they are: one that is not finite makes its own update so.
  """

  def init(params: Any) -> Any:
    _leaves.check_floating(params, "params")
    return inner.init(params)

  def update(updates, state, params=None, **extra_args):
    _leaves.check_floating(updates, "updates")
    with _visits.known_finite():
      results, state = inner.update(jax.tree.map(_bounded, updates), state, params, **extra_args)
    leaves, structure = _leaves.flat(updates)
    found = structure.flatten_up_to(results)
    params = _parts.read(params, results)
    likes = found if params is None else structure.flatten_up_to(params)
    new = [x if _leaves.is_absent(x) else _rejoined(u, x, like)
           for x, u, like in zip(leaves, found, likes)]
    return structure.unflatten(new), state

  return _parts.Part(init, update, inner.survey, "hands on")


def _bounded(x: Any) -> jax.Array:
  x = jnp.asarray(x)
  wide = _visits.finite(x).astype(_numerics.compute_dtype(x.dtype))
  return _numerics.squarable(wide)


def _rejoined(new: Any, old: Any, like: Any) -> jax.Array:
  """What came out, in the dtype of the parameter if there is one; what went in where not finite."""
  dtype = new.dtype if _leaves.is_absent(like) else like.dtype
  new = _numerics.narrowed(jnp.asarray(new), dtype)
  return jnp.where(jnp.isfinite(old), new, jnp.asarray(old).astype(dtype))
