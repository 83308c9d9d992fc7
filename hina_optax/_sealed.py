"""Leaves of a state that are kept in another form, opened where they are needed and no earlier.

A wrapper that stores state in fewer bits would open all of it before its inner begins, and stack by
stack all but one stack would lie open in vain.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("stored", "reading", "writing"), meta_fields=("decode", "encode"))
@dataclasses.dataclass(frozen=True)
class Sealed:
  """A leaf in its stored form.

  Attributes:
    stored: the form.
    reading: what `decode` is given beside it, such as the key of a noise.
    writing: what `encode` is given beside a new leaf.
    decode: `(stored, reading) -> leaf`.
    encode: `(leaf, writing) -> stored`.
  """

  stored: Any
  reading: Any
  writing: Any
  decode: Callable[[Any, Any], Any]
  encode: Callable[[Any, Any], Any]


class Opening(optax.GradientTransformationExtraArgs):
  """A transformation that opens what is sealed in its state, and gives it back sealed."""

  opens = True


def opens(transformation: Any) -> bool:
  """Whether a transformation may be given a state with sealed leaves."""
  return getattr(transformation, "opens", False)


def is_sealed(x: Any) -> bool:
  """True for a `Sealed`."""
  return isinstance(x, Sealed)


def opened(tree: Any) -> Any:
  """`tree` with the leaf in place of each `Sealed`."""
  return jax.tree.map(
    lambda x: x.decode(x.stored, x.reading) if is_sealed(x) else x, tree, is_leaf=is_sealed)


def sealed_as(before: Any, after: Any) -> Any:
  """`after` with its leaves sealed where those of `before` are."""
  return jax.tree.map(
    lambda x, new: dataclasses.replace(x, stored=x.encode(new, x.writing)) if is_sealed(x) else new,
    before, after, is_leaf=is_sealed)
