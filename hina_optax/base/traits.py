"""What the driver must know of a transformation: it hangs on the transformation's `init`.

A function keeps its attributes where a NamedTuple would lose them: in `jax.tree.map`, `_replace`
and copies of the transformation.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import optax

_NAME = "hina_traits"

# For each place of a tree of parameters, what decides how its leaf is treated beside shape and
# dtype.
Kinds = Callable[[Any], list[Any]]


@dataclasses.dataclass(frozen=True)
class Traits:
  """What is known of a transformation.

  Attributes:
    leafwise: whether it treats each leaf by itself, given what its `measures` hand it.
    kinds: only leaves of which all of these agree may be stacked.
    measures: what it looks up across leaves before the leaves are updated, in the order of its
      state.
    bare: the same transformation without a guard of its own against numbers that are not finite.
    driver: the settings of a transformation that runs its inner in the driver; `None` for others.
    options: the `HinaOptions` it was built from, if it was.
    decide: `decide(params, state=None)` gives its memory plan; `None` where there is none.
    rebuilt: `rebuilt(**changes)` is the same with other options; `None` where there are none.
  """

  leafwise: bool = False
  kinds: tuple[Kinds, ...] = ()
  measures: tuple[Any, ...] = ()
  bare: Any = None
  driver: Any = None
  options: Any = None
  decide: Any = None
  rebuilt: Any = None


def traits_of(transformation: Any) -> Traits:
  """What is known of `transformation`; nothing where it is somebody else's."""
  return getattr(getattr(transformation, "init", None), _NAME, None) or Traits()


def with_traits(
  init: Callable[..., Any], update: Callable[..., Any], traits: Traits
) -> optax.GradientTransformationExtraArgs:
  """The transformation of a new `init`, on which `traits` are hung, and `update`."""
  setattr(init, _NAME, traits)
  return optax.GradientTransformationExtraArgs(init, update)


def bare(transformation: Any) -> Any:
  """`transformation` without its guard; itself where it has none."""
  return traits_of(transformation).bare or transformation


def joined(parts: Sequence[Any]) -> Traits:
  """What is known of several transformations that run one after the other, or in each other."""
  known = [traits_of(part) for part in parts]
  return Traits(
    leafwise=all(t.leafwise for t in known),
    kinds=tuple(k for t in known for k in t.kinds),
    measures=tuple(m for t in known for m in t.measures),
  )


def leafwise(transformation: Any) -> optax.GradientTransformationExtraArgs:
  """`transformation` of another library, known to treat each element by itself."""
  inner = optax.with_extra_args_support(transformation)

  def init(params: Any) -> Any:
    return inner.init(params)

  return with_traits(init, inner.update, Traits(leafwise=True))


def chain(*parts: Any) -> optax.GradientTransformationExtraArgs:
  """`optax.chain`, with what is known of its parts."""
  chained = optax.chain(*parts)

  def init(params: Any) -> Any:
    return chained.init(params)

  def update(updates, state, params=None, **extra_args):
    return chained.update(updates, state, params, **extra_args)

  known = joined(parts)
  if any(traits_of(part).bare for part in parts):
    known = dataclasses.replace(known, bare=chain(*map(bare, parts)))
  return with_traits(init, update, known)
