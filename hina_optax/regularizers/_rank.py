"""Rank penalty: the (reweighted) nuclear norm of the product of each LoRA pair."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from hina_optax import registry
from hina_optax.base import checks, leafwise, lora, numerics, paths
from hina_optax.base.lora import FactorAxes
from hina_optax.base.numerics import Scalar
from hina_optax.grouped.layout import Group
from hina_optax.grouped.measures import LeafGroups, Measure
from hina_optax.registry import Option
from hina_optax.regularizers import _spectra

__all__ = ["AddRankPenaltyState", "add_rank_penalty"]

# The extra argument in which each factor gets the matrix that turns it into its gradient.
_KERNELS = "rank_penalty_kernels"


class AddRankPenaltyState(NamedTuple):
  """State of `add_rank_penalty`: empty. It names the part in a chain's state."""


def add_rank_penalty(
  strength: Scalar = 0.01,
  emphasis: Scalar = 1.2,
  *,
  unpaired: str = "ignore",
  lora_pattern: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Adds the gradient of the nuclear norm of `B A` to the factors of every LoRA pair.

  With the singular values :math:`\sigma_i` of the product of a pair (`down` = A, `up` = B),

  .. math::
    g \leftarrow g + s\, \nabla \sum_i w_i \sigma_i(BA), \qquad
    w_i = \left(\frac{(1 + 10^{-3})\,\sigma_1}{\sigma_i + 10^{-3} \sigma_1}\right)^{\epsilon - 1}

  with the weights held constant and :math:`\epsilon` = `emphasis`. An emphasis of 1 is the plain
  nuclear norm. A larger one gives small singular values more weight, so that they reach zero first.
  The gradient is 0 where `B = 0` (the start of a LoRA) and leaves out singular values below 1e-3 of
  the largest, which fp32 does not resolve. Only rank x rank matrices are decomposed, all pairs of
  one rank together, and nothing is differentiated through a decomposition.

  Pairs are leaves whose paths differ in one word: `lora_a`/`lora_b`, `lora_down`/`lora_up`,
  `lora_A`/`lora_B`. Flax's `(..., in, rank)`, `(..., rank, out)` and PyTorch's `(rank, in, ...)`,
  `(out, rank, ...)` are told apart by their shapes; windows of convolutions count as inputs and
  outputs; equal leading axes are layers stacked by a scan. If one factor of a pair is masked away,
  the other passes through.

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
  checks.number("strength", strength)
  checks.number("emphasis", emphasis, 1.0)
  checks.choice("unpaired", unpaired, ("ignore", "nuclear"))
  pattern = lora.compile_pattern(lora_pattern)

  def penalize(leaf, g, p, old, kernel):
    if kernel is not None:
      term = leaf.ravel(_penalty_gradient(leaf.unravel(p), kernel))
    elif unpaired == "nuclear" and len(leaf.shape) == 2 and leaf.size:
      term = leaf.ravel(_spectra.polar_factors(leaf.unravel(p)))
    else:
      return g, old
    return g + numerics.scalar(strength, g.dtype) * numerics.zero_non_finite(term), old

  return leafwise.part(
    AddRankPenaltyState, penalize, reads_params="add_rank_penalty",
    measure=Measure(
      _KERNELS, None, functools.partial(_compute_kernels, pattern=pattern, emphasis=emphasis),
      functools.partial(_find_roles, pattern=pattern)))


class _Role(NamedTuple):
  """The role of a factor in its pair.

  Attributes:
    side: 0 for `down`, 1 for `up`.
    axes: how the factor is stored.
    batch: what pairs that are solved together have in common: rank, number of layers, dtype, and
      whether they have elements.
  """

  side: int
  axes: FactorAxes
  batch: tuple[int, int, Any, bool]


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=("value",), meta_fields=("axes",))
@dataclasses.dataclass(frozen=True)
class _Kernel:
  """The matrices that turn a factor into its gradient.

  Attributes:
    value: `(layers, rank, rank)`; in a stack, `(leaves, layers, rank, rank)`.
    axes: how the factor is stored.
  """

  value: jax.Array
  axes: FactorAxes


def _penalty_gradient(p: jax.Array, kernel: _Kernel) -> jax.Array:
  """The gradient of the weighted nuclear norm for one factor."""
  matrix = lora.to_matrix(p, kernel.axes)
  return lora.from_matrix(_spectra.product(kernel.value, matrix), kernel.axes, p)


