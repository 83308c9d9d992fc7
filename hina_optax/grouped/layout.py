"""Layouts: which leaves are stacked into one array.

A layout is static. It is part of the structure of the state, so every function that gets a state
also gets its layout.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hina_optax.base import numerics, paths, positions, shardings

# Operands of one concatenation: the time of XLA's passes grows with the square of their number.
_MAX_OPERANDS = 512


@dataclasses.dataclass(frozen=True)
class Group:
  """Leaves of one shape that are stacked into one array, or one leaf that is not stacked.

  Attributes:
    name: the path of a leaf that is not stacked; for a stack, what the paths share, and the shape.
    paths: paths of its leaves.
    places: indices of its leaves in the flattened tree.
    shape: shape of each leaf.
    kind: what else its leaves have in common, beside shape and dtype.
  """

  name: str
  paths: tuple[str, ...]
  places: tuple[int, ...]
  shape: tuple[int, ...]
  kind: Any = None

  @property
  def stacked(self) -> bool:
    """Whether the array has a leading axis that counts leaves."""
    return len(self.places) > 1

  @property
  def size(self) -> int:
    """Number of elements of all its leaves."""
    return len(self.places) * math.prod(self.shape)


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Layout:
  """How the leaves of a tree are grouped.

  Attributes:
    groups: in the order of their first leaves.
    count: number of places of the tree, including those of absent leaves.
  """

  groups: tuple[Group, ...]
  count: int

  @functools.cached_property
  def _key(self) -> tuple[Any, ...]:
    return self.count, tuple((g.name, g.paths, g.places, g.shape) for g in self.groups)

  @functools.cached_property
  def _hash(self) -> int:
    return hash(self._key)

  def __hash__(self) -> int:
    return self._hash

  def __eq__(self, other: object) -> bool:
    # Every call of a jitted function compares layouts. Equal hashes are checked first for speed.
    return self is other or (
      isinstance(other, Layout) and self._hash == other._hash and self._key == other._key)

  def __repr__(self) -> str:
    """A short text, since it appears in JAX's errors on trees that do not match."""
    return f"Layout({', '.join(f'{group.name}: {len(group.places)}' for group in self.groups)})"

  @property
  def stacked(self) -> bool:
    """Whether any leaves are stacked."""
    return any(group.stacked for group in self.groups)

  @property
  def paths(self) -> list[str]:
    """Paths of all leaves, group by group."""
    return [path for group in self.groups for path in group.paths]


class Grouped:
  """A tree like the parameters, stored as a mapping from the names of groups to their arrays.

  Attributes:
    layout: how the leaves are grouped.
    arrays: one per group; `(leaves, *shape)` for a stack.
  """

  def __init__(self, layout: Layout, arrays: Iterable[Any]):
    self.layout, self.arrays = layout, list(arrays)
    positions.register_with_flax(Grouped, _to_flax, _from_flax)

  def keys(self) -> list[str]:
    """Names of the groups."""
    return [group.name for group in self.layout.groups]

  def values(self) -> list[Any]:
    """Arrays of the groups."""
    return list(self.arrays)

  def items(self) -> Iterator[tuple[str, Any]]:
    """Names and arrays."""
    return zip(self.keys(), self.arrays)

  def __iter__(self) -> Iterator[str]:
    return iter(self.keys())

  def __len__(self) -> int:
    return len(self.arrays)

  def __getitem__(self, name: str) -> Any:
    return dict(self.items())[name]

  def __repr__(self) -> str:
    return f"Grouped({dict(self.items())!r})"


def _to_flax(x: Grouped) -> dict[str, Any]:
  return {name: sys.modules["flax.serialization"].to_state_dict(y) for name, y in x.items()}


def _from_flax(x: Grouped, saved: dict[str, Any]) -> Grouped:
  restore = sys.modules["flax.serialization"].from_state_dict
  return Grouped(x.layout, [restore(y, saved[name], name=name) for name, y in x.items()])


