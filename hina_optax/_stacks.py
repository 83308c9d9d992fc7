"""Leaves of equal shape stacked into one array, so that a part is compiled once for all of them."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hina_optax import _borders, _leaves, _numerics

Kinds = Callable[[Any], list[Any]]
# Elements of a stack. On a CPU a step writes some four arrays of its size in between: 20 MB, most
# of which caches hold. Beyond 32 MB glibc takes fresh pages from the system at each step. Of larger
# leaves a stack holds a few, to have fewer arrays.
LARGEST = 1_200_000
_FEW_LARGE = 8


@dataclasses.dataclass(frozen=True)
class Group:
  """Leaves that are one array, or one leaf that stands alone.

  Attributes:
    name: the path of a leaf that stands alone; what the paths share, and the shape, of others.
    paths: of its leaves.
    places: of its leaves in the flattened tree.
    shape: of each leaf.
    kind: what `kinds` said of them.
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


@dataclasses.dataclass(frozen=True, repr=False)
class Layout:
  """How a tree is stacked.

  Attributes:
    groups: in the order of their names.
    count: places of the tree, absent leaves counted.
    absent: places and paths of what stands in place of a leaf.
    missing: places whose update is absent at this step.
  """

  groups: tuple[Group, ...]
  count: int
  absent: tuple[tuple[int, str], ...] = ()
  missing: frozenset[int] = dataclasses.field(default=frozenset(), compare=False)

  def __repr__(self) -> str:
    """Short: it stands in JAX's messages on trees that do not match."""
    return f"Layout({', '.join(f'{group.name}: {len(group.places)}' for group in self.groups)})"

  @property
  def names(self) -> frozenset[str]:
    """Of all groups."""
    return frozenset(group.name for group in self.groups)


class Stacks:
  """A tree of parameters as one array a group: a pytree whose keys are the groups' names.

  The array of a stacked group has one row a leaf, and the leaf flat in it: where it kept its shape,
  loops over a short last axis would run at a third of the speed on CPUs, and a reshape between
  state and parameters would cost XLA's in-place update of either.
  """

  def __init__(self, layout: Layout, arrays: Sequence[Any]):
    self.layout, self.arrays = layout, list(arrays)

  def items(self) -> Iterator[tuple[Group, Any]]:
    """Groups and their arrays."""
    return zip(self.layout.groups, self.arrays)

  def as_dict(self) -> dict[str, Any]:
    """The arrays by name."""
    return {group.name: array for group, array in self.items()}


jax.tree_util.register_pytree_with_keys(
  Stacks,
  lambda s: ([(jax.tree_util.DictKey(g.name), x) for g, x in s.items()], s.layout),
  lambda layout, arrays: Stacks(layout, list(arrays)),
  lambda s: (s.arrays, s.layout),
)


def layout_of(
  tree: Any, max_elements: int, kinds: Kinds | None = None, apart: Set[str] = frozenset()
) -> Layout | None:
  """Groups of the leaves of `tree` of at most `max_elements`; `None` where no two are alike.

  Leaves whose paths are in `apart` stand alone, alike or not.
  """
  places, leaves, _ = _leaves.flatten(tree)
  told = [None] * len(leaves) if kinds is None else kinds(tree)
  found: dict[Any, list[int]] = {}
  for i, leaf in enumerate(leaves):
    if not _leaves.is_absent(leaf):
      small = 0 < np.size(leaf) <= max_elements
      key = (leaf.shape, leaf.dtype.name, told[i]) if small else i
      found.setdefault(key, []).append(i)
  if all(len(members) == 1 for members in found.values()):
    return None
  alone = [place.path in apart for place in places]
  sizes = [int(np.size(x)) for x in leaves]
  return _laid_out(places, leaves, told, _divided(found.values(), alone, sizes))


def each_alone(tree: Any, kinds: Kinds | None = None) -> Layout:
  """Each leaf of `tree` as a group."""
  places, leaves, _ = _leaves.flatten(tree)
  told = [None] * len(leaves) if kinds is None else kinds(tree)
  return _laid_out(places, leaves, told,
                   ([i] for i, x in enumerate(leaves) if not _leaves.is_absent(x)))


def _laid_out(
  places: list[_leaves.Leaf], leaves: list[Any], told: list[Any], members: Iterable[list[int]]
) -> Layout:
  """The layout of which each group has these members."""
  groups: list[Group] = []
  taken: set[str] = set()
  for own in members:
    paths, shape = tuple(places[i].path for i in own), tuple(leaves[own[0]].shape)
    groups.append(Group(_unique(_name(paths, shape), taken), paths, tuple(own), shape,
                        told[own[0]]))
  absent = tuple((i, places[i].path) for i, leaf in enumerate(leaves) if _leaves.is_absent(leaf))
  return Layout(tuple(sorted(groups, key=lambda g: g.name)), len(leaves), absent)


