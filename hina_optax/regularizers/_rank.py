"""Rank penalty: the (reweighted) nuclear norm of the product of each LoRA pair."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hina_optax import _checks, _leaves, _lora, _numerics, _stacks, _visits
from hina_optax._numerics import Scalar
from hina_optax.regularizers import _spectra


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

  def penalties(params: Any) -> Any:
    if measure == "top_eigenvalues":
      return _terms(params, _each_matrix(_spectra.energy_gradient, params, set()))
    pairs = _lora.find_pairs(params, pattern)
    found = _pair_gradients(pairs, params, emphasis)
    if unpaired == "nuclear":
      taken = {place for pair in pairs for place in (pair.down, pair.up)}
      found += _each_matrix(_spectra.polar_factor, params, taken)
    return _terms(params, found)

  def init(params: Any) -> AddRankPenaltyState:
    _leaves.check_floating(params, "params")
    if measure == "nuclear":
      _lora.find_pairs(params, pattern)
    return AddRankPenaltyState()

  def update(updates, state, params=None, **extra_args):
    del extra_args
    _leaves.require_params(params, "add_rank_penalty")

    def add(leaf, g, read, trees, scalars):
      del leaf, trees, scalars
      term = read[0]
      return (g if term is None else g + _numerics.scalar(strength, g.dtype) * term), (), ()

    return _visits.visit(add, updates, read=(penalties(params),)).updates, state

  return _stacks.Part(init, update)


class _Term(NamedTuple):
  """What is added to some rows of a node (row 0 of a node that is one leaf)."""

  node: int
  rows: list[int]
  value: jax.Array


class _Factors(NamedTuple):
  """Factors of one layout in some rows of a node, and the pairs that they belong to.

  `matrices` are they as (rows, layers, rank, rest).
  """

  node: int
  rows: list[int]
  pairs: list[int]
  layout: _lora.Layout
  leaves: jax.Array
  matrices: jax.Array


def _rows_of(node: _visits.Visit, array: jax.Array, rows: list[int]) -> jax.Array:
  whole = array.reshape(len(node.places), *node.shape)
  return whole if rows == list(range(len(node.places))) else whole[np.array(rows)]


def _terms(params: Any, found: list[_Term]) -> Any:
  """The terms as a tree like `params`, absent where there is none."""
  nodes = _visits.nodes(params)
  leaves, structure = _leaves.flat(params)
  joined: list[Any] = [None] * len(leaves)
  for i, node in enumerate(nodes):
    mine = [term for term in found if term.node == i]
    if mine:
      rows = [row for term in mine for row in term.rows]
      rest = sorted(set(range(len(node.places))) - set(rows))
      parts = [term.value for term in mine]
      if rest:
        parts.append(jnp.zeros((len(rest), *parts[0].shape[1:]), parts[0].dtype))
      value, rows = jnp.concatenate(parts), rows + rest
      value = value if rows == sorted(rows) else value[np.argsort(rows)]
      joined[i] = value.reshape(leaves[i].shape)
  return structure.unflatten(joined)


def _each_matrix(function: Callable[..., jax.Array], params: Any, taken: set[int]) -> list[_Term]:
  found = []
  for i, (node, array) in enumerate(zip(_visits.nodes(params), _visits.values(params))):
    rows = [r for r, place in enumerate(node.places) if place not in taken]
    if rows and not _leaves.is_absent(array) and len(node.shape) == 2 and array.size:
      leaves = _upcast(_rows_of(node, jnp.asarray(array), rows))
      value = jax.vmap(function)(leaves) if node.stacked else function(leaves[0])[None]
      found.append(_Term(i, rows, value))
  return found


def _upcast(x: Any) -> jax.Array:
  return jnp.asarray(x).astype(_numerics.compute_dtype(x.dtype))


def _pair_gradients(pairs: list[_lora.Pair], params: Any, emphasis: Scalar) -> list[_Term]:
  """Gradient of the weighted nuclear norm for each factor of each pair."""
  shapes = {place.index: leaf for place, leaf in _visits.members(params)}
  groups: dict[Any, list[_lora.Pair]] = defaultdict(list)
  for pair in pairs:
    down, up = shapes[pair.down], shapes[pair.up]
    if down.size and up.size:
      dtype = _numerics.compute_dtype(down.dtype, up.dtype)
      layers = math.prod(down.shape[:pair.down_layout.batch_axes])
      groups[pair.rank, layers, dtype].append(pair)
  return [
    term for (rank, layers, dtype), group in groups.items()
    for term in _group_gradients(group, params, dtype, emphasis)
  ]


def _group_gradients(
  group: list[_lora.Pair], params: Any, dtype: Any, emphasis: Scalar
) -> list[_Term]:
  """Those of pairs of one rank, in one batch of small matrices."""
  sides = (
    _factors({p.down: (i, p.down_layout) for i, p in enumerate(group)}, params, dtype),
    _factors({p.up: (i, p.up_layout) for i, p in enumerate(group)}, params, dtype),
  )
  grams = [_in_order([_spectra.gram(f.matrices) for f in side], side) for side in sides]
  down, up = (x.reshape(-1, *x.shape[2:]) for x in grams)
  kernels = _spectra.pair_kernels(down, up, emphasis)
  found = []
  for side, kernel in zip(sides, kernels):
    kernel = kernel.reshape(len(group), -1, *kernel.shape[1:])
    for f in side:
      own = kernel if f.pairs == list(range(len(group))) else kernel[np.array(f.pairs)]
      back = jax.vmap(functools.partial(_lora.from_matrix, layout=f.layout))
      found.append(_Term(f.node, f.rows, back(_spectra.product(own, f.matrices), like=f.leaves)))
  return found


def _factors(
  wanted: dict[int, tuple[int, _lora.Layout]], params: Any, dtype: Any
) -> list[_Factors]:
  """The factors at the places of `wanted`, those of one node and layout together."""
  found = []
  for i, (node, array) in enumerate(zip(_visits.nodes(params), _visits.values(params))):
    layouts: dict[_lora.Layout, list[tuple[int, int]]] = defaultdict(list)
    for row, place in enumerate(node.places):
      if place in wanted:
        pair, layout = wanted[place]
        layouts[layout].append((row, pair))
    for layout, members in layouts.items():
      rows, pairs = (list(column) for column in zip(*members))
      leaves = _rows_of(node, jnp.asarray(array), rows).astype(dtype)
      matrices = jax.vmap(functools.partial(_lora.to_matrix, layout=layout))(leaves)
      found.append(_Factors(i, rows, pairs, layout, leaves, matrices))
  return found


def _in_order(parts: list[jax.Array], side: list[_Factors]) -> jax.Array:
  """The parts of one side in the order of the pairs."""
  order = [pair for f in side for pair in f.pairs]
  joined = jnp.concatenate(parts)
  return joined if order == sorted(order) else joined[np.argsort(order)]
