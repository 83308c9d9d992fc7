"""Where an optimizer's state keeps the numbers of each leaf.

A state holds trees like the parameters (moments), vectors with one number per leaf (`LeafNumbers`),
and numbers that all leaves share (counters).
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hina_optax.base import paths
from hina_optax.base.leaf import ReshapedLeaf


class Names:
  """The paths of leaves, in order.

  They are static data of a state, so each call of a jitted function compares them.
  """

  def __init__(self, names: tuple[str, ...]):
    """Call `intern_names` instead: equal names are then one object, which is cheap to compare."""
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
def intern_names(names: tuple[str, ...]) -> Names:
  """The `Names` of these paths."""
  return Names(names)


class LeafNumbers:
  """One number per leaf: a vector, indexed by the path of the leaf.

  Attributes:
    names: the paths, one per entry.
    numbers: the vector.
  """

  names: Names
  numbers: Any

  def __init__(self, names: Names, numbers: Any):
    self.names, self.numbers = names, numbers
    register_with_flax(
      LeafNumbers, lambda x: {"numbers": x.numbers},
      lambda x, saved: LeafNumbers(x.names, saved["numbers"]))

  def __getitem__(self, path: str) -> Any:
    """The number of the leaf at `path`, such as `"block/kernel"`."""
    if path not in self.names.index:
      examples = ", ".join(repr(name) for name in self.names.names[:4])
      raise KeyError(f"there is no leaf '{path}'; paths look like {examples}.")
    return self.numbers[self.names.index[path]]

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    """Converts the vector to a NumPy array."""
    del copy
    return np.asarray(self.numbers, dtype)

  def items(self) -> Any:
    """Pairs of a path and a number."""
    return zip(self.names.names, self.numbers)

  def __repr__(self) -> str:
    return f"LeafNumbers({len(self.names.names)} leaves, {self.numbers!r})"


jax.tree_util.register_pytree_with_keys(
  LeafNumbers,
  lambda x: (((jax.tree_util.DictKey("numbers"), x.numbers),), x.names),
  lambda names, children: LeafNumbers(names, *children),
  lambda x: ((x.numbers,), x.names),
)


_FLAX_TYPES: set[type] = set()


def register_with_flax(
  node_type: type, to_dict: Callable[[Any], Any], from_dict: Callable[..., Any]
) -> None:
  """Tells `flax.serialization`, if Flax is loaded, how to save a node of a state.

  Flax would save an unknown node unchanged, which fails. The core itself does not import Flax.
  """
  module = sys.modules.get("flax.serialization")
  if module is not None and node_type not in _FLAX_TYPES:
    module.register_serialization_state(node_type, to_dict, from_dict)
    _FLAX_TYPES.add(node_type)


def make_leaf_numbers(leaf_paths: Sequence[str], numbers: Any) -> Any:
  """State with one number per leaf, or a plain empty vector if there is no leaf.

  `optax.tree.map_params` compares a state with the state of a tree without leaves. It accepts a
  plain array in place of a `LeafNumbers`, but not a `LeafNumbers` with different names.
  """
  if not leaf_paths:
    return jnp.zeros((0,), jnp.float32)
  return LeafNumbers(intern_names(tuple(leaf_paths)), numbers)


def get_structure(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
  """The structure of a tree. `None` and the like, in place of a leaf, count as leaves."""
  return jax.tree.structure(tree, is_leaf=_make_leaf_test(is_leaf))


def _make_leaf_test(is_leaf: Callable[[Any], bool] | None) -> Callable[[Any], bool]:
  def test(x: Any) -> bool:
    return paths.is_absent(x) or isinstance(x, ReshapedLeaf) or (is_leaf is not None and is_leaf(x))

  return test


def is_tree_like(
  structure: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Callable[..., bool]:
  """A function that tests whether something is a tree of this structure."""
  trivial = structure == jax.tree.structure(0)

  def test(x: Any) -> bool:
    if isinstance(x, LeafNumbers) or isinstance(x, (jax.Array, np.ndarray)):
      return False
    return not trivial and get_structure(x, is_leaf) == structure

  return test
