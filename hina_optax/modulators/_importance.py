"""Importance: move learning rate between leaves by how much each has to learn."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from hina_optax import registry
from hina_optax.base import checks, numerics
from hina_optax.base.numerics import Scalar
from hina_optax.base.positions import LeafNumbers
from hina_optax.grouped.layout import Group
from hina_optax.grouped.measures import LeafGroups, Measure
from hina_optax.modulators import _relations
from hina_optax.modulators._rates import RateRule, scale_by_rates
from hina_optax.registry import Figure, Option, Part

__all__ = ["ImportanceState", "importance_rule", "scale_by_importance"]

# The name of the extra argument in which each leaf gets its factor.
_FACTORS = "importance_factors"

# Weights of the gradient, the change and the intrinsic importance in a contribution.
_WEIGHTS = 0.4, 0.3, 0.3
_MIN_CONTRIBUTION = 0.01
_FACTOR_BOUNDS = 0.1, 3.0
_RELATION_WEIGHT = 0.2
_ESTIMATED_INTRINSIC = 0.5
# Elements below it count as zero.
_SPARSE_BELOW = 1e-6


class ImportanceState(NamedTuple):
  """State of `scale_by_importance`: three numbers per leaf, nothing per parameter.

  Attributes:
    count: int32 scalar, steps seen.
    importance: fp32, one number per leaf, found by its path.
    initial_norm: like `importance`: norm of the parameters at the first visit, -1 before it.
    relation: like `importance`: compatibility with the related leaf, 0 without one. All three take
      12 bytes per leaf.
  """

  count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
  importance: LeafNumbers
  initial_norm: LeafNumbers
  relation: LeafNumbers


def scale_by_importance(
  inner: optax.GradientTransformation,
  strength: Scalar = 1.0,
  *,
  interval: Scalar = 100,
  decay: Scalar = 0.95,
  compatibility_threshold: Scalar = 0.3,
  intrinsic_importance: str = "full",
) -> optax.GradientTransformationExtraArgs:
  r"""Scales the direction of each leaf by its importance relative to the other leaves.

  At every `interval`-th step each leaf contributes

  .. math:: k = \max(0.01,\; 0.4\,\hat g + 0.3\,\hat c + 0.3\,\hat\imath)

  - `g`: root mean square of its gradient,
  - `c`: relative change of its parameters' norm since the first visit,
  - `i`: variance of its parameters times the share of them above 1e-6 in size,

  each divided by its mean over the leaves. Importance is the average of the contribution over
  visits, :math:`I \leftarrow \delta I + (1-\delta) k`, from 1. A matrix is related to the most
  compatible other matrix (equal sides, correlated first elements) if their compatibility `q` is
  above the threshold. With :math:`R = I (1 + 0.2\, q)`,

  .. math::
    f = \operatorname{clip}\left(1 + s\left(\tfrac{R}{\operatorname{mean} R} - 1\right),
    0.1, 3\right), \qquad u \leftarrow \frac{f}{\operatorname{mean} f}\, u

  Means are over the leaves that have an update. The mean factor is 1: learning rate moves between
  leaves, the sum stays. Between visits this costs one multiplication. Importance is a heuristic of
  the guide (the Traditional Chinese guide to HinaAdaptive that the library implements), without
  published evidence.

  Args:
    inner: any optax transformation whose output still points along the gradient.
    strength: `s` >= 0, dimensionless; 0 is the identity.
    interval: >= 1, steps between visits.
    decay: :math:`\delta` in [0, 1).
    compatibility_threshold: in [0, 1].
    intrinsic_importance: `"full"` as above, or `"estimated"`: the constant 0.5 for `i`, which saves
      a pass over the parameters at each visit.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `ScaleByRatesState` that holds an
    `ImportanceState`: 12 bytes per leaf beside the inner's state.

  Raises:
    ValueError: if an argument lies outside its range, or `params` are missing at the update.
    TypeError: if a leaf is not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import hina_optax
    >>> tx = hina_optax.scale_by_importance(optax.identity(), interval=1, decay=0.0)
    >>> params = {"a": jnp.array([1.0, 3.0]), "b": jnp.array([1.0, 3.0])}
    >>> grads = {"a": jnp.array([3.0, 3.0]), "b": jnp.array([1.0, 1.0])}
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> [round(float(updates[k][0] / grads[k][0]), 3) for k in ("a", "b")]
    [1.2, 0.8]

  References:
    `use_dynamic_adaptation`, `adaptation_strength`, `relationship_discovery_interval`,
    `importance_decay` and `compatibility_threshold` of `HinaAdaptive`.
  """
  return scale_by_rates(inner, (importance_rule(
    strength, interval=interval, decay=decay, compatibility_threshold=compatibility_threshold,
    intrinsic_importance=intrinsic_importance),))


def importance_rule(
  strength: Scalar,
  *,
  interval: Scalar,
  decay: Scalar,
  compatibility_threshold: Scalar,
  intrinsic_importance: str,
) -> RateRule:
  """The rule behind `scale_by_importance`."""
  checks.number("strength", strength)
  checks.integer("interval", interval, 1)
  checks.decay("decay", decay)
  checks.unit_interval("compatibility_threshold", compatibility_threshold)
  checks.choice("intrinsic_importance", intrinsic_importance, ("full", "estimated"))

  def compute_factors(
    leaves: LeafGroups, state: ImportanceState
  ) -> tuple[list[Any], ImportanceState]:
    count = optax.safe_increment(state.count)
    is_due = count % jnp.asarray(interval).astype(jnp.int32) == 0
    new = lax.cond(is_due, lambda: visit(leaves, state), lambda: state)
    importance, relation = (numbers_by_group(leaves, x) for x in (new.importance, new.relation))
    factors = _rate_factors(importance, relation, strength, leaves.update_mask())
    return split_by_group(leaves, factors), new._replace(count=count)

  def visit(leaves: LeafGroups, state: ImportanceState) -> ImportanceState:
    has_update = leaves.update_mask()
    initial_norm = numbers_by_group(leaves, state.initial_norm)
    measured = leaves.map_leaves(measure, "gradients", "params")
    gradient, norm, intrinsic = (concatenate_groups([row[k] for row in measured]) for k in range(3))
    terms = (gradient, relative_change(norm, initial_norm), intrinsic)
    contribution = sum(w * _divide_by_mean(x, has_update) for w, x in zip(_WEIGHTS, terms))
    contribution = jnp.maximum(contribution, _MIN_CONTRIBUTION)
    old = [numbers_by_group(leaves, state.importance), initial_norm,
           numbers_by_group(leaves, state.relation)]
    new = [numerics.update_average(old[0], contribution, decay),
           jnp.where(initial_norm < 0, norm, initial_norm),
           _update_relations(
             leaves, [row[3] for row in measured], old[2], has_update, compatibility_threshold)]
    if has_update is not None:
      new = [jnp.where(has_update, a, b) for a, b in zip(new, old)]
    fields = state.importance, state.initial_norm, state.relation
    return ImportanceState(state.count, *(
      numbers_by_path(leaves, field, x) for field, x in zip(fields, new)))

  def measure(group: Group, g: jax.Array, p: jax.Array) -> tuple[Any, ...]:
    intrinsic = (jnp.float32(_ESTIMATED_INTRINSIC) if intrinsic_importance == "estimated"
                 else _measure_intrinsic(p))
    sample = _relations.first_elements(p) if _is_matrix(group) else None
    return _root_mean_square(g), numerics.norm(p), intrinsic, sample

  def scale(leaf, u, g, old, factor):
    del leaf, g
    return (u if factor is None else u * factor.astype(u.dtype)), old

  return RateRule(
    ImportanceState, scale,
    numbers={"importance": 1.0, "initial_norm": -1.0, "relation": 0.0},
    measure=Measure(_FACTORS, ImportanceState, compute_factors), reads_params="scale_by_importance")


def concatenate_groups(groups: list[Any]) -> jax.Array:
  """Joins one vector per group to one vector with a number per leaf, group by group."""
  return jnp.concatenate([x.astype(jnp.float32) for x in groups])


def _field_indices(leaves: LeafGroups, field: LeafNumbers) -> np.ndarray:
  """For each leaf, group by group, its index in `field`."""
  return np.array([field.names.index[path] for group in leaves.groups for path in group.paths])


def numbers_by_group(leaves: LeafGroups, field: LeafNumbers) -> jax.Array:
  """The numbers of a state's field, in the order of the groups."""
  indices = _field_indices(leaves, field)
  return field.numbers if (indices == np.arange(len(field.names.names))).all() else (
    field.numbers[indices])


