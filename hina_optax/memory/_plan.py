"""Plans how to store a state so that it fits a memory budget, from shapes alone."""

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


class PlanConstraints(NamedTuple):
  """The constraints on a plan.

  Attributes:
    budget: bytes on the device for parameters, gradients and state; `None`: no limit.
    reserve: bytes of the budget that are kept for something else.
    share: share of the rest of the budget that may be used.
    initial_precision: index in `PRECISIONS` of `_ledger` with which every leaf starts.
    host: whether every leaf starts in host memory.
    window: bytes of offloaded state on the device at once; `None`: the plan chooses.
    rounding: how bf16 state is rounded.
  """

  budget: int | None = None
  reserve: int = 0
  share: float = 1.0
  initial_precision: int = 0
  host: bool = False
  window: int | None = None
  rounding: str = "stochastic"


def plan_state(inner: Any, params: Any, constraints: PlanConstraints) -> MemoryPlan:
  """Chooses how the state of `inner` for `params` is stored; nothing is allocated.

  Leaves are moved from fp32 to bf16, then to 8 bits, then to host memory, one after the other, the
  largest first, until the budget is met.
  """
  leaves = list_state_leaves(inner, params)
  ledger = Ledger(leaves, constraints.initial_precision, constraints.host, constraints.window)
  steps: list[PlanStep] = []
  room = None
  if constraints.budget is not None:
    usable = int(constraints.share * (constraints.budget - constraints.reserve))
    room = usable - 2 * tree_bytes(params)
    steps = ledger.shrink(room)
  storage = ledger.make_storage(constraints.rounding, room)
  for i in ledger.hosted if constraints.window else ():
    size = leaves[i].sizes[ledger.precisions[i]]
    _host_offload.check_window(leaves[i].path, size, constraints.window)
  rows = (
    *_make_tree_rows("parameters", params), *_make_tree_rows("gradients", params),
    *_make_state_rows(leaves, storage),
  )
  return MemoryPlan(
    rows, tuple(_merge_steps(steps)), constraints.budget, constraints.reserve, storage)


def apply_storage(inner: Any, storage: Storage) -> optax.GradientTransformationExtraArgs:
  """Puts `inner` into the storage wrappers that a plan needs, and into no others."""
  depth = 0

  def make_rule(leaf_paths: frozenset[str]) -> Callable[[str, Any], bool]:
    # The path that a wrapper sees starts with one field for each wrapper inside of it.
    skip = depth * len(_PREFIX)
    return lambda path, leaf: _strip_codec_field(path[skip:]) in leaf_paths

  if storage.quantized:
    inner = _quantized_state.with_quantized_state(inner, include=make_rule(storage.quantized))
    depth += 1
  if storage.narrow:
    inner = _state_dtype.with_state_dtype(
      inner, rounding=storage.rounding, include=make_rule(storage.narrow))
    depth += 1
  if storage.hosted:
    inner = _host_offload.with_host_offload(
      inner, include=make_rule(storage.hosted), min_bytes=0,
      max_buffer_memory_mb=storage.window / _MB)
  return optax.with_extra_args_support(inner)


def list_state_leaves(inner: Any, params: Any) -> list[StateLeaf]:
  """Lists the leaves of the state of `inner` for `params`, with their sizes per precision."""
  wide = jax.eval_shape(lambda tree: jax.tree.map(codecs.widen, tree), params)
  pairs, _ = jax.tree_util.tree_flatten_with_path(jax.eval_shape(inner.init, wide))
  is_narrow = any(
    x.dtype != y.dtype for x, y in zip(jax.tree.leaves(wide), jax.tree.leaves(params)))
  unwrapped = [leaf for _, leaf in pairs]
  if is_narrow:
    unwrapped = jax.tree.leaves(jax.eval_shape(inner.init, params))
  leaf_count = len(jax.tree.leaves(params))
  state_leaves = []
  for (path, leaf), unwrapped_leaf in zip(pairs, unwrapped):
    size = _count_elements(leaf)
    # Counters and vectors with one number per leaf are too small to matter.
    movable = size > leaf_count
    state_leaves.append(StateLeaf(
      paths.path_string(path), *_find_field_and_owner(path), size, np.dtype(leaf.dtype),
      np.dtype(unwrapped_leaf.dtype), movable, _find_stored_sizes(leaf, movable)))
  return state_leaves


