"""How a leaf is cut into blocks that share a scale, in place where it is sharded."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Into how many parts a block is cut at most: as many as divide it.
_PARTS = (8, 4, 2, 1)


def scales_shape(shape: tuple[int, ...], block: int) -> tuple[int, ...]:
  """Leading axes, number of blocks, ones: blocks span as few trailing axes as hold `block`."""
  if not shape:
    return ()
  axis = len(shape) - 1
  while axis > 0 and math.prod(shape[axis:]) < block:
    axis -= 1
  rest = (1,) * (len(shape) - axis - 1)
  whole = math.prod(shape[axis + 1:])
  return (*shape[:axis], _block_count(shape[axis], whole, block), *rest)


def _block_count(side: int, rest: int, block: int) -> int:
  """How many blocks `side` times `rest` numbers are cut into: of whole rows or at least equal."""
  size = side * rest
  lengths = [n for n in range(3 * block // 4, 3 * block // 2 + 1) if size % n == 0]
  rows = [n for n in lengths if n % rest == 0]
  if lengths:
    return size // min(rows or lengths, key=lambda n: abs(n - block))
  return max(1, math.ceil(size / block))


class Cut(NamedTuple):
  """How a leaf is cut into blocks.

  Attributes:
    lead: leading axes, each place of which has its own blocks.
    blocks: how many at each place.
    parts: of a block, whose largest magnitudes are found first.
    shape: leading axes, parts of blocks, and their elements.
  """

  lead: tuple[int, ...]
  blocks: int
  parts: int
  shape: tuple[int, ...]


def cut(shape: tuple[int, ...], scales_shape: tuple[int, ...]) -> Cut:
  # Where trailing ones leave it open which axis counts the blocks, every reading cuts alike.
  used = [axis for axis, n in enumerate(scales_shape) if n != 1]
  axis = used[-1] if used else 0
  lead, count, rest = shape[:axis], math.prod(scales_shape[axis:]), shape[axis + 1:]
  if not shape or shape[axis] % count:
    length = math.ceil(math.prod(shape[axis:]) / count)
    return Cut(lead, count, 1, (*lead, count, length))
  # Only one axis is cut, so that a sharded leaf stays where it is, and finely, so that the pieces
  # also fall evenly on devices where blocks would not.
  side = shape[axis] // count
  parts = next(n for n in _PARTS if side % n == 0)
  return Cut(lead, count, parts, (*lead, count * parts, side // parts, *rest))


def to_blocks(x: jax.Array, cut: Cut) -> jax.Array:
  """`x` in the shape of its cut, zeros at the end where the last block is not full."""
  missing = math.prod(cut.shape[len(cut.lead):]) - math.prod(x.shape[len(cut.lead):])
  if missing:
    x = jnp.pad(x.reshape(*cut.lead, -1), [(0, 0)] * len(cut.lead) + [(0, missing)])
  return x.reshape(cut.shape)


def from_blocks(blocks: jax.Array, cut: Cut, shape: tuple[int, ...]) -> jax.Array:
  """The shape that was cut."""
  size = math.prod(shape[len(cut.lead):])
  if math.prod(cut.shape[len(cut.lead):]) > size:
    blocks = blocks.reshape(*cut.lead, -1)[..., :size]
  return blocks.reshape(shape)


def largest(x: jax.Array, cut: Cut) -> jax.Array:
  """The largest number of each block: `(*lead, count)`."""
  parts = jnp.max(x, axis=tuple(range(len(cut.lead) + 1, len(cut.shape))))
  return jnp.max(parts.reshape(*cut.lead, cut.blocks, cut.parts), axis=-1)


def spread(numbers: jax.Array, cut: Cut) -> jax.Array:
  """One number a block at each of its parts, with ones for their elements."""
  parts = jnp.broadcast_to(numbers[..., None], (*numbers.shape, cut.parts))
  lead = len(cut.lead) + 1
  return parts.reshape(*cut.shape[:lead], *[1] * (len(cut.shape) - lead))
