"""The least costly way to keep a state within a budget, from shapes alone."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hina_optax.base import paths
from hina_optax.grouped import codecs
from hina_optax.memory import _host_offload, _quantized_state, _state_dtype
from hina_optax.memory._ledger import Ledger, StateLeaf
from hina_optax.memory._plan_table import MemoryPlan, PlanRow, PlanStep, Storage

GB = 1 << 30
_MB = 1 << 20
_PREFIX = "inner_state/"
_BF16 = np.dtype(jnp.bfloat16)


class StateMemoryError(RuntimeError):
  """There is no memory for an optimizer's state; the message proposes a plan."""


class Demands(NamedTuple):
  """What a plan is asked for.

  Attributes:
    budget: bytes on the device for parameters, gradients and state; `None`: no limit.
    reserve: bytes of the budget that belong to something else.
    share: of the rest of the budget, what may be used.
    least_form: place in `FORMS` from which every leaf starts.
    host: whether every leaf starts in host memory.
    window: bytes of hosted state on the device at once; `None`: chosen.
    rounding: of bf16 state.
  """

  budget: int | None = None
  reserve: int = 0
  share: float = 1.0
  least_form: int = 0
  host: bool = False
  window: int | None = None
  rounding: str = "stochastic"


def plan_state(inner: Any, params: Any, demands: Demands) -> MemoryPlan:
  """Chooses how the state of `inner` for `params` is kept; nothing is allocated.

  Goes from fp32 to bf16 to 8 bits to host memory, one leaf after the other, the largest first, and
  stops as soon as the budget is met.
  """
  leaves = state_leaves(inner, params)
  ledger = Ledger(leaves, demands.least_form, demands.host, demands.window)
  steps: list[PlanStep] = []
  room = None
  if demands.budget is not None:
    room = int(demands.share * (demands.budget - demands.reserve)) - 2 * tree_bytes(params)
    steps = ledger.shrink(room)
  storage = ledger.storage(demands.rounding, room)
  for i in ledger.hosted if demands.window else ():
    _host_offload.check_window(leaves[i].path, leaves[i].sizes[ledger.forms[i]], demands.window)
  rows = (
    *_tree_rows("parameters", params), *_tree_rows("gradients", params),
    *_state_rows(leaves, storage),
  )
  return MemoryPlan(rows, tuple(_joined(steps)), demands.budget, demands.reserve, storage)


def apply_storage(inner: Any, storage: Storage) -> optax.GradientTransformationExtraArgs:
  """`inner` in the wrappers that a plan chose, and in no others."""
  depth = 0

  def rule(chosen: frozenset[str]) -> Callable[[str, Any], bool]:
    # The path that a wrapper sees starts with one field for each wrapper inside of it.
    skip = depth * len(_PREFIX)
    return lambda path, leaf: _original(path[skip:]) in chosen

  if storage.quantized:
    inner = _quantized_state.with_quantized_state(inner, include=rule(storage.quantized))
    depth += 1
  if storage.narrow:
    inner = _state_dtype.with_state_dtype(
      inner, rounding=storage.rounding, include=rule(storage.narrow))
    depth += 1
  if storage.hosted:
    inner = _host_offload.with_host_offload(
      inner, include=rule(storage.hosted), min_bytes=0, max_buffer_memory_mb=storage.window / _MB)
  return optax.with_extra_args_support(inner)


def state_leaves(inner: Any, params: Any) -> list[StateLeaf]:
  """The leaves of the state of `inner` for `params`, with their size in each form."""
  wide = jax.eval_shape(lambda tree: jax.tree.map(codecs.widen, tree), params)
  pairs, _ = jax.tree_util.tree_flatten_with_path(jax.eval_shape(inner.init, wide))
  narrow = any(x.dtype != y.dtype for x, y in zip(jax.tree.leaves(wide), jax.tree.leaves(params)))
  bare = jax.tree.leaves(jax.eval_shape(inner.init, params)) if narrow else [x for _, x in pairs]
  vector = len(jax.tree.leaves(params))
  return [
    StateLeaf(
      paths.path_string(path), *_group(path), _count(leaf), np.dtype(leaf.dtype),
      np.dtype(other.dtype), _count(leaf) > vector, _sizes(leaf, _count(leaf) > vector))
    for (path, leaf), other in zip(pairs, bare)
  ]


