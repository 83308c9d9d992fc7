"""The arrays of a state under names that do not depend on how it is stored or stacked."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hina_optax import _layouts, _leaves, _rounding, memory
from hina_optax._stacks import Group

_WRAPPERS = (
  memory.WithHostOffloadState, memory.WithQuantizedStateState, memory.WithStateDtypeState,
)
_PURPOSE = 5


class Entry(NamedTuple):
  """One array of a state, or one `QuantizedLeaf`.

  Attributes:
    names: of what is in it: one, or one a row of a stack: `"0/mu/block/kernel"`, field and path.
    row: shape of each row of a stack; `None` where the entry is one leaf.
    value: the array, its shape and dtype, or a `QuantizedLeaf` of either.
    own: whether it belongs to a storage wrapper, and begins anew under another.
  """

  names: tuple[str, ...]
  row: tuple[int, ...] | None
  value: Any
  own: bool = False


def entries(state: Any, groups: dict[str, Group]) -> list[Entry]:
  """The entries of a state in its order; `groups` are the stacks by name."""
  return list(_walk(state, (), groups))


def groups_of(tx: Any, state: Any, params: Any) -> dict[str, Group]:
  """The stacks of a state of `tx`, by name.

  Raises:
    ValueError: if the state is not one of `tx` for these parameters.
  """
  with _layouts.as_made(state), _layouts.noted() as layouts:
    like = jax.eval_shape(lambda tree: tx.init(tree), params)
  structure: Any = jax.tree.structure(like)
  try:
    same = structure.flatten_up_to(state)
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"the state is not of this optimizer and these parameters: {error}") from error
  for x, y in zip(jax.tree.leaves(like), same):
    if getattr(y, "shape", ()) != x.shape:
      raise ValueError(
        f"the state is not of this optimizer and these parameters: an array is {list(y.shape)} "
        f"where init makes {list(x.shape)}.")
  return stacks_in(layouts)


def stacks_in(layouts: list[Any]) -> dict[str, Group]:
  """The groups of several leaves, by name."""
  return {group.name: group for layout in layouts for group in layout.groups if group.stacked}


def _walk(node: Any, path: tuple[Any, ...], groups: dict[str, Group]) -> Iterator[Entry]:
  if isinstance(node, _WRAPPERS):
    counters = {k: v for k, v in node._asdict().items() if k != "inner_state"}
    yield from _walk(node.inner_state, path, groups)
    for field, value in counters.items():
      name = f"{_leaves.path_string(path)}/<{type(node).__name__}>/{field}"
      yield Entry((name,), None, value, own=True)
    return
  if isinstance(node, memory.QuantizedLeaf):
    yield _entry(node, node.codes.shape, path, groups)
    return
  children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
  for key, child in children:
    if child is node:
      yield _entry(node, jnp.shape(node), path, groups)
    else:
      yield from _walk(child, (*path, *key), groups)


def _entry(value: Any, shape: Any, path: tuple[Any, ...], groups: dict[str, Group]) -> Entry:
  group = groups.get(str(getattr(path[-1], "key", ""))) if path else None
  if group is None:
    return Entry((_leaves.path_string(path),), None, value)
  head = _leaves.path_string(path[:-1])
  names = tuple(f"{head}/{own}" if head else own for own in group.paths)
  flat = math.prod(shape[1:]) == math.prod(group.shape)
  return Entry(names, group.shape if flat else tuple(shape[1:]), value)


def form(entry: Entry) -> tuple[Any, ...]:
  """What two entries must share for the array of one to be that of the other."""
  kind = "8 bits" if isinstance(entry.value, memory.QuantizedLeaf) else "plain"
  arrays = tuple((tuple(x.shape), jnp.dtype(x.dtype).name) for x in jax.tree.leaves(entry.value))
  return entry.names, kind, arrays


def pieces(entry: Entry) -> dict[str, jax.Array]:
  """What is in an entry, by name, in fp32 where it was kept in 8 bits."""
  value = jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), entry.value)
  if isinstance(value, memory.QuantizedLeaf):
    value = memory.dequantize_state(value)
  if entry.row is None:
    return {entry.names[0]: value}
  return {name: value[i].reshape(entry.row) for i, name in enumerate(entry.names)}


def assembled(entry: Entry, found: dict[str, jax.Array], index: int) -> Any:
  """The value of an abstract entry, from the pieces that it is made of."""
  quantized = isinstance(entry.value, memory.QuantizedLeaf)
  like = entry.value.codes if quantized else entry.value
  parts = [found[name] for name in entry.names]
  if entry.row is not None:
    wide = jnp.result_type(*parts) if len({x.dtype for x in parts}) == 1 else jnp.float32
    parts = [jnp.stack([x.astype(wide).reshape(like.shape[1:]) for x in parts])]
  whole = parts[0].reshape(like.shape)
  if quantized:
    # The draw of the rounding is as good as any other: it happens once.
    at = _rounding.key(_rounding.seed_word(0), jnp.zeros([], jnp.int32), _PURPOSE).fold(index)
    value: Any = memory.quantize_leaf(whole, entry.value.scales.shape, at)
  elif jnp.issubdtype(like.dtype, jnp.floating) and like.dtype.itemsize < 4:
    value = _rounding.round_to(whole, like.dtype, None)
  else:
    value = whole.astype(like.dtype)
  return jax.tree.map(placed, value, entry.value)


def placed(x: jax.Array, like: Any) -> jax.Array:
  """`x` where `like` is to lie."""
  return x if like.sharding is None else jax.device_put(x, like.sharding)


def shape(entry: Entry) -> tuple[int, ...]:
  """Of one leaf in an entry."""
  value = entry.value.codes if isinstance(entry.value, memory.QuantizedLeaf) else entry.value
  return tuple(value.shape) if entry.row is None else entry.row