jax.tree_util.register_pytree_with_keys(
  Grouped,
  lambda s: ([(jax.tree_util.DictKey(name), x) for name, x in s.items()], s.layout),
  lambda layout, arrays: Grouped(layout, arrays),
  lambda s: (s.arrays, s.layout),
)


def is_grouped(x: Any) -> bool:
  """True for a `Grouped`."""
  return isinstance(x, Grouped)


def find_layout(state: Any) -> Layout | None:
  """Returns the layout of a state; `None` if nothing is stacked."""
  return next((x.layout for x in jax.tree.leaves(state, is_leaf=is_grouped) if is_grouped(x)), None)


def separate_leaves(tree: Any, kinds: Sequence[Any] | None = None) -> Layout:
  """Returns a layout in which each leaf is a group of its own."""
  return _build_layout(tree, kinds or [None] * len(paths.flatten(tree)[0]), lambda i, key: (i,))


def group_leaves(
  tree: Any, max_elements: int, kinds: Sequence[Any], max_leaves: Callable[[int], int] | None = None
) -> Layout:
  """Returns a layout that stacks leaves of equal shape, dtype and kind.

  Leaves of more than `max_elements` and sharded leaves are not stacked; see
  `find_unstackable_leaves`.

  Args:
    tree: the parameters.
    max_elements: largest number of elements of a leaf that is stacked.
    kinds: for each place of the tree, what must agree beside shape and dtype.
    max_leaves: `f(place)`, the largest number of leaves in a stack with the leaf of this place.
  """
  leaves = paths.flatten(tree)[1]
  unstackable = find_unstackable_leaves(tree)

  def key(i: int, kind: Any) -> tuple[Any, ...]:
    is_small = 0 < np.size(leaves[i]) <= max_elements
    return ("stack", *kind) if is_small and i not in unstackable else (i,)

  return _build_layout(tree, kinds, key, max_leaves)


