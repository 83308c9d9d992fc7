"""Spectra of small matrices: gradients of nuclear norms, polar factors, largest eigenvalues."""

import jax
import jax.numpy as jnp
from jax import lax

from hina_optax import _numerics
from hina_optax._numerics import Scalar

# Relative to the largest eigenvalue of a Gram matrix: what fp32 still resolves.
_CUTOFF = 1e-6
# Smallest singular value, relative to the largest, that the reweighting tells from zero.
_FLOOR = 1e-3
_MUON_STEPS, _CUBIC_STEPS = 6, 3
_LARGEST = 10


def product(*factors: jax.Array) -> jax.Array:
  """Matrix product in full precision."""
  result = factors[0]
  for factor in factors[1:]:
    result = jnp.matmul(result, factor, precision=lax.Precision.HIGHEST)
  return result


def gram(x: jax.Array) -> jax.Array:
  """`x x^T`."""
  return product(x, jnp.swapaxes(x, -1, -2))


def pair_kernels(
  down: jax.Array, up: jax.Array, emphasis: Scalar
) -> tuple[jax.Array, jax.Array]:
  """Rank x rank matrices that turn each factor into its gradient.

  With `T` the square root of `A A^T` and `T (B^T B) T = Q S^2 Q^T`, the singular values of `B A`
  are `S`, and the gradients of `sum(w S)` are `B (T Q w/S Q^T T)` and `(B^T B T Q w/S Q^T T^-1) A`,
  with the pseudo-inverse where `A A^T` is singular (more rank than inputs).
  """
  down_size, up_size = _sizes(down), _sizes(up)
  down, up = down * _numerics.reciprocal(down_size), up * _numerics.reciprocal(up_size)
  values, vectors = jnp.linalg.eigh(down)
  root, inverse = _root(values)
  left = product(vectors * root[:, None, :], jnp.swapaxes(vectors, -1, -2))
  left_inverse = product(vectors * inverse[:, None, :], jnp.swapaxes(vectors, -1, -2))
  values, vectors = jnp.linalg.eigh(product(left, up, left))
  sigma, sigma_inverse = _root(values)
  weight = _weights(sigma, emphasis)
  turned = product(left, vectors) * (weight * sigma_inverse)[:, None, :]
  back = jnp.swapaxes(vectors, -1, -2)
  ratio = jnp.sqrt(down_size * _numerics.reciprocal(up_size))
  for_down = product(up, turned, back, left_inverse)
  return for_down * _numerics.reciprocal(ratio), product(turned, back, left) * ratio


def _sizes(gram: jax.Array) -> jax.Array:
  return jnp.trace(gram, axis1=-2, axis2=-1)[:, None, None]


def _root(values: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Square roots of eigenvalues and their inverses; both 0 below the cut-off."""
  keep = values > _CUTOFF * jnp.max(values, axis=-1, keepdims=True)
  root = jnp.sqrt(jnp.where(keep, values, jnp.ones_like(values)))
  return jnp.where(keep, root, 0), jnp.where(keep, 1 / root, 0)


def _weights(sigma: jax.Array, emphasis: Scalar) -> jax.Array:
  largest = jnp.max(sigma, axis=-1, keepdims=True)
  relative = sigma * _numerics.reciprocal(largest)
  return ((1 + _FLOOR) / (relative + _FLOOR)) ** (_numerics.scalar(emphasis, sigma.dtype) - 1)


def polar_factor(x: jax.Array) -> jax.Array:
  """`U V^T` of a matrix: Muon's steep quintic to come near, the classical cubic to arrive."""
  tall = x.shape[0] > x.shape[1]
  y = (x.T if tall else x) * _numerics.reciprocal(_numerics.norm(x))
  for _ in range(_MUON_STEPS):
    small = gram(y)
    y = 3.4445 * y + product(-4.7750 * small + 2.0315 * product(small, small), y)
  for _ in range(_CUBIC_STEPS):
    y = 1.5 * y - 0.5 * product(gram(y), y)
  return y.T if tall else y


def energy_gradient(x: jax.Array) -> jax.Array:
  """`x` times the sum of the ten largest eigenvalues of its Gram matrix."""
  small = gram(x if x.shape[0] <= x.shape[1] else x.T)
  if small.shape[0] <= _LARGEST:
    return jnp.trace(small) * x
  return jnp.sum(jnp.linalg.eigvalsh(small)[-_LARGEST:]) * x
