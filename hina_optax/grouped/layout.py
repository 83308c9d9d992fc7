"""Which leaves are one array: the layout of a state, and stacks of leaves.

A layout is static: it stands in the structure of the state, so that every function that is given a
state knows it.
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

# Operands of one concatenation: XLA's passes take a time quadratic in them.
_MOST_OPERANDS = 512


@dataclasses.dataclass(frozen=True)
class Group:
  """Leaves of one shape that are one array, or one leaf that stands alone.

  Attributes:
    name: the path of a leaf that stands alone; what the paths share, and the shape, of others.
    paths: of its leaves.
    places: of its leaves in the flattened tree.
    shape: of each leaf.
    kind: what is the same of all of them beside shape and dtype.
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
    """Elements of all its leaves."""
    return len(self.places) * math.prod(self.shape)


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Layout:
  """How the leaves of a tree are grouped.

  Attributes:
    groups: in the order of their first leaves.
    count: places of the tree, absent leaves counted.
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
    # A state is compared with another at every call of a jitted function.
    return self is other or (
      isinstance(other, Layout) and self._hash == other._hash and self._key == other._key)

  def __repr__(self) -> str:
    """Short: it stands in JAX's messages on trees that do not match."""
    return f"Layout({', '.join(f'{group.name}: {len(group.places)}' for group in self.groups)})"

  @property
  def stacked(self) -> bool:
    """Whether any leaves are one array."""
    return any(group.stacked for group in self.groups)

  @property
  def paths(self) -> list[str]:
    """Of all leaves, group by group."""
    return [path for group in self.groups for path in group.paths]


class Grouped:
  """A tree like the parameters as one entry per group: a mapping from the groups' names.

  Attributes:
    layout: how the leaves are grouped.
    arrays: one per group; of stacked leaves `(leaves, *shape)`.
  """

  def __init__(self, layout: Layout, arrays: Iterable[Any]):
    self.layout, self.arrays = layout, list(arrays)
    positions.make_known_to_flax(Grouped, _to_flax, _from_flax)

  def keys(self) -> list[str]:
    """Names of the groups."""
    return [group.name for group in self.layout.groups]

  def values(self) -> list[Any]:
    """Their arrays."""
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


def layout_in(state: Any) -> Layout | None:
  """The layout of a state; `None` where nothing is stacked."""
  return next((x.layout for x in jax.tree.leaves(state, is_leaf=is_grouped) if is_grouped(x)), None)


def alone(tree: Any, kinds: Sequence[Any] | None = None) -> Layout:
  """Each leaf of `tree` by itself."""
  return _laid_out(tree, kinds or [None] * len(paths.flatten(tree)[0]), lambda i, key: (i,))


def grouped(
  tree: Any, max_elements: int, kinds: Sequence[Any], most_rows: Callable[[int], int] | None = None
) -> Layout:
  """Leaves of equal shape, dtype and kind together.

  Leaves of more than `max_elements` and sharded leaves stand alone; see `standing_alone`.

  Args:
    tree: the parameters.
    max_elements: of a leaf that is stacked.
    kinds: for each place of the tree, what decides beside shape and dtype.
    most_rows: for the place of a leaf, how many of its kind one stack may hold.
  """
  leaves = paths.flatten(tree)[1]
  apart = standing_alone(tree)

  def key(i: int, kind: Any) -> tuple[Any, ...]:
    small = 0 < np.size(leaves[i]) <= max_elements
    return ("stack", *kind) if small and i not in apart else (i,)

  return _laid_out(tree, kinds, key, most_rows)


