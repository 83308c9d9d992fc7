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
from jax.experimental.xla_metadata import set_xla_metadata

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
  count, length = array.shape
  flat = array.reshape(count * length)

  def at_once(flat: jax.Array) -> list[jax.Array]:
    return list(lax.split(flat, [length] * count))

  if count <= _FEW:
    return at_once(flat)
  return lax.platform_dependent(
    flat, cpu=functools.partial(_split_in_calls, count=count, length=length), default=at_once)


def _split_in_calls(flat: jax.Array, count: int, length: int) -> list[jax.Array]:
  """Rows of a flat stack, taken out by functions that XLA does not inline.

  XLA's CPU backend generates code for each slice, but once for those of equal functions: as many of
  them as each has slices.
  """
  # Of a known beginning XLA would make each call a function of its own.
  zero = jnp.minimum(lax.population_count(flat[0].astype(jnp.int32)), 0)
  most = max(_FEW, math.isqrt(count))
  with set_xla_metadata(inlineable="false"):
    return [row for begin in range(0, count, most)
            for row in _rows_from(flat, zero + begin * length, min(most, count - begin), length)]


@functools.partial(jax.jit, static_argnames=("count", "length"))
def _rows_from(flat: jax.Array, begin: jax.Array, count: int, length: int) -> list[jax.Array]:
  return [
    lax.dynamic_slice_in_dim(flat, begin + i * length, length, allow_negative_indices=False)
    for i in range(count)
  ]
