"""The arrays of a state under names that do not depend on how it is stored or stacked."""

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
_PURPOSE = 5


class Entry(NamedTuple):
  """One array of a state, or one `QuantizedLeaf`.

  Attributes:
    names: of what is in it: one, or one a row of a stack: `"0/mu/block/kernel"`, field and path.
    row: shape of each row of a stack; `None` where the entry is one leaf.
    value: the array, its shape and dtype, or a `QuantizedLeaf` of either.
    own: whether it belongs to a storage wrapper, and begins anew under another.
    places: of the rows in the array, where these are not simply all.
  """

  names: tuple[str, ...]
  row: tuple[int, ...] | None
  value: Any
  own: bool = False
  places: tuple[int, ...] | None = None


def entries(state: Any) -> list[Entry]:
  """The entries of a state in its order."""
  return list(_walk(state, ()))


def check_state(tx: Any, state: Any, params: Any) -> None:
  """Refuses a state that is not one of `tx` for these parameters.

  Raises:
    ValueError: naming what differs.
  """
  wanted = _shapes(entries(jax.eval_shape(lambda tree: tx.init(tree), params)))
  found = _shapes(entries(state))
  lines = [f"  {name}: not in the state" for name in wanted if name not in found]
  lines += [f"  {name}: only in the state" for name in found if name not in wanted]
  lines += [f"  {name}: {list(found[name])} where init makes {list(wanted[name])}"
            for name in wanted if name in found and found[name] != wanted[name]]
  if lines:
    raise ValueError("\n".join([
      "the state is not of this optimizer and these parameters:", *lines[:6],
      *([f"  and {len(lines) - 6} more"] if len(lines) > 6 else [])]))


def is_wrapper(node: Any) -> bool:
  """True for the state of a storage wrapper."""
  return isinstance(node, _WRAPPERS)


def _shapes(found: list[Entry]) -> dict[str, tuple[int, ...]]:
  return {name: shape(entry) for entry in found for name in entry.names}


def _walk(node: Any, path: tuple[Any, ...]) -> Iterator[Entry]:
  if is_wrapper(node):
    counters = {k: v for k, v in node._asdict().items() if k != "inner_state"}
    yield from _walk(node.inner_state, path)
    for field, value in counters.items():
      name = f"{paths.path_string(path)}/<{type(node).__name__}>/{field}"
      yield Entry((name,), None, value, own=True)
    return
  if isinstance(node, Grouped):
    for group, array in zip(node.layout.groups, node.arrays):
      if group.stacked:
        yield from _stacked(array, paths.path_string(path), group)
      else:
        yield from _walk(array, (*path, jax.tree_util.DictKey(group.name)))
    return
  if isinstance(node, LeafNumbers):
    yield Entry(_names(paths.path_string(path), node.names.names), (), node.numbers)
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


def _names(head: str, own: tuple[str, ...]) -> tuple[str, ...]:
  return tuple(f"{head}/{path}" if head else path for path in own)


def _stacked(value: Any, head: str, group: Group) -> Iterator[Entry]:
  """The state of a group of several leaves: one array per leaf, or several, as of Adafactor."""
  pairs = jax.tree_util.tree_flatten_with_path(
    value, is_leaf=lambda x: isinstance(x, QuantizedLeaf))[0]
  for key, x in pairs:
    own = group.paths if not key else tuple(
      f"{path}/{paths.path_string(key)}" for path in group.paths)
    array = x.codes if isinstance(x, QuantizedLeaf) else x
    yield Entry(_names(head, own), tuple(array.shape[1:]), x)


def form(entry: Entry) -> tuple[Any, ...]:
  """What two entries must share for the array of one to be that of the other."""
  kind = "8 bits" if isinstance(entry.value, QuantizedLeaf) else "plain"
  arrays = tuple((tuple(x.shape), jnp.dtype(x.dtype).name) for x in jax.tree.leaves(entry.value))
  return entry.names, entry.places, kind, arrays


def pieces(entry: Entry) -> dict[str, jax.Array]:
  """What is in an entry, by name, in fp32 where it was kept in 8 bits."""
  value = jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), entry.value)
  if isinstance(value, QuantizedLeaf):
    value = memory.dequantize_state(value)
  if entry.row is None:
    return {entry.names[0]: value}
  places = entry.places or range(len(entry.names))
  return {name: value[i].reshape(entry.row) for i, name in zip(places, entry.names)}


def assembled(entry: Entry, found: dict[str, jax.Array], index: int) -> Any:
  """The value of an abstract entry, from the pieces that it is made of."""
  quantized = isinstance(entry.value, QuantizedLeaf)
  like = entry.value.codes if quantized else entry.value
  parts = [found[name] for name in entry.names]
  if entry.row is not None:
    wide = jnp.result_type(*parts) if len({x.dtype for x in parts}) == 1 else jnp.float32
    parts = [jnp.stack([x.astype(wide).reshape(like.shape[1:]) for x in parts])]
  whole = parts[0].reshape(like.shape)
  if quantized:
    # The draw of the rounding is as good as any other: it happens once.
    at = rounding.key_of(rounding.seed_word(0), jnp.zeros([], jnp.int32), _PURPOSE).fold(index)
    value: Any = memory.quantize_leaf(whole, entry.value.scales.shape, at)
  elif jnp.issubdtype(like.dtype, jnp.floating) and like.dtype.itemsize < 4:
    value = rounding.round_to(whole, like.dtype, None)
  else:
    value = whole.astype(like.dtype)
  return jax.tree.map(placed, value, entry.value)


def placed(x: jax.Array, like: Any) -> jax.Array:
  """`x` where `like` is to lie."""
  return x if like.sharding is None else jax.device_put(x, like.sharding)


def shape(entry: Entry) -> tuple[int, ...]:
  """Of one leaf in an entry."""
  value = entry.value.codes if isinstance(entry.value, QuantizedLeaf) else entry.value
  return tuple(value.shape) if entry.row is None else entry.row
