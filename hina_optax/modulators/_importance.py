"""Importance: move learning rate between leaves by how much each has to learn."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from hina_optax import _checks, _numerics, _visits
from hina_optax._numerics import Scalar
from hina_optax.modulators import _relations
from hina_optax.modulators._rates import RateRule, scale_by_rates

_WEIGHTS = 0.4, 0.3, 0.3
_LEAST_CONTRIBUTION = 0.01
_FACTOR_BOUNDS = 0.1, 3.0
_RELATED_BOUNDS = 0.01, 5.0
_RELATION_WEIGHT = 0.2
_INTRINSIC = 0.5
_SPARSE = 1e-6
# The original keeps importance as an integer of 16 bits.
_QUANTA = 6553.5


class ImportanceState(NamedTuple):
  """State of `scale_by_importance`: four numbers a leaf, nothing per parameter.

  Attributes:
    count: int32 scalar, steps seen.
    importance: fp32 vector, one number a leaf.
    initial_norm: fp32 vector: norm of the parameters at the first visit, -1 before it.
    relation: fp32 vector: compatibility with the related leaf, 0 without one.
    gradient_size: fp32 vector: root mean square of the gradient at the last step, 0 before the
      first; `None` with `relative=False`.
  """

  count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
  importance: jax.Array
  initial_norm: jax.Array
  relation: jax.Array
  gradient_size: jax.Array | None


def scale_by_importance(
  inner: optax.GradientTransformation,
  strength: Scalar = 1.0,
  *,
  interval: Scalar = 100,
  decay: Scalar = 0.95,
  compatibility_threshold: Scalar = 0.3,
  intrinsic_importance: str = "full",
  relative: bool = True,
) -> optax.GradientTransformationExtraArgs:
  r"""Scales the direction of each leaf by its importance relative to the other leaves.

  At every `interval`-th step each leaf contributes

  .. math:: k = \max(0.01,\; 0.4\,\hat g + 0.3\,\hat c + 0.3\,\hat\imath)

  - `g`: root mean square of its gradient at the step before,
  - `c`: relative change of its parameters' norm since the first visit,
  - `i`: variance of its parameters times the share of them above 1e-6 in size,

  each divided by its mean over the leaves, and importance is the average of that over visits,
  :math:`I \leftarrow \delta I + (1-\delta) k` from 1. A matrix is related to the most compatible
  other one (equal sides, correlated first elements), if above the threshold, with compatibility
  `q`. With :math:`R = I (1 + 0.2\, q)`,

  .. math::
    f = \operatorname{clip}\left(1 + s\left(\tfrac{R}{\operatorname{mean} R} - 1\right),
    0.1, 3\right), \qquad u \leftarrow \frac{f}{\operatorname{mean} f}\, u

  The mean factor over the leaves is 1: learning rate moves between leaves, the sum stays. Between
  visits this costs one multiplication. Importance is a heuristic of the guide: it has no published
  evidence.

  Args:
    inner: any optax transformation whose output still points along the gradient.
    strength: `s` >= 0, dimensionless; 0 is the identity.
    interval: >= 1, steps between visits.
    decay: :math:`\delta` in [0, 1).
    compatibility_threshold: in [0, 1].
    intrinsic_importance: `"full"` as above, or `"estimated"`: the constant 0.5 for `i`, which saves
      a pass over the parameters at each visit.
    relative: `False` is the PyTorch original: absolute terms (`g` the norm, at the same step),
      importance in steps of 1/6553.5, the first relation found, in the order of the leaves, instead
      of the best,
      :math:`u \leftarrow \operatorname{clip}((1 + 0.2 q) \operatorname{clip}(s I, 0.1, 3), 0.01, 5)
      \, u`.
      A leaf with small gradients then decays towards a sixth of the learning rate.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `ScaleByRatesState` that holds an
    `ImportanceState`: 16 bytes a leaf beside the inner's state.

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
    >>> _, state = tx.update(grads, tx.init(params), params)
    >>> updates, _ = tx.update(grads, state, params)
    >>> [round(float(updates[k][0] / grads[k][0]), 3) for k in ("a", "b")]
    [1.2, 0.8]

  References:
    `use_dynamic_adaptation`, `adaptation_strength`, `relationship_discovery_interval`,
    `importance_decay` and `compatibility_threshold` of `HinaAdaptive`.
  """
  return scale_by_rates(inner, (importance_rule(
    strength, interval=interval, decay=decay, compatibility_threshold=compatibility_threshold,
    intrinsic_importance=intrinsic_importance, relative=relative,
  ),))


def importance_rule(
  strength: Scalar,
  *,
  interval: Scalar,
  decay: Scalar,
  compatibility_threshold: Scalar,
  intrinsic_importance: str,
  relative: bool,
) -> RateRule:
  """The rule behind `scale_by_importance`."""
  _checks.number("strength", strength)
  _checks.integer("interval", interval, 1)
  _checks.decay("decay", decay)
  _checks.fraction("compatibility_threshold", compatibility_threshold)
  _checks.choice("intrinsic_importance", intrinsic_importance, ("full", "estimated"))
  start = 1.0 if relative else round(_QUANTA) / _QUANTA

  def init(params: Any) -> ImportanceState:
    return ImportanceState(
      count=jnp.zeros([], jnp.int32),
      importance=_visits.per_leaf_scalars(params, start),
      initial_norm=_visits.per_leaf_scalars(params, -1.0),
      relation=_visits.per_leaf_scalars(params),
      gradient_size=_visits.per_leaf_scalars(params) if relative else None,
    )

  def prepare(whole, state):
    count, places = optax.safe_increment(state.count), whole.places()
    due = count % jnp.asarray(interval).astype(jnp.int32) == 0
    measures = whole.look(due, functools.partial(_measure, intrinsic=intrinsic_importance))
    new = lax.cond(due, lambda state: visit(whole, measures, state), lambda state: state, state)
    # The original searches for relations after it has begun the step.
    relation = new.relation if relative else state.relation
    factors = _factors(new.importance, relation, strength, places, relative)
    return factors, new._replace(count=count)

  def visit(whole, look: Callable[[], _Measures], state: ImportanceState):
    places = whole.places()
    if not places:
      return state
    index, measures, seen = np.array(places, np.int32), look(), state.gradient_size
    size = _sizes(places, whole.gradients()) if seen is None else seen[index]
    change = _change(measures.norm, state.initial_norm[index])
    contribution = sum(w * (_relative(x) if relative else x)
                       for w, x in zip(_WEIGHTS, (size, change, measures.intrinsic)))
    contribution = jnp.maximum(contribution, _LEAST_CONTRIBUTION)
    importance = _numerics.average(state.importance[index], contribution, decay)
    if not relative:
      importance = jnp.clip(jnp.round(importance * _QUANTA), 0, 65535) / _QUANTA
    first = jnp.where(state.initial_norm[index] < 0, measures.norm, state.initial_norm[index])
    shapes = _relations.candidates(whole.shapes(), places)
    return state._replace(
      importance=state.importance.at[index].set(importance),
      initial_norm=state.initial_norm.at[index].set(first),
      relation=_relate(shapes, measures.sample, state.relation, compatibility_threshold,
                       None if relative else len(places)),
    )

  def factor(u, g, trees, value):
    del g, trees
    return value.astype(u.dtype), ()

  return RateRule(
    init, prepare, factor, per_leaf=True, observed="gradient_size" if relative else None,
    observe=_root_mean_square, reads_gradients=not relative, reads_params="scale_by_importance")


def _root_mean_square(g: jax.Array) -> jax.Array:
  # Right where squares underflow, and a number where they overflow.
  return _numerics.squarable(_numerics.wide_norm(g) / max(g.size, 1) ** 0.5)


class _Measures(NamedTuple):
  """What a visit looks up of the parameters.

  Attributes:
    norm: of each leaf.
    intrinsic: of each leaf: variance times the share that is not next to 0.
    sample: the first elements of each matrix; `None` where there is none.
  """

  norm: jax.Array
  intrinsic: jax.Array
  sample: jax.Array | None


def _measure(parameters: Any, places: list[int], intrinsic: str) -> _Measures:
  def of_each(function: Callable[..., jax.Array], places: Any = places) -> jax.Array:
    return _visits.vector_of(lambda p: function(_clean(p)), _order(places), (parameters,))

  matrices = list(_relations.candidates(parameters, places))
  return _Measures(
    of_each(_numerics.norm),
    jnp.full(len(places), _INTRINSIC) if intrinsic == "estimated" else of_each(_intrinsic),
    of_each(_relations.first_elements, matrices) if matrices else None)


def _intrinsic(p: jax.Array) -> jax.Array:
  return _numerics.variance(p) * (1 - _numerics.fraction(jnp.abs(p) < _SPARSE))


def _sizes(places: list[int], gradients: Any) -> jax.Array:
  return _visits.vector_of(lambda g: _numerics.norm(_clean(g)), _order(places), (gradients,))


def _change(norm: jax.Array, initial_norm: jax.Array) -> jax.Array:
  """How far each leaf's norm is from the first, relative to it."""
  moved = _numerics.safe_divide(jnp.abs(norm - initial_norm), initial_norm)
  return jnp.where(initial_norm < 0, 0, moved)


