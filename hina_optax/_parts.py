"""What the parts of this library are: transformations of stacked leaves as of any tree."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import optax

from hina_optax import _shardings

# The extra argument in which `update` is given what `survey` found.
SURVEYED = "_surveyed"
# `survey(params, state)`, of a `_in_turn.Later` and the whole state: a function that gives, of a
# layout, the index of a group in it and that group's own layout, what `update` needs to know beside
# the leaves of the group. It takes no gradients.
Survey = Callable[[Any, Any], Callable[..., Any]]


def looks_at_no_other_leaf(params: Any, state: Any) -> Callable[..., Any]:
  """The survey of a part that treats each leaf by itself."""
  del params, state
  return lambda *group: None


class Deferred:
  """Parameters that are stacked when a part first reads them, for not to be in memory before."""

  def __init__(self, make: Callable[[Any], Any]):
    """`make(updates)` stacks them after the updates are there."""
    self._make, self._made = make, None

  def after(self, updates: Any) -> Any:
    """The parameters, for a part that is given these updates."""
    if self._made is None:
      self._made = self._make(updates)
    return self._made


def read(params: Any, updates: Any) -> Any:
  """`params`, deferred or not."""
  return params.after(updates) if isinstance(params, Deferred) else params


class Part(optax.GradientTransformationExtraArgs):
  """A transformation that takes `Stacks` as it takes any tree of parameters, and any sharding.

  `survey` is for updating one group after the other; `None` where that cannot be. `params` says
  what `update` does with them: only what hands them on is given `Deferred` ones.
  """

  survey: Survey | None

  def __new__(cls, init: Callable[..., Any], update: Callable[..., Any],
              survey: Survey | None = looks_at_no_other_leaf,
              params: Literal["reads", "ignores", "hands on"] = "reads") -> "Part":
    made = super().__new__(cls, init, _deferring(update, params))
    made.survey = survey
    return made


def _deferring(update: Callable[..., Any], use: str) -> Callable[..., Any]:
  """`update` for any sharding, and for parameters that may be `Deferred`."""
  plain = _shardings.automatic(update)

  @functools.wraps(update)
  def decorated(updates, state, params=None, **extra_args):
    if not isinstance(params, Deferred):
      return plain(updates, state, params, **extra_args)
    if use == "hands on":
      return update(updates, state, params, **extra_args)
    own = params.after(updates) if use == "reads" else None
    return plain(updates, state, own, **extra_args)

  return decorated


def inner_survey(inner: Part) -> Survey | None:
  """The survey of a wrapper that keeps its inner's state in `inner_state`."""
  survey = inner.survey
  return None if survey is None else lambda params, state: survey(params, state.inner_state)


def chain(*parts: optax.GradientTransformationExtraArgs) -> Part:
  """`optax.chain` of parts, and of others that treat each element by itself."""
  parts = tuple(map(optax.with_extra_args_support, parts))
  surveys = [getattr(part, "survey", looks_at_no_other_leaf) for part in parts]

  def update(updates, state, params=None, **extra_args):
    known = extra_args.pop(SURVEYED, None) or [None] * len(parts)
    new_states = []
    for part, own, seen in zip(parts, state, known):
      if isinstance(part, Part):
        updates, new = part.update(updates, own, params, **extra_args, **{SURVEYED: seen})
      else:
        updates, new = part.update(updates, own, read(params, updates), **extra_args)
      new_states.append(new)
    return updates, tuple(new_states)

  def survey(params, state):
    found = [one(params, own) for one, own in zip(surveys, state)]
    return lambda *group: tuple(known(*group) for known in found)

  return Part(optax.chain(*parts).init, update, None if None in surveys else survey, "hands on")