def _divided(
  groups: Iterable[list[int]], alone: list[bool], sizes: list[int]
) -> Iterator[list[int]]:
  """The members of each group that stand alone, one by one, and the others in equal parts."""
  for members in groups:
    yield from ([i] for i in members if alone[i])
    together = [i for i in members if not alone[i]]
    if together:
      # Leaves of a group have one size.
      count, size = len(together), sizes[together[0]]
      parts = max(1, min(-(-count * size // LARGEST), count // _FEW_LARGE))
      # Rather half as many again of one size, which share their code.
      equal = [n for n in range(parts, parts + parts // 2 + 1) if count % n == 0]
      parts = equal[0] if equal else parts
      for part in range(parts):
        yield together[part * count // parts:(part + 1) * count // parts]


def by_path(kind: Callable[[str, Any], Any]) -> Kinds:
  """`kind(path, leaf)` for each place of a tree."""
  def kinds(tree: Any) -> list[Any]:
    places, leaves, _ = _leaves.flatten(tree)
    return [
      None if _leaves.is_absent(x) else kind(place.path, x) for place, x in zip(places, leaves)
    ]

  return kinds


def without(layout: Layout, updates: Sequence[Any]) -> Layout:
  """`layout` for a step at which some updates are absent."""
  taken = {place for group in layout.groups for place in group.places}
  missing = frozenset(i for i in taken if _leaves.is_absent(updates[i]))
  return dataclasses.replace(layout, missing=missing)


def _name(paths: tuple[str, ...], shape: tuple[int, ...]) -> str:
  """The path of one leaf; of several what they share, with `*` for the rest, and their shape."""
  if len(paths) == 1:
    return paths[0]
  parts = [path.split("/") for path in paths]
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


def stack(layout: Layout, leaves: Sequence[Any]) -> Stacks:
  """The leaves of a tree, in its order, as one array a group; zeros where one is absent."""
  return Stacks(layout, [_rows(group, [leaves[i] for i in group.places])
                         for group in layout.groups])


def _rows(group: Group, rows: list[Any]) -> Any:
  present = [x for x in rows if not _leaves.is_absent(x)]
  if not group.stacked or not present:
    return rows[0] if present or not group.stacked else None
  kinds = {jnp.dtype(x.dtype) for x in present}
  dtype = kinds.pop() if len(kinds) == 1 else _numerics.compute_dtype(*kinds)
  return _borders.join(
    [jnp.zeros(group.shape, dtype) if _leaves.is_absent(x) else x for x in rows], dtype)


def unstack(stacks: Stacks, likes: Sequence[Any]) -> list[Any]:
  """One leaf a place; where `likes` is absent, what stands there."""
  result = list(likes)
  for group, array in stacks.items():
    if not group.stacked:
      result[group.places[0]] = array
    elif array is not None:
      for place, row in zip(group.places, _borders.split(array)):
        if not _leaves.is_absent(likes[place]):
          result[place] = lax.reshape(row, group.shape)
  return result


def as_dicts(state: Any) -> Any:
  """`state` with each `Stacks` as a plain dict of arrays."""
  return jax.tree.map(lambda x: x.as_dict() if isinstance(x, Stacks) else x, state,
                      is_leaf=lambda x: isinstance(x, Stacks))


def as_stacks(layout: Layout, state: Any) -> Any:
  """Inverse of `as_dicts`."""
  def whole(x: Any) -> bool:
    return isinstance(x, dict) and x.keys() == layout.names

  return jax.tree.map(
    lambda x: Stacks(layout, [x[g.name] for g in layout.groups]) if whole(x) else x,
    state, is_leaf=whole)


def with_old_rows(layout: Layout, new: Any, old: Any) -> Any:
  """State `new` with the rows of leaves whose update is missing as they were in `old`."""
  if not layout.missing:
    return new

  def keep(after: Any, before: Any) -> Any:
    if not isinstance(after, Stacks):
      return after
    rows = zip(layout.groups, after.arrays, before.arrays)
    return Stacks(layout, [_keep(layout, g, a, b) for g, a, b in rows])

  return jax.tree.map(keep, new, old, is_leaf=lambda x: isinstance(x, Stacks))


def _keep(layout: Layout, group: Group, after: Any, before: Any) -> Any:
  gone = np.array([place in layout.missing for place in group.places])
  if not gone.any():
    return after
  return jax.tree.map(
    lambda a, b: jnp.where(gone.reshape(-1, *[1] * (a.ndim - 1)) if group.stacked else gone[0], b,
                           a),
    after, before)


def map_groups(function: Callable[[Group], Any], tree: Stacks) -> Stacks:
  """One value a group, as a tree like `tree`."""
  return Stacks(tree.layout, [function(group) for group in tree.layout.groups])
