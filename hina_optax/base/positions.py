"""Where the numbers of each leaf stand in an optimizer's state.

A state holds trees like the parameters (moments), vectors with one number per leaf (`LeafNumbers`),
and what all leaves share (counters).
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hina_optax.base import paths
from hina_optax.base.leaf import Carried


class Names:
  """The paths of some leaves, in order; static, and compared at every call of a jitted function."""

  def __init__(self, names: tuple[str, ...]):
    """Equal names are made once by `names_of`, so that comparing them is comparing pointers."""
    self.names = names
    self.index = {name: i for i, name in enumerate(names)}
    self._hash = hash(names)

  def __hash__(self) -> int:
    return self._hash

  def __eq__(self, other: object) -> bool:
    return self is other or (isinstance(other, Names) and self.names == other.names)

  def __repr__(self) -> str:
    return f"Names({len(self.names)} leaves)"


@functools.lru_cache(maxsize=256)
def names_of(names: tuple[str, ...]) -> Names:
  """The `Names` of these paths."""
  return Names(names)


class LeafNumbers:
  """One number per leaf: a vector whose entries are found by the path of their leaf.

  Attributes:
    names: the paths, one per entry.
    numbers: the vector.
  """

  names: Names
  numbers: Any

  def __init__(self, names: Names, numbers: Any):
    self.names, self.numbers = names, numbers
    make_known_to_flax(
      LeafNumbers, lambda x: {"numbers": x.numbers},
      lambda x, saved: LeafNumbers(x.names, saved["numbers"]))

  def __getitem__(self, path: str) -> Any:
    """The number of the leaf at `path`, such as `"block/kernel"`."""
    if path not in self.names.index:
      some = ", ".join(repr(name) for name in self.names.names[:4])
      raise KeyError(f"there is no leaf '{path}'; paths look like {some}.")
    return self.numbers[self.names.index[path]]

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    """The vector, for NumPy."""
    del copy
    return np.asarray(self.numbers, dtype)

  def items(self) -> Any:
    """Paths and numbers."""
    return zip(self.names.names, self.numbers)

  def __repr__(self) -> str:
    return f"LeafNumbers({len(self.names.names)} leaves, {self.numbers!r})"


jax.tree_util.register_pytree_with_keys(
  LeafNumbers,
  lambda x: (((jax.tree_util.DictKey("numbers"), x.numbers),), x.names),
  lambda names, children: LeafNumbers(names, *children),
  lambda x: ((x.numbers,), x.names),
)


_KNOWN_TO_FLAX: set[type] = set()


def make_known_to_flax(kind: type, to_dict: Callable[[Any], Any], from_dict: Callable[..., Any]
                       ) -> None:
  """Tells `flax.serialization` how a node of a state is saved, where Flax is loaded.

  Flax saves nodes that it does not know as they are, which fails. The core does not import Flax.
  """
  module = sys.modules.get("flax.serialization")
  if module is not None and kind not in _KNOWN_TO_FLAX:
    module.register_serialization_state(kind, to_dict, from_dict)
    _KNOWN_TO_FLAX.add(kind)


def leaf_numbers(leaf_paths: Sequence[str], numbers: Any) -> Any:
  """State for one number per leaf; a bare empty vector where there is no leaf.

  `optax.tree.map_params` compares a state with that of a tree without leaves. A bare array there
  may stand beside a `LeafNumbers`, while one with other names may not.
  """
  if not leaf_paths:
    return jnp.zeros((0,), jnp.float32)
  return LeafNumbers(names_of(tuple(leaf_paths)), numbers)


def structure_of(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
  """The structure of a tree in which what stands in place of a leaf counts as one."""
  return jax.tree.structure(tree, is_leaf=_leaf_rule(is_leaf))


def leaves_of(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[Any]:
  """Its leaves, those that are absent among them."""
  return jax.tree.leaves(tree, is_leaf=_leaf_rule(is_leaf))


def _leaf_rule(is_leaf: Callable[[Any], bool] | None) -> Callable[[Any], bool]:
  def rule(x: Any) -> bool:
    return paths.is_absent(x) or isinstance(x, Carried) or (is_leaf is not None and is_leaf(x))

  return rule


def is_tree_like(
  structure: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Callable[..., bool]:
  """A test for trees of this structure."""
  trivial = structure == jax.tree.structure(0)

  def test(x: Any) -> bool:
    if isinstance(x, LeafNumbers) or isinstance(x, (jax.Array, np.ndarray)):
      return False
    return not trivial and structure_of(x, is_leaf) == structure

  return test
