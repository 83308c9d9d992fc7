"""Rounding to fewer bits: to the nearest value, or at random with an exact mean.

The random bits are an integer hash of the seed, the step, the leaf and the position in the leaf.
They are computed where they are used, element by element. So they cost no pass over memory and no
key of `jax.random`, and a sharded leaf draws the same bits as an unsharded one.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

_WORD_MASK = 0xFFFFFFFF
_GOLDEN_RATIO = 0x9E3779B9


class Key(NamedTuple):
  """Identifies one stream of random bits: two uint32 scalars."""

  first: Array
  second: Array

  def fold(self, index: int) -> "Key":
    """The key of the leaf at `index`, which is static: two scalar operations per leaf."""
    word = _mix_int(index + 1)
    return Key(self.first ^ _word(word), self.second + _word(_mix_int(word ^ _GOLDEN_RATIO)))


def seed_word(seed: Any) -> Array:
  """A seed as a uint32 scalar, from an int or from a scalar array, traced or concrete."""
  if isinstance(seed, (int, np.integer)):
    return jnp.asarray(_word(int(seed)))
  return jnp.asarray(seed).astype(jnp.uint32)


def make_key(seed: Array, step: Array, purpose: int) -> Key:
  """The key of one step. A different `purpose` gives wrappers with equal seeds different bits."""
  word = _mix(seed ^ _word(_mix_int(purpose)))
  word = _mix(word + step.astype(jnp.uint32) * _word(_GOLDEN_RATIO))
  return Key(word, _mix(word ^ _word(_GOLDEN_RATIO)))


def random_bits(shape: tuple[int, ...], key: Key) -> Array:
  """An array of `shape` of uniform uint32 numbers."""
  # The second word enters between the rounds. Otherwise two keys would give the same sequence,
  # shifted.
  word = _row_major_index(shape) ^ key.first
  word = (word ^ (word >> 16)) * _word(0x85EBCA6B) + key.second
  word = (word ^ (word >> 13)) * _word(0xC2B2AE35)
  return word ^ (word >> 16)


def uniform(shape: tuple[int, ...], key: Key) -> Array:
  """An array of `shape` of uniform fp32 numbers in [0, 1), in steps of 2^-24."""
  return (random_bits(shape, key) >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


# Jitted so that a call outside of jit runs one program and not about twenty.
@functools.partial(jax.jit, static_argnums=1)
def round_to(x: Array, dtype: Any, key: Key | None) -> Array:
  """Rounds `x` to `dtype` (fp32, bf16 or f16): to the nearest value, or at random with a `key`.

  When rounding at random, the mean over many draws is `x`. Infinite values and NaN pass. A finite
  value beyond the range of `dtype` becomes the largest finite one. fp64 is first rounded to the
  nearest fp32 value.
  """
  dtype = jnp.dtype(dtype)
  if x.dtype.itemsize <= dtype.itemsize:
    return x.astype(dtype)
  finite = jnp.isfinite(x)
  largest = jnp.asarray(float(jnp.finfo(dtype).max), x.dtype)
  clamped = jnp.where(finite, lax.clamp(-largest, x, largest), x).astype(jnp.float32)
  if key is None or dtype == jnp.float32:
    return clamped.astype(dtype)
  bits = random_bits(x.shape, key)
  rounded = (_round_mantissa(clamped, bits, 16) if dtype == jnp.bfloat16
             else _round_to_f16(clamped, bits))
  return jnp.where(finite, rounded, clamped).astype(dtype)


def _round_mantissa(x: Array, bits: Array, dropped: int) -> Array:
  """Adds random bits to the lowest `dropped` ones and truncates (Zamirai et al., 2010.06192)."""
  pattern = lax.bitcast_convert_type(x, jnp.uint32) + (bits >> (32 - dropped))
  return lax.bitcast_convert_type((pattern >> dropped) << dropped, jnp.float32)


def _round_to_f16(x: Array, bits: Array) -> Array:
  # Below 2^-14, the subnormal range of f16, its values are the multiples of 2^-24.
  steps = jnp.abs(x) * jnp.float32(2.0**24)
  low = jnp.floor(steps)
  threshold = ((steps - low) * jnp.float32(2.0**32)).astype(jnp.uint32)
  rounded = (low + (bits < threshold).astype(jnp.float32)) * jnp.float32(2.0**-24)
  subnormal = jnp.copysign(rounded, x)
  return jnp.where(jnp.abs(x) < jnp.float32(2.0**-14), subnormal, _round_mantissa(x, bits, 13))


def _row_major_index(shape: tuple[int, ...]) -> Array:
  """The row-major index of each element.

  It is computed from the coordinates, so that a sharded leaf needs no gather.
  """
  index, stride = jnp.zeros(shape, jnp.uint32), 1
  for axis in reversed(range(len(shape))):
    index = index + lax.broadcasted_iota(jnp.uint32, shape, axis) * _word(stride)
    stride *= shape[axis]
  return index


def _mix(word: Array) -> Array:
  """The finalizer of MurmurHash3 (Appleby, public domain): each bit influences every bit."""
  word = (word ^ (word >> 16)) * _word(0x85EBCA6B)
  word = (word ^ (word >> 13)) * _word(0xC2B2AE35)
  return word ^ (word >> 16)


def _mix_int(word: int) -> int:
  """`_mix` of a static number."""
  word = ((word ^ (word >> 16)) * 0x85EBCA6B) & _WORD_MASK
  word = ((word ^ (word >> 13)) * 0xC2B2AE35) & _WORD_MASK
  return word ^ (word >> 16)


def _word(value: int) -> np.uint32:
  return np.uint32(value & _WORD_MASK)
