"""Measures: what is computed from several leaves, once per step, before the leaves are updated."""

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

# Leaves of at most this many elements are stacked when a measure is evaluated without the loop.
_MAX_STACKED_ELEMENTS = 1 << 20


class LeafGroups(NamedTuple):
  """All leaves of a step that have a parameter, group by group.

  Attributes:
    layout: how the leaves are grouped.
    gradients: one per place of the tree; absent if the leaf has no update.
    params: one per place of the tree.
    structure: structure of the user's tree.
    present: one boolean scalar per place; `None` if the user did not pass `present`.
  """

  layout: Layout
  gradients: Sequence[Any]
  params: Sequence[Any]
  structure: Any
  present: Sequence[Any] | None = None

  @property
  def groups(self) -> tuple[Group, ...]:
    """The groups of the layout."""
    return self.layout.groups

  def places(self) -> list[int]:
    """Returns the places of all leaves, group by group."""
    return [place for group in self.groups for place in group.places]

  def update_mask(self) -> jax.Array | None:
    """Returns which leaves have an update, group by group; `None` if all have one."""
    places = self.places()
    has_gradient = np.array([not paths.is_absent(self.gradients[place]) for place in places], bool)
    if self.present is None:
      return None if has_gradient.all() else jnp.asarray(has_gradient)
    return jnp.stack([jnp.asarray(self.present[place]) for place in places]) & has_gradient

  def map_leaves(
    self, function: Callable[..., Any], *fields: str,
    only: Callable[[Group], bool] = lambda group: True,
  ) -> list[Any]:
    """Computes `function(group, leaf, ...)` per leaf; returns one array per group, a row per leaf.

    The function gets finite arrays of at least fp32, and zeros for an absent leaf. Each group is
    stacked once per call, so one call should compute everything that is needed.

    Args:
      function: gets the gradient of a leaf, its parameter, or both.
      *fields: `"gradients"`, `"params"`, in the order of the function's arguments.
      only: selects groups; the result of every other group is `None`.
    """
    results: list[Any] = []
    token = jnp.zeros([], jnp.float32)
    for group in self.groups:
      columns = [[self._get_leaf(field, group, place) for place in group.places]
                 for field in fields]
      if not only(group):
        results.append(None)
        continue
      # One group waits for the one before, so that only one stack is in memory at a time.
      token, columns[0][0] = xla_cpu.barrier((token, columns[0][0]))

      def measure_leaf(*xs: Any, group: Group = group) -> Any:
        return function(group, *map(_to_finite, xs))

      def measure_stack(
        *columns: Any, group: Group = group, measure_leaf: Any = measure_leaf
      ) -> Any:
        # The barrier keeps XLA from computing the stack again for each of its consumers.
        stacks = lax.optimization_barrier(
          [layouts.stack(leaves, group.shape) for leaves in columns])
        return jax.vmap(measure_leaf)(*stacks)

      results.append(xla_cpu.map_rows(measure_leaf, columns, measure_stack))
      token = xla_cpu.make_token(jax.tree.leaves(results[-1])[:1])
    return results

  def _get_leaf(self, field: str, group: Group, place: int) -> Any:
    x = getattr(self, field)[place]
    return jnp.zeros(group.shape) if paths.is_absent(x) else jnp.asarray(x)


def _to_finite(x: Any) -> jax.Array:
  x = jnp.asarray(x)
  return numerics.zero_non_finite(x).astype(numerics.compute_dtype(x.dtype))


class Measure(NamedTuple):
  """A computation across leaves, whose result is a small value per leaf.

  Attributes:
    name: key in `extra_args` under which the loop hands the values to the part, as a dict from a
      leaf's place in the flattened tree to its value.
    state_type: type of the state that it keeps from step to step; `None` if it keeps none.
    compute: `(leaves, state) -> (values, state)`, with one value per group: `None`, or a tree of
      arrays with one row per leaf.
    kinds: the part's function that tells which leaves may be grouped.
  """

  name: str
  state_type: type | None
  compute: Callable[[LeafGroups, Any], tuple[list[Any], Any]]
  kinds: Callable[[Any], list[Any]] | None = None

  def evaluate(
    self, gradients: Any, state: Any, params: Any, extra_args: Mapping[str, Any]
  ) -> tuple[Mapping[int, Any], Any]:
    """Returns the values of one step by place, and the new state.

    The update loop evaluates measures itself and passes the values in `extra_args`. Outside of the
    loop they are computed here.
    """
    loop_values = extra_args.get(self.name)
    if loop_values is not None:
      return loop_values, state
    structure: Any = jax.tree.structure(gradients, is_leaf=paths.is_absent)
    leaves = group_step_leaves(gradients, params, extra_args.get(PRESENT), self.kinds)
    group_values, state = self.compute(leaves, state)
    values: dict[int, Any] = dict.fromkeys(range(structure.num_leaves))
    return values | split_by_place(leaves.layout, group_values), state


def split_by_place(layout: Layout, group_values: Sequence[Any]) -> dict[int, Any]:
  """Splits the values of groups into one value per place."""
  return {
    place: None if value is None else jax.tree.map(lambda x, i=i: x[i], value)
    for group, value in zip(layout.groups, group_values) for i, place in enumerate(group.places)
  }


def group_step_leaves(
  gradients: Any, params: Any, present: Any = None, kinds: Callable[[Any], list[Any]] | None = None
) -> LeafGroups:
  """Groups the leaves of a step by shape, dtype and kind."""
  structure: Any = jax.tree.structure(gradients, is_leaf=paths.is_absent)
  p = structure.flatten_up_to(params)
  leaf_kinds = [None] * len(p) if kinds is None else kinds(params)
  layout = layouts.group_leaves(structure.unflatten(p), _MAX_STACKED_ELEMENTS, leaf_kinds)
  flags = None if present is None else structure.flatten_up_to(present)
  return LeafGroups(layout, structure.flatten_up_to(gradients), p, structure, flags)