def _find_factors(
  places: Sequence[paths.Place], leaves: Sequence[Any], pattern: Any, is_whole_tree: bool
) -> dict[int, tuple[_Role, int]]:
  """For each place that holds a factor: its role, and the number of its pair within the batch."""
  by_place = {place.index: leaf for place, leaf in zip(places, leaves)}
  factors: dict[int, tuple[_Role, int]] = {}
  sizes: dict[Any, int] = {}
  for pair in lora.find_pairs(places, leaves, pattern, is_whole_tree):
    down, up = by_place[pair.down], by_place[pair.up]
    batch = (pair.rank, math.prod(down.shape[:pair.down_axes.batch_axes]),
             numerics.compute_dtype(down.dtype, up.dtype),
             bool(math.prod(down.shape) and math.prod(up.shape)))
    number = sizes.get(batch, 0)
    sizes[batch] = number + 1
    factors[pair.down] = _Role(0, pair.down_axes, batch), number
    factors[pair.up] = _Role(1, pair.up_axes, batch), number
  return factors


def _find_roles(params: Any, pattern: Any) -> list[Any]:
  """For each place of a tree the role of its leaf. Only leaves with equal roles are stacked."""
  places, leaves, _ = paths.flatten(params)
  factors = _find_factors(places, leaves, pattern, is_whole_tree=True)
  return [factors[place.index][0] if place.index in factors else None for place in places]


def _compute_kernels(
  leaves: LeafGroups, state: Any, pattern: Any, emphasis: Scalar
) -> tuple[list[Any], Any]:
  """The kernels of each group's factors. All pairs of a batch are solved together."""
  places = [paths.Place(path, place) for group in leaves.groups
            for path, place in zip(group.paths, group.places)]
  places.sort(key=lambda place: place.index)
  factors = _find_factors(
    places, [leaves.params[p.index] for p in places], pattern, is_whole_tree=False)

  def get_role(group: Group) -> _Role | None:
    factor = factors.get(group.places[0])
    return factor[0] if factor is not None and factor[0].batch[3] else None

  def compute_gram(group: Group, x: jax.Array) -> jax.Array:
    role = get_role(group)
    assert role is not None
    return lora.factor_gram(x.astype(role.batch[2]), role.axes)

  grams = leaves.map_leaves(compute_gram, "params", only=lambda group: get_role(group) is not None)
  values: list[Any] = [None] * len(grams)
  roles = [get_role(group) for group in leaves.groups]
  for batch in dict.fromkeys(role.batch for role in roles if role):
    sides: list[Any] = []
    members = [(i, group) for i, (group, role) in enumerate(zip(leaves.groups, roles))
               if role and role.batch == batch]
    for side in (0, 1):
      numbered = [(i, [factors[p][1] for p in g.places]) for i, g in members
                  if factors[g.places[0]][0].side == side]
      pair_numbers = [number for _, numbers in numbered for number in numbers]
      sides.append((numbered, numerics.concatenate_sorted(
        [grams[i] for i, _ in numbered], pair_numbers)))
    shape = sides[0][1].shape
    down, up = (x.reshape(-1, *shape[2:]) for _, x in sides)
    kernels = _spectra.pair_kernels(down, up, emphasis)
    for (numbered, _), kernel in zip(sides, kernels):
      kernel = kernel.reshape(shape)
      for i, numbers in numbered:
        axes = factors[leaves.groups[i].places[0]][0].axes
        values[i] = _Kernel(_take_rows(kernel, numbers), axes)
  return values, state


def _take_rows(values: jax.Array, rows: Sequence[int]) -> jax.Array:
  """`values[rows]`, as a slice if the rows are consecutive, so that XLA need not gather them."""
  begin, end = rows[0], rows[-1] + 1
  return values[begin:end] if list(rows) == list(range(begin, end)) else values[np.array(rows)]


registry.register(registry.regularizer(
  add_rank_penalty, AddRankPenaltyState, 60,
  Option("lora_rank_penalty", False, registry.FLAG,
         "`add_rank_penalty`: nuclear norm of the product of each LoRA pair",
         "every matrix shrinks by its own energy"),
  {"strength": Option("rank_penalty_strength", 0.01, registry.NUMBER,
                      "in units of the loss per unit of nuclear norm"),
   "emphasis": Option("low_rank_emphasis", 1.2, registry.at_least(1.0),
                      "weight of small singular values", "unused, as in the original"),
   "unpaired": Option("unpaired", "ignore", registry.one_of("ignore", "nuclear"),
                      "what happens to matrices that are no LoRA factor", "unused"),
   "lora_pattern": Option("lora_pattern", None, registry.PATTERN,
                          "with the groups `down` and `up`, for other names of factors",
                          "unused")},
  reads_params=True, moves_minimum=True, identity={"strength": 0.0},
  examples={"": {"strength": 0.1, "emphasis": 1.5, "unpaired": "nuclear"}}))
