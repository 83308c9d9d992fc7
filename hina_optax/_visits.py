"""One loop that visits all leaves of a tree, stacked or not."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hina_optax import _leaves, _numerics, _stencils
from hina_optax._stacks import Group, Stacks

_FINITE: ContextVar[bool] = ContextVar("whether what is visited is known to be finite",
                                       default=False)


@contextlib.contextmanager
def known_finite() -> Iterator[None]:
  """Inside, `visit` hands on what it is given: the caller has put 0 where it was not finite."""
  token = _FINITE.set(True)
  try:
    yield
  finally:
    _FINITE.reset(token)


def grid(node: Group, rule: _leaves.SpatialAxes | None, dtype: Any) -> _stencils.Grid:
  """Along which axes of each leaf of a node neighbours are compared."""
  leaf = jax.ShapeDtypeStruct(node.shape, dtype)
  axes = _leaves.resolve_axes(rule, node.paths[0], leaf)
  for path in node.paths[1:]:
    if _leaves.resolve_axes(rule, path, leaf) != axes:
      raise ValueError(
        f"spatial_axes gives {axes} for leaf '{node.paths[0]}' and another answer for '{path}', "
        "which has the same shape: they cannot be batched together. Give with_leaf_batching a "
        "`kind` that tells them apart."
      )
  return _stencils.Grid(node.shape, axes)


def nodes(tree: Any) -> list[Group]:
  """The nodes of a tree in its order, absent ones among them: leaves, or stacks of leaves."""
  if isinstance(tree, Stacks):
    return list(tree.layout.groups)
  places, leaves, _ = _leaves.flatten(tree)
  return [
    Group(place.path, (place.path,), (place.index,),
          () if _leaves.is_absent(leaf) else jnp.shape(leaf))
    for place, leaf in zip(places, leaves)
  ]


def members(tree: Any) -> list[tuple[_leaves.Leaf, Any]]:
  """Each place of the user's tree, with shape and dtype of its leaf or what stands there."""
  absent = tree.layout.absent if isinstance(tree, Stacks) else ()
  found = [(_leaves.Leaf(path, place), None) for place, path in absent]
  for node, leaf in zip(nodes(tree), values(tree)):
    one = leaf if _leaves.is_absent(leaf) else one_of(node, leaf)
    found += [(_leaves.Leaf(path, place), one) for path, place in zip(node.paths, node.places)]
  return sorted(found, key=lambda item: item[0].index)


def missing(tree: Any) -> frozenset[int]:
  """Places of a stacked tree whose update is absent at this step."""
  return tree.layout.missing if isinstance(tree, Stacks) else frozenset()


def leaf_count(tree: Any) -> int:
  """Number of places in the user's tree, absent leaves counted."""
  if isinstance(tree, Stacks):
    return tree.layout.count
  return len(jax.tree.leaves(tree, is_leaf=_leaves.is_absent))


def per_leaf_scalars(params: Any, value: float = 0.0, dtype: Any = jnp.float32) -> jax.Array:
  """State for one scalar a leaf: a vector, so that 1,000 leaves are one array and not 1,000."""
  return jnp.full((leaf_count(params),), value, dtype)


def has_axes(rule: _leaves.SpatialAxes | None, params: Any) -> np.ndarray:
  """For each place of the tree, whether its leaf has spatial axes; checks the rule on the way."""
  found = np.zeros(leaf_count(params), bool)
  for node, leaf in zip(nodes(params), values(params)):
    if not _leaves.is_absent(leaf):
      found[list(node.places)] = bool(grid(node, rule, leaf.dtype).axes)
  return found


def one_of(node: Group, leaf: Any) -> Any:
  """Shape and dtype of one leaf of a node."""
  return jax.ShapeDtypeStruct(node.shape, leaf.dtype) if node.stacked else leaf


def values(tree: Any) -> list[Any]:
  """What stands at the nodes of a tree."""
  return jax.tree.leaves(tree, is_leaf=_leaves.is_absent)


def for_each(node: Group, function: Callable[..., Any], *arrays: Any) -> Any:
  """`function` of each leaf of a node: one call, or one for all rows."""
  return (jax.vmap(function, axis_name=_numerics.LEAVES)(*arrays) if node.stacked
          else function(*arrays))


class Visited(NamedTuple):
  """What a visit of all leaves returned."""

  updates: Any
  trees: tuple[Any, ...]
  scalars: tuple[jax.Array, ...]


