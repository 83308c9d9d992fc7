"""What a formula may ask of the leaf it works on: its shape, and stencils along its spatial axes.

A stencil combines an element with its neighbours along some axes of the leaf.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


class Neighbours(NamedTuple):
  """Along one axis: the neighbours below and above, and where there is none (0 stands there)."""

  lower: Array
  upper: Array
  first: Array
  last: Array


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A leaf in its own shape.

  Attributes:
    shape: of the leaf.
    axes: along which neighbours are compared, counted from the front.
  """

  shape: tuple[int, ...]
  axes: tuple[int, ...] = ()

  @property
  def size(self) -> int:
    """Number of elements."""
    size = 1
    for side in self.shape:
      size *= side
    return size

  def unravel(self, x: Array) -> Array:
    """`x` in the shape of the leaf."""
    return x

  def ravel(self, x: Array) -> Array:
    """Inverse of `unravel`."""
    return x

  def reused(self, x: Array) -> Array:
    """`x`, which several results are computed from, so that it should be computed once."""
    return lax.optimization_barrier(x)

  def seldom(
    self, fits: Array, short: Array, long: Callable[..., Array], *operands: Array
  ) -> Array:
    """`short` where it `fits`, else `long(*operands)`, which is seldom needed."""
    return jnp.where(fits, short, long(*operands))

  def neighbours(self, x: Array, axes: tuple[int, ...]) -> Iterator[Neighbours]:
    """For each of `axes`."""
    # Each shift keeps the shape, and with it where shards begin: one place of an axis crosses
    # between devices. Slices of a frame that is larger by two would lie elsewhere on every device
    # but the first.
    zero = jnp.zeros([], x.dtype)
    for axis in axes:
      places = lax.broadcasted_iota(jnp.int32, x.shape, axis)
      lower, upper = (
        lax.pad(x, zero, [(by, -by, 0) if a == axis else (0, 0, 0) for a in range(x.ndim)])
        for by in (1, -1)
      )
      yield Neighbours(lower, upper, places == 0, places == x.shape[axis] - 1)

  def laplacian(self, x: Array) -> Array:
    """Second difference summed over the axes; a missing neighbour equals the element itself."""
    result = jnp.zeros_like(x)
    for at in self.neighbours(x, self.axes):
      below, above = (jnp.where(edge, x, y) for edge, y in _sides(at))
      result = result + ((above - x) - (x - below))
    return result

  def squared_differences(self, x: Array) -> Array:
    """Sum over the existing neighbours of the squared difference to that neighbour."""
    result = jnp.zeros_like(x)
    for at in self.neighbours(x, self.axes):
      below, above = (jnp.where(edge, jnp.zeros_like(x), y - x) for edge, y in _sides(at))
      result = result + (jnp.square(below) + jnp.square(above))
    return result

  def box_mean(self, x: Array) -> Array:
    """Mean over three places along each axis; a missing neighbour equals the element itself."""
    for axis in self.axes:
      [at] = self.neighbours(x, (axis,))
      below, above = (jnp.where(edge, x, y) for edge, y in _sides(at))
      x = x + ((above - x) - (x - below)) / 3
    return x


def _sides(at: Neighbours) -> Iterator[tuple[Array, Array]]:
  return zip((at.first, at.last), (at.lower, at.upper))


def leaf_of(x: Any, axes: tuple[int, ...] = ()) -> Leaf:
  """The facts of an array, carried or not."""
  if isinstance(x, Carried):
    return x.kind(x.shape, axes)
  return Leaf(tuple(jnp.shape(x)), axes)


@jax.tree_util.register_pytree_node_class
class Carried:
  """A leaf whose array is not in the leaf's own shape; the driver makes it for one platform.

  Attributes:
    array: the numbers.
    shape: of the leaf.
    kind: the class of `Leaf` that knows how the array lies.
  """

  def __init__(self, array: Any, shape: tuple[int, ...], kind: type[Leaf]):
    self.array, self.shape, self.kind = array, shape, kind

  def tree_flatten(self) -> tuple[tuple[Any], Any]:
    """Its array is its only child."""
    return (self.array,), (self.shape, self.kind)

  @classmethod
  def tree_unflatten(cls, static: Any, children: Any) -> "Carried":
    """Inverse of `tree_flatten`."""
    return cls(children[0], *static)


  def read(self, beside: Any) -> Any:
    """Its array, for a formula that reads it together with another array of the leaf."""
    del beside
    return self.array


def array_of(x: Any) -> Any:
  """The array of a leaf, carried or not."""
  return x.array if isinstance(x, Carried) else x


def read(x: Any, beside: Any) -> Any:
  """The array of a leaf that is read beside another."""
  return x.read(beside) if isinstance(x, Carried) else x


def like(array: Any, x: Any) -> Any:
  """`array` in the place of the leaf `x`."""
  return Carried(array, x.shape, x.kind) if isinstance(x, Carried) else array
