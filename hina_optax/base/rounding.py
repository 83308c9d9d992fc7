"""Rounding to fewer bits: to the nearest value, or up or down at random so that the mean is exact.

The randomness is an integer hash of the seed, the step, the leaf and the position in the leaf. It
is computed where it is used, element by element, so it costs no pass over memory and no key of
`jax.random`, and a sharded leaf draws the same noise as an unsharded one.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


class Key(NamedTuple):
  """What tells one stream of noise from another: two uint32 scalars."""

  first: Array
  second: Array

  def fold(self, index: int) -> "Key":
    """The key of leaf `index`, known when the program is built: two scalar operations a leaf."""
    word = _mix_int(index + 1)
    return Key(self.first ^ _word(word), self.second + _word(_mix_int(word ^ _GOLDEN)))


def seed_word(seed: Any) -> Array:
  """A seed as a uint32 scalar: from an int, or from any traced or concrete scalar array."""
  if isinstance(seed, (int, np.integer)):
    return jnp.asarray(_word(int(seed)))
  return jnp.asarray(seed).astype(jnp.uint32)


def key_of(seed: Array, step: Array, purpose: int) -> Key:
  """The key of one step of one wrapper; `purpose` keeps wrappers with equal seeds apart."""
  word = _mix(seed ^ _word(_mix_int(purpose)))
  word = _mix(word + step.astype(jnp.uint32) * _word(_GOLDEN))
  return Key(word, _mix(word ^ _word(_GOLDEN)))


def noise(shape: tuple[int, ...], at: Key) -> Array:
  """Uniform uint32 noise of `shape`."""
  # The second word enters between the rounds: else two keys would give one sequence, shifted.
  word = _position(shape) ^ at.first
  word = (word ^ (word >> 16)) * _word(0x85EBCA6B) + at.second
  word = (word ^ (word >> 13)) * _word(0xC2B2AE35)
  return word ^ (word >> 16)


def uniform(shape: tuple[int, ...], at: Key) -> Array:
  """Uniform fp32 noise in [0, 1), in steps of 2^-24."""
  return (noise(shape, at) >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


# Called outside of jit, one program in place of some twenty.
@functools.partial(jax.jit, static_argnums=1)
def round_to(x: Array, dtype: Any, at: Key | None) -> Array:
  """`x` in `dtype` (fp32, bf16 or f16): to the nearest value, or with `at` up or down at random.

  At random, the mean over many draws is `x`. Infinite values and NaN pass. A finite value beyond
  the range of `dtype` becomes the largest finite one. fp64 is cut to fp32 first, by the nearest.
  """
  dtype = jnp.dtype(dtype)
  if x.dtype.itemsize <= dtype.itemsize:
    return x.astype(dtype)
  finite = jnp.isfinite(x)
  top = jnp.asarray(float(jnp.finfo(dtype).max), x.dtype)
  inside = jnp.where(finite, lax.clamp(-top, x, top), x).astype(jnp.float32)
  if at is None or dtype == jnp.float32:
    return inside.astype(dtype)
  draw = noise(x.shape, at)
  rounded = _cut(inside, draw, 16) if dtype == jnp.bfloat16 else _half(inside, draw)
  return jnp.where(finite, rounded, inside).astype(dtype)


def _cut(x: Array, draw: Array, bits: int) -> Array:
  """Adds random bits below those that are kept, and cuts them off (Zamirai et al., 2010.06192)."""
  pattern = lax.bitcast_convert_type(x, jnp.uint32) + (draw >> (32 - bits))
  return lax.bitcast_convert_type((pattern >> bits) << bits, jnp.float32)


def _half(x: Array, draw: Array) -> Array:
  # Below 2^-14 f16 is a fixed grid of 2^-24: its last bit no longer moves with the exponent.
  steps = jnp.abs(x) * jnp.float32(2.0**24)
  low = jnp.floor(steps)
  chance = ((steps - low) * jnp.float32(2.0**32)).astype(jnp.uint32)
  fixed = jnp.copysign((low + (draw < chance).astype(jnp.float32)) * jnp.float32(2.0**-24), x)
  return jnp.where(jnp.abs(x) < jnp.float32(2.0**-14), fixed, _cut(x, draw, 13))


def _position(shape: tuple[int, ...]) -> Array:
  """The place of each element in row-major order, from its coordinates: no gather when sharded."""
  place, stride = jnp.zeros(shape, jnp.uint32), 1
  for axis in reversed(range(len(shape))):
    place = place + lax.broadcasted_iota(jnp.uint32, shape, axis) * _word(stride)
    stride *= shape[axis]
  return place


def _mix(word: Array) -> Array:
  """The finalizer of MurmurHash3 (Appleby, public domain): every bit reaches every bit."""
  word = (word ^ (word >> 16)) * _word(0x85EBCA6B)
  word = (word ^ (word >> 13)) * _word(0xC2B2AE35)
  return word ^ (word >> 16)


def _mix_int(word: int) -> int:
  """`_mix` of a number that is known when the program is built."""
  word = ((word ^ (word >> 16)) * 0x85EBCA6B) & _WORD
  word = ((word ^ (word >> 13)) * 0xC2B2AE35) & _WORD
  return word ^ (word >> 16)


def _word(value: int) -> np.uint32:
  return np.uint32(value & _WORD)