def visit(
  function: Callable[..., tuple[jax.Array, tuple, tuple]],
  updates: Any,
  *,
  read: Sequence[Any] = (),
  raw: Sequence[Any] = (),
  trees: Sequence[Any] = (),
  scalars: Sequence[jax.Array] = (),
) -> Visited:
  """Applies `function` to each leaf of `updates`, in at least fp32.

  `function(leaf, update, read, trees, scalars)` returns `(update, trees, scalars)`: the new update,
  and the new value of each per-element state in `trees` and of each of the first so many per-leaf
  scalars in `scalars`; those behind are only read.
  `read` are trees that are only read (parameters, another transformation's input); they are cast as
  the updates are, and where one is absent it is `None`. `raw` are handed on as they are.

  Absent leaves pass, with their state as it was. The function never sees an element of `updates` or
  `read` that is not finite: it sees 0 in its place, and such an update passes unchanged, so an
  overflow in one element stays in that element and out of the state. Inside of `known_finite` that
  was seen to before.
  """
  _leaves.check_floating(updates, "updates")
  leaves, structure = _leaves.flat(updates)
  columns = [structure.flatten_up_to(tree) for tree in (*read, *raw, *trees)]
  cut = len(read), len(read) + len(raw)
  new_updates: list[Any] = []
  new_trees: list[list[Any]] = [[] for _ in trees]
  found: list[tuple[Group, Any]] = []
  for i, (node, update) in enumerate(zip(nodes(updates), leaves)):
    row = [column[i] for column in columns]
    if _leaves.is_absent(update):
      result: tuple = update, row[cut[1]:], None
    else:
      result = _at(function, node, jnp.asarray(update), row, cut, scalars)
    new_updates.append(result[0])
    for collected, item in zip(new_trees, result[1]):
      collected.append(item)
    if result[2]:
      found.append((node, result[2]))
  gone = missing(updates)
  return Visited(
    structure.unflatten(new_updates),
    tuple(structure.unflatten(column) for column in new_trees),
    tuple(
      _vector([(node, new[k]) for node, new in found if len(new) > k], old, gone)
      for k, old in enumerate(scalars)
    ),
  )


def _at(function, node: Group, update, row, cut, scalars):
  """The function at one node: `row` holds what is read, what is raw, and the state there."""
  present = [i for i, x in enumerate(row) if not _leaves.is_absent(x)]

  def one(update, arrays, numbers):
    full = [None] * len(row)
    for i, x in zip(present, arrays):
      full[i] = x
    return _apply(function, node, update, full[:cut[0]], full[cut[0]:cut[1]], full[cut[1]:],
                  numbers)

  numbers = [_of(node, vector) for vector in scalars]
  return for_each(node, one, update, [jnp.asarray(row[i]) for i in present], numbers)


def _of(node: Group, vector: jax.Array) -> jax.Array:
  """The entries of a per-leaf vector that belong to a node."""
  if not node.stacked:
    return vector[node.places[0]]
  places = np.array(node.places)
  if (np.diff(places) == 1).all():
    return vector[node.places[0]:node.places[-1] + 1]
  return vector[places]


def _vector(found: list[tuple[Group, Any]], old: jax.Array, gone: frozenset[int]) -> jax.Array:
  """A per-leaf vector in the order of the user's leaves; old entries where nothing was computed."""
  if not found:
    return old
  parts = [jnp.atleast_1d(new).astype(old.dtype) for _, new in found]
  order = [place for node, _ in found for place in node.places]
  kept = sorted(set(range(old.size)) - set(order))
  if kept:
    parts.append(old[np.array(kept)])
  joined = _numerics.in_order(order + kept, parts)
  if not gone:
    return joined
  return jnp.where(np.isin(np.arange(old.size), list(gone)), old, joined)


def _apply(function, node, update, read, raw, trees, scalars):
  dtype = _numerics.compute_dtype(update.dtype)
  known = _FINITE.get()
  clean = (update if known else finite(update)).astype(dtype)
  seen = [None if x is None else (x if known else finite(x)).astype(dtype) for x in read]
  stored = [x.dtype for x in trees]
  new, new_trees, new_scalars = function(
    node, clean, (*seen, *raw), tuple(x.astype(dtype) if _is_float(x) else x for x in trees),
    tuple(scalars),
  )
  new = _numerics.narrowed(new, update.dtype)
  if not known:
    new = jnp.where(jnp.isfinite(update), new, update)
  return new, tuple(x.astype(d) for x, d in zip(new_trees, stored)), new_scalars


def finite(x: jax.Array) -> jax.Array:
  """`x` with 0 in place of what is not finite."""
  return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))


def _is_float(x: jax.Array) -> bool:
  return jnp.issubdtype(x.dtype, jnp.floating)


def vector_of(
  function: Callable[..., jax.Array], chosen: dict[int, int], trees: Sequence[Any]
) -> jax.Array:
  """`function` of each chosen leaf, stacked: entry `chosen[place]` is that of the leaf at `place`.

  A node is asked whole if any of its leaves is chosen.
  """
  parts, order = [], []
  columns = [values(tree) for tree in trees]
  for i, node in enumerate(nodes(trees[0])):
    rows = [r for r, place in enumerate(node.places) if place in chosen]
    if rows:
      result = for_each(node, function, *(column[i] for column in columns))
      result = result if node.stacked else result[None]
      parts.append(result if len(rows) == len(node.places) else result[np.array(rows)])
      order += [chosen[node.places[r]] for r in rows]
  return _numerics.in_order(order, parts)
