"""Rank penalty: the (reweighted) nuclear norm of the product of each LoRA pair."""

from collections import defaultdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from hina_optax import _checks, _leaves, _lora, _numerics
from hina_optax._numerics import Scalar

# Relative to the largest eigenvalue of a Gram matrix: what fp32 still resolves.
_CUTOFF = 1e-6
# Smallest singular value, relative to the largest, that the reweighting tells from zero.
_FLOOR = 1e-3
_MUON_STEPS, _CUBIC_STEPS = 6, 3
_LARGEST = 10


class AddRankPenaltyState(NamedTuple):
  """State of `add_rank_penalty`: empty, it names the part in a chain's state."""


def add_rank_penalty(
  strength: Scalar = 0.01,
  emphasis: Scalar = 1.2,
  *,
  unpaired: str = "ignore",
  lora_pattern: str | None = None,
  measure: str = "nuclear",
) -> optax.GradientTransformationExtraArgs:
  r"""Adds the gradient of the nuclear norm of `B A` to the factors of every LoRA pair.

  With the singular values :math:`\sigma_i` of the product of a pair (`down` = A, `up` = B),

  .. math::
    g \leftarrow g + s\, \nabla \sum_i w_i \sigma_i(BA), \qquad
    w_i = \left(\frac{(1 + 10^{-3})\,\sigma_1}{\sigma_i + 10^{-3} \sigma_1}\right)^{\epsilon - 1}

  with the weights held constant, :math:`\epsilon` = `emphasis`. An emphasis of 1 is the plain
  nuclear norm; more weighs small singular values higher, so that they reach zero first. The
  gradient is 0 where `B = 0` (the start of a LoRA) and leaves out singular values below 1e-3 of the
  largest, which fp32 does not resolve. Only rank x rank matrices are decomposed, all pairs of one
  rank together, and nothing is differentiated through a decomposition.

  Pairs are leaves whose paths differ in one word: `lora_a`/`lora_b`, `lora_down`/`lora_up`,
  `lora_A`/`lora_B`. Flax's `(..., in, rank)`, `(..., rank, out)` and PyTorch's `(rank, in, ...)`,
  `(out, rank, ...)` are told apart by their shapes; windows of convolutions count as inputs and
  outputs; equal leading axes are layers stacked by a scan. A pair of which one factor is masked
  away is left alone.

  Args:
    strength: `s` >= 0, in units of the loss per unit of nuclear norm: the term added to the loss is
      `s * sum(w * sigma)`. It does not follow the scale of the gradient: before an Adam-like core
      only its ratio to the gradient counts. 0 is the identity.
    emphasis: >= 1, dimensionless.
    unpaired: what happens to other matrices: `"ignore"`, or `"nuclear"`: their own nuclear norm,
      its gradient `U V^T` by Newton-Schulz (matrix products only; singular values below 1e-4 of the
      Frobenius norm count less).
    lora_pattern: regular expression with the named groups `down` and `up`, for other spellings, for
      example `r"(?P<down>reduce)|(?P<up>expand)"`; the last match in a path counts.
    measure: `"nuclear"`, or `"top_eigenvalues"`: the PyTorch original, which adds to *every* matrix
      `p` the term `s * (sum of the 10 largest eigenvalues of the smaller Gram matrix of p) * p`: a
      weight decay that grows with the square of the weights and lowers no rank. It ignores
      `emphasis` and decomposes matrices of the smaller side of each leaf.

  Returns:
    An `optax.GradientTransformationExtraArgs` without state.

  Raises:
    ValueError: if an argument lies outside its range, `params` are missing at the update, a factor
      has no partner in the tree, or the two share no rank. TypeError: if a leaf is not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> import hina_optax
    >>> params = {"lora_a": jnp.array([[3.0], [0.0]]), "lora_b": jnp.array([[0.0, 4.0]])}
    >>> tx = hina_optax.add_rank_penalty(strength=1.0)
    >>> zero = {"lora_a": jnp.zeros((2, 1)), "lora_b": jnp.zeros((1, 2))}
    >>> updates, _ = tx.update(zero, tx.init(params), params)
    >>> [[round(float(x), 4) for x in updates[k].ravel()] for k in ("lora_a", "lora_b")]
    [[4.0, 0.0], [0.0, 3.0]]

  References:
    Reweighting: Candes, Wakin, Boyd, Enhancing sparsity by reweighted l1 minimization, 2008.
    Newton-Schulz: Jordan et al., Muon, 2024. `lora_rank_penalty`, `rank_penalty_strength` and
    `low_rank_emphasis` of `HinaAdaptive` (which never used the last).
  """
  _checks.number("strength", strength)
  _checks.number("emphasis", emphasis, 1.0)
  _checks.choice("unpaired", unpaired, ("ignore", "nuclear"))
  _checks.choice("measure", measure, ("nuclear", "top_eigenvalues"))
  pattern = _lora.compile_pattern(lora_pattern)

  def penalties(params: Any) -> dict[int, jax.Array]:
    _, leaves, _ = _leaves.flatten(params)
    if measure == "top_eigenvalues":
      return {i: _energy_gradient(x) for i, x in _matrices(leaves)}
    pairs = _lora.find_pairs(params, pattern)
    result = _pair_gradients(pairs, leaves, emphasis)
    if unpaired == "nuclear":
      taken = {i for pair in pairs for i in (pair.down, pair.up)}
      result |= {i: _polar_factor(x) for i, x in _matrices(leaves) if i not in taken}
    return result

  def init(params: Any) -> AddRankPenaltyState:
    _leaves.check_floating(params, "params")
    if measure == "nuclear":
      _lora.find_pairs(params, pattern)
    return AddRankPenaltyState()

  def update(updates, state, params=None, **extra_args):
    del extra_args
    _leaves.require_params(params, "add_rank_penalty")
    terms = penalties(params)

    def add(leaf, g, read, trees, scalars):
      del read, trees, scalars
      if leaf.index not in terms:
        return g, (), ()
      term = terms[leaf.index].astype(g.dtype)
      return g + _numerics.scalar(strength, g.dtype) * term, (), ()

    return _leaves.visit(add, updates).updates, state

  return optax.GradientTransformationExtraArgs(init, update)


