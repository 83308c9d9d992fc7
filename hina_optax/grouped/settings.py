"""The settings of the update loop, and how it groups the leaves of a tree."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from hina_optax.base import paths, positions, traits
from hina_optax.grouped import codecs, leaf_dependencies
from hina_optax.grouped import layout as layouts
from hina_optax.grouped.codecs import Codec
from hina_optax.grouped.layout import Layout


@dataclasses.dataclass(frozen=True)
class Stacking:
  """Which leaves are stacked.

  Attributes:
    max_elements: largest number of elements of a leaf that is stacked.
    kind: `f(path, leaf) -> hashable`, given by the user. With `None`, leaves are of one kind if the
      transformation computes the same for them.
  """

  max_elements: int
  kind: Callable[[str, Any], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the loop runs, and how.

  Attributes:
    inner: the transformation.
    stacking: which leaves are stacked; `None`: none are.
    codecs: how the state is stored, from the inside out.
    window: largest number of bytes of offloaded state that is decoded on the device at once;
      `None`: no limit.
    layout: how leaves are grouped, if that is already known.
    guards_non_finite: whether the loop guards the inner transformation, which then has no guard of
      its own, against numbers that are not finite. The inner gets 0 in their place, and numbers
      whose squares fp32 can hold. Numbers that are not finite pass unchanged; all other updates
      are cast to the dtype of their parameter.
    is_lightweight: whether the inner does as little work per leaf as Adam does. On CPUs its groups
      are then not compiled as separate programs.
  """

  inner: Any
  stacking: Stacking | None = None
  codecs: tuple[Codec, ...] = ()
  window: int | None = None
  layout: Layout | None = None
  guards_non_finite: bool = False
  is_lightweight: bool = False


def init_state(settings: Settings, params: Any) -> tuple[Any, Layout | None]:
  """Returns the inner's initial state, grouped if leaves are stacked, and the layout."""
  if settings.guards_non_finite:
    paths.check_floating(params, "params")
  if any(codec.is_lossy for codec in settings.codecs):
    params = jax.tree.map(codecs.widen, params)
  state = settings.inner.init(params)
  layout = settings.layout
  if layout is None and settings.stacking is not None:
    layout = make_layout(settings, params, state)
  if layout is None or not layout.stacked:
    return state, None
  return layouts.group_state(layout, state, positions.get_structure(params)), layout


def make_layout(settings: Settings, params: Any, state: Any = None) -> Layout:
  """Groups the leaves of `params`."""
  assert settings.stacking is not None
  kinds = _find_leaf_kinds(settings, params)
  max_leaves = None
  if settings.window is not None:
    if state is None:
      state = jax.eval_shape(settings.inner.init, params)
    sizes = count_state_bytes(state, positions.get_structure(params))
    # Two windows are on the device at once: one on its way in, one on its way out.
    half = settings.window // 2
    max_leaves = lambda place: half // max(1, sizes[place])  # noqa: E731
  return layouts.group_leaves(params, settings.stacking.max_elements, kinds, max_leaves)


def count_state_bytes(state: Any, structure: Any) -> list[int]:
  """Returns, for each place of the tree, the bytes of its leaf's decoded state."""
  is_tree = positions.is_tree_like(structure)
  sizes = [0] * structure.num_leaves
  for node in jax.tree.leaves(state, is_leaf=is_tree):
    if is_tree(node):
      for place, x in enumerate(structure.flatten_up_to(node)):
        sizes[place] += sum(y.size * y.dtype.itemsize for y in jax.tree.leaves(x))
  return sizes


def _find_leaf_kinds(settings: Settings, params: Any) -> list[Any]:
  """Returns, for each place, what must agree, beside shape and dtype, in one stack."""
  assert settings.stacking is not None
  inner_traits = traits.get_traits(settings.inner)
  columns = [kinds(params) for kinds in inner_traits.kinds]
  if settings.stacking.kind is not None:
    columns.append([None if paths.is_absent(x) else settings.stacking.kind(place.path, x)
                    for place, x in zip(*paths.flatten(params)[:2])])
  elif not inner_traits.leafwise:
    columns.append(_find_programs(settings.inner, params))
  count = len(paths.flatten(params)[0])
  return [tuple(column[i] for column in columns) for i in range(count)]


def _find_programs(inner: Any, params: Any) -> list[Any]:
  """Returns what `inner` computes for each leaf, or the shape of its state if that is unknown."""
  try:
    dependencies = leaf_dependencies.trace_dependencies(inner, params, {})
  except (TypeError, ValueError, KeyError, AttributeError):
    # The inner needs extra arguments that only `update` gets. Leaves with equal state then count
    # as one kind, and `update` checks the rest.
    structure = positions.get_structure(params)
    state = jax.eval_shape(inner.init, params)
    is_tree = positions.is_tree_like(structure)
    trees = [structure.flatten_up_to(x) for x in jax.tree.leaves(state, is_leaf=is_tree)
             if is_tree(x)]
    return [str([jax.tree.map(lambda y: (y.shape, y.dtype), column[i]) for column in trees])
            for i in range(structure.num_leaves)]
  if dependencies.cross_leaf is not None:
    raise ValueError(describe_refusal("with_leaf_batching can only batch", dependencies.cross_leaf))
  return dependencies.programs


def describe_refusal(wrapper: str, cross_leaf: str) -> str:
  """Says why `wrapper` cannot take a transformation, and what to do."""
  return (
    f"{wrapper} a transformation that treats each leaf by itself, but {cross_leaf}. Put what looks "
    "across leaves (global norms, Prodigy, importance in a chain) outside of the wrapper, in a "
    "chain before or behind it.")
