"""Spectra of small matrices: gradients of nuclear norms, polar factors, largest eigenvalues."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hina_optax import _numerics, _visits
from hina_optax._numerics import Scalar

# Relative to the largest eigenvalue of a Gram matrix: what fp32 still resolves.
_CUTOFF = 1e-6
# Of Cholesky's diagonal, relative to its largest: below, a matrix is as good as singular.
_LEAST_PIVOT = 1e-2
# Smallest singular value, relative to the largest, that the reweighting tells from zero.
_FLOOR = 1e-3
_MUON_STEPS, _CUBIC_STEPS = 6, 3
_LARGEST = 10
# Eigenvalue problems in the body of a loop on CPUs. XLA takes fewer one by one, more side by side.
_AT_ONCE = 10


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
  down, up = down * _numerics.reciprocal(down_size), up * _numerics.reciprocal(up_size)
  left, left_inverse = _factor(down)
  right = jnp.swapaxes(left, -1, -2)
  values, vectors = _eigh(product(right, up, left))
  sigma, sigma_inverse = _root(values)
  weight = _weights(sigma, emphasis)
  turned = product(left, vectors) * (weight * sigma_inverse)[:, None, :]
  back = jnp.swapaxes(vectors, -1, -2)
  ratio = jnp.sqrt(down_size * _numerics.reciprocal(up_size))
  for_down = product(up, turned, back, left_inverse)
  return for_down * _numerics.reciprocal(ratio), product(turned, back, right) * ratio


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

  lower, inverse = map(_visits.finite, _each(factorize, gram))
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
  return _each(decompose, (matrices + jnp.swapaxes(matrices, -1, -2)) / 2, _AT_ONCE)


def _each(function: Callable[[jax.Array], Any], matrices: jax.Array, unroll: int = 1) -> Any:
  """A function of LAPACK for a batch: on CPUs in a loop, `unroll` matrices in its body.

  Of a batch jaxlib 0.10 keeps one of XLA's threads waiting until the others have done it. As many
  batches at once as there are threads, of factors of several ranks for example, wait for ever.
  """
  def in_a_loop(matrices: jax.Array) -> Any:
    return lax.scan(lambda _, x: (None, function(x)), None, matrices, unroll=unroll)[1]

  return lax.platform_dependent(matrices, cpu=in_a_loop, default=function)


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


def polar_factors(x: jax.Array) -> jax.Array:
  """`U V^T` of each matrix of a batch: Muon's steep quintic to come near, the classical cubic."""
  tall = x.shape[-2] > x.shape[-1]
  y = jnp.swapaxes(x, -1, -2) if tall else x
  y = y * _numerics.reciprocal(jnp.sqrt(jnp.sum(y * y, axis=(-2, -1), keepdims=True)))
  for _ in range(_MUON_STEPS):
    small = gram(y)
    y = 3.4445 * y + product(-4.7750 * small + 2.0315 * product(small, small), y)
  for _ in range(_CUBIC_STEPS):
    y = 1.5 * y - 0.5 * product(gram(y), y)
  return jnp.swapaxes(y, -1, -2) if tall else y


def energy_gradients(x: jax.Array) -> jax.Array:
  """Each matrix of a batch times the sum of the ten largest eigenvalues of its Gram matrix."""
  small = gram(x if x.shape[-2] <= x.shape[-1] else jnp.swapaxes(x, -1, -2))
  if small.shape[-1] <= _LARGEST:
    return _sizes(small) * x
  values, _ = _eigh(small)
  return jnp.sum(values[:, -_LARGEST:], axis=-1)[:, None, None] * x
