"""Spectra of small matrices: gradients of nuclear norms, polar factors."""

import jax
import jax.numpy as jnp
from jax import lax

from hina_optax.base import numerics
from hina_optax.base.numerics import Scalar
from hina_optax.grouped import xla_cpu

# Relative to the largest eigenvalue of a Gram matrix: what fp32 still resolves.
_CUTOFF = 1e-6
# Of Cholesky's diagonal, relative to its largest: below, a matrix is as good as singular.
_LEAST_PIVOT = 1e-2
# Smallest singular value, relative to the largest, that the reweighting tells from zero.
_FLOOR = 1e-3
_MUON_STEPS, _CUBIC_STEPS = 6, 3


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

  With `T T^T = A A^T` and `T^T (B^T B) T = Q S^2 Q^T`, the singular values of `B A` are `S`, and
  the gradients of `sum(w S)` are `B (T Q w/S Q^T T^T)` and `(B^T B T Q w/S Q^T T^-1) A`, with the
  pseudo-inverse where `A A^T` is singular (more rank than inputs).
  """
  down_size, up_size = _sizes(down), _sizes(up)
  down, up = down * numerics.reciprocal(down_size), up * numerics.reciprocal(up_size)
  left, left_inverse = _factor(down)
  right = jnp.swapaxes(left, -1, -2)
  values, vectors = _eigh(product(right, up, left))
  sigma, sigma_inverse = _root(values)
  weight = _weights(sigma, emphasis)
  turned = product(left, vectors) * (weight * sigma_inverse)[:, None, :]
  back = jnp.swapaxes(vectors, -1, -2)
  ratio = jnp.sqrt(down_size * numerics.reciprocal(up_size))
  for_down = product(up, turned, back, left_inverse)
  return for_down * numerics.reciprocal(ratio), product(turned, back, right) * ratio


def _factor(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`T` with `T T^T` the matrix, and its inverse: of Cholesky, and where one is singular, `eigh`.

  Cholesky's takes a tenth of the time.
  """
  lower, inverse = _cholesky(gram)
  pivots = jnp.diagonal(lower, axis1=-2, axis2=-1)
  regular = jnp.all(pivots > _LEAST_PIVOT * jnp.max(pivots, axis=-1, keepdims=True))
  return lax.cond(regular, lambda *found: found, lambda *_: _symmetric_root(gram), lower, inverse)


# Jitted, since NaN that leave an operation that is not are an error under `jax_debug_nans`.
@jax.jit
def _cholesky(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Lower factors and their inverses; 0 for what is not finite, as where a matrix is singular."""
  def factorize(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    lower = lax.linalg.cholesky(gram)
    one = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    return lower, lax.linalg.triangular_solve(lower, one, left_side=True, lower=True)

  lower, inverse = map(
    numerics.finite, xla_cpu.each_matrix(factorize, gram, side_by_side=False))
  return lower, inverse


def _symmetric_root(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
  values, vectors = _eigh(gram)
  root, inverse = (product(vectors * x[:, None, :], jnp.swapaxes(vectors, -1, -2))
                   for x in _root(values))
  return root, inverse


def _eigh(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Eigenvalues and eigenvectors of a batch."""
  def decompose(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    vectors, values = lax.linalg.eigh(matrices, symmetrize_input=False)
    return values, vectors

  # Made symmetric here at once, not in the loop for each.
  symmetric = (matrices + jnp.swapaxes(matrices, -1, -2)) / 2
  return xla_cpu.each_matrix(decompose, symmetric, side_by_side=True)


def _sizes(gram: jax.Array) -> jax.Array:
  return jnp.trace(gram, axis1=-2, axis2=-1)[:, None, None]


def _root(values: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Square roots of eigenvalues and their inverses; both 0 below the cut-off."""
  keep = values > _CUTOFF * jnp.max(values, axis=-1, keepdims=True)
  root = jnp.sqrt(jnp.where(keep, values, jnp.ones_like(values)))
  return jnp.where(keep, root, 0), jnp.where(keep, 1 / root, 0)


def _weights(sigma: jax.Array, emphasis: Scalar) -> jax.Array:
  largest = jnp.max(sigma, axis=-1, keepdims=True)
  relative = sigma * numerics.reciprocal(largest)
  return ((1 + _FLOOR) / (relative + _FLOOR)) ** (numerics.scalar(emphasis, sigma.dtype) - 1)


def polar_factors(x: jax.Array) -> jax.Array:
  """`U V^T` of each matrix of a batch: Muon's steep quintic to come near, the classical cubic."""
  tall = x.shape[-2] > x.shape[-1]
  y = jnp.swapaxes(x, -1, -2) if tall else x
  y = y * numerics.reciprocal(jnp.sqrt(jnp.sum(y * y, axis=(-2, -1), keepdims=True)))
  for _ in range(_MUON_STEPS):
    small = gram(y)
    y = 3.4445 * y + product(-4.7750 * small + 2.0315 * product(small, small), y)
  for _ in range(_CUBIC_STEPS):
    y = 1.5 * y - 0.5 * product(gram(y), y)
  return jnp.swapaxes(y, -1, -2) if tall else y
