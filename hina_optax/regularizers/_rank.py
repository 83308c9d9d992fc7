"""Rank penalty: the (reweighted) nuclear norm of the product of each LoRA pair."""

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hina_optax import _borders, _checks, _leaves, _lora, _numerics, _parts, _visits
from hina_optax._numerics import Scalar
from hina_optax._stacks import Group
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

  measured = functools.partial(_measured, pattern=pattern, measure=measure)
  others = {"nuclear": {"nuclear": _spectra.polar_factors, "ignore": None}[unpaired],
            "top_eigenvalues": _spectra.energy_gradients}[measure]

  def init(params: Any) -> AddRankPenaltyState:
    _leaves.check_floating(params, "params")
    if measure == "nuclear":
      _lora.find_pairs(params, pattern)
    return AddRankPenaltyState()

  def update(updates, state, params=None, **extra_args):
    _leaves.require_params(params, "add_rank_penalty")
    known = extra_args.get(_parts.SURVEYED)
    if known is None:
      factors = measured(params)
      rows = zip(_visits.nodes(params), _visits.values(params), factors)
      known = _kernels(factors, [_grams(*row) for row in rows], emphasis)
    terms = _terms(params, _pair_terms(params, known) + _each_matrix(others, params, known))

    def add(leaf, g, read, trees, scalars):
      del leaf, trees, scalars
      [term] = read
      return (g if term is None else g + _numerics.scalar(strength, g.dtype) * term), (), ()

    return _visits.visit(add, updates, raw=(terms,)).updates, state

  def survey(params, state):
    del state
    factors = measured(params.shapes())
    grams = [[_grams_of_leaves(params.members(index, f.rows), f) for f in own]
             for index, own in enumerate(factors)]
    known = _kernels(factors, grams, emphasis)
    return lambda layout, index, alone: [known[index]]

  return _parts.Part(init, update, survey)


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=("value",), meta_fields=("rows", "layout"))
@dataclasses.dataclass(frozen=True)
class _Kernels:
  """What turns the factors of one layout in some rows of a node into their gradients.

  `value` is (rows, layers, rank, rank), `None` for factors without elements.
  """

  rows: tuple[int, ...]
  layout: _lora.Layout
  value: jax.Array | None


class _Term(NamedTuple):
  """What is added to some rows of a node (row 0 of a node that is one leaf)."""

  node: int
  rows: tuple[int, ...]
  value: jax.Array


class _Factors(NamedTuple):
  """Factors in some rows of a node: their layout, and the pairs of one batch that they belong to.

  `batch` is what the pairs have in common: rank, layers, dtype, and whether they have elements.
  """

  rows: tuple[int, ...]
  layout: _lora.Layout
  batch: Any
  side: int
  pairs: tuple[int, ...]


def _rows_of(node: Group, array: jax.Array, rows: tuple[int, ...]) -> jax.Array:
  whole = array.reshape(len(node.places), *node.shape)
  return _chosen(whole, rows)


def _terms(params: Any, found: list[_Term]) -> Any:
  """The terms as a tree like `params`, absent where there is none, 0 for what is not finite."""
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
      terms = _numerics.in_order(rows + rest, parts).reshape(leaves[i].shape)
      joined[i] = _visits.finite(terms)
  return structure.unflatten(joined)


def _each_matrix(
  function: Callable[..., jax.Array] | None, params: Any, known: list[list[_Kernels]]
) -> list[_Term]:
  """What a function of batches gives of matrices that are in no pair."""
  found: list[_Term] = []
  if function is None:
    return found
  for i, (node, array) in enumerate(zip(_visits.nodes(params), _visits.values(params))):
    taken = {row for kernels in known[i] for row in kernels.rows}
    rows = tuple(r for r in range(len(node.places)) if r not in taken)
    if rows and not _leaves.is_absent(array) and len(node.shape) == 2 and array.size:
      found.append(_Term(i, rows, function(_upcast(_rows_of(node, jnp.asarray(array), rows)))))
  return found


def _upcast(x: Any) -> jax.Array:
  return jnp.asarray(x).astype(_numerics.compute_dtype(x.dtype))


def _pair_terms(params: Any, known: list[list[_Kernels]]) -> list[_Term]:
  """The gradient of the weighted nuclear norm for each factor of each pair."""
  found = []
  for i, (node, array) in enumerate(zip(_visits.nodes(params), _visits.values(params))):
    for kernels in known[i]:
      if kernels.value is not None:
        leaves = _rows_of(node, jnp.asarray(array), kernels.rows).astype(kernels.value.dtype)
        back = jax.vmap(functools.partial(_lora.from_matrix, layout=kernels.layout))
        product = _spectra.product(kernels.value, _matrices(leaves, kernels.layout))
        found.append(_Term(i, kernels.rows, back(product, like=leaves)))
  return found


