"""A running state from one plan to another."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hina_optax.base import paths
from hina_optax.grouped import codecs
from hina_optax.memory import _plan, _quantized_state, _state_dtype
from hina_optax.memory._host_offload import WithHostOffloadState
from hina_optax.memory._plan_table import Storage
from hina_optax.memory._planned import Decision


def open_state(decision: Decision, state: Any, params: Any) -> Any:
  """The state without its wrappers: its leaves still as they are stored."""
  storage = decision.plan.storage
  wrappers = (
    (storage.hosted, WithHostOffloadState),
    (storage.narrow, _state_dtype.WithStateDtypeState),
    (storage.quantized, _quantized_state.WithQuantizedStateState),
  )
  for used, kind in wrappers:
    if used and not isinstance(state, kind):
      raise ValueError(
        f"the state is a {type(state).__name__} where this optimizer's plan has a {kind.__name__}: "
        "it was made by another optimizer, by another plan, or for other parameters."
      )
    state = state.inner_state if used else state
  structure: Any = jax.tree.structure(_like(decision, params))
  try:
    structure.flatten_up_to(state)
  except (TypeError, ValueError) as error:
    raise ValueError(f"the state is not of this optimizer and these parameters: {error}") from error
  return codecs.restored(state)


def store_state(decision: Decision, opened: Any, params: Any) -> Any:
  """An opened state in the wrappers of `decision`, moved array by array.

  Parts that `decision` does not have are dropped; parts that only it has begin from `init`.
  """
  like = _like(decision, params)
  places = jax.tree_util.tree_flatten_with_path(like)[0]
  merged = _graft(like, opened)
  structure: Any = jax.tree.structure(like)
  kept = structure.flatten_up_to(merged)
  missing = any(isinstance(x, jax.ShapeDtypeStruct) for x in kept)
  fresh = jax.tree.leaves(decision.base.init(params)) if missing else kept
  moved = []
  for (path, wanted), x, first in zip(places, kept, fresh):
    source = first if isinstance(x, jax.ShapeDtypeStruct) else x
    moved.append(_move(paths.path_string(path), source, wanted, decision.plan.storage))
  return _wrap(structure.unflatten(moved), decision.plan.storage)


def _like(decision: Decision, params: Any) -> Any:
  return jax.eval_shape(decision.base.init, jax.eval_shape(
    lambda tree: jax.tree.map(codecs.widen, tree), params))


def _move(path: str, stored: Any, like: Any, storage: Storage) -> Any:
  frozen = optax.GradientTransformation(
    lambda params: {path: _open(stored, like)}, lambda updates, state, params=None: (updates, state)
  )
  # Wrapped alone, the leaf takes the form that it has inside of the whole.
  alone = storage._replace(
    narrow=storage.narrow & {path}, quantized=storage.quantized & {path},
    hosted=storage.hosted & {path})
  state = _plan.apply_storage(frozen, alone).init(None)
  while not isinstance(state, dict):
    state = state.inner_state
  return state[path]


def _open(stored: Any, like: Any) -> jax.Array:
  stored = jax.device_put(stored, jax.memory.Space.Device)
  if isinstance(stored, _quantized_state.QuantizedLeaf):
    return _quantized_state.dequantize_state(stored, like.dtype)
  return stored.astype(like.dtype)


def _wrap(state: Any, storage: Storage) -> Any:
  def counted(kind: Any, inner_state: Any) -> Any:
    return kind(inner_state, jnp.zeros([], jnp.int32), jnp.zeros([], jnp.uint32))

  if storage.quantized:
    state = counted(_quantized_state.WithQuantizedStateState, state)
  if storage.narrow:
    state = counted(_state_dtype.WithStateDtypeState, state)
  return WithHostOffloadState(state) if storage.hosted else state


def _graft(new: Any, old: Any) -> Any:
  """`new` with the fields of every part that `old` has as well."""
  parts: dict[type, list[Any]] = {}
  _collect(old, parts)
  return _grafted(new, parts)


def _is_part(x: Any) -> bool:
  """True for the state of a transformation; not for parameters that a user keeps in NamedTuples."""
  library = type(x).__module__.split(".")[0] in ("hina_optax", "optax")
  return library and hasattr(x, "_fields") and not isinstance(x, _quantized_state.QuantizedLeaf)


def _collect(state: Any, parts: dict[type, list[Any]]) -> None:
  if _is_part(state):
    parts.setdefault(type(state), []).append(state)
  for child in state if isinstance(state, (tuple, list)) else ():
    _collect(child, parts)


def _grafted(new: Any, parts: dict[type, list[Any]]) -> Any:
  if _is_part(new):
    same = parts.get(type(new), [])
    source = same.pop(0) if same else None
    return type(new)(*(
      _grafted(value, parts) if _holds_parts(value) or source is None else getattr(source, name)
      for name, value in zip(new._fields, new)
    ))
  if type(new) in (tuple, list):
    return type(new)(_grafted(child, parts) for child in new)
  return new


def _holds_parts(value: Any) -> bool:
  found: dict[type, list[Any]] = {}
  _collect(value, found)
  return bool(found)