def numbers_by_path(leaves: LeafGroups, field: LeafNumbers, numbers: jax.Array) -> LeafNumbers:
  """Inverse of `numbers_by_group`. Leaves that are in no group keep their numbers of `field`."""
  indices = _field_indices(leaves, field)
  is_same_order = (indices == np.arange(len(field.names.names))).all() if len(indices) == len(
    field.names.names) else False
  return LeafNumbers(
    field.names, numbers if is_same_order else field.numbers.at[indices].set(numbers))


def split_by_group(leaves: LeafGroups, numbers: jax.Array) -> list[Any]:
  """Splits numbers in the order of the groups into one array per group."""
  arrays, begin = [], 0
  for group in leaves.groups:
    arrays.append(numbers[begin:begin + len(group.places)])
    begin += len(group.places)
  return arrays


def _root_mean_square(g: jax.Array) -> jax.Array:
  # `scaled_norm` is right where squares underflow, and clipping keeps the result finite where they
  # overflow.
  return numerics.clip_to_squarable(numerics.scaled_norm(g) / max(g.size, 1) ** 0.5)


def _measure_intrinsic(p: jax.Array) -> jax.Array:
  """Variance times the share of elements that are not close to 0."""
  return numerics.variance(p) * (1 - numerics.share_of_true(jnp.abs(p) < _SPARSE_BELOW, p.dtype))