def _build_layout(
  tree: Any, kinds: Sequence[Any], key: Callable[[int, Any], tuple[Any, ...]],
  max_leaves: Callable[[int], int] | None = None,
) -> Layout:
  places, leaves, _ = paths.flatten(tree)
  places_by_key: dict[Any, list[int]] = {}
  for i, leaf in enumerate(leaves):
    if not paths.is_absent(leaf):
      kind = (tuple(jnp.shape(leaf)), jnp.dtype(leaf.dtype).name, kinds[i])
      places_by_key.setdefault(key(i, kind), []).append(i)
  groups, used_names = [], set[str]()
  for alike in places_by_key.values():
    limit = len(alike) if max_leaves is None else max(1, max_leaves(alike[0]))
    # Groups of nearly equal size, rather than full ones and a small rest.
    parts = -(-len(alike) // limit)
    for part in range(parts):
      members = alike[part * len(alike) // parts:(part + 1) * len(alike) // parts]
      leaf_paths = tuple(places[i].path for i in members)
      shape = tuple(jnp.shape(leaves[members[0]]))
      name = _make_unique(_name_group(leaf_paths, shape), used_names)
      groups.append(Group(name, leaf_paths, tuple(members), shape, kinds[members[0]]))
  return Layout(tuple(sorted(groups, key=lambda g: g.places[0])), len(leaves))


def find_unstackable_leaves(tree: Any) -> frozenset[int]:
  """Returns the places of the leaves that must not be stacked, whatever their size.

  A stack would gather leaves that are sharded. If a mesh of several devices is set, every leaf may
  be sharded. Boxes (`flax.linen.LogicallyPartitioned`, variables of `flax.nnx` with a sharding) say
  how their leaves are to be sharded. If a tree has any box, none of its leaves is stacked: the
  state keeps the structure of the parameters, boxes included, and code that reads shardings from
  it finds those of the parameters.
  """
  leaves = paths.flatten(tree)[1]
  nodes = jax.tree.leaves(tree, is_leaf=lambda x: paths.is_absent(x) or _is_box(x))
  if shardings.is_mesh_set() or any(map(_is_box, nodes)):
    return frozenset(range(len(leaves)))
  return frozenset(i for i, x in enumerate(leaves) if shardings.is_sharded(x))


def _is_box(x: Any) -> bool:
  if hasattr(x, "replace_boxed") and hasattr(x, "unbox"):
    return True
  if isinstance(x, jax.Array) or not callable(getattr(type(x), "get_metadata", None)):
    return False
  metadata = x.get_metadata()
  return any(
    metadata.get(name) is not None for name in ("sharding", "sharding_names", "out_sharding"))


def _name_group(leaf_paths: tuple[str, ...], shape: tuple[int, ...]) -> str:
  """Returns the path of a single leaf, or what several paths share, with `*`, and the shape."""
  if len(leaf_paths) == 1:
    return leaf_paths[0]
  parts = [path.split("/") for path in leaf_paths]
  shortest = min(map(len, parts))
  same = [len({p[i] for p in parts}) == 1 for i in range(shortest)]
  head = same.index(False) if False in same else shortest
  tail = 0
  while tail < shortest - head and len({p[-1 - tail] for p in parts}) == 1:
    tail += 1
  shared = [*parts[0][:head], "*", *parts[0][len(parts[0]) - tail:]]
  return f"{'/'.join(shared)}[{'x'.join(map(str, shape))}]"


def _make_unique(name: str, used_names: set[str]) -> str:
  number, unique = 2, name
  while unique in used_names:
    unique, number = f"{unique}#{number}", number + 1
  used_names.add(unique)
  return unique


def stack(leaves: Sequence[Any], shape: tuple[int, ...]) -> Any:
  """Stacks leaves of one shape into one array, with zeros for an absent leaf.

  Leaves of several dtypes are cast to the dtype in which they are computed.
  """
  dtypes = {jnp.dtype(x.dtype) for x in leaves if not paths.is_absent(x)}
  dtype = dtypes.pop() if len(dtypes) == 1 else numerics.compute_dtype(*dtypes)
  parts = [jnp.zeros((1, *shape), dtype) if paths.is_absent(x)
           else lax.reshape(jnp.asarray(x).astype(dtype), (1, *shape)) for x in leaves]
  while len(parts) > 1:
    parts = [lax.concatenate(parts[i:i + _MAX_OPERANDS], 0)
             for i in range(0, len(parts), _MAX_OPERANDS)]
  return parts[0]


def unstack(array: Any) -> list[Any]:
  """Returns the rows of a stack as separate arrays."""
  return [lax.index_in_dim(array, i, keepdims=False) for i in range(array.shape[0])]


def group_state(layout: Layout, state: Any, structure: Any) -> Any:
  """Replaces each tree like the parameters by a `Grouped`, and reorders vectors as in `layout`."""
  is_tree = positions.is_tree_like(structure)

  def convert(x: Any) -> Any:
    if isinstance(x, positions.LeafNumbers):
      order = [x.names.index[path] for path in layout.paths]
      names = positions.intern_names(tuple(layout.paths))
      same = names == x.names
      return positions.LeafNumbers(names, x.numbers if same else x.numbers[np.array(order)])
    if not is_tree(x):
      return x
    leaves = structure.flatten_up_to(x)
    return Grouped(layout, [_stack_states(g, [leaves[i] for i in g.places]) for g in layout.groups])

  return jax.tree.map(
    convert, state, is_leaf=lambda x: isinstance(x, positions.LeafNumbers) or is_tree(x))


def _stack_states(group: Group, states: list[Any]) -> Any:
  """Stacks the states of a group's leaves, each of which may be several arrays."""
  if not group.stacked:
    return states[0]
  return jax.tree.map(lambda *xs: stack(xs, jnp.shape(xs[0])), *states)
