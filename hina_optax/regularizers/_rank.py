"""Rank penalty: the (reweighted) nuclear norm of the product of each LoRA pair."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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

# The extra argument in which each factor is handed what turns it into its gradient.
_KERNELS = "rank_penalty_kernels"


class AddRankPenaltyState(NamedTuple):
  """State of `add_rank_penalty`: empty, it names the part in a chain's state."""


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
      term = leaf.ravel(_pair_term(leaf.unravel(p), kernel))
    elif unpaired == "nuclear" and len(leaf.shape) == 2 and leaf.size:
      term = leaf.ravel(_spectra.polar_factors(leaf.unravel(p)))
    else:
      return g, old
    return g + numerics.scalar(strength, g.dtype) * numerics.finite(term), old

  return leafwise.part(
    AddRankPenaltyState, penalize, reads_params="add_rank_penalty",
    measure=Measure(
      _KERNELS, None, functools.partial(_look, pattern=pattern, emphasis=emphasis),
      functools.partial(_roles, pattern=pattern)))


class _Role(NamedTuple):
  """What a factor is in its pair.

  Attributes:
    side: 0 for `down`, 1 for `up`.
    axes: how it is stored.
    batch: what pairs that are solved together have in common: rank, layers, dtype, and whether they
      have elements.
  """

  side: int
  axes: FactorAxes
  batch: tuple[int, int, Any, bool]


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=("value",), meta_fields=("axes",))
@dataclasses.dataclass(frozen=True)
class _Kernel:
  """What turns a factor into its gradient: `(layers, rank, rank)`, in a stack `(leaves, ...)`."""

  value: jax.Array
  axes: FactorAxes


def _pair_term(p: jax.Array, kernel: _Kernel) -> jax.Array:
  """The gradient of the weighted nuclear norm for one factor."""
  matrix = lora.to_matrix(p, kernel.axes)
  return lora.from_matrix(_spectra.product(kernel.value, matrix), kernel.axes, p)


def _factors(
  places: Sequence[paths.Leaf], leaves: Sequence[Any], pattern: Any, whole: bool
) -> dict[int, tuple[_Role, int]]:
  """For each place that holds a factor its role, and the number of its pair in the pair's batch."""
  by_place = {place.index: leaf for place, leaf in zip(places, leaves)}
  found: dict[int, tuple[_Role, int]] = {}
  sizes: dict[Any, int] = {}
  for pair in lora.find_pairs(places, leaves, pattern, whole):
    down, up = by_place[pair.down], by_place[pair.up]
    batch = (pair.rank, math.prod(down.shape[:pair.down_axes.batch_axes]),
             numerics.compute_dtype(down.dtype, up.dtype),
             bool(math.prod(down.shape) and math.prod(up.shape)))
    number = sizes.get(batch, 0)
    sizes[batch] = number + 1
    found[pair.down] = _Role(0, pair.down_axes, batch), number
    found[pair.up] = _Role(1, pair.up_axes, batch), number
  return found


def _roles(params: Any, pattern: Any) -> list[Any]:
  """For each place of a tree the role of its leaf, by which leaves are stacked."""
  places, leaves, _ = paths.flatten(params)
  found = _factors(places, leaves, pattern, whole=True)
  return [found[place.index][0] if place.index in found else None for place in places]


def _look(
  leaves: LeafGroups, state: Any, pattern: Any, emphasis: Scalar
) -> tuple[list[Any], Any]:
  """For each group what turns its factors into their gradients, pairs of one batch together."""
  places = [paths.Leaf(path, place) for group in leaves.groups
            for path, place in zip(group.paths, group.places)]
  places.sort(key=lambda place: place.index)
  factors = _factors(places, [leaves.params[p.index] for p in places], pattern, whole=False)

  def role(group: Group) -> _Role | None:
    known = factors.get(group.places[0])
    return known[0] if known is not None and known[0].batch[3] else None

  def gram(group: Group, x: jax.Array) -> jax.Array:
    own = role(group)
    assert own is not None
    return lora.gram(x.astype(own.batch[2]), own.axes)

  grams = leaves.each(gram, "params", only=lambda group: role(group) is not None)
  values: list[Any] = [None] * len(grams)
  for batch in dict.fromkeys(role(g).batch for g in leaves.groups if role(g)):  # type: ignore[union-attr]
    sides: list[Any] = []
    members = [(i, g) for i, g in enumerate(leaves.groups) if role(g) and role(g).batch == batch]  # type: ignore[union-attr]
    for side in (0, 1):
      own = [(i, [factors[p][1] for p in g.places]) for i, g in members
             if factors[g.places[0]][0].side == side]
      order = [number for _, numbers in own for number in numbers]
      sides.append((own, _in_order(order, [grams[i] for i, _ in own])))
    shape = sides[0][1].shape
    down, up = (x.reshape(-1, *shape[2:]) for _, x in sides)
    solved = _spectra.pair_kernels(down, up, emphasis)
    for (own, _), kernel in zip(sides, solved):
      kernel = kernel.reshape(shape)
      for i, numbers in own:
        axes = factors[leaves.groups[i].places[0]][0].axes
        values[i] = _Kernel(_chosen(kernel, numbers), axes)
  return values, state


def _in_order(numbers: Sequence[int], parts: Sequence[jax.Array]) -> jax.Array:
  """The rows of all `parts`, of which `numbers` has one each, sorted by their numbers."""
  joined = jnp.concatenate(parts)
  order = list(numbers)
  return joined if order == sorted(order) else joined[np.argsort(order)]


def _chosen(values: jax.Array, rows: Sequence[int]) -> jax.Array:
  """Some rows: a slice where they follow each other, which XLA need not gather."""
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
