"""What a formula can ask about its leaf: the shape, and stencils along the spatial axes.

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
  """The neighbours of all elements along one axis.

  Attributes:
    lower: the previous element along the axis; 0 where there is none.
    upper: the next element along the axis; 0 where there is none.
    is_first: true for elements without a lower neighbour.
    is_last: true for elements without an upper neighbour.
  """

  lower: Array
  upper: Array
  is_first: Array
  is_last: Array


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A leaf in its own shape.

  Attributes:
    shape: the shape of the leaf.
    axes: the axes along which neighbours are compared, counted from the front.
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
    """Brings an array of the leaf, as the formula gets it, to the shape of the leaf."""
    return x

  def ravel(self, x: Array) -> Array:
    """Inverse of `unravel`."""
    return x

  def compute_once(self, x: Array) -> Array:
    """`x`, computed once although several results depend on it.

    Without this, XLA may fuse the computation of `x` into each of its uses and repeat it there.
    """
    return lax.optimization_barrier(x)

  def recompute_unless(
    self, is_valid: Array, x: Array, compute: Callable[..., Array], *operands: Array
  ) -> Array:
    """`x` where `is_valid`, else `compute(*operands)`.

    The second is expensive and rarely needed. A platform may skip it where `x` is valid.
    """
    return jnp.where(is_valid, x, compute(*operands))

  def neighbours(self, x: Array, axes: tuple[int, ...]) -> Iterator[Neighbours]:
    """Yields the neighbours along each of `axes`."""
    # Each shift keeps the shape, and so the places where shards begin: only one place of an axis
    # crosses between devices. Slices of an array that is padded by two places would be shifted on
    # every device but the first.
    zero = jnp.zeros([], x.dtype)
    for axis in axes:
      index = lax.broadcasted_iota(jnp.int32, x.shape, axis)
      lower, upper = (
        lax.pad(x, zero, [(shift, -shift, 0) if a == axis else (0, 0, 0) for a in range(x.ndim)])
        for shift in (1, -1)
      )
      yield Neighbours(lower, upper, index == 0, index == x.shape[axis] - 1)

  def laplacian(self, x: Array) -> Array:
    """Second difference summed over the axes; a missing neighbour equals the element itself."""
    result = jnp.zeros_like(x)
    for neighbours in self.neighbours(x, self.axes):
      below, above = (jnp.where(on_border, x, y) for on_border, y in _sides(neighbours))
      result = result + ((above - x) - (x - below))
    return result

  def squared_differences(self, x: Array) -> Array:
    """Sum of the squared differences to the existing neighbours."""
    result = jnp.zeros_like(x)
    for neighbours in self.neighbours(x, self.axes):
      below, above = (jnp.where(on_border, jnp.zeros_like(x), y - x)
                      for on_border, y in _sides(neighbours))
      result = result + (jnp.square(below) + jnp.square(above))
    return result

  def box_mean(self, x: Array) -> Array:
    """Mean over three places along each axis; a missing neighbour equals the element itself."""
    for axis in self.axes:
      [neighbours] = self.neighbours(x, (axis,))
      below, above = (jnp.where(on_border, x, y) for on_border, y in _sides(neighbours))
      x = x + ((above - x) - (x - below)) / 3
    return x


def _sides(neighbours: Neighbours) -> Iterator[tuple[Array, Array]]:
  return zip((neighbours.is_first, neighbours.is_last), (neighbours.lower, neighbours.upper))


def make_leaf(x: Any, axes: tuple[int, ...] = ()) -> Leaf:
  """The `Leaf` that describes an array or a `ReshapedLeaf`."""
  if isinstance(x, ReshapedLeaf):
    return x.kind(x.shape, axes)
  return Leaf(tuple(jnp.shape(x)), axes)


@jax.tree_util.register_pytree_node_class
class ReshapedLeaf:
  """A leaf whose array does not have the leaf's own shape; the driver makes it for one platform.

  Attributes:
    array: the elements.
    shape: the shape of the leaf.
    kind: the subclass of `Leaf` that knows how the array is laid out.
  """

  def __init__(self, array: Any, shape: tuple[int, ...], kind: type[Leaf]):
    self.array, self.shape, self.kind = array, shape, kind

  def tree_flatten(self) -> tuple[tuple[Any], Any]:
    """The array is the only child."""
    return (self.array,), (self.shape, self.kind)

  @classmethod
  def tree_unflatten(cls, static: Any, children: Any) -> "ReshapedLeaf":
    """Inverse of `tree_flatten`."""
    return cls(children[0], *static)

  def read(self, beside: Any) -> Any:
    """The array, for a formula that reads it beside another array of the same leaf."""
    del beside
    return self.array


def get_array(x: Any) -> Any:
  """The array of a leaf, which may be a `ReshapedLeaf`."""
  return x.array if isinstance(x, ReshapedLeaf) else x


def read_array(x: Any, beside: Any) -> Any:
  """The array of a leaf, for a formula that also reads `beside`, another array of the leaf."""
  return x.read(beside) if isinstance(x, ReshapedLeaf) else x


def replace_array(x: Any, array: Any) -> Any:
  """The leaf `x` with `array` in place of its own array."""
  return ReshapedLeaf(array, x.shape, x.kind) if isinstance(x, ReshapedLeaf) else array