def _matrices(leaves: list[Any]) -> list[tuple[int, jax.Array]]:
  found = [(i, x) for i, x in enumerate(leaves) if not _leaves.is_absent(x)]
  return [(i, _upcast(x)) for i, x in found if x.ndim == 2 and x.size]


def _upcast(x: Any) -> jax.Array:
  return jnp.asarray(x).astype(_numerics.compute_dtype(x.dtype))


def _product(*factors: jax.Array) -> jax.Array:
  result = factors[0]
  for factor in factors[1:]:
    result = jnp.matmul(result, factor, precision=lax.Precision.HIGHEST)
  return result


def _gram(x: jax.Array) -> jax.Array:
  return _product(x, jnp.swapaxes(x, -1, -2))


def _pair_gradients(
  pairs: list[_lora.Pair], leaves: list[Any], emphasis: Scalar
) -> dict[int, jax.Array]:
  """Gradient of the weighted nuclear norm for each leaf of each pair, by its place."""
  groups: dict[Any, list[_lora.Pair]] = defaultdict(list)
  for pair in pairs:
    if leaves[pair.down].size and leaves[pair.up].size:
      dtype = _numerics.compute_dtype(leaves[pair.down].dtype, leaves[pair.up].dtype)
      groups[pair.rank, dtype].append(pair)
  result: dict[int, jax.Array] = {}
  for (_, dtype), group in groups.items():
    downs = [_lora.to_matrix(leaves[p.down].astype(dtype), p.down_layout) for p in group]
    ups = [_lora.to_matrix(leaves[p.up].astype(dtype), p.up_layout) for p in group]
    kernels = _pair_kernels(
      jnp.concatenate([_gram(x) for x in downs]), jnp.concatenate([_gram(x) for x in ups]), emphasis
    )
    start = 0
    for pair, down, up in zip(group, downs, ups):
      stop = start + down.shape[0]
      for index, layout, factor, kernel in (
        (pair.down, pair.down_layout, down, kernels[0][start:stop]),
        (pair.up, pair.up_layout, up, kernels[1][start:stop]),
      ):
        result[index] = _lora.from_matrix(_product(kernel, factor), layout, leaves[index])
      start = stop
  return result


def _pair_kernels(
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
  left = _product(vectors * root[:, None, :], jnp.swapaxes(vectors, -1, -2))
  left_inverse = _product(vectors * inverse[:, None, :], jnp.swapaxes(vectors, -1, -2))
  values, vectors = jnp.linalg.eigh(_product(left, up, left))
  sigma, sigma_inverse = _root(values)
  weight = _weights(sigma, emphasis)
  turned = _product(left, vectors) * (weight * sigma_inverse)[:, None, :]
  back = jnp.swapaxes(vectors, -1, -2)
  ratio = jnp.sqrt(down_size * _numerics.reciprocal(up_size))
  for_down = _product(up, turned, back, left_inverse)
  return for_down * _numerics.reciprocal(ratio), _product(turned, back, left) * ratio


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


def _polar_factor(x: jax.Array) -> jax.Array:
  """`U V^T` of a matrix: Muon's steep quintic to come near, the classical cubic to arrive."""
  tall = x.shape[0] > x.shape[1]
  y = (x.T if tall else x) * _numerics.reciprocal(_numerics.norm(x))
  for _ in range(_MUON_STEPS):
    gram = _gram(y)
    y = 3.4445 * y + _product(-4.7750 * gram + 2.0315 * _product(gram, gram), y)
  for _ in range(_CUBIC_STEPS):
    y = 1.5 * y - 0.5 * _product(_gram(y), y)
  return y.T if tall else y


def _energy_gradient(x: jax.Array) -> jax.Array:
  gram = _gram(x if x.shape[0] <= x.shape[1] else x.T)
  if gram.shape[0] <= _LARGEST:
    return jnp.trace(gram) * x
  return jnp.sum(jnp.linalg.eigvalsh(gram)[-_LARGEST:]) * x
