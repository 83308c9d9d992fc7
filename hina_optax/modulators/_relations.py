"""How related the matrices of a tree are, from their shapes and their first elements."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hina_optax import _numerics, _visits

SAMPLE = 1000
_MOST_MATRICES = 1024
_MOST_RELATIONS = 100


def candidates(parameters: Any, places: Sequence[int]) -> dict[int, tuple[int, ...]]:
  """Places and shapes of the matrices among which relations are sought: the first 1,024."""
  chosen, found = set(places), {}
  for place, leaf in _visits.members(parameters):
    if place.index in chosen and len(leaf.shape) == 2 and leaf.size:
      found[place.index] = leaf.shape
  return dict(list(found.items())[:_MOST_MATRICES])


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


def first_accepted(compat: jax.Array, threshold: Any, leaf_total: int) -> jax.Array:
  """The original's choice: of the first pairs above the threshold, in order, each row's first."""
  limit = min(_MOST_RELATIONS, leaf_total * (leaf_total - 1) // 2)
  above = compat > _numerics.scalar(threshold, compat.dtype)
  order = jnp.cumsum(above.ravel().astype(jnp.int32)).reshape(above.shape)
  accepted = above & (order <= limit)
  found = jnp.take_along_axis(compat, jnp.argmax(accepted, axis=1)[:, None], axis=1)[:, 0]
  return jnp.where(jnp.any(accepted, axis=1), found, 0)


def strongest(compat: jax.Array, threshold: Any) -> jax.Array:
  """Each matrix's best compatibility above the threshold, whichever of a pair it is; else 0."""
  both = jnp.maximum(compat, compat.T)
  best = jnp.max(both, axis=1, initial=0.0)
  return jnp.where(best > _numerics.scalar(threshold, best.dtype), best, 0)


def _correlation(shapes: Sequence[tuple[int, ...]], sample: jax.Array) -> jax.Array:
  """Pearson correlation of each pair over the first `min(1000, sizes)` elements."""
  lengths = np.array([min(SAMPLE, rows * columns) for rows, columns in shapes])
  shared = np.minimum(lengths[:, None], lengths[None, :])
  result = jnp.zeros((len(shapes), len(shapes)), jnp.float32)
  for length in np.unique(shared):
    part = sample[:, :length]
    centred = part - jnp.mean(part, axis=1, keepdims=True)
    size = jnp.sqrt(jnp.sum(jnp.square(centred), axis=1, keepdims=True))
    unit = centred * _numerics.reciprocal(size)
    gram = jnp.matmul(unit, unit.T, precision=jax.lax.Precision.HIGHEST)
    result = jnp.where(jnp.asarray(shared == length), gram, result)
  return result


def first_elements(matrix: jax.Array) -> jax.Array:
  """The first 1,000 elements of a matrix in its order, flat or not, zeros behind them."""
  # Whole rows first, so that a sharded matrix is not gathered for its first elements.
  rows = matrix if matrix.ndim == 1 else matrix[: -(-SAMPLE // matrix.shape[1])]
  flat = rows.astype(jnp.float32).ravel()[:SAMPLE]
  return jnp.pad(flat, (0, SAMPLE - flat.size))
