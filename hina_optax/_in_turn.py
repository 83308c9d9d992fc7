"""A stacked update one stack after the other.

On a CPU a step over all stacks at once writes arrays as large as all parameters, several at a time,
into memory that the system hands out afresh and page by page: it costs as much as the arithmetic.
Taken in turn, one stack has the memory of the one before. Other devices keep their memory from step
to step.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hina_optax import _leaves, _numerics, _parts, _sealed, _shardings, _stacks
from hina_optax._parts import Part
from hina_optax._stacks import Group, Layout, Stacks

# Vectors with one entry a leaf are told by their length, which up to this might be chance.
_FEWEST_LEAVES = 8
# Below as many elements in all a step is too short to gain by it.
LEAST = 1 << 21


class Later(NamedTuple):
  """All parameters, stacked where they are called for.

  Attributes:
    layout: how.
    leaves: in the order of the user's tree.
    looks: what `look` has found, added as it is called.
  """

  layout: Layout
  leaves: Sequence[Any]
  looks: list[Any]

  def __call__(self) -> Stacks:
    """The stacks."""
    return _stacks.stack(self.layout, self.leaves)

  def shapes(self) -> Stacks:
    """The stacks without their numbers."""
    return Stacks(self.layout, [
      jax.ShapeDtypeStruct(
        (len(group.places), math.prod(group.shape)) if group.stacked else group.shape,
        _numerics.compute_dtype(*(self.leaves[i].dtype for i in group.places)))
      for group in self.layout.groups])

  def members(self, index: int, rows: Sequence[int]) -> list[Any]:
    """The leaves that are some rows of a stack, as they are."""
    places = self.layout.groups[index].places
    return [self.leaves[places[row]] for row in rows]

  def look(self, when: jax.Array, function: Callable[..., Any]) -> Callable[[], Any]:
    """What `function(stacks, places)` finds of all stacks; each looked at only where `when`.

    It gives arrays with one row for each of the first so many leaves, or `None`.
    """
    found = []
    for group in self.layout.groups:
      alone, rows = _alone(group), [self.leaves[i] for i in group.places]

      def of(rows, alone=alone):
        return function(_stacks.stack(alone, rows), list(alone.groups[0].places))

      nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of, rows))
      found.append(lax.cond(when, of, lambda rows, nothing=nothing: nothing, rows))

    def joined(*parts: Any) -> Any:
      rows = [(group.places[:len(x)], x) for group, x in zip(self.layout.groups, parts)
              if x is not None]
      if not rows:
        return None
      return _numerics.in_order([i for places, _ in rows for i in places], [x for _, x in rows])

    self.looks.extend(jax.tree.leaves(found))
    whole = jax.tree.map(joined, *found, is_leaf=_leaves.is_absent)
    return lambda: whole

  def places(self) -> list[int]:
    """Of all leaves."""
    return sorted(place for group in self.layout.groups for place in group.places)


def pays(part: Part, layout: Layout, leaves: Sequence[Any]) -> bool:
  """Whether a step on these leaves should be taken stack by stack, and can."""
  present = [x for x in leaves if not _leaves.is_absent(x)]
  return (
    part.survey is not None and jax.default_backend() == "cpu"
    and len(layout.groups) > 1 and layout.count > _FEWEST_LEAVES and not layout.missing
    and sum(int(np.size(x)) for x in present) >= LEAST
    and all(isinstance(x, jax.core.Tracer) for x in present)
    and not _shardings.is_hidden(present) and not any(map(_shardings.is_sharded, present))
  )


def update(
  part: Part, layout: Layout, leaves: Sequence[Any], state: Any, params: Sequence[Any] | None,
  extra_args: dict[str, Any],
) -> tuple[list[Any], Any]:
  """`part.update` of leaves that stand as in the user's tree, for a stacked state."""
  assert part.survey is not None
  sealed, state = state, _with_vectors_open(state)
  results, states = list(leaves), []
  # The first waits for what looks at all leaves, which else would be in memory beside it.
  last: list[Any] = []
  known = part.survey(Later(layout, leaves if params is None else params, last), state)
  update_one = _as_a_call(part, extra_args)
  for (index, group), alone in zip(enumerate(layout.groups), _each_alone(layout)):
    own = None if params is None else [params[i] for i in group.places]
    new, rows, after = update_one(
      alone, _leaves_of(group, leaves, last), rows_of(state, layout, index, alone), own,
      known(layout, index, alone))
    states.append(after)
    # Of a leaf that stands alone the update might else be added without being written out.
    kept = [x for s in jax.tree.leaves(after, is_leaf=_is_stacks) if _is_stacks(s)
            for x in jax.tree.leaves(s)]
    last = new.arrays if group.stacked or not kept else kept
    for place, x in zip(group.places, rows):
      results[place] = x
  return results, _with_vectors_sealed(sealed, _joined(state, layout, states))


