"""The arrays of a state under names that do not depend on its storage or its stacking."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hina_optax import memory
from hina_optax.base import paths, rounding
from hina_optax.base.positions import LeafNumbers
from hina_optax.grouped.codecs import QuantizedLeaf
from hina_optax.grouped.layout import Group, Grouped

_WRAPPERS = (
  memory.WithHostOffloadState, memory.WithQuantizedStateState, memory.WithStateDtypeState,
)
# Seeds the random bits of this module's rounding apart from those of other modules.
_PURPOSE = 5


class Entry(NamedTuple):
  """One array of a state, or one `QuantizedLeaf`.

  Attributes:
    names: field and path of each leaf in the entry, such as `"0/mu/block/kernel"`: a single name,
      or one per row of a stack.
    row_shape: shape of each row of a stack; `None` if the entry is a single leaf.
    value: an array, its shape and dtype, or a `QuantizedLeaf` of either.
    is_counter: whether the entry is a counter or a seed of a storage wrapper, which starts anew
      under another wrapper.
    rows: indices of the named rows in the array; `None` if these are all rows.
  """

  names: tuple[str, ...]
  row_shape: tuple[int, ...] | None
  value: Any
  is_counter: bool = False
  rows: tuple[int, ...] | None = None


def list_entries(state: Any) -> list[Entry]:
  """Lists the entries of a state in the order of its leaves."""
  return list(_walk(state, ()))


def check_state(tx: Any, state: Any, params: Any) -> None:
  """Refuses a state that is not one of `tx` for these parameters.

  Raises:
    ValueError: naming what differs.
  """
  expected = _leaf_shapes(jax.eval_shape(lambda tree: tx.init(tree), params))
  actual = _leaf_shapes(state)
  lines = [f"  {name}: not in the state" for name in expected if name not in actual]
  lines += [f"  {name}: only in the state" for name in actual if name not in expected]
  lines += [f"  {name}: {list(actual[name])} where init makes {list(expected[name])}"
            for name in expected if name in actual and actual[name] != expected[name]]
  if lines:
    raise ValueError("\n".join([
      "the state is not of this optimizer and these parameters:", *lines[:6],
      *([f"  and {len(lines) - 6} more"] if len(lines) > 6 else [])]))


def is_wrapper(node: Any) -> bool:
  """Returns whether a node is the state of a storage wrapper."""
  return isinstance(node, _WRAPPERS)


def _leaf_shapes(state: Any) -> dict[str, tuple[int, ...]]:
  return {name: leaf_shape(entry) for entry in list_entries(state) for name in entry.names}


def _walk(node: Any, path: tuple[Any, ...]) -> Iterator[Entry]:
  if is_wrapper(node):
    counters = {k: v for k, v in node._asdict().items() if k != "inner_state"}
    yield from _walk(node.inner_state, path)
    for field, value in counters.items():
      name = f"{paths.path_string(path)}/<{type(node).__name__}>/{field}"
      yield Entry((name,), None, value, is_counter=True)
    return
  if isinstance(node, Grouped):
    for group, array in zip(node.layout.groups, node.arrays):
      if group.stacked:
        yield from _walk_stack(array, paths.path_string(path), group)
      else:
        yield from _walk(array, (*path, jax.tree_util.DictKey(group.name)))
    return
  if isinstance(node, LeafNumbers):
    yield Entry(_join_paths(paths.path_string(path), node.names.names), (), node.numbers)
    return
  if isinstance(node, QuantizedLeaf):
    yield Entry((paths.path_string(path),), None, node)
    return
  children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
  for key, child in children:
    if child is node:
      yield Entry((paths.path_string(path),), None, node)
    else:
      yield from _walk(child, (*path, *key))


def _join_paths(field: str, leaf_paths: tuple[str, ...]) -> tuple[str, ...]:
  return tuple(f"{field}/{path}" if field else path for path in leaf_paths)


def _walk_stack(value: Any, field: str, group: Group) -> Iterator[Entry]:
  """Yields the stacked state of a group: one entry, or several as in optax's Adafactor."""
  pairs = jax.tree_util.tree_flatten_with_path(
    value, is_leaf=lambda x: isinstance(x, QuantizedLeaf))[0]
  for key, x in pairs:
    leaf_paths = group.paths if not key else tuple(
      f"{path}/{paths.path_string(key)}" for path in group.paths)
    array = x.codes if isinstance(x, QuantizedLeaf) else x
    yield Entry(_join_paths(field, leaf_paths), tuple(array.shape[1:]), x)


def layout_key(entry: Entry) -> tuple[Any, ...]:
  """Returns a key that is equal for entries whose arrays can be exchanged as they are."""
  kind = "8 bits" if isinstance(entry.value, QuantizedLeaf) else "plain"
  arrays = tuple((tuple(x.shape), jnp.dtype(x.dtype).name) for x in jax.tree.leaves(entry.value))
  return entry.names, entry.rows, kind, arrays


def split_entry(entry: Entry) -> dict[str, jax.Array]:
  """Splits an entry into its leaves, by name; 8-bit state becomes fp32."""
  value = jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), entry.value)
  if isinstance(value, QuantizedLeaf):
    value = memory.dequantize_state(value)
  if entry.row_shape is None:
    return {entry.names[0]: value}
  rows = entry.rows or range(len(entry.names))
  return {name: value[i].reshape(entry.row_shape) for i, name in zip(rows, entry.names)}


def assemble_entry(entry: Entry, pieces: dict[str, jax.Array], index: int) -> Any:
  """Assembles the value of an abstract entry from its leaves, the inverse of `split_entry`.

  Args:
    entry: the abstract entry, which gives dtype, storage and sharding.
    pieces: at least the leaves of the entry, by name.
    index: number of the entry in its state, which seeds the rounding to 8 bits.
  """
  quantized = isinstance(entry.value, QuantizedLeaf)
  like = entry.value.codes if quantized else entry.value
  leaves = [pieces[name] for name in entry.names]
  if entry.row_shape is not None:
    dtype = jnp.result_type(*leaves) if len({x.dtype for x in leaves}) == 1 else jnp.float32
    leaves = [jnp.stack([x.astype(dtype).reshape(like.shape[1:]) for x in leaves])]
  whole = leaves[0].reshape(like.shape)
  if quantized:
    # A fixed seed is good enough: the state is rounded here only once.
    at = rounding.make_key(rounding.seed_word(0), jnp.zeros([], jnp.int32), _PURPOSE).fold(index)
    value: Any = memory.quantize_leaf(whole, entry.value.scales.shape, at)
  elif jnp.issubdtype(like.dtype, jnp.floating) and like.dtype.itemsize < 4:
    value = rounding.round_to(whole, like.dtype, None)
  else:
    value = whole.astype(like.dtype)
  return jax.tree.map(place_like, value, entry.value)


def place_like(x: jax.Array, like: Any) -> jax.Array:
  """Moves an array to the sharding of an abstract one, if that has a sharding."""
  return x if like.sharding is None else jax.device_put(x, like.sharding)


def leaf_shape(entry: Entry) -> tuple[int, ...]:
  """Returns the shape of each leaf in an entry."""
  value = entry.value.codes if isinstance(entry.value, QuantizedLeaf) else entry.value
  return tuple(value.shape) if entry.row_shape is None else entry.row_shape
