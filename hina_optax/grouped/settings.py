"""What the driver runs, and how it groups the leaves of a tree."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from hina_optax.base import paths, positions, traits
from hina_optax.grouped import codecs, separable
from hina_optax.grouped import layout as layouts
from hina_optax.grouped.codecs import Layer
from hina_optax.grouped.layout import Layout


@dataclasses.dataclass(frozen=True)
class Stacking:
  """Which leaves are stacked.

  Attributes:
    max_elements: of a leaf that is stacked.
    kind: `f(path, leaf) -> hashable` of the user; `None`: it is read from what is computed.
  """

  max_elements: int
  kind: Callable[[str, Any], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the driver runs, and how.

  Attributes:
    inner: the transformation.
    stacking: `None`: every leaf stands alone.
    layers: of storage, from the inside out.
    window: opened bytes of hosted state on the device at once; `None`: all of it.
    layout: how leaves are grouped, where it was decided before.
    contains: whether the inner has no guard of its own against numbers that are not finite. It is
      then given 0 in their place, and numbers whose squares fp32 holds; what is not finite passes
      unchanged, the rest comes out in the dtype of its parameter.
    short: whether the inner does as little for a leaf as Adam does. On CPUs its groups are then no
      programs of their own.
  """

  inner: Any
  stacking: Stacking | None = None
  layers: tuple[Layer, ...] = ()
  window: int | None = None
  layout: Layout | None = None
  contains: bool = False
  short: bool = False


def begin(settings: Settings, params: Any) -> tuple[Any, Layout | None]:
  """The inner's state, opened, in groups where leaves are stacked, and the layout."""
  if settings.contains:
    paths.check_floating(params, "params")
  if any(layer.rounds for layer in settings.layers):
    params = jax.tree.map(codecs.widen, params)
  state = settings.inner.init(params)
  layout = settings.layout
  if layout is None and settings.stacking is not None:
    layout = layout_of(settings, params, state)
  if layout is None or not layout.stacked:
    return state, None
  return layouts.to_groups(layout, state, positions.structure_of(params)), layout


def layout_of(settings: Settings, params: Any, state: Any = None) -> Layout:
  """How the leaves of `params` are grouped."""
  assert settings.stacking is not None
  kinds = _kinds(settings, params)
  most_rows = None
  if settings.window is not None:
    if state is None:
      state = jax.eval_shape(settings.inner.init, params)
    sizes = opened_bytes(state, positions.structure_of(params))
    half = settings.window // 2
    most_rows = lambda place: half // max(1, sizes[place])  # noqa: E731
  return layouts.grouped(params, settings.stacking.max_elements, kinds, most_rows)


def opened_bytes(state: Any, structure: Any) -> list[int]:
  """For each place of the tree the bytes of its leaf's state."""
  is_tree = positions.is_tree_like(structure)
  sizes = [0] * structure.num_leaves
  for node in jax.tree.leaves(state, is_leaf=is_tree):
    if is_tree(node):
      for place, x in enumerate(structure.flatten_up_to(node)):
        sizes[place] += sum(y.size * y.dtype.itemsize for y in jax.tree.leaves(x))
  return sizes


def _kinds(settings: Settings, params: Any) -> list[Any]:
  """For each place what decides beside shape and dtype."""
  assert settings.stacking is not None
  known = traits.traits_of(settings.inner)
  columns = [kinds(params) for kinds in known.kinds]
  if settings.stacking.kind is not None:
    columns.append([None if paths.is_absent(x) else settings.stacking.kind(place.path, x)
                    for place, x in zip(*paths.flatten(params)[:2])])
  elif not known.leafwise:
    columns.append(_programs(settings.inner, params))
  count = len(paths.flatten(params)[0])
  return [tuple(column[i] for column in columns) for i in range(count)]


def _programs(inner: Any, params: Any) -> list[Any]:
  """What `inner` computes for each leaf, or keeps of it where it cannot be asked beforehand."""
  try:
    found = separable.analyse(inner, params, {})
  except (TypeError, ValueError, KeyError, AttributeError):
    # It wants extra arguments that only an update has: what it keeps of each leaf decides, and the
    # update checks the rest.
    structure = positions.structure_of(params)
    state = jax.eval_shape(inner.init, params)
    is_tree = positions.is_tree_like(structure)
    trees = [structure.flatten_up_to(x) for x in jax.tree.leaves(state, is_leaf=is_tree)
             if is_tree(x)]
    return [str([jax.tree.map(lambda y: (y.shape, y.dtype), column[i]) for column in trees])
            for i in range(structure.num_leaves)]
  if found.mixing is not None:
    raise ValueError(refusal("with_leaf_batching can only batch", found.mixing))
  return found.programs


def refusal(wrapper: str, mixing: str) -> str:
  """Why `wrapper` cannot take a transformation, and what to do."""
  return (
    f"{wrapper} a transformation that treats each leaf by itself, but {mixing}. Put what looks "
    "across leaves (global norms, Prodigy, importance in a chain) outside of the wrapper, in a "
    "chain before or behind it.")
