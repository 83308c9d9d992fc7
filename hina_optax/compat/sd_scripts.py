"""The arithmetic of `HinaAdaptive`, the PyTorch original in a fork of kohya's sd-scripts.

`hina_adaptive(sd_scripts_compat=True)` follows the original step by step, faults included. It stays
within 3e-6 of the trajectories in tests/parity. The stages stand in the order of a step, each as a
formula for one leaf. Their docstrings say what is wrong with them: nothing here is advice. The
states are those of the public parts, so saved states and `get_optimization_info` need not know
which arithmetic was chosen.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from hina_optax.base import leafwise, numerics, paths, traits
from hina_optax.base.leaf import Leaf
from hina_optax.base.numerics import Scalar
from hina_optax.core._moments import ScaleByHinaState
from hina_optax.core._weight_decay import AddScheduledWeightDecayState
from hina_optax.grouped import xla_cpu
from hina_optax.grouped.layout import Group
from hina_optax.grouped.measures import LeafGroups, Measure
from hina_optax.modulators import _importance, _projection, _rates, _relations, _sign_agreement
from hina_optax.modulators._alignment import CautiousState
from hina_optax.modulators._importance import ImportanceState
from hina_optax.modulators._projection import ProjectToInitState
from hina_optax.modulators._rates import RateRule, ScaleByRatesState
from hina_optax.regularizers._agr import AdaptiveGradientRegularizationState
from hina_optax.regularizers._background import AttenuateBackgroundState
from hina_optax.regularizers._detail import PreserveDetailState
from hina_optax.regularizers._edges import SuppressEdgesState
from hina_optax.regularizers._high_frequency import SuppressHighFrequencyState
from hina_optax.regularizers._orthogonal import orthogonalize_to_params
from hina_optax.regularizers._rank import AddRankPenaltyState

Array = jax.Array
Transformation: TypeAlias = optax.GradientTransformationExtraArgs

# The original stores importance as a 16-bit integer. It starts from 6554, which is close to 1.
_QUANTA = 6553.5
_IMPORTANCE = {"importance": round(_QUANTA) / _QUANTA, "initial_norm": -1.0, "relation": 0.0}

# Options that switch a stage on; the original accepts `use_grams` and ignores it.
SWITCHES = frozenset({
  "use_agr", "edge_suppression", "spatial_awareness", "background_regularization",
  "lora_rank_penalty", "use_orthogonal_grad", "use_tam", "use_adopt_stability", "use_cautious",
  "use_grams", "use_lr_mask", "use_dynamic_adaptation", "use_spd"})


def sd_scripts_chain(
  o: Any, mask: Callable[[Transformation], Transformation] | None = None, *,
  rate_units: tuple[Scalar, Scalar, Scalar],
) -> Transformation:
  """The original's chain.

  Args:
    o: the `HinaOptions`, checked.
    mask: puts the weight decay behind a mask, which the original does not have.
    rate_units: `lr_bump`, `min_lr` and `max_lr` as multiples of the learning rate. The original
      measures them against the learning rate that its constructor got.
  """
  regularizers = [stage(o) for is_on, stage in (
    (o.use_agr, agr),
    (o.edge_suppression, _edges),
    (o.spatial_awareness, _high_frequency),
    (o.spatial_awareness, _detail),
    (o.background_regularization, _background),
    (o.lora_rank_penalty, _rank),
    (o.use_orthogonal_grad, _orthogonal),
  ) if is_on]
  direction = _core(o)
  if o.use_cautious:
    direction = _cautious(direction)
  if o.use_lr_mask or o.use_dynamic_adaptation:
    direction = _step_scale(direction, o, rate_units)
  decay = _weight_decay(o)
  step = traits.chain(
    direction, traits.mark_leafwise(optax.scale_by_learning_rate(o.learning_rate)),
    decay if mask is None else mask(decay))
  return traits.chain(*regularizers, _spd(step, o) if o.use_spd else step)


def agr(o: Any) -> Transformation:
  """Step 1, `use_agr`: `g / |g|` where `|g| > 1`.

  This clips each leaf to norm 1. It is not the published AGR.
  """
  def clip(leaf, g, old):
    squares = numerics.inner_product(g, g)
    norm = leaf.recompute_unless(squares < 1e36, jnp.sqrt(squares), numerics.scaled_norm, g)
    return g / jnp.maximum(norm, jnp.ones_like(norm)), old

  return leafwise.part(AdaptiveGradientRegularizationState, clip)


def restrict_to_matrices(rule: paths.SpatialAxes | None, side: int) -> paths.SpatialAxes:
  """`rule` for matrices whose sides are all at least `side`; no axes for other leaves."""
  def axes(path: str, leaf: Any) -> Sequence[int]:
    is_eligible = leaf.ndim == 2 and min(leaf.shape) >= side
    return (rule or paths.flax_spatial_axes)(path, leaf) if is_eligible else ()

  return axes


def _edges(o: Any) -> Transformation:
  """Step 2.1, `edge_suppression`: `g / (1 + penalty e)`, `e = |L|` where `|L| > threshold`, else 0.

  `L` is the second difference, summed over the axes. Along each axis it is 0 on the border. The
  threshold is absolute, so behind a clip to norm 1 it is practically never exceeded.
  """
  def damp(leaf, g, old):
    if not leaf.axes or not leaf.size:
      return g, old
    laplacian = jnp.zeros_like(g)
    for pair in leaf.neighbours(g, leaf.axes):
      second = (pair.upper - g) - (g - pair.lower)
      laplacian = laplacian + jnp.where(pair.is_first | pair.is_last, jnp.zeros_like(g), second)
    edges = leaf.compute_once(jnp.abs(laplacian))
    is_edge = edges > numerics.scalar(o.edge_threshold, g.dtype)
    factor = 1 + numerics.scalar(o.edge_penalty, g.dtype) * jnp.where(is_edge, edges, 0)
    return g / factor, old._replace(edge_share=numerics.share_of_true(is_edge))

  return leafwise.part(
    SuppressEdgesState, damp, axes=restrict_to_matrices(o.spatial_axes, 3),
    numbers={"edge_share": lambda leaf: 0.0 if leaf.axes else -1.0})


def _high_frequency(o: Any) -> Transformation:
  """Step 2.2, `spatial_awareness`: `g - penalty f`, `f` the sum over the axes of `|g[i] - g[i-1]|`.

  It subtracts a magnitude from a signed number, which biases every gradient downwards.
  """
  def subtract(leaf, g, old):
    differences = jnp.zeros_like(g)
    for pair in leaf.neighbours(g, leaf.axes):
      differences += jnp.where(pair.is_first, jnp.zeros_like(g), jnp.abs(g - pair.lower))
    return g - numerics.scalar(o.frequency_penalty, g.dtype) * differences, old

  return leafwise.part(
    SuppressHighFrequencyState, subtract, axes=restrict_to_matrices(o.spatial_axes, 2))


def _detail(o: Any) -> Transformation:
  """Step 2.3, `spatial_awareness`: `g / (1 + preservation V)`.

  `V` is an average over steps, from 1, of the sum of the squared differences to the neighbours. So
  it first divides every matrix and kernel by about 1.8, and more preservation means less detail.
  """
  def damp(leaf, g, old):
    if len(leaf.shape) < 2:
      return g, old
    # An average that becomes infinite would stay infinite.
    squares = jnp.minimum(leaf.squared_differences(g), 1e38)
    variance = numerics.update_average(old.local_variance, squares, 0.9)
    factor = 1 + numerics.scalar(o.detail_preservation, g.dtype) * variance
    return g / factor, old._replace(local_variance=variance)

  return leafwise.part(
    PreserveDetailState, damp, elements={"local_variance": 1.0},
    axes=restrict_to_matrices(o.spatial_axes, 3))


def require_two_axes(rule: paths.SpatialAxes | None) -> paths.SpatialAxes:
  """`rule` where it gives two axes; for any other leaf of at least two axes, the last two."""
  def axes(path: str, leaf: Any) -> Sequence[int]:
    chosen = tuple((rule or paths.flax_spatial_axes)(path, leaf))
    return chosen if len(chosen) == 2 or leaf.ndim < 2 else (leaf.ndim - 2, leaf.ndim - 1)

  return axes


def _background(o: Any) -> Transformation:
  """Step 2.4, `background_regularization`: damps elements that are often quiet.

  `b` is an average over steps, from 0, of whether an element is quiet.

  - simple: where `|g| < mean|g| - 0.5 std|g|`; then `g (1 - 0.5 b)`.
  - fast: where the 3 x 3 mean of `|g|` is below the 0.3 quantile of the leaf; then
    `g (b behind + (1 - b) front)`, with factors that depend on the share of background so far.

  The averages keep their bias from the start. A missing neighbour counts as 0, so every border
  looks like background.
  """
  def simple(leaf, g, old):
    if not leaf.axes or not leaf.size:
      return g, old
    activity = jnp.abs(g)
    is_quiet = activity < numerics.mean(activity) - 0.5 * jnp.sqrt(numerics.variance(activity))
    background = numerics.update_average(old.background, is_quiet.astype(g.dtype), 0.95)
    return g * (1 - 0.5 * background), old._replace(background=background)

  def fast(leaf, g, old):
    if not leaf.axes or not leaf.size:
      return g, old
    activity, threshold = _compute_activity(leaf, jnp.abs(g))
    is_quiet = activity < threshold
    background = numerics.update_average(old.background, is_quiet.astype(g.dtype), 0.9)
    mean = numerics.mean(background).astype(old.background_share.dtype)
    share = numerics.update_average(old.background_share, mean, 0.95)
    behind, front = (
      jnp.where(share > 0.7, high, jnp.where(share < 0.2, low, medium)).astype(g.dtype)
      for high, low, medium in ((0.2, 0.5, 0.3), (1.2, 1.05, 1.1)))
    factor = background * behind + (1 - background) * front
    return g * factor, old._replace(background=background, background_share=share)

  return leafwise.part(
    AttenuateBackgroundState, fast if o.background_regularization_mode == "fast" else simple,
    elements={"background": 0.0}, numbers={"background_share": 0.5},
    axes=require_two_axes(o.spatial_axes))


def _compute_activity(leaf: Leaf, x: Array) -> tuple[Array, Array]:
  """The 3 x 3 mean, or `x` if a side is short, and its quantile, interpolated in short kernels."""
  position = 0.3 * (leaf.size - 1)
  if min(leaf.shape[axis] for axis in leaf.axes) > 2:
    for axis in leaf.axes:
      [pair] = leaf.neighbours(x, (axis,))
      below, above = (jnp.where(on_border, jnp.zeros_like(x), y)
                      for on_border, y in ((pair.is_first, pair.lower), (pair.is_last, pair.upper)))
      x = (x + below + above) / 3
  elif len(leaf.shape) > 2:
    low = numerics.order_statistic(x, int(position))
    high = numerics.order_statistic(x, min(int(position) + 1, leaf.size - 1))
    return x, low + (position - int(position)) * (high - low)
  return x, numerics.order_statistic(x, int(0.3 * leaf.size))


def _rank(o: Any) -> Transformation:
  """Step 3, `lora_rank_penalty`: `g + strength s p` for every matrix.

  `s` is the sum of the ten largest eigenvalues of the smaller Gram matrix of `p`. The result is a
  weight decay that grows with the square of the weights. It lowers no rank, and it solves an
  eigenvalue problem per matrix and step.
  """
  def add(leaf, g, p, old, energy):
    if energy is None:
      return g, old
    term = numerics.zero_non_finite(energy.astype(g.dtype) * p)
    return g + numerics.scalar(o.rank_penalty_strength, g.dtype) * term, old

  def compute_energies(leaves: LeafGroups, state: Any) -> tuple[list[Any], Any]:
    grams = leaves.map_leaves(
      lambda _, p: _smaller_gram(p), "params", only=lambda group: _is_matrix(group.shape))
    return [None if gram is None else _energies(gram) for gram in grams], state

  return leafwise.part(
    AddRankPenaltyState, add, reads_params="add_rank_penalty",
    measure=Measure("sd_scripts_energy", None, compute_energies))


def _smaller_gram(p: Array) -> Array:
  matrix = p if p.shape[0] <= p.shape[1] else p.T
  gram = jnp.matmul(matrix, matrix.T, precision=lax.Precision.HIGHEST)
  return (gram + gram.T) / 2


def _energies(grams: Array) -> Array:
  """The sum of the ten largest eigenvalues of each matrix of a batch."""
  if grams.shape[-1] <= 10:
    return jnp.trace(grams, axis1=-2, axis2=-1)

  def eigenvalues(matrices: Array) -> Array:
    return lax.linalg.eigh(matrices, symmetrize_input=False)[1]

  return jnp.sum(xla_cpu.map_matrices(eigenvalues, grams, side_by_side=True)[:, -10:], axis=-1)


def _is_matrix(shape: tuple[int, ...]) -> bool:
  return len(shape) == 2 and min(shape) > 0


def _orthogonal(o: Any) -> Transformation:
  """Step 4, `use_orthogonal_grad`: the public part, applied to vectors as well."""
  return orthogonalize_to_params(include_vectors=True)


def _core(o: Any) -> Transformation:
  """Steps 5 and 6: Adam, `use_adopt_stability` and `use_tam`.

  With stability the denominator uses `max(v, v of the step before)`, which is not ADOPT. TAM
  multiplies `u` by `(1 + a) / 2`, where `a` is an average over steps, from 0, of the cosine between
  the new `m` and `g`. With its decay of 0.999 this is close to a constant 0.5.
  """
  b1, b2 = o.betas
  torque_decay = 0.999 if o.tam_beta is None else o.tam_beta

  def step(leaf, g, old):
    # `numerics.cosine` handles large squares itself.
    unclipped, g = g, numerics.clip_to_squarable(g)
    mu = numerics.update_average(old.mu, g, b1)
    nu = numerics.update_average(old.nu, jnp.square(g), b2)
    # As exact as PyTorch's. optax's is off by 1.3e-5 for 0.999 at the first step.
    correction1, correction2 = (
      numerics.bias_correction(b, old.count, g.dtype, precise=True) for b in (b1, b2))
    v = jnp.maximum(nu, old.nu) if o.use_adopt_stability else nu
    u = (mu / correction1) / (jnp.sqrt(v / correction2) + numerics.scalar(o.eps, g.dtype))
    a = old.torque
    if o.use_tam:
      a = numerics.update_average(a, numerics.cosine(mu, unclipped), torque_decay)
      u = u * ((1 + a) / 2)
    return u, old._replace(mu=mu, nu=nu, torque=a)

  return leafwise.part(
    ScaleByHinaState, step, elements={"mu": 0.0, "nu": 0.0},
    numbers={"torque": 0.0} if o.use_tam else None)


def _cautious(inner: Transformation) -> Transformation:
  """Step 7, `use_cautious`: `u / 2` where the cosine of `u` and `g` is below 0.1.

  It halves the whole leaf, whatever the signs of its elements.
  """
  def halve(leaf, u, g, old):
    angle = numerics.cosine(u, g)
    is_opposed = numerics.have_directions(u, g) & (angle < 0.1)
    return u * jnp.where(is_opposed, jnp.asarray(0.5, u.dtype), 1), old._replace(alignment=angle)

  return leafwise.part(CautiousState, halve, inner=inner, numbers={"alignment": 0.0})


def _step_scale(
  inner: Transformation, o: Any, rate_units: tuple[Scalar, Scalar, Scalar]
) -> Transformation:
  """Step 8, `use_lr_mask` and `use_dynamic_adaptation`: `u clip(mask adaptive, 0.001, 10)`.

  `mask` is per element and `adaptive` per leaf. The mask follows the signs of the gradient, not
  those of the direction.
  """
  rules = []
  if o.use_lr_mask:
    rules.append(_sign_agreement.sign_agreement_rule(*rate_units, o.warmup_steps))
  if o.use_dynamic_adaptation:
    rules.append(_adaptive_rule(o))

  def scale(leaf, u, g, old, adaptive=None):
    product = jnp.ones([], u.dtype)
    if o.use_lr_mask:
      _, old = rules[0].formula(leaf, g, g, old)
      anchors, bump, _ = _sign_agreement.make_lattice(*rate_units, u.dtype)
      product = _sign_agreement.decode_rates(old.bumps, anchors, bump)
    if adaptive is not None:
      product = product * adaptive.astype(u.dtype)
    return u * jnp.clip(product, 0.001, 10.0), old

  function = leafwise.lift_formula(scale)

  def build(inner: Any, guard: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def init(params: Any) -> ScaleByRatesState:
      return ScaleByRatesState(
        inner.init(params), tuple(_rates.init_rule_state(rule, params) for rule in rules))

    def update(updates, state, params=None, **extra_args):
      u, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
      values, states = zip(*(_rates.measure_step(rule, updates, old, params, extra_args)
                             for rule, old in zip(rules, state.rules)))
      u, first_state = leafwise.map_leaves(
        function, u, states[0], [updates], elements=("bumps",) if o.use_lr_mask else (),
        values=values[-1], guard=guard)
      return u, ScaleByRatesState(inner_state, (first_state, *states[1:]))

    return init, update

  return leafwise.build_guarded(build, inner, traits.Traits(
    leafwise=True, measures=tuple(rule.measure for rule in rules if rule.measure)))


def _adaptive_rule(o: Any) -> RateRule:
  """`adaptive` is `clip(clip(strength I, 0.1, 3) (1 + 0.2 q), 0.01, 5)`.

  `q` is the compatibility with a related leaf. At each visit `I` averages
  `max(0.01, 0.4 |g| + 0.3 c + 0.3 i)`, with the change `c` of `|p|` since the first visit. The
  terms are absolute: on a leaf with small gradients `I` decays towards 0.15, a sixth of the rate.
  """
  def adapt(leaves: LeafGroups, old: ImportanceState) -> tuple[list[Any], ImportanceState]:
    state = old._replace(count=optax.safe_increment(old.count))
    if not leaves.groups:
      return [], state
    is_due = state.count % jnp.asarray(o.relationship_discovery_interval).astype(jnp.int32) == 0
    state = lax.cond(is_due, lambda: _visit(leaves, state, o), lambda: state)
    # The original searches for relations after it has begun the step.
    importance, related = (
      _importance.numbers_by_group(leaves, x) for x in (state.importance, old.relation))
    scaled = jnp.clip(importance * numerics.scalar(o.adaptation_strength, jnp.float32), 0.1, 3.0)
    factors = jnp.clip(scaled * (1 + 0.2 * related), 0.01, 5.0)
    return _importance.split_by_group(leaves, factors), state

  return RateRule(
    ImportanceState, lambda leaf, u, g, old, adaptive: (u * adaptive, old), numbers=_IMPORTANCE,
    measure=Measure("sd_scripts_importance", ImportanceState, adapt),
    reads_params="scale_by_importance")


def _visit(leaves: LeafGroups, state: ImportanceState, o: Any) -> ImportanceState:
  """The state after a visit. Local arrays have one number per leaf, in the order of the groups."""
  def measure(group: Group, g: Array, p: Array) -> tuple[Any, ...]:
    # The original takes 0.5, and one time in ten the other value. Here it is always the same one.
    intrinsic = jnp.asarray(0.5, p.dtype)
    if o.intrinsic_importance == "full":
      intrinsic = numerics.variance(p) * (1 - numerics.share_of_true(jnp.abs(p) < 1e-6, p.dtype))
    sample = _relations.first_elements(p) if _is_matrix(group.shape) else None
    return numerics.norm(g), numerics.norm(p), intrinsic, sample

  columns = [list(column) for column in zip(*leaves.map_leaves(measure, "gradients", "params"))]
  gradient, norm, intrinsic = (_importance.concatenate_groups(column) for column in columns[:3])
  fields = state.importance, state.initial_norm, state.relation
  old = [_importance.numbers_by_group(leaves, field) for field in fields]
  change = _importance.relative_change(norm, old[1])
  contribution = jnp.maximum(0.01, 0.4 * gradient + 0.3 * change + 0.3 * intrinsic)
  importance = numerics.update_average(old[0], contribution, o.importance_decay)
  importance = jnp.clip(jnp.round(importance * _QUANTA), 0, 65535) / _QUANTA
  new = [importance, jnp.where(old[1] < 0, norm, old[1]),
         _update_relations(leaves, columns[3], old[2], o.compatibility_threshold)]
  has_update = leaves.update_mask()
  if has_update is not None:
    new = [jnp.where(has_update, x, y) for x, y in zip(new, old)]
  return ImportanceState(
    state.count, *(_importance.numbers_by_path(leaves, field, x) for field, x in zip(fields, new)))


def _update_relations(
  leaves: LeafGroups, samples: Sequence[Any], old: Array, threshold: Scalar
) -> Array:
  """For each leaf the first relation ever accepted with the leaf as the first of the pair."""
  shapes = [group.shape for group in leaves.groups for _ in group.places]
  # The original pairs leaves in the order of its list, while they stand group by group here.
  chosen = np.array(_relations.find_matrices(leaves.places(), shapes), np.int32)
  if len(chosen) < 2:
    return old
  matrices = [i for i, shape in enumerate(shapes) if _is_matrix(shape)]
  rows = np.searchsorted(matrices, chosen)
  sample = jnp.concatenate([x for x in samples if x is not None])[rows]
  compat = _relations.compatibility([shapes[i] for i in chosen], sample)
  has_update = leaves.update_mask()
  if has_update is not None:
    compat = jnp.where(has_update[chosen][:, None] & has_update[chosen][None, :], compat, 0)
  total = len(old) if has_update is None else jnp.sum(has_update, dtype=jnp.int32)
  # The original stores relations in fp16.
  new = lax.reduce_precision(find_first_accepted(compat, threshold, total), 5, 10)
  return old.at[chosen].set(jnp.where(old[chosen] > 0, old[chosen], new))


def find_first_accepted(compat: Array, threshold: Scalar, total: int | Array) -> Array:
  """The first in each row among the first `min(100, n (n - 1) / 2)` pairs above the threshold."""
  above = compat > numerics.scalar(threshold, compat.dtype)
  order = jnp.cumsum(above.ravel(), dtype=jnp.int32).reshape(above.shape)
  n = jnp.minimum(total, 15)  # 15 leaves have 105 pairs already.
  accepted = above & (order <= jnp.minimum(100, n * (n - 1) // 2))
  first = jnp.take_along_axis(compat, jnp.argmax(accepted, axis=1)[:, None], axis=1)[:, 0]
  return jnp.where(jnp.any(accepted, axis=1), first, 0)


def _weight_decay(o: Any) -> Transformation:
  """Step 9: `p - lr wd p` of the parameters after the step, since `u` holds `-lr` here.

  With `dynamic_weight_decay`, `wd` fades once the step is beyond `wd_transition_steps`.
  """
  def decay(leaf, u, p, old):
    amount = numerics.scalar(o.weight_decay, u.dtype)
    if o.dynamic_weight_decay:
      begin, factor, min_ratio = (numerics.scalar(x, u.dtype) for x in (
        o.wd_transition_steps, o.wd_decay_factor, o.wd_min_ratio))
      progress = (old.count.astype(u.dtype) - begin) / begin
      ratio = jnp.maximum(min_ratio, factor ** jnp.minimum(progress, 2))
      amount = amount * jnp.where(progress > 0, ratio, jnp.ones_like(ratio))
    # The original rounds the parameter after each of its two steps, and so does this.
    stepped = p + u
    return (stepped - _rate_at(o, old.count, u.dtype) * amount * stepped) - p, old

  return leafwise.part(
    AddScheduledWeightDecayState, decay, reads_params="add_scheduled_weight_decay")


def _rate_at(o: Any, count: Array, dtype: Any) -> Any:
  """The learning rate of step `count`, counted from 1."""
  rate = o.learning_rate
  return numerics.scalar(rate(count - 1) if callable(rate) else rate, dtype)


def _spd(inner: Transformation, o: Any) -> Transformation:
  """Step 10, `use_spd`: `p - lr spd_lambda (|d| / |p|) d`, `d` the displacement from the start.

  It selects nothing: it pulls at every step, whatever the gradient asks for.
  """
  def pull(leaf, u, g, p, old, raw):
    (raw_u, raw_p), u = raw, leaf.compute_once(u)
    stepped, displacement = p + u, old.displacement + u
    share = numerics.safe_divide(numerics.norm(displacement), numerics.norm(stepped))
    amount = _rate_at(o, old.count, u.dtype) * numerics.scalar(o.spd_lambda, u.dtype)
    # The original rounds the parameter after the optimizer's own step, and so does this.
    u = leaf.compute_once((stepped - amount * share * displacement) - p)
    change = _projection.applied_update(u, raw_p, raw_u.dtype)
    return u, old._replace(displacement=old.displacement + change)

  return leafwise.part(
    ProjectToInitState, pull, inner=inner, elements={"displacement": 0.0}, raw=True,
    reads_params="project_to_init")
