"""Casts at the two ends of a chain, so that nothing between them rounds to the gradient's dtype."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hina_optax import _leaves, _numerics, _stacks


def upcast_updates() -> optax.GradientTransformationExtraArgs:
  """Updates in at least fp32, without state."""

  def init(params: Any) -> optax.EmptyState:
    _leaves.check_floating(params, "params")
    return optax.EmptyState()

  def update(updates, state, params=None, **extra_args):
    del params, extra_args
    _leaves.check_floating(updates, "updates")
    return jax.tree.map(lambda g: _cast(g, _numerics.compute_dtype(g.dtype)), updates), state

  return _stacks.Part(init, update)


def cast_updates_to_params() -> optax.GradientTransformationExtraArgs:
  """Updates in the dtype of their parameters; as they are where there are no parameters."""

  def update(updates, state, params=None, **extra_args):
    del extra_args
    if params is None:
      return updates, state
    _, leaves, structure = _leaves.flatten(updates)
    cast = [
      u if _leaves.is_absent(u) or _leaves.is_absent(p) else _cast(u, p.dtype)
      for u, p in zip(leaves, structure.flatten_up_to(params))
    ]
    return structure.unflatten(cast), state

  return _stacks.Part(lambda params: optax.EmptyState(), update)


def _cast(x: Any, dtype: Any) -> jax.Array:
  return _numerics.narrowed(jnp.asarray(x), dtype)
