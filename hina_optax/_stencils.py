"""Stencils: what an element has in common with its neighbours along some axes of its leaf.

A leaf comes in its own shape, or flat. Flat leaves are several times faster on CPUs where the last
axis is short, as that of a LoRA factor: the innermost loop runs over all elements instead of
sixteen. Leaves in their own shape may be sharded: only a border crosses from device to device.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array


class Grid(NamedTuple):
  """Along which axes neighbours are compared.

  Attributes:
    shape: of the leaf, however it comes.
    axes: counted from the front.
  """

  shape: tuple[int, ...]
  axes: tuple[int, ...]


class Field(NamedTuple):
  """A leaf on which stencils act.

  Attributes:
    values: of the leaf. What else is computed from the leaf should read these too.
    grid: along which axes.
    frame: a flat leaf with zeros before and behind it; `None` where the leaf keeps its shape.
    reach: how many zeros on each side.
  """

  values: Array
  grid: Grid
  frame: Array | None = None
  reach: int = 0


def field(x: Array, grid: Grid) -> Field:
  """A leaf in its own shape, or flat."""
  if len(grid.shape) == 1 or x.ndim > 1:
    return Field(x, grid)
  reach = max(_strides(grid), default=0)
  # Without the first barrier arithmetic would be done on the way into the frame, with a branch for
  # each element; without the second the frame would be made again for each neighbour. A pad takes
  # twice as long on CPUs as a concatenation.
  x = lax.optimization_barrier(x)
  zeros = jnp.zeros((reach,), x.dtype)
  frame = lax.optimization_barrier(lax.concatenate([zeros, x, zeros], 0))
  return Field(x, grid, frame, reach)


class _Neighbours(NamedTuple):
  """Along one axis: the neighbours below and above, and where there is none (0 stands there)."""

  lower: Array
  upper: Array
  first: Array
  last: Array


def laplacian(leaf: Field, border: str = "replicate") -> Array:
  """Second difference summed over the axes.

  `border="replicate"` takes the missing neighbour to equal the element itself; `"zero"` gives a
  second difference of 0 along an axis on that axis's first and last place.
  """
  x = leaf.values
  result = jnp.zeros_like(x)
  for at in _neighbours(leaf):
    if border == "replicate":
      below, above = (jnp.where(edge, x, y) for edge, y in _sides(at))
      result = result + ((above - x) - (x - below))
    else:
      inside = (at.upper - x) - (x - at.lower)
      result = result + jnp.where(at.first | at.last, jnp.zeros_like(x), inside)
  return result


def squared_differences(leaf: Field) -> Array:
  """Sum over the existing neighbours of the squared difference to that neighbour."""
  x = leaf.values
  result = jnp.zeros_like(x)
  for at in _neighbours(leaf):
    below, above = (jnp.where(edge, jnp.zeros_like(x), y - x) for edge, y in _sides(at))
    result = result + (jnp.square(below) + jnp.square(above))
  return result


def absolute_differences(leaf: Field) -> Array:
  """Sum over the axes of `|x[i] - x[i-1]|`, 0 in the first place."""
  x = leaf.values
  result = jnp.zeros_like(x)
  for at in _neighbours(leaf):
    result = result + jnp.where(at.first, jnp.zeros_like(x), jnp.abs(x - at.lower))
  return result


def box_mean(x: Array, grid: Grid, border: str = "replicate") -> Array:
  """Mean over three places along each axis; `border="zero"` counts missing ones as 0."""
  for axis in grid.axes:
    [at] = _neighbours(field(x, Grid(grid.shape, (axis,))))
    if border == "replicate":
      below, above = (jnp.where(edge, x, y) for edge, y in _sides(at))
      x = x + ((above - x) - (x - below)) / 3
    else:
      below, above = (jnp.where(edge, jnp.zeros_like(x), y) for edge, y in _sides(at))
      x = (x + below + above) / 3
  return x


def _sides(at: _Neighbours) -> Iterator[tuple[Array, Array]]:
  return zip((at.first, at.last), (at.lower, at.upper))


def _neighbours(leaf: Field) -> Iterator[_Neighbours]:
  """For each axis."""
  if leaf.frame is None:
    return _shaped_neighbours(leaf.values, leaf.grid)
  return _flat_neighbours(leaf, leaf.frame)


def _shaped_neighbours(x: Array, grid: Grid) -> Iterator[_Neighbours]:
  # Each shift keeps the shape, and with it where shards begin: one place of an axis crosses. Slices
  # of a frame that is larger by two would lie elsewhere on every device but the first.
  zero = jnp.zeros([], x.dtype)
  for axis in grid.axes:
    places = lax.broadcasted_iota(jnp.int32, x.shape, axis)
    lower, upper = (
      lax.pad(x, zero, [(by, -by, 0) if a == axis else (0, 0, 0) for a in range(x.ndim)])
      for by in (1, -1)
    )
    yield _Neighbours(lower, upper, places == 0, places == x.shape[axis] - 1)


def _flat_neighbours(leaf: Field, frame: Array) -> Iterator[_Neighbours]:
  # Slices of one frame, so that no branch stands in the innermost loop.
  count = leaf.values.size
  places = lax.iota(jnp.uint32, count)
  for axis, stride in zip(leaf.grid.axes, _strides(leaf.grid)):
    size = leaf.grid.shape[axis]
    if size * stride == count:
      first, last = places < np.uint32(stride), places >= np.uint32(count - stride)
    else:
      along = lax.rem(lax.div(places, _like(places, stride)), _like(places, size))
      first, last = along == 0, along == np.uint32(size - 1)
    lower, upper = (
      lax.slice(frame, [leaf.reach + shift], [leaf.reach + shift + count])
      for shift in (-stride, stride)
    )
    yield _Neighbours(lower, upper, first, last)


def _strides(grid: Grid) -> list[int]:
  """For each axis how far apart neighbours lie in a flat leaf."""
  return [int(np.prod(grid.shape[axis + 1:])) for axis in grid.axes]


def _like(places: Array, number: int) -> Array:
  return jnp.full_like(places, number)
