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


class _Neighbours(NamedTuple):
  """Along one axis: the neighbours below and above, and where there is none (0 stands there)."""

  lower: Array
  upper: Array
  first: Array
  last: Array


def laplacian(x: Array, grid: Grid, border: str = "replicate") -> Array:
  """Second difference summed over the axes.

  `border="replicate"` takes the missing neighbour to equal the element itself; `"zero"` gives a
  second difference of 0 along an axis on that axis's first and last place.
  """
  result = jnp.zeros_like(x)
  for at in _neighbours(x, grid):
    if border == "replicate":
      below, above = (jnp.where(edge, x, y) for edge, y in _sides(at))
      result = result + ((above - x) - (x - below))
    else:
      inside = (at.upper - x) - (x - at.lower)
      result = result + jnp.where(at.first | at.last, jnp.zeros_like(x), inside)
  return result


def squared_differences(x: Array, grid: Grid) -> Array:
  """Sum over the existing neighbours of the squared difference to that neighbour."""
  result = jnp.zeros_like(x)
  for at in _neighbours(x, grid):
    below, above = (jnp.where(edge, jnp.zeros_like(x), y - x) for edge, y in _sides(at))
    result = result + (jnp.square(below) + jnp.square(above))
  return result


def absolute_differences(x: Array, grid: Grid) -> Array:
  """Sum over the axes of `|x[i] - x[i-1]|`, 0 in the first place."""
  result = jnp.zeros_like(x)
  for at in _neighbours(x, grid):
    result = result + jnp.where(at.first, jnp.zeros_like(x), jnp.abs(x - at.lower))
  return result


def box_mean(x: Array, grid: Grid, border: str = "replicate") -> Array:
  """Mean over three places along each axis; `border="zero"` counts missing ones as 0."""
  for axis in grid.axes:
    [at] = _neighbours(x, Grid(grid.shape, (axis,)))
    if border == "replicate":
      below, above = (jnp.where(edge, x, y) for edge, y in _sides(at))
      x = x + ((above - x) - (x - below)) / 3
    else:
      below, above = (jnp.where(edge, jnp.zeros_like(x), y) for edge, y in _sides(at))
      x = (x + below + above) / 3
  return x


def _sides(at: _Neighbours) -> Iterator[tuple[Array, Array]]:
  return zip((at.first, at.last), (at.lower, at.upper))


def _neighbours(x: Array, grid: Grid) -> Iterator[_Neighbours]:
  """For each axis."""
  if len(grid.shape) > 1 and x.ndim == 1:
    return _flat_neighbours(x, grid)
  return _shaped_neighbours(x, grid)


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


def _flat_neighbours(x: Array, grid: Grid) -> Iterator[_Neighbours]:
  # Slices of one frame, so that no branch stands in the innermost loop.
  strides = [int(np.prod(grid.shape[axis + 1:])) for axis in grid.axes]
  reach = max(strides, default=0)
  frame = lax.pad(x, jnp.zeros([], x.dtype), [(reach, reach, 0)])
  places = lax.iota(jnp.uint32, x.size)
  for axis, stride in zip(grid.axes, strides):
    size = grid.shape[axis]
    if size * stride == x.size:
      first, last = places < np.uint32(stride), places >= np.uint32(x.size - stride)
    else:
      along = lax.rem(lax.div(places, _like(places, stride)), _like(places, size))
      first, last = along == 0, along == np.uint32(size - 1)
    lower, upper = (
      lax.slice(frame, [reach + shift], [reach + shift + x.size]) for shift in (-stride, stride)
    )
    yield _Neighbours(lower, upper, first, last)


def _like(places: Array, number: int) -> Array:
  return jnp.full_like(places, number)