def _order(places: list[int]) -> dict[int, int]:
  return {place: i for i, place in enumerate(places)}


def _clean(x: Any) -> jax.Array:
  x = jnp.asarray(x).astype(jnp.float32)
  return jnp.where(jnp.isfinite(x), x, 0)


def _relative(x: jax.Array) -> jax.Array:
  """`x` over its mean; all ones where the mean is 0."""
  x = jnp.where(jnp.isfinite(x), x, 0)
  average = jnp.mean(x)
  return jnp.where(average > 0, x * _numerics.reciprocal(average), 1)


def _relate(
  shapes: dict[int, tuple[int, ...]], sample: jax.Array | None, relation: jax.Array,
  threshold: Scalar, total: int | None,
) -> jax.Array:
  """The new relations of the matrices of these places and shapes.

  `total`: how many leaves the original counts; `None`: each takes its strongest relation instead.
  """
  if sample is None or len(shapes) < 2:
    return relation
  compat = _relations.compatibility(list(shapes.values()), sample[:len(shapes)])
  index = np.array(list(shapes))
  if total is None:
    return relation.at[index].set(_relations.strongest(compat, threshold))
  first = _relations.first_accepted(compat, threshold, total)
  first = first.astype(jnp.float16).astype(jnp.float32)
  return relation.at[index].set(jnp.where(relation[index] > 0, relation[index], first))


def _factors(
  importance: jax.Array, relation: jax.Array, strength: Scalar, places: list[int], relative: bool
) -> jax.Array:
  amount = _numerics.scalar(strength, importance.dtype)
  related = 1 + _RELATION_WEIGHT * relation
  if not relative:
    return jnp.clip(jnp.clip(importance * amount, *_FACTOR_BOUNDS) * related, *_RELATED_BOUNDS)
  if not places:
    return jnp.ones_like(importance)
  index = np.array(places)
  rank = (importance * related)[index]
  factor = jnp.clip(1 + amount * (rank / jnp.mean(rank) - 1), *_FACTOR_BOUNDS)
  return jnp.ones_like(importance).at[index].set(factor / jnp.mean(factor))
