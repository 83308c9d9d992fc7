"""Spectra of small matrices: gradients of nuclear norms, polar factors."""

import jax
import jax.numpy as jnp
from jax import lax

from hina_optax.base import numerics
from hina_optax.base.numerics import Scalar
from hina_optax.grouped import xla_cpu

# The smallest eigenvalue of a Gram matrix, relative to the largest, that fp32 resolves.
_CUTOFF = 1e-6
# A matrix with a smaller pivot in its Cholesky factor, relative to the largest, counts as singular.
_MIN_PIVOT = 1e-2
# The smallest singular value, relative to the largest, that the reweighting tells from zero.
_FLOOR = 1e-3
_MUON_STEPS, _CUBIC_STEPS = 6, 3


def product(*factors: jax.Array) -> jax.Array:
  """Matrix product in full precision."""
  result = factors[0]
  for factor in factors[1:]:
    result = jnp.matmul(result, factor, precision=lax.Precision.HIGHEST)
  return result


def gram_matrix(x: jax.Array) -> jax.Array:
  """`x x^T` in full precision."""
  return product(x, jnp.swapaxes(x, -1, -2))


def pair_kernels(
  down: jax.Array, up: jax.Array, emphasis: Scalar
) -> tuple[jax.Array, jax.Array]:
  """Rank x rank matrices that turn each factor into its gradient.

  `down` holds the Gram matrices `A A^T`, and `up` the Gram matrices `B^T B`.

  With `T T^T = A A^T` and `T^T (B^T B) T = Q S^2 Q^T`, the singular values of `B A` are `S`, and
  the gradients of `sum(w S)` are `B (T Q w/S Q^T T^T)` and `(B^T B T Q w/S Q^T T^-1) A`, with the
  pseudo-inverse where `A A^T` is singular (more rank than inputs).
  """
  down_trace, up_trace = _trace(down), _trace(up)
  down, up = down * numerics.reciprocal(down_trace), up * numerics.reciprocal(up_trace)
  left, left_inverse = _factorize(down)
  right = jnp.swapaxes(left, -1, -2)
  values, vectors = _eigh(product(right, up, left))
  sigma, sigma_inverse = _invert_root(values)
  weight = _weights(sigma, emphasis)
  scaled = product(left, vectors) * (weight * sigma_inverse)[:, None, :]
  vectors_t = jnp.swapaxes(vectors, -1, -2)
  ratio = jnp.sqrt(down_trace * numerics.reciprocal(up_trace))
  for_down = product(up, scaled, vectors_t, left_inverse)
  return for_down * numerics.reciprocal(ratio), product(scaled, vectors_t, right) * ratio


def _factorize(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`T` such that `T T^T` is the matrix, and the inverse of `T`.

  They come from Cholesky, or from `eigh` if a matrix of the batch is singular. Cholesky takes a
  tenth of the time.
  """
  lower, inverse = _cholesky(gram)
  pivots = jnp.diagonal(lower, axis1=-2, axis2=-1)
  is_regular = jnp.all(pivots > _MIN_PIVOT * jnp.max(pivots, axis=-1, keepdims=True))
  return lax.cond(
    is_regular, lambda *factors: factors, lambda *_: _symmetric_root(gram), lower, inverse)


# Jitted, because `jax_debug_nans` checks the result of each operation outside of jit, and a
# singular matrix gives NaN here.
@jax.jit
def _cholesky(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Lower factors and their inverses, with 0 where a singular matrix gives non-finite elements."""
  def factorize(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    lower = lax.linalg.cholesky(gram)
    identity = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    return lower, lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)

  lower, inverse = map(
    numerics.zero_non_finite, xla_cpu.map_matrices(factorize, gram, side_by_side=False))
  return lower, inverse


def _symmetric_root(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
  values, vectors = _eigh(gram)
  root, inverse = (product(vectors * x[:, None, :], jnp.swapaxes(vectors, -1, -2))
                   for x in _invert_root(values))
  return root, inverse


def _eigh(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Eigenvalues and eigenvectors of a batch."""
  def decompose(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    vectors, values = lax.linalg.eigh(matrices, symmetrize_input=False)
    return values, vectors

  # The whole batch is made symmetric at once, outside of the loop over matrices.
  symmetric = (matrices + jnp.swapaxes(matrices, -1, -2)) / 2
  return xla_cpu.map_matrices(decompose, symmetric, side_by_side=True)


def _trace(gram: jax.Array) -> jax.Array:
  return jnp.trace(gram, axis1=-2, axis2=-1)[:, None, None]


def _invert_root(values: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Square roots of eigenvalues and their inverses; both 0 below the cut-off."""
  is_resolved = values > _CUTOFF * jnp.max(values, axis=-1, keepdims=True)
  root = jnp.sqrt(jnp.where(is_resolved, values, jnp.ones_like(values)))
  return jnp.where(is_resolved, root, 0), jnp.where(is_resolved, 1 / root, 0)


def _weights(sigma: jax.Array, emphasis: Scalar) -> jax.Array:
  largest = jnp.max(sigma, axis=-1, keepdims=True)
  relative = sigma * numerics.reciprocal(largest)
  return ((1 + _FLOOR) / (relative + _FLOOR)) ** (numerics.scalar(emphasis, sigma.dtype) - 1)


def polar_factors(x: jax.Array) -> jax.Array:
  """`U V^T` of each matrix of a batch, by Newton-Schulz.

  Muon's steep quintic iteration comes close, and the classical cubic iteration converges.
  """
  is_tall = x.shape[-2] > x.shape[-1]
  y = jnp.swapaxes(x, -1, -2) if is_tall else x
  y = y * numerics.reciprocal(jnp.sqrt(jnp.sum(y * y, axis=(-2, -1), keepdims=True)))
  for _ in range(_MUON_STEPS):
    gram = gram_matrix(y)
    y = 3.4445 * y + product(-4.7750 * gram + 2.0315 * product(gram, gram), y)
  for _ in range(_CUBIC_STEPS):
    y = 1.5 * y - 0.5 * product(gram_matrix(y), y)
  return jnp.swapaxes(y, -1, -2) if is_tall else y