def _matrices(leaves: jax.Array, layout: _lora.Layout) -> jax.Array:
  """Factors as (rows, layers, rank, rest)."""
  return jax.vmap(functools.partial(_lora.to_matrix, layout=layout))(leaves)


def _measured(params: Any, pattern: Any, measure: str) -> list[list[_Factors]]:
  """The factors that are penalized in pairs, for each node."""
  pairs = _lora.find_pairs(params, pattern) if measure == "nuclear" else []
  return _factors(pairs, params)


def _factors(pairs: list[_lora.Pair], params: Any) -> list[list[_Factors]]:
  """For each node its factors, those of one layout and batch together."""
  shapes = {place.index: leaf for place, leaf in _visits.members(params)}
  places = (place for node in _visits.nodes(params) for place in node.places)
  position = {place: i for i, place in enumerate(places)}
  sizes: dict[Any, int] = defaultdict(int)
  wanted = {}
  # In the order of the nodes, which one side of a batch then has.
  for pair in sorted(pairs, key=lambda pair: position[pair.down]):
    down, up = shapes[pair.down], shapes[pair.up]
    batch = (pair.rank, math.prod(down.shape[:pair.down_layout.batch_axes]),
             _numerics.compute_dtype(down.dtype, up.dtype), bool(down.size and up.size))
    wanted[pair.down] = (pair.down_layout, batch, 0), sizes[batch]
    wanted[pair.up] = (pair.up_layout, batch, 1), sizes[batch]
    sizes[batch] += 1
  found = []
  for node in _visits.nodes(params):
    together: dict[Any, list[tuple[int, int]]] = defaultdict(list)
    for row, place in enumerate(node.places):
      if place in wanted:
        together[wanted[place][0]].append((row, wanted[place][1]))
    found.append([
      _Factors(rows, layout, batch, side, of)
      for (layout, batch, side), members in together.items() for rows, of in [zip(*members)]
    ])
  return found


def _grams(node: Group, array: Any, factors: list[_Factors]) -> list[Any]:
  """`A A^T` or `B^T B` for each of a node's factors; `None` where they have no elements."""
  return [
    _gram(_rows_of(node, jnp.asarray(array), f.rows).astype(f.batch[2]), f.layout)
    if f.batch[3] else None for f in factors
  ]


def _grams_of_leaves(leaves: list[jax.Array], factors: _Factors) -> Any:
  """The same of one node's factors that are not stacked: on a CPU products are as fast alone."""
  _, _, dtype, filled = factors.batch
  if not filled:
    return None
  found = [_gram_of_leaf(x, dtype=dtype, layout=factors.layout) for x in leaves]
  return _borders.join(found, dtype).reshape(-1, *found[0].shape)


# Jitted to be traced once for leaves that are alike.
@functools.partial(jax.jit, static_argnames=("dtype", "layout"))
def _gram_of_leaf(leaf: jax.Array, dtype: Any, layout: _lora.Layout) -> jax.Array:
  return _lora.gram(leaf.astype(dtype), layout)


def _gram(leaves: jax.Array, layout: _lora.Layout) -> jax.Array:
  matrices = _matrices(leaves, layout)
  # Batches in one axis: of two XLA copies the operand.
  together = _spectra.gram(matrices.reshape(-1, *matrices.shape[2:]))
  return together.reshape(*matrices.shape[:2], *together.shape[1:])


def _kernels(
  factors: list[list[_Factors]], grams: list[list[Any]], emphasis: Scalar
) -> list[list[_Kernels]]:
  """For each node what turns its factors into their gradients; pairs of one batch together."""
  every = [(f, g) for own, found in zip(factors, grams) for f, g in zip(own, found)]
  solved = {}
  for batch in dict.fromkeys(f.batch for f, _ in every if f.batch[3]):
    sides = [_side([(f, g) for f, g in every if f.batch == batch and f.side == side])
             for side in (0, 1)]
    down, up = (x.reshape(-1, *x.shape[2:]) for x in sides)
    solved[batch] = [x.reshape(sides[0].shape) for x in _spectra.pair_kernels(down, up, emphasis)]
  return [
    [_Kernels(f.rows, f.layout, _chosen(solved[f.batch][f.side], f.pairs) if f.batch[3] else None)
     for f in own] for own in factors
  ]


def _chosen(values: jax.Array, rows: tuple[int, ...]) -> jax.Array:
  """Some rows: a slice where they follow each other, which XLA need not gather."""
  begin, end = rows[0], rows[-1] + 1
  return values[begin:end] if rows == tuple(range(begin, end)) else values[np.array(rows)]


def _side(found: list[tuple[_Factors, jax.Array]]) -> jax.Array:
  """What was found for one side of all pairs, in their order."""
  return _numerics.in_order([pair for f, _ in found for pair in f.pairs], [g for _, g in found])
