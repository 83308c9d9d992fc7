"""The border of stacks: leaves joined into one array and taken out of it, in many small pieces.

XLA's passes are quadratic in the operands of one concatenation, and many of those for CPUs in the
instructions of one function.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hina_optax import _numerics

# Operands of one concatenation.
_CHUNK = 512
# Up to as many rows are taken out of a stack without a function for it.
_FEW = 8


def join(leaves: Sequence[Any], dtype: Any) -> jax.Array:
  """Leaves of one shape as the rows of one array, each flat."""
  rows = [_flat(x, dtype) for x in leaves]
  # The barrier keeps XLA from computing the concatenation again in each of its readers.
  while len(rows) > 1:
    rows = [
      lax.optimization_barrier(lax.concatenate(rows[i:i + _CHUNK], 0))
      for i in range(0, len(rows), _CHUNK)
    ]
  return rows[0].reshape(len(leaves), -1)


def _flat(x: Any, dtype: Any) -> jax.Array:
  # By lax, since the methods of arrays take three times as long to trace, once for each leaf.
  flat = lax.reshape(x if isinstance(x, jax.Array) else jnp.asarray(x), (np.size(x),))
  return flat if flat.dtype == dtype else lax.convert_element_type(flat, dtype)


def split(array: jax.Array) -> list[jax.Array]:
  """The rows of an array, each as an array of its own."""
  def at_once(array: jax.Array) -> list[jax.Array]:
    count, length = array.shape
    return list(lax.split(array.reshape(count * length), [length] * count))

  if len(array) <= _FEW:
    return at_once(array)
  return lax.platform_dependent(array, cpu=_split_in_calls, default=at_once)


def _split_in_calls(array: jax.Array) -> list[jax.Array]:
  """Rows of a stack, taken out by functions that XLA does not inline.

  XLA's CPU backend generates code for each slice, but once for those of equal functions: as many of
  them as each has slices.
  """
  # Of a known beginning XLA would make each call a function of its own.
  zero = jnp.minimum(lax.population_count(array[0, 0].astype(jnp.int32)), 0)
  count = len(array)
  most = max(_FEW, math.isqrt(count))
  return [row for begin in range(0, count, most)
          for row in _rows_from(array, zero + begin, min(most, count - begin))]


@functools.partial(_numerics.noinline, static_argnames="count")
def _rows_from(array: jax.Array, begin: jax.Array, count: int) -> list[jax.Array]:
  # Not of a flat array: what is computed on the way would look up the row of each element.
  rows = (lax.dynamic_slice_in_dim(array, begin + i, 1, allow_negative_indices=False)
          for i in range(count))
  return [lax.squeeze(row, (0,)) for row in rows]