def tree_bytes(tree: Any) -> int:
  """Returns the bytes of all arrays of a tree."""
  return sum(_count_bytes(x) for x in jax.tree.leaves(tree))


def _count_elements(x: Any) -> int:
  return math.prod(x.shape)


def _count_bytes(x: Any) -> int:
  return _count_elements(x) * np.dtype(x.dtype).itemsize


def _find_field_and_owner(path: Any) -> tuple[str, str]:
  """Returns the last field of a state on a path, and the path of the parameter behind it."""
  if path and getattr(path[-1], "name", None) == "value":  # a variable of flax.nnx
    path = path[:-1]
  fields = [i for i, key in enumerate(path) if isinstance(key, jax.tree_util.GetAttrKey)]
  last = fields[-1] if fields else -1
  owner = paths.path_string(path[last + 1 :])
  return (path[last].name if fields else "state"), owner


def _find_stored_sizes(leaf: Any, movable: bool) -> tuple[int, int, int]:
  whole, size = _count_bytes(leaf), _count_elements(leaf)
  if not movable or not codecs.is_floating(leaf) or np.dtype(leaf.dtype).itemsize <= 2:
    return whole, whole, whole
  narrow = 2 * size if size >= _state_dtype.MIN_SIZE else whole
  quantized = narrow
  if size >= _quantized_state.MIN_SIZE:
    quantized = _quantized_state.count_stored_bytes(leaf.shape)
  return whole, narrow, quantized


def _strip_codec_field(path: str) -> str:
  """Returns the path of the leaf to which an array of a `QuantizedLeaf` belongs."""
  return path.removesuffix("/codes").removesuffix("/scales")


def _make_tree_rows(name: str, tree: Any) -> list[PlanRow]:
  return _merge_rows(
    (name, np.dtype(x.dtype), "device", _count_bytes(x)) for x in jax.tree.leaves(tree))


def _make_state_rows(leaves: list[StateLeaf], storage: Storage) -> list[PlanRow]:
  """Returns the rows of the stored state: each leaf is one array, or codes and scales."""
  wrapper_count = bool(storage.narrow) + bool(storage.quantized)
  items: list[tuple[str, Any, str, int]] = []
  for leaf in leaves:
    place = "host" if leaf.path in storage.hosted else "device"
    if leaf.path in storage.quantized:
      items.append((leaf.field, np.dtype(np.uint8), place, leaf.size))
      items.append((leaf.field, _BF16, place, leaf.sizes[2] - leaf.size))
    elif leaf.path in storage.narrow:
      items.append((leaf.field, _BF16, place, leaf.sizes[1]))
    else:
      dtype = leaf.dtype if wrapper_count else leaf.unwrapped_dtype
      items.append((leaf.field, dtype, place, leaf.size * dtype.itemsize))
  counters = [("counters", np.dtype(dtype), "device", 4) for dtype in (np.int32, np.uint32)]
  return _merge_rows(items + counters * wrapper_count)


def _merge_rows(items: Iterable[tuple[str, Any, str, int]]) -> list[PlanRow]:
  totals: dict[tuple[str, str, str], list[int]] = {}
  for group, dtype, place, size in items:
    total = totals.setdefault((group, dtype.name, place), [0, 0])
    total[0] += 1
    total[1] += size
  return [PlanRow(*key, *total) for key, total in totals.items()]


def _merge_steps(steps: list[PlanStep]) -> list[PlanStep]:
  """Merges steps of one group and change, in the order in which they begin."""
  merged: dict[tuple[str, str], PlanStep] = {}
  for step in steps:
    total = merged.get((step.group, step.change), step._replace(leaves=0, saves=0))
    merged[step.group, step.change] = total._replace(
      leaves=total.leaves + step.leaves, saves=total.saves + step.saves)
  return list(merged.values())
