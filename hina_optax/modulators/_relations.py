"""The compatibility of the matrices of a tree, from their shapes and their first elements."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hina_optax.base import numerics

SAMPLE_SIZE = 1000
_MAX_MATRICES = 1024


def find_matrices(places: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> list[int]:
  """The indices of the tree's first 1,024 matrices, in the order of the tree.

  Relations are only sought among these. Empty matrices do not count.
  """
  matrices = [i for i, shape in enumerate(shapes) if len(shape) == 2 and 0 not in shape]
  return sorted(matrices, key=lambda i: places[i])[:_MAX_MATRICES]


def compatibility(shapes: Sequence[tuple[int, ...]], sample: jax.Array) -> jax.Array:
  """Compatibility of each pair `i < j` of matrices, 0 elsewhere: shape (n, n).

  It is 0.7 times the share of the four comparisons of sides that hold, plus 0.3 times the absolute
  correlation of the first elements, which are the rows of `sample`. It is 0 where no side agrees.
  """
  rows, columns = np.array(shapes).T
  equal_sides = sum(
    (a[:, None] == b[None, :]).astype(np.float32)
    for a, b in ((columns, rows), (rows, columns), (columns, columns), (rows, rows))
  )
  share = np.triu(equal_sides / 4, 1).astype(np.float32)
  has_equal_side = jnp.asarray(share > 0)
  correlation = jnp.abs(_correlate(shapes, sample))
  return jnp.where(has_equal_side, 0.7 * jnp.asarray(share) + 0.3 * correlation, 0)


def find_strongest(compat: jax.Array, threshold: Any) -> jax.Array:
  """Each matrix's highest compatibility with another one, or 0 if it is not above the threshold."""
  symmetric = jnp.maximum(compat, compat.T)
  best = jnp.max(symmetric, axis=1, initial=0.0)
  return jnp.where(best > numerics.scalar(threshold, best.dtype), best, 0)


def _correlate(shapes: Sequence[tuple[int, ...]], sample: jax.Array) -> jax.Array:
  """Pearson correlation of each pair over the first `min(1000, sizes)` elements."""
  lengths = np.array([min(SAMPLE_SIZE, rows * columns) for rows, columns in shapes])
  common_lengths = np.minimum(lengths[:, None], lengths[None, :])
  result = jnp.zeros((len(shapes), len(shapes)), jnp.float32)
  for length in np.unique(common_lengths):
    shortened = sample[:, :length]
    centred = shortened - jnp.mean(shortened, axis=1, keepdims=True)
    norm = jnp.sqrt(jnp.sum(jnp.square(centred), axis=1, keepdims=True))
    unit = centred * numerics.reciprocal(norm)
    gram = jnp.matmul(unit, unit.T, precision=jax.lax.Precision.HIGHEST)
    result = jnp.where(jnp.asarray(common_lengths == length), gram, result)
  return result


def first_elements(matrix: jax.Array) -> jax.Array:
  """The first 1,000 elements of a matrix in row-major order, padded with zeros."""
  # Rows are sliced first, so that a sharded matrix is not gathered as a whole.
  rows = matrix[: -(-SAMPLE_SIZE // matrix.shape[1])]
  flat = rows.astype(jnp.float32).ravel()[:SAMPLE_SIZE]
  return jnp.pad(flat, (0, SAMPLE_SIZE - flat.size))
