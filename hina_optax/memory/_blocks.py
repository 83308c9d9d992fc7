"""Splits a leaf into blocks that share a scale, so that a sharded leaf stays in place."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# A block is split into the largest of these numbers of parts that divides it.
_PART_COUNTS = (8, 4, 2, 1)


def find_scales_shape(shape: tuple[int, ...], block: int) -> tuple[int, ...]:
  """Returns the shape of the scales: leading axes, number of blocks, axes of size 1.

  Blocks span as few trailing axes as hold `block` numbers.
  """
  if not shape:
    return ()
  axis = len(shape) - 1
  while axis > 0 and math.prod(shape[axis:]) < block:
    axis -= 1
  ones = (1,) * (len(shape) - axis - 1)
  trailing_size = math.prod(shape[axis + 1:])
  return (*shape[:axis], _count_blocks(shape[axis], trailing_size, block), *ones)


def _count_blocks(side: int, trailing_size: int, block: int) -> int:
  """Returns the number of blocks for `side` rows of `trailing_size` numbers.

  Blocks of whole rows are preferred, then blocks of equal length.
  """
  size = side * trailing_size
  lengths = [n for n in range(3 * block // 4, 3 * block // 2 + 1) if size % n == 0]
  row_lengths = [n for n in lengths if n % trailing_size == 0]
  if lengths:
    return size // min(row_lengths or lengths, key=lambda n: abs(n - block))
  return max(1, math.ceil(size / block))


class Blocking(NamedTuple):
  """How a leaf is split into blocks.

  Attributes:
    lead: leading axes; each place of them has its own blocks.
    blocks: number of blocks at each place.
    parts: number of parts of a block. The largest magnitude of a block is found from its parts.
    shape: leading axes, parts of all blocks, elements of a part.
  """

  lead: tuple[int, ...]
  blocks: int
  parts: int
  shape: tuple[int, ...]


def find_blocking(shape: tuple[int, ...], scales_shape: tuple[int, ...]) -> Blocking:
  """Returns the blocking of a leaf of `shape` whose scales have `scales_shape`."""
  # Scales may leave open which axis counts the blocks, if trailing axes have size 1. Every reading
  # gives the same blocks.
  axes = [axis for axis, n in enumerate(scales_shape) if n != 1]
  axis = axes[-1] if axes else 0
  lead, count, trailing = shape[:axis], math.prod(scales_shape[axis:]), shape[axis + 1:]
  if not shape or shape[axis] % count:
    length = math.ceil(math.prod(shape[axis:]) / count)
    return Blocking(lead, count, 1, (*lead, count, length))
  # Only one axis is split, so that a sharded leaf stays in place. Blocks are split into parts,
  # because parts may fall evenly on devices where whole blocks do not.
  side = shape[axis] // count
  parts = next(n for n in _PART_COUNTS if side % n == 0)
  return Blocking(lead, count, parts, (*lead, count * parts, side // parts, *trailing))


def to_blocks(x: jax.Array, blocking: Blocking) -> jax.Array:
  """Reshapes `x` into blocks, with zeros at the end of the last block if it is not full."""
  lead = blocking.lead
  missing = math.prod(blocking.shape[len(lead):]) - math.prod(x.shape[len(lead):])
  if missing:
    x = jnp.pad(x.reshape(*lead, -1), [(0, 0)] * len(lead) + [(0, missing)])
  return x.reshape(blocking.shape)


def from_blocks(blocks: jax.Array, blocking: Blocking, shape: tuple[int, ...]) -> jax.Array:
  """Reshapes blocks into a leaf of `shape`: the inverse of `to_blocks`."""
  lead = blocking.lead
  size = math.prod(shape[len(lead):])
  if math.prod(blocking.shape[len(lead):]) > size:
    blocks = blocks.reshape(*lead, -1)[..., :size]
  return blocks.reshape(shape)


def block_max(x: jax.Array, blocking: Blocking) -> jax.Array:
  """Returns the largest number of each block: `(*lead, blocks)`."""
  parts = jnp.max(x, axis=tuple(range(len(blocking.lead) + 1, len(blocking.shape))))
  return jnp.max(parts.reshape(*blocking.lead, blocking.blocks, blocking.parts), axis=-1)


def broadcast_to_parts(numbers: jax.Array, blocking: Blocking) -> jax.Array:
  """Repeats one number per block for each of its parts, with axes of size 1 for the elements."""
  parts = jnp.broadcast_to(numbers[..., None], (*numbers.shape, blocking.parts))
  axis_count = len(blocking.lead) + 1
  ones = [1] * (len(blocking.shape) - axis_count)
  return parts.reshape(*blocking.shape[:axis_count], *ones)
