"""How related the matrices of a tree are, from their shapes and their first elements."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hina_optax.base import numerics

SAMPLE = 1000
_MOST_MATRICES = 1024


def candidates(places: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> list[int]:
  """Which of some leaves are matrices among which relations are sought: the tree's first 1,024."""
  found = [i for i, shape in enumerate(shapes) if len(shape) == 2 and 0 not in shape]
  return sorted(found, key=lambda i: places[i])[:_MOST_MATRICES]


def compatibility(shapes: Sequence[tuple[int, ...]], sample: jax.Array) -> jax.Array:
  """Compatibility of each pair `i < j` of matrices, 0 elsewhere: shape (n, n).

  0.7 times the share of four comparisons of sides that hold, plus 0.3 times the absolute
  correlation of the first elements, the rows of `sample`; 0 where no side agrees.
  """
  rows, columns = np.array(shapes).T
  agree = sum(
    (a[:, None] == b[None, :]).astype(np.float32)
    for a, b in ((columns, rows), (rows, columns), (columns, columns), (rows, rows))
  )
  share = np.triu(agree / 4, 1).astype(np.float32)
  related = jnp.asarray(share > 0)
  together = jnp.abs(_correlation(shapes, sample))
  return jnp.where(related, 0.7 * jnp.asarray(share) + 0.3 * together, 0)


def strongest(compat: jax.Array, threshold: Any) -> jax.Array:
  """Each matrix's best compatibility above the threshold, whichever of a pair it is; else 0."""
  both = jnp.maximum(compat, compat.T)
  best = jnp.max(both, axis=1, initial=0.0)
  return jnp.where(best > numerics.scalar(threshold, best.dtype), best, 0)


def _correlation(shapes: Sequence[tuple[int, ...]], sample: jax.Array) -> jax.Array:
  """Pearson correlation of each pair over the first `min(1000, sizes)` elements."""
  lengths = np.array([min(SAMPLE, rows * columns) for rows, columns in shapes])
  shared = np.minimum(lengths[:, None], lengths[None, :])
  result = jnp.zeros((len(shapes), len(shapes)), jnp.float32)
  for length in np.unique(shared):
    part = sample[:, :length]
    centred = part - jnp.mean(part, axis=1, keepdims=True)
    size = jnp.sqrt(jnp.sum(jnp.square(centred), axis=1, keepdims=True))
    unit = centred * numerics.reciprocal(size)
    gram = jnp.matmul(unit, unit.T, precision=jax.lax.Precision.HIGHEST)
    result = jnp.where(jnp.asarray(shared == length), gram, result)
  return result


def first_elements(matrix: jax.Array) -> jax.Array:
  """The first 1,000 elements of a matrix in its order, zeros behind them."""
  # Whole rows first, so that a sharded matrix is not gathered for its first elements.
  rows = matrix[: -(-SAMPLE // matrix.shape[1])]
  flat = rows.astype(jnp.float32).ravel()[:SAMPLE]
  return jnp.pad(flat, (0, SAMPLE - flat.size))
