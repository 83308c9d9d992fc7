"""Which leaves of a tree are stacked: none that is sharded, and later those that were at first."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax

from hina_optax import _leaves, _shardings, _stacks

_MADE: ContextVar[Any] = ContextVar("a state for which init is asked again", default=None)
_NOTED: ContextVar[list[_stacks.Layout] | None] = ContextVar("layouts of an init", default=None)


def layout_for(
  tree: Any, state: Any, max_elements: int, kinds: _stacks.Kinds | None = None,
  apart: frozenset[str] = frozenset(),
) -> _stacks.Layout | None:
  """How `tree` is stacked: as in `state` if there is one, else leaves of `apart` stand alone."""
  layout = _stacks.layout_of(tree, max_elements, kinds, apart)
  state = made() if state is None else state
  if layout is not None and state is not None:
    # Traced leaves show no sharding: what stood alone when the state was made, its keys say.
    known = set(keys_in(state))
    others = (_stacks.layout_of(tree, max_elements, kinds, alone)
              for alone in (apart, *paths_in(state, tree)))
    layout = next((x for x in others if x is not None and x.names in known), layout)
  noted = _NOTED.get()
  if layout is not None and noted is not None:
    noted.append(layout)
  return layout


def made() -> Any:
  """The state of the innermost `as_made`; `None` outside of any."""
  return _MADE.get()


def standing_alone(tree: Any, careful: bool = False) -> frozenset[str]:
  """Paths of the leaves that are seen to be sharded, since a stack would gather them.

  With `careful` all paths, where leaves might be sharded and it cannot be seen.
  """
  places, leaves, _ = _leaves.flatten(tree)
  every = careful and _shardings.is_hidden(tree)
  return frozenset(
    p.path for p, x in zip(places, leaves) if every or _shardings.is_sharded(x))


@contextlib.contextmanager
def as_made(state: Any) -> Iterator[None]:
  """Inside, `init` of what is batched stacks as for `state`, whatever it sees of its argument."""
  token = _MADE.set(state)
  try:
    yield
  finally:
    _MADE.reset(token)


@contextlib.contextmanager
def noted() -> Iterator[list[_stacks.Layout]]:
  """Gathers the layouts that are made inside."""
  found: list[_stacks.Layout] = []
  token = _NOTED.set(found)
  try:
    yield found
  finally:
    _NOTED.reset(token)


def paths_in(state: Any, tree: Any) -> Iterator[frozenset[str]]:
  """For each dict in a state, the leaves of `tree` that have a key of their own in it."""
  paths = {place.path for place in _leaves.flatten(tree)[0]}
  for keys in keys_in(state):
    yield keys & paths


def keys_in(state: Any) -> Iterator[frozenset[str]]:
  """The keys of each dict in a state."""
  for node in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, dict)):
    if isinstance(node, dict):
      yield frozenset(node)
      yield from keys_in(list(node.values()))