def tree_bytes(tree: Any) -> int:
  """Bytes of all arrays of a tree."""
  return sum(_bytes(x) for x in jax.tree.leaves(tree))


def _count(x: Any) -> int:
  return math.prod(x.shape)


def _bytes(x: Any) -> int:
  return _count(x) * np.dtype(x.dtype).itemsize


def _group(path: Any) -> tuple[str, str]:
  """The last field of a state on a path, and the path of the parameter behind it."""
  if path and getattr(path[-1], "name", None) == "value":  # of a variable of flax.nnx
    path = path[:-1]
  fields = [i for i, key in enumerate(path) if isinstance(key, jax.tree_util.GetAttrKey)]
  last = fields[-1] if fields else -1
  owner = paths.path_string(path[last + 1 :])
  return (path[last].name if fields else "state"), owner


def _sizes(leaf: Any, movable: bool) -> tuple[int, int, int]:
  whole, size = _bytes(leaf), _count(leaf)
  if not movable or not codecs.is_floating(leaf) or np.dtype(leaf.dtype).itemsize <= 2:
    return whole, whole, whole
  narrow = 2 * size if size >= _state_dtype.MIN_SIZE else whole
  small = _quantized_state.stored_bytes(leaf.shape) if size >= _quantized_state.MIN_SIZE else narrow
  return whole, narrow, small


def _original(path: str) -> str:
  """The path of the leaf that an array of its stored form belongs to."""
  return path.removesuffix("/codes").removesuffix("/scales")


def _tree_rows(name: str, tree: Any) -> list[PlanRow]:
  return _rows((name, np.dtype(x.dtype), "device", _bytes(x)) for x in jax.tree.leaves(tree))


def _state_rows(leaves: list[StateLeaf], storage: Storage) -> list[PlanRow]:
  """What each leaf becomes: one array, or codes and scales."""
  wrapped = bool(storage.narrow) + bool(storage.quantized)
  items: list[tuple[str, Any, str, int]] = []
  for leaf in leaves:
    place = "host" if leaf.path in storage.hosted else "device"
    if leaf.path in storage.quantized:
      items.append((leaf.group, np.dtype(np.uint8), place, leaf.size))
      items.append((leaf.group, _BF16, place, leaf.sizes[2] - leaf.size))
    elif leaf.path in storage.narrow:
      items.append((leaf.group, _BF16, place, leaf.sizes[1]))
    else:
      dtype = leaf.dtype if wrapped else leaf.bare
      items.append((leaf.group, dtype, place, leaf.size * dtype.itemsize))
  counters = [("counters", np.dtype(kind), "device", 4) for kind in (np.int32, np.uint32)]
  return _rows(items + counters * wrapped)


def _rows(items: Iterable[tuple[str, Any, str, int]]) -> list[PlanRow]:
  found: dict[tuple[str, str, str], list[int]] = {}
  for group, dtype, place, size in items:
    entry = found.setdefault((group, dtype.name, place), [0, 0])
    entry[0] += 1
    entry[1] += size
  return [PlanRow(*key, *value) for key, value in found.items()]


def _joined(steps: list[PlanStep]) -> list[PlanStep]:
  """Steps of one group and kind as one, in the order in which they begin."""
  joined: dict[tuple[str, str], PlanStep] = {}
  for step in steps:
    old = joined.get((step.group, step.change), step._replace(leaves=0, saves=0))
    joined[step.group, step.change] = old._replace(
      leaves=old.leaves + step.leaves, saves=old.saves + step.saves)
  return list(joined.values())