def relative_change(norm: jax.Array, initial_norm: jax.Array) -> jax.Array:
  """The change of each leaf's norm since the first visit, relative to the norm at that visit."""
  change = numerics.safe_divide(jnp.abs(norm - initial_norm), initial_norm)
  return jnp.where(initial_norm < 0, 0, change)


def _mean(x: jax.Array, has_update: jax.Array | None) -> jax.Array:
  """Mean over the leaves that have an update."""
  if has_update is None:
    return jnp.mean(x)
  return jnp.sum(jnp.where(has_update, x, 0)) / jnp.maximum(jnp.sum(has_update.astype(x.dtype)), 1)


def _divide_by_mean(x: jax.Array, has_update: jax.Array | None) -> jax.Array:
  """`x` divided by its mean; all ones where the mean is 0."""
  x = numerics.zero_non_finite(x)
  average = _mean(x, has_update)
  return jnp.where(average > 0, x * numerics.reciprocal(average), 1)


def _is_matrix(group: Group) -> bool:
  return len(group.shape) == 2 and group.size > 0


def _update_relations(
  leaves: LeafGroups, samples: list[Any], relation: jax.Array, has_update: jax.Array | None,
  threshold: Scalar,
) -> jax.Array:
  """The new relations of all leaves, group by group. Only those of matrices change."""
  places = leaves.places()
  shapes = [group.shape for group in leaves.groups for _ in group.places]
  chosen = _relations.find_matrices(places, shapes)
  if len(chosen) < 2:
    return relation

  matrices = [i for i, shape in enumerate(shapes) if len(shape) == 2 and 0 not in shape]
  sample = jnp.concatenate([x for x in samples if x is not None])
  sample = sample[np.array([matrices.index(i) for i in chosen])]
  compat = _relations.compatibility([shapes[i] for i in chosen], sample)
  index = np.array(chosen)
  if has_update is not None:
    both_have_update = has_update[index][:, None] & has_update[index][None, :]
    compat = jnp.where(both_have_update, compat, 0)
  return relation.at[index].set(_relations.find_strongest(compat, threshold))


def _rate_factors(
  importance: jax.Array, relation: jax.Array, strength: Scalar, has_update: jax.Array | None
) -> jax.Array:
  """The factor of each leaf's learning rate, group by group."""
  amount = numerics.scalar(strength, importance.dtype)
  weighted = importance * (1 + _RELATION_WEIGHT * relation)
  factor = jnp.clip(1 + amount * (weighted / _mean(weighted, has_update) - 1), *_FACTOR_BOUNDS)
  return factor / _mean(factor, has_update)


def _build_rule(options):
  return importance_rule(
    options.adaptation_strength, interval=options.relationship_discovery_interval,
    decay=options.importance_decay, compatibility_threshold=options.compatibility_threshold,
    intrinsic_importance=options.intrinsic_importance)


registry.register(Part(
  scale_by_importance, ImportanceState, "rate", 20, (
    Option("use_dynamic_adaptation", True, registry.FLAG,
           "`scale_by_importance`: moves learning rate between leaves, its mean stays",
           "absolute: most leaves drift towards a sixth of their rate"),
    Option("adaptation_strength", 1.0, registry.NUMBER,
           "strength of `use_dynamic_adaptation`"),
    Option("relationship_discovery_interval", 100, registry.whole_number(1),
           "steps after which importance is measured again"),
    Option("importance_decay", 0.95, registry.DECAY,
           "decay of the average of importance over its measurements"),
    Option("compatibility_threshold", 0.3, registry.FRACTION,
           "least compatibility of two related matrices", "the first one found"),
    Option("intrinsic_importance", "full", registry.one_of("full", "estimated"),
           "how a matrix is measured; `\"estimated\"` is cheaper",
           "in place of the original's random draw"),
  ), ("use_dynamic_adaptation",), _build_rule,
  figures={"mean_importance": Figure("importance")}, reads_params=True,
  identity={"strength": 0.0}, examples={"": {"interval": 3, "decay": 0.5}}))
