"""What a part looks up across leaves, once per step, before the leaves are updated."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hina_optax.base import numerics, paths
from hina_optax.base.leafwise import PRESENT
from hina_optax.grouped import layout as layouts
from hina_optax.grouped import xla_cpu
from hina_optax.grouped.layout import Group, Layout

# Leaves up to as many elements are measured together where nothing says how they are grouped.
_SMALL = 1 << 20


class LeafGroups(NamedTuple):
  """All leaves of a step that have a parameter, group by group.

  Attributes:
    layout: how they are grouped.
    gradients: one per place of the tree; absent where a leaf has no update.
    params: one per place of the tree.
    structure: of the user's tree.
    present: for each place a boolean scalar; `None` where that is not said.
  """

  layout: Layout
  gradients: Sequence[Any]
  params: Sequence[Any]
  structure: Any
  present: Sequence[Any] | None = None

  @property
  def groups(self) -> tuple[Group, ...]:
    """The groups."""
    return self.layout.groups

  def places(self) -> list[int]:
    """Of all leaves, group by group."""
    return [place for group in self.groups for place in group.places]

  def here(self) -> jax.Array | None:
    """Which leaves have an update, group by group; `None` where all have."""
    places = self.places()
    given = np.array([not paths.is_absent(self.gradients[place]) for place in places], bool)
    if self.present is None:
      return None if given.all() else jnp.asarray(given)
    return jnp.stack([jnp.asarray(self.present[place]) for place in places]) & given

  def each(
    self, function: Callable[..., Any], *which: str,
    only: Callable[[Group], bool] = lambda group: True,
  ) -> list[Any]:
    """`function(group, leaf, ...)` of each leaf, for each group an array with one row per leaf.

    A leaf is finite and in at least fp32; it is 0 where it is absent. What is looked at in one call
    is stacked once.

    Args:
      function: of one leaf: its gradient, its parameter, or both.
      *which: `"gradients"`, `"params"`, in the order in which the function takes them.
      only: which groups; others give `None`.
    """
    found: list[Any] = []
    done = jnp.zeros([], jnp.float32)
    for group in self.groups:
      columns = [[self._row(name, group, place) for place in group.places] for name in which]
      if not only(group):
        found.append(None)
        continue
      # One group after the other, so that the stack of one is in memory at a time.
      done, columns[0][0] = xla_cpu.barrier((done, columns[0][0]))

      def of_leaf(*xs: Any, group: Group = group) -> Any:
        return function(group, *map(_seen, xs))

      def of_stack(*columns: Any, group: Group = group, of_leaf: Any = of_leaf) -> Any:
        # Written once, and not computed again by each of its readers.
        stacks = lax.optimization_barrier([layouts.stack(rows, group.shape) for rows in columns])
        return jax.vmap(of_leaf)(*stacks)

      found.append(xla_cpu.each_row(of_leaf, columns, group.shape, of_stack))
      done = xla_cpu.number_of(jax.tree.leaves(found[-1])[:1])
    return found

  def _row(self, which: str, group: Group, place: int) -> Any:
    x = getattr(self, which)[place]
    return jnp.zeros(group.shape) if paths.is_absent(x) else jnp.asarray(x)


def _seen(x: Any) -> jax.Array:
  x = jnp.asarray(x)
  return numerics.finite(x).astype(numerics.compute_dtype(x.dtype))


class Measure(NamedTuple):
  """A look across leaves, of which each leaf is told a small value.

  Attributes:
    name: of the extra argument in which a part is handed the values of its leaves, by place.
    state_type: of the state that it keeps from step to step; `None` where there is none.
    look: `(leaves, state) -> (values, state)`, with one value per group: `None`, or a tree of
      arrays with one row per leaf.
    kinds: the part's, by which leaves are grouped.
    reads_params: the public name of the part, if it reads the parameters.
  """

  name: str
  state_type: type | None
  look: Callable[[LeafGroups, Any], tuple[list[Any], Any]]
  kinds: Callable[[Any], list[Any]] | None = None

  def of_step(
    self, gradients: Any, state: Any, params: Any, extra_args: Mapping[str, Any]
  ) -> tuple[Mapping[int, Any], Any]:
    """The values of a step by place, and the new state: as the driver found them, or found here."""
    known = extra_args.get(self.name)
    if known is not None:
      return known, state
    structure: Any = jax.tree.structure(gradients, is_leaf=paths.is_absent)
    leaves = groups_of(gradients, params, extra_args.get(PRESENT), self.kinds)
    found, state = self.look(leaves, state)
    values: dict[int, Any] = dict.fromkeys(range(structure.num_leaves))
    return values | by_place(leaves.layout, found), state


def by_place(layout: Layout, found: Sequence[Any]) -> dict[int, Any]:
  """The values of groups, for each place."""
  return {
    place: None if value is None else jax.tree.map(lambda x, i=i: x[i], value)
    for group, value in zip(layout.groups, found) for i, place in enumerate(group.places)
  }


def groups_of(
  gradients: Any, params: Any, present: Any = None, kinds: Callable[[Any], list[Any]] | None = None
) -> LeafGroups:
  """The leaves of a step, those that are alike together."""
  structure: Any = jax.tree.structure(gradients, is_leaf=paths.is_absent)
  p = structure.flatten_up_to(params)
  told = [None] * len(p) if kinds is None else kinds(params)
  layout = layouts.grouped(structure.unflatten(p), _SMALL, told)
  flags = None if present is None else structure.flatten_up_to(present)
  return LeafGroups(layout, structure.flatten_up_to(gradients), p, structure, flags)