def _with_vectors_open(state: Any) -> Any:
  """`state` with nothing sealed but stacks, which each group opens for itself."""
  return jax.tree.map(lambda x: x if _is_stacks(x) else _sealed.opened(x), state,
                      is_leaf=_is_stacks_or_sealed)


def _with_vectors_sealed(before: Any, after: Any) -> Any:
  return jax.tree.map(lambda x, new: new if _is_stacks(x) else _sealed.sealed_as(x, new),
                      before, after, is_leaf=_is_stacks_or_sealed)


def _is_stacks_or_sealed(x: Any) -> bool:
  return _is_stacks(x) or _sealed.is_sealed(x)


def update_tree(
  part: Part, layout: Layout, updates: Any, state: Any, params: Any, extra_args: dict[str, Any]
) -> tuple[Any, Any]:
  """`part.update` where each leaf is a group of `layout`, for a state of trees like the updates."""
  leaves, structure = _leaves.flat(updates)

  def flat(x: Any) -> tuple[list[Any], Any]:
    return _leaves.flat(x, lambda x: _leaves.is_absent(x) or _sealed.is_sealed(x))

  def like_updates(x: Any) -> bool:
    return flat(x)[1] == structure

  trees, above = _leaves.flat(state, like_updates)
  rows = [flat(x)[0] if like_updates(x) else None for x in trees]
  old = [x if r is None else _stacks.stack(layout, r) for x, r in zip(trees, rows)]
  found, new = update(part, layout, leaves, above.unflatten(old),
                      None if params is None else structure.flatten_up_to(params), extra_args)
  after = [x if r is None else structure.unflatten(_stacks.unstack(x, r))
           for x, r in zip(above.flatten_up_to(new), rows)]
  return structure.unflatten(found), above.unflatten(after)


def _as_a_call(part: Part, extra_args: dict[str, Any]) -> Callable[..., Any]:
  """The update of one group: its updates, stacked and as leaves, and its state.

  It is traced once for groups that are alike, and stays a call in the program: XLA puts kernels of
  one function in order in a time that grows with the square of their number.
  """
  def update_one(alone, leaves, state, params, known):
    [group] = alone.groups

    def stacked(updates):
      first = _numerics.after(updates.arrays, params[0]) if group.stacked else params[0]
      return _stacks.stack(alone, [first, *params[1:]])

    own = None if params is None else _parts.Deferred(stacked)
    new, after = part.update(_stacks.stack(alone, leaves), _sealed.opened(state), own,
                             **extra_args, **{_parts.SURVEYED: known})
    return new, _stacks.unstack(new, leaves), _sealed.sealed_as(state, after)

  return _numerics.noinline(update_one, static_argnums=0)


def _alone(group: Group) -> Layout:
  """A group as a tree of its own."""
  own = dataclasses.replace(group, places=tuple(range(len(group.places))))
  return Layout((own,), len(group.places))


def _each_alone(layout: Layout) -> Iterator[Layout]:
  """Each group as a tree of its own; those that are alike share one, where kinds were told."""
  first: dict[Any, Layout] = {}
  for group in layout.groups:
    alone, like = _alone(group), (len(group.places), group.shape, group.kind)
    yield alone if group.kind is None else first.setdefault(like, alone)


def _leaves_of(group: Group, leaves: Sequence[Any], last: Sequence[Any]) -> list[Any]:
  """The leaves of a group, the first of them made after `last`."""
  first, *rest = [leaves[i] for i in group.places]
  return [_numerics.after(last, first), *rest]


def rows_of(tree: Any, layout: Layout, index: int, alone: Layout) -> Any:
  """What belongs to a group: its array, its entries of per-leaf vectors, and what is shared."""
  places = np.array(layout.groups[index].places)

  def one(x: Any) -> Any:
    if _is_stacks(x):
      return Stacks(alone, [x.arrays[index]])
    return x[places] if _is_per_leaf(x, layout) else x

  return jax.tree.map(one, tree, is_leaf=_is_stacks)


def _joined(old: Any, layout: Layout, states: list[Any]) -> Any:
  """The states of all groups as one; what is shared, as the first left it."""
  places = [place for group in layout.groups for place in group.places]
  kept = sorted(set(range(layout.count)) - set(places))

  def one(before: Any, *found: Any) -> Any:
    if _is_stacks(before):
      return Stacks(layout, [x.arrays[0] for x in found])
    if not _is_per_leaf(before, layout):
      return found[0]
    parts = [x.astype(before.dtype) for x in found]
    return _numerics.in_order(places + kept, [*parts, before[np.array(kept, int)]])

  return jax.tree.map(one, old, *states, is_leaf=_is_stacks)


def _is_stacks(x: Any) -> bool:
  return isinstance(x, Stacks)


def _is_per_leaf(x: Any, layout: Layout) -> bool:
  return jnp.ndim(x) == 1 and x.shape[0] == layout.count
