"""Converts a running state from one plan to another."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hina_optax.base import paths
from hina_optax.grouped import codecs
from hina_optax.memory import _plan, _quantized_state, _state_dtype
from hina_optax.memory._host_offload import WithHostOffloadState
from hina_optax.memory._plan_cache import PlannedTransformation
from hina_optax.memory._plan_table import Storage


def unwrap_state(planned: PlannedTransformation, state: Any, params: Any) -> Any:
  """Returns the state without its wrappers; its leaves stay as they are stored."""
  storage = planned.plan.storage
  wrappers = (
    (storage.hosted, WithHostOffloadState),
    (storage.narrow, _state_dtype.WithStateDtypeState),
    (storage.quantized, _quantized_state.WithQuantizedStateState),
  )
  for paths_in_wrapper, state_type in wrappers:
    if not paths_in_wrapper:
      continue
    if not isinstance(state, state_type):
      raise ValueError(
        f"the state is a {type(state).__name__} where this optimizer's plan has a "
        f"{state_type.__name__}: it was made by another optimizer, by another plan, or for other "
        "parameters."
      )
    state = state.inner_state
  structure: Any = jax.tree.structure(_find_state_shapes(planned, params))
  try:
    structure.flatten_up_to(state)
  except (TypeError, ValueError) as error:
    raise ValueError(f"the state is not of this optimizer and these parameters: {error}") from error
  return codecs.restore_quantized_leaves(state)


def convert_state(planned: PlannedTransformation, unwrapped: Any, params: Any) -> Any:
  """Stores an unwrapped state in the wrappers of `planned`, converted array by array.

  Parts that `planned` does not have are dropped; parts that only it has begin from `init`.
  """
  shapes = _find_state_shapes(planned, params)
  leaf_paths = jax.tree_util.tree_flatten_with_path(shapes)[0]
  structure: Any = jax.tree.structure(shapes)
  sources = structure.flatten_up_to(_merge_parts(shapes, unwrapped))
  has_new_parts = any(isinstance(x, jax.ShapeDtypeStruct) for x in sources)
  initial_leaves = jax.tree.leaves(planned.base.init(params)) if has_new_parts else sources
  converted = []
  for (path, like), x, initial in zip(leaf_paths, sources, initial_leaves):
    source = initial if isinstance(x, jax.ShapeDtypeStruct) else x
    converted.append(_convert_leaf(paths.path_string(path), source, like, planned.plan.storage))
  return _wrap_state(structure.unflatten(converted), planned.plan.storage)


def _find_state_shapes(planned: PlannedTransformation, params: Any) -> Any:
  return jax.eval_shape(planned.base.init, jax.eval_shape(
    lambda tree: jax.tree.map(codecs.widen, tree), params))


def _convert_leaf(path: str, stored: Any, like: Any, storage: Storage) -> Any:
  # The `init` of a dummy transformation, whose state is this leaf alone, stores the leaf as the
  # wrappers store it within the full state.
  transformation = optax.GradientTransformation(
    lambda params: {path: _decode_leaf(stored, like)},
    lambda updates, state, params=None: (updates, state))
  leaf_storage = storage._replace(
    narrow=storage.narrow & {path}, quantized=storage.quantized & {path},
    hosted=storage.hosted & {path})
  state = _plan.apply_storage(transformation, leaf_storage).init(None)
  while not isinstance(state, dict):
    state = state.inner_state
  return state[path]


def _decode_leaf(stored: Any, like: Any) -> jax.Array:
  stored = jax.device_put(stored, jax.memory.Space.Device)
  if isinstance(stored, _quantized_state.QuantizedLeaf):
    return _quantized_state.dequantize_state(stored, like.dtype)
  return stored.astype(like.dtype)


def _wrap_state(state: Any, storage: Storage) -> Any:
  def add_counters(state_type: Any, inner_state: Any) -> Any:
    return state_type(inner_state, jnp.zeros([], jnp.int32), jnp.zeros([], jnp.uint32))

  if storage.quantized:
    state = add_counters(_quantized_state.WithQuantizedStateState, state)
  if storage.narrow:
    state = add_counters(_state_dtype.WithStateDtypeState, state)
  return WithHostOffloadState(state) if storage.hosted else state


def _merge_parts(new: Any, old: Any) -> Any:
  """Returns `new` with the fields of every part that `old` has as well."""
  parts: dict[type, list[Any]] = {}
  _collect_parts(old, parts)
  return _replace_parts(new, parts)


def _is_part(x: Any) -> bool:
  """True for the state of a transformation; not for parameters that a user keeps in NamedTuples."""
  is_library_type = type(x).__module__.split(".")[0] in ("hina_optax", "optax")
  return (
    is_library_type and hasattr(x, "_fields")
    and not isinstance(x, _quantized_state.QuantizedLeaf))


def _collect_parts(state: Any, parts: dict[type, list[Any]]) -> None:
  if _is_part(state):
    parts.setdefault(type(state), []).append(state)
  for child in state if isinstance(state, (tuple, list)) else ():
    _collect_parts(child, parts)


def _replace_parts(new: Any, parts: dict[type, list[Any]]) -> Any:
  if _is_part(new):
    same_type = parts.get(type(new), [])
    source = same_type.pop(0) if same_type else None
    return type(new)(*(
      _replace_parts(value, parts) if _holds_parts(value) or source is None
      else getattr(source, name)
      for name, value in zip(new._fields, new)
    ))
  if type(new) in (tuple, list):
    return type(new)(_replace_parts(child, parts) for child in new)
  return new


def _holds_parts(value: Any) -> bool:
  parts: dict[type, list[Any]] = {}
  _collect_parts(value, parts)
  return bool(parts)