def _laid_out(
  tree: Any, kinds: Sequence[Any], key: Callable[[int, Any], tuple[Any, ...]],
  most_rows: Callable[[int], int] | None = None,
) -> Layout:
  places, leaves, _ = paths.flatten(tree)
  together: dict[Any, list[int]] = {}
  for i, leaf in enumerate(leaves):
    if not paths.is_absent(leaf):
      kind = (tuple(jnp.shape(leaf)), jnp.dtype(leaf.dtype).name, kinds[i])
      together.setdefault(key(i, kind), []).append(i)
  groups, taken = [], set[str]()
  for members in together.values():
    most = len(members) if most_rows is None else max(1, most_rows(members[0]))
    parts = -(-len(members) // most)
    for part in range(parts):
      own = members[part * len(members) // parts:(part + 1) * len(members) // parts]
      found, shape = tuple(places[i].path for i in own), tuple(jnp.shape(leaves[own[0]]))
      groups.append(Group(_unique(_name(found, shape), taken), found, tuple(own), shape,
                          kinds[own[0]]))
  return Layout(tuple(sorted(groups, key=lambda g: g.places[0])), len(leaves))


def standing_alone(tree: Any) -> frozenset[int]:
  """Places of the leaves that are not stacked, whatever their size.

  A stack would gather leaves that are sharded. Where a mesh of several devices is set, all leaves
  may be. Boxes (`flax.linen.LogicallyPartitioned`, variables of `flax.nnx` with a sharding) say how
  their leaves are to be sharded: a tree that has any keeps its form in the state, boxes included,
  so that whoever asks the state finds what the parameters have.
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
  known = x.get_metadata()
  return any(known.get(name) is not None for name in ("sharding", "sharding_names", "out_sharding"))


def _name(found: tuple[str, ...], shape: tuple[int, ...]) -> str:
  """The path of one leaf; of several what they share, with `*` for the rest, and their shape."""
  if len(found) == 1:
    return found[0]
  parts = [path.split("/") for path in found]
  shortest = min(map(len, parts))
  same = [len({p[i] for p in parts}) == 1 for i in range(shortest)]
  head = same.index(False) if False in same else shortest
  tail = 0
  while tail < shortest - head and len({p[-1 - tail] for p in parts}) == 1:
    tail += 1
  shared = [*parts[0][:head], "*", *parts[0][len(parts[0]) - tail:]]
  return f"{'/'.join(shared)}[{'x'.join(map(str, shape))}]"


def _unique(name: str, taken: set[str]) -> str:
  number, chosen = 2, name
  while chosen in taken:
    chosen, number = f"{name}#{number}", number + 1
  taken.add(chosen)
  return chosen


def stack(rows: Sequence[Any], shape: tuple[int, ...]) -> Any:
  """Leaves of one shape as the rows of one array; zeros where one is absent.

  Rows of several dtypes are joined in the dtype in which they are computed.
  """
  dtypes = {jnp.dtype(x.dtype) for x in rows if not paths.is_absent(x)}
  dtype = dtypes.pop() if len(dtypes) == 1 else numerics.compute_dtype(*dtypes)
  parts = [jnp.zeros((1, *shape), dtype) if paths.is_absent(x)
           else lax.reshape(jnp.asarray(x).astype(dtype), (1, *shape)) for x in rows]
  while len(parts) > 1:
    parts = [lax.concatenate(parts[i:i + _MOST_OPERANDS], 0)
             for i in range(0, len(parts), _MOST_OPERANDS)]
  return parts[0]


def unstack(array: Any) -> list[Any]:
  """The rows of an array, each as an array of its own."""
  return [lax.index_in_dim(array, i, keepdims=False) for i in range(array.shape[0])]


def to_groups(layout: Layout, state: Any, structure: Any) -> Any:
  """`state` with a `Grouped` for each tree like the parameters, vectors in the layout's order."""
  is_tree = positions.is_tree_like(structure)

  def convert(x: Any) -> Any:
    if isinstance(x, positions.LeafNumbers):
      order = [x.names.index[path] for path in layout.paths]
      names = positions.names_of(tuple(layout.paths))
      same = names == x.names
      return positions.LeafNumbers(names, x.numbers if same else x.numbers[np.array(order)])
    if not is_tree(x):
      return x
    rows = structure.flatten_up_to(x)
    return Grouped(layout, [_stacked_state(g, [rows[i] for i in g.places]) for g in layout.groups])

  return jax.tree.map(
    convert, state, is_leaf=lambda x: isinstance(x, positions.LeafNumbers) or is_tree(x))


def _stacked_state(group: Group, rows: list[Any]) -> Any:
  """The states of a group's leaves as one, which may be several arrays per leaf."""
  if not group.stacked:
    return rows[0]
  return jax.tree.map(lambda *xs: stack(xs, jnp.shape(xs[0])), *rows)
