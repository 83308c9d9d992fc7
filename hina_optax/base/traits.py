"""What the driver needs to know about a transformation, kept as an attribute of its `init`.

A transformation is a NamedTuple, which would lose an attribute of its own in `jax.tree.map`, in
`_replace` and in copies. The function `init` keeps it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import optax

_ATTRIBUTE = "hina_traits"

# `kinds(params)` gives, for each place of the tree, what decides how the leaf is treated beside its
# shape and dtype.
Kinds = Callable[[Any], list[Any]]


@dataclasses.dataclass(frozen=True)
class Traits:
  """What is known about a transformation.

  Attributes:
    leafwise: whether it updates each leaf by itself, given the results of its `measures`.
    kinds: functions of the parameters. Leaves may be stacked only if all of these agree on them.
    measures: what it measures across leaves before the leaves are updated, in the order of its
      state.
    bare: the same transformation without its own guard against numbers that are not finite.
    resolver: `resolver(params, state)` gives the driver's settings of a transformation that runs in
      the driver; `None` for others.
    options: the `HinaOptions` that it was built from; `None` for others.
    choose_plan: `choose_plan(params, state=None)` gives its memory plan; `None` if it has none.
    rebuild: `rebuild(**changes)` gives the transformation with changed options; `None` if it has
      no options.
  """

  leafwise: bool = False
  kinds: tuple[Kinds, ...] = ()
  measures: tuple[Any, ...] = ()
  bare: Any = None
  resolver: Any = None
  options: Any = None
  choose_plan: Any = None
  rebuild: Any = None


def get_traits(transformation: Any) -> Traits:
  """The traits of `transformation`; the default ones if another library made it."""
  return getattr(getattr(transformation, "init", None), _ATTRIBUTE, None) or Traits()


def attach_traits(
  init: Callable[..., Any], update: Callable[..., Any], traits: Traits
) -> optax.GradientTransformationExtraArgs:
  """The transformation of `init` and `update`. Sets `traits` as an attribute of `init`."""
  setattr(init, _ATTRIBUTE, traits)
  return optax.GradientTransformationExtraArgs(init, update)


def strip_guard(transformation: Any) -> Any:
  """`transformation` without its guard, or `transformation` itself if it has none."""
  return get_traits(transformation).bare or transformation


def join_traits(parts: Sequence[Any]) -> Traits:
  """The traits of transformations that run one after the other, or one inside the other."""
  traits = [get_traits(part) for part in parts]
  return Traits(
    leafwise=all(t.leafwise for t in traits),
    kinds=tuple(k for t in traits for k in t.kinds),
    measures=tuple(m for t in traits for m in t.measures),
  )


def mark_leafwise(transformation: Any) -> optax.GradientTransformationExtraArgs:
  """Marks a `transformation` of another library that treats each element by itself."""
  inner = optax.with_extra_args_support(transformation)

  def init(params: Any) -> Any:
    return inner.init(params)

  return attach_traits(init, inner.update, Traits(leafwise=True))


def chain(*parts: Any) -> optax.GradientTransformationExtraArgs:
  """`optax.chain`, with the joined traits of its parts."""
  chained = optax.chain(*parts)

  def init(params: Any) -> Any:
    return chained.init(params)

  def update(updates, state, params=None, **extra_args):
    return chained.update(updates, state, params, **extra_args)

  traits = join_traits(parts)
  if any(get_traits(part).bare for part in parts):
    traits = dataclasses.replace(traits, bare=chain(*map(strip_guard, parts)))
  return attach_traits(init, update, traits)
