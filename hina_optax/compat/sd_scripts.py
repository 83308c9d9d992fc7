"""The arithmetic of `HinaAdaptive`, the PyTorch original in a fork of kohya's sd-scripts.

`hina_adaptive(sd_scripts_compat=True)` follows the original step by step, faults included. It stays
within 3e-6 of the trajectories in tests/parity. The stages stand here in the order in which a step
runs through them, each as a formula of one leaf. Their docstrings say what is wrong with them:
nothing here is advice. The states are those of the public parts, so saved states and
`get_optimization_info` need not know which arithmetic was chosen.
"""

import math
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

# Importance is kept as an integer of 16 bits. It starts from 6554, which is next to 1.
_QUANTA = 6553.5
_IMPORTANCE = {"importance": round(_QUANTA) / _QUANTA, "initial_norm": -1.0, "relation": 0.0}


def sd_scripts_chain(
  o: Any, mask: Callable[[Transformation], Transformation] | None = None, *,
  rate_units: tuple[Scalar, Scalar, Scalar],
) -> Transformation:
  """The original's chain.

  Args:
    o: the `HinaOptions`, checked.
    mask: puts the weight decay behind a mask, which the original does not have.
    rate_units: `lr_bump`, `min_lr` and `max_lr` as multiples of the learning rate. The original
      measures them against the one that its constructor was given.
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
    direction, traits.leafwise(optax.scale_by_learning_rate(o.learning_rate)),
    decay if mask is None else mask(decay))
  return traits.chain(*regularizers, _spd(step, o) if o.use_spd else step)


def agr(o: Any) -> Transformation:
  """Step 1, `use_agr`: `g / |g|` where `|g| > 1`.

  It is a clip of each leaf to norm 1, not the published AGR.
  """
  def clip(leaf, g, old):
    squares = numerics.inner_product(g, g)
    norm = leaf.seldom(squares < 1e36, jnp.sqrt(squares), numerics.scaled_norm, g)
    return g / jnp.maximum(norm, jnp.ones_like(norm)), old

  return leafwise.part(AdaptiveGradientRegularizationState, clip)


def only_matrices(rule: paths.SpatialAxes | None, side: int) -> paths.SpatialAxes:
  """`rule` for matrices of which each side is at least `side`, nothing for other leaves."""
  def axes(path: str, leaf: Any) -> Sequence[int]:
    wide = leaf.ndim == 2 and min(leaf.shape) >= side
    return (rule or paths.flax_spatial_axes)(path, leaf) if wide else ()

  return axes


def _edges(o: Any) -> Transformation:
  """Step 2.1, `edge_suppression`: `g / (1 + penalty e)`, `e = |L|` where `|L| > threshold`, else 0.

  `L` is the second difference, summed over the axes. Along an axis it is 0 on the border. The
  threshold is absolute: behind a clip to norm 1 it practically never fires.
  """
  def damp(leaf, g, old):
    if not leaf.axes or not leaf.size:
      return g, old
    second = jnp.zeros_like(g)
    for at in leaf.neighbours(g, leaf.axes):
      inside = (at.upper - g) - (g - at.lower)
      second = second + jnp.where(at.first | at.last, jnp.zeros_like(g), inside)
    size = leaf.reused(jnp.abs(second))
    fires = size > numerics.scalar(o.edge_threshold, g.dtype)
    factor = 1 + numerics.scalar(o.edge_penalty, g.dtype) * jnp.where(fires, size, 0)
    return g / factor, old._replace(edge_share=numerics.fraction(fires))

  return leafwise.part(
    SuppressEdgesState, damp, axes=only_matrices(o.spatial_axes, 3),
    numbers={"edge_share": lambda leaf: 0.0 if leaf.axes else -1.0})


def _high_frequency(o: Any) -> Transformation:
  """Step 2.2, `spatial_awareness`: `g - penalty f`, `f` the sum over the axes of `|g[i] - g[i-1]|`.

  A magnitude is subtracted from a number with a sign, which biases every gradient downwards.
  """
  def subtract(leaf, g, old):
    found = jnp.zeros_like(g)
    for at in leaf.neighbours(g, leaf.axes):
      found = found + jnp.where(at.first, jnp.zeros_like(g), jnp.abs(g - at.lower))
    return g - numerics.scalar(o.frequency_penalty, g.dtype) * found, old

  return leafwise.part(
    SuppressHighFrequencyState, subtract, axes=only_matrices(o.spatial_axes, 2))


def _detail(o: Any) -> Transformation:
  """Step 2.3, `spatial_awareness`: `g / (1 + preservation V)`.

  `V` is an average over steps, from 1, of the sum of the squared differences to the neighbours. So
  every matrix and kernel is divided by about 1.8 at first, and more preservation means less detail.
  """
  def damp(leaf, g, old):
    if len(leaf.shape) < 2:
      return g, old
    # An average that became infinite would stay so.
    squares = jnp.minimum(leaf.squared_differences(g), 1e38)
    variance = numerics.average(old.local_variance, squares, 0.9)
    factor = 1 + numerics.scalar(o.detail_preservation, g.dtype) * variance
    return g / factor, old._replace(local_variance=variance)

  return leafwise.part(
    PreserveDetailState, damp, elements={"local_variance": 1.0},
    axes=only_matrices(o.spatial_axes, 3))


def two_axes(rule: paths.SpatialAxes | None) -> paths.SpatialAxes:
  """`rule` where it gives two axes, the last two of any other leaf that has as many."""
  def axes(path: str, leaf: Any) -> Sequence[int]:
    given = tuple((rule or paths.flax_spatial_axes)(path, leaf))
    return given if len(given) == 2 or leaf.ndim < 2 else (leaf.ndim - 2, leaf.ndim - 1)

  return axes


def _background(o: Any) -> Transformation:
  """Step 2.4, `background_regularization`: damps what is often quiet.

  `b` is an average over steps, from 0, of whether an element is quiet.

  - simple: where `|g| < mean|g| - 0.5 std|g|`; then `g (1 - 0.5 b)`.
  - fast: where the 3 x 3 mean of `|g|` is below the 0.3 quantile of the leaf; then
    `g (b behind + (1 - b) front)`, with factors that depend on the share of background so far.

  Averages keep their bias from the start, and a missing neighbour counts as 0, so that every border
  looks like background.
  """
  def simple(leaf, g, old):
    if not leaf.axes or not leaf.size:
      return g, old
    size = jnp.abs(g)
    quiet = size < numerics.mean(size) - 0.5 * jnp.sqrt(numerics.variance(size))
    background = numerics.average(old.background, quiet.astype(g.dtype), 0.95)
    return g * (1 - 0.5 * background), old._replace(background=background)

  def fast(leaf, g, old):
    if not leaf.axes or not leaf.size:
      return g, old
    activity, threshold = _activity(leaf, jnp.abs(g))
    quiet = activity < threshold
    background = numerics.average(old.background, quiet.astype(g.dtype), 0.9)
    now = numerics.mean(background).astype(old.background_share.dtype)
    share = numerics.average(old.background_share, now, 0.95)
    behind, front = (
      jnp.where(share > 0.7, often, jnp.where(share < 0.2, seldom, between)).astype(g.dtype)
      for often, seldom, between in ((0.2, 0.5, 0.3), (1.2, 1.05, 1.1)))
    factor = background * behind + (1 - background) * front
    return g * factor, old._replace(background=background, background_share=share)

  return leafwise.part(
    AttenuateBackgroundState, fast if o.background_regularization_mode == "fast" else simple,
    elements={"background": 0.0}, numbers={"background_share": 0.5},
    axes=two_axes(o.spatial_axes))


def _activity(leaf: Leaf, x: Array) -> tuple[Array, Array]:
  """The 3 x 3 mean where there is one, and its quantile: interpolated in narrow kernels alone."""
  place = 0.3 * (leaf.size - 1)
  if min(leaf.shape[axis] for axis in leaf.axes) > 2:
    for axis in leaf.axes:
      [at] = leaf.neighbours(x, (axis,))
      below, above = (jnp.where(edge, jnp.zeros_like(x), y)
                      for edge, y in ((at.first, at.lower), (at.last, at.upper)))
      x = (x + below + above) / 3
  elif len(leaf.shape) > 2:
    low = numerics.order_statistic(x, int(place))
    high = numerics.order_statistic(x, min(int(place) + 1, leaf.size - 1))
    return x, low + (place - int(place)) * (high - low)
  return x, numerics.order_statistic(x, int(0.3 * leaf.size))


def _rank(o: Any) -> Transformation:
  """Step 3, `lora_rank_penalty`: `g + strength s p` for every matrix.

  `s` is the sum of the ten largest eigenvalues of the smaller Gram matrix of `p`. It is a weight
  decay that grows with the square of the weights. It lowers no rank, and it needs an eigenvalue
  problem per matrix and step.
  """
  def add(leaf, g, p, old, energy):
    if energy is None:
      return g, old
    term = numerics.finite(energy.astype(g.dtype) * p)
    return g + numerics.scalar(o.rank_penalty_strength, g.dtype) * term, old

  def look(leaves: LeafGroups, state: Any) -> tuple[list[Any], Any]:
    grams = leaves.each(
      lambda _, p: _small_gram(p), "params", only=lambda group: _is_matrix(group.shape))
    return [None if gram is None else _energies(gram) for gram in grams], state

  return leafwise.part(
    AddRankPenaltyState, add, reads_params="add_rank_penalty",
    measure=Measure("sd_scripts_energy", None, look))


def _small_gram(p: Array) -> Array:
  wide = p if p.shape[0] <= p.shape[1] else p.T
  gram = jnp.matmul(wide, wide.T, precision=lax.Precision.HIGHEST)
  return (gram + gram.T) / 2


def _energies(grams: Array) -> Array:
  """The sum of the ten largest eigenvalues of each matrix of a batch."""
  if grams.shape[-1] <= 10:
    return jnp.trace(grams, axis1=-2, axis2=-1)

  def eigenvalues(matrices: Array) -> Array:
    return lax.linalg.eigh(matrices, symmetrize_input=False)[1]

  return jnp.sum(xla_cpu.each_matrix(eigenvalues, grams, side_by_side=True)[:, -10:], axis=-1)


def _is_matrix(shape: tuple[int, ...]) -> bool:
  return len(shape) == 2 and min(shape) > 0


def _orthogonal(o: Any) -> Transformation:
  """Step 4, `use_orthogonal_grad`: the public part, for vectors as well."""
  return orthogonalize_to_params(include_vectors=True)


def _core(o: Any) -> Transformation:
  """Steps 5 and 6: Adam, `use_adopt_stability` and `use_tam`.

  Stability shows the denominator `max(v, v of the step before)`, which is not ADOPT. TAM multiplies
  `u` by `(1 + a) / 2`, `a` an average over steps, from 0, of the cosine between the new `m` and
  `g`. With its decay of 0.999 this is close to a constant 0.5.
  """
  b1, b2 = o.betas
  torque_decay = 0.999 if o.tam_beta is None else o.tam_beta

  def step(leaf, g, old):
    # Cosines take care of their own squares.
    whole, g = g, numerics.squarable(g)
    mu, nu = numerics.average(old.mu, g, b1), numerics.average(old.nu, jnp.square(g), b2)
    first, second = (_seen(b, old.count, g.dtype) for b in (b1, b2))
    shown = jnp.maximum(nu, old.nu) if o.use_adopt_stability else nu
    u = (mu / first) / (jnp.sqrt(shown / second) + numerics.scalar(o.eps, g.dtype))
    a = old.torque
    if o.use_tam:
      a = numerics.average(a, numerics.cosine(mu, whole), torque_decay)
      u = u * ((1 + a) / 2)
    return u, old._replace(mu=mu, nu=nu, torque=a)

  return leafwise.part(
    ScaleByHinaState, step, elements={"mu": 0.0, "nu": 0.0},
    numbers={"torque": 0.0} if o.use_tam else None)


def _seen(decay: Scalar, count: Array, dtype: Any) -> Array:
  """`1 - decay**count` as exactly as PyTorch has it. optax's is 1.3e-5 off for 0.999 at first."""
  if isinstance(decay, float) and decay > 0:
    return -jnp.expm1(count.astype(dtype) * math.log(decay))
  return numerics.debias(decay, count, dtype)


def _cautious(inner: Transformation) -> Transformation:
  """Step 7, `use_cautious`: `u / 2` where the cosine of `u` and `g` is below 0.1.

  It halves the whole leaf, whatever the signs of its elements.
  """
  def halve(leaf, u, g, old):
    angle = numerics.cosine(u, g)
    apart = numerics.have_directions(u, g) & (angle < 0.1)
    return u * jnp.where(apart, jnp.asarray(0.5, u.dtype), 1), old._replace(alignment=angle)

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
    rules.append(_adaptive(o))

  def scale(leaf, u, g, old, adaptive=None):
    product = jnp.ones([], u.dtype)
    if o.use_lr_mask:
      _, old = rules[0].formula(leaf, g, g, old)
      anchors, bump, _ = _sign_agreement._anchors(*rate_units, u.dtype)
      product = _sign_agreement._decode(old.bumps, anchors, bump)
    if adaptive is not None:
      product = product * adaptive.astype(u.dtype)
    return u * jnp.clip(product, 0.001, 10.0), old

  function = leafwise.on_leaf(scale)

  def build(inner: Any, guard: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def init(params: Any) -> ScaleByRatesState:
      return ScaleByRatesState(
        inner.init(params), tuple(_rates._begin(rule, params) for rule in rules))

    def update(updates, state, params=None, **extra_args):
      u, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
      values, states = zip(*(_rates._step(rule, updates, old, params, extra_args)
                             for rule, old in zip(rules, state.rules)))
      u, first = leafwise.map_leaves(
        function, u, states[0], [updates], elements=("bumps",) if o.use_lr_mask else (),
        values=values[-1], guard=guard)
      return u, ScaleByRatesState(inner_state, (first, *states[1:]))

    return init, update

  return leafwise.both_forms(build, inner, traits.Traits(
    leafwise=True, measures=tuple(rule.measure for rule in rules if rule.measure)))


def _adaptive(o: Any) -> RateRule:
  """`adaptive` is `clip(clip(strength I, 0.1, 3) (1 + 0.2 q), 0.01, 5)`.

  `q` is the compatibility with a related leaf. At each visit `I` averages
  `max(0.01, 0.4 |g| + 0.3 c + 0.3 i)`, with the change `c` of `|p|` since the first one. The terms
  are absolute: `I` of a leaf with small gradients decays towards 0.15, a sixth of the rate.
  """
  def look(leaves: LeafGroups, old: ImportanceState) -> tuple[list[Any], ImportanceState]:
    state = old._replace(count=optax.safe_increment(old.count))
    if not leaves.groups:
      return [], state
    due = state.count % jnp.asarray(o.relationship_discovery_interval).astype(jnp.int32) == 0
    state = lax.cond(due, lambda: _visited(leaves, state, o), lambda: state)
    # The original searches for relations after it has begun the step.
    importance, related = (
      _importance._in_groups(leaves, x) for x in (state.importance, old.relation))
    scaled = jnp.clip(importance * numerics.scalar(o.adaptation_strength, jnp.float32), 0.1, 3.0)
    factors = jnp.clip(scaled * (1 + 0.2 * related), 0.01, 5.0)
    return _importance._divided(leaves, factors), state

  return RateRule(
    ImportanceState, lambda leaf, u, g, old, adaptive: (u * adaptive, old), numbers=_IMPORTANCE,
    measure=Measure("sd_scripts_importance", ImportanceState, look),
    reads_params="scale_by_importance")


def _visited(leaves: LeafGroups, state: ImportanceState, o: Any) -> ImportanceState:
  """The state after a visit. Inside, the numbers of leaves stand in the order of the groups."""
  def measure(group: Group, g: Array, p: Array) -> tuple[Any, ...]:
    # The original takes 0.5, and at random, once in ten times, the other. Here it is always one.
    intrinsic = jnp.asarray(0.5, p.dtype)
    if o.intrinsic_importance == "full":
      intrinsic = numerics.variance(p) * (1 - numerics.fraction(jnp.abs(p) < 1e-6, p.dtype))
    sample = _relations.first_elements(p) if _is_matrix(group.shape) else None
    return numerics.norm(g), numerics.norm(p), intrinsic, sample

  columns = [list(column) for column in zip(*leaves.each(measure, "gradients", "params"))]
  size, norm, intrinsic = (_importance._joined(column) for column in columns[:3])
  fields = state.importance, state.initial_norm, state.relation
  old = [_importance._in_groups(leaves, field) for field in fields]
  change = _importance._change(norm, old[1])
  contribution = jnp.maximum(0.01, 0.4 * size + 0.3 * change + 0.3 * intrinsic)
  importance = numerics.average(old[0], contribution, o.importance_decay)
  importance = jnp.clip(jnp.round(importance * _QUANTA), 0, 65535) / _QUANTA
  new = [importance, jnp.where(old[1] < 0, norm, old[1]),
         _related(leaves, columns[3], old[2], o.compatibility_threshold)]
  here = leaves.here()
  if here is not None:
    new = [jnp.where(here, x, y) for x, y in zip(new, old)]
  return ImportanceState(
    state.count, *(_importance._by_name(leaves, field, x) for field, x in zip(fields, new)))


def _related(
  leaves: LeafGroups, samples: Sequence[Any], old: Array, threshold: Scalar
) -> Array:
  """For each leaf the first relation ever accepted in which it is the first of the pair."""
  shapes = [group.shape for group in leaves.groups for _ in group.places]
  # The original pairs leaves in the order of its list. Here they stand group by group.
  chosen = np.array(_relations.candidates(leaves.places(), shapes), np.int32)
  if len(chosen) < 2:
    return old
  found = [i for i, shape in enumerate(shapes) if _is_matrix(shape)]
  sample = jnp.concatenate([x for x in samples if x is not None])[np.searchsorted(found, chosen)]
  compat = _relations.compatibility([shapes[i] for i in chosen], sample)
  here = leaves.here()
  if here is not None:
    compat = jnp.where(here[chosen][:, None] & here[chosen][None, :], compat, 0)
  total = len(old) if here is None else jnp.sum(here, dtype=jnp.int32)
  # The original stores them in fp16.
  new = lax.reduce_precision(first_accepted(compat, threshold, total), 5, 10)
  return old.at[chosen].set(jnp.where(old[chosen] > 0, old[chosen], new))


def first_accepted(compat: Array, threshold: Scalar, total: int | Array) -> Array:
  """The first in each row of the first `min(100, n (n - 1) / 2)` pairs above the threshold."""
  above = compat > numerics.scalar(threshold, compat.dtype)
  order = jnp.cumsum(above.ravel(), dtype=jnp.int32).reshape(above.shape)
  n = jnp.minimum(total, 15)  # which have 105 pairs
  accepted = above & (order <= jnp.minimum(100, n * (n - 1) // 2))
  found = jnp.take_along_axis(compat, jnp.argmax(accepted, axis=1)[:, None], axis=1)[:, 0]
  return jnp.where(jnp.any(accepted, axis=1), found, 0)


def _weight_decay(o: Any) -> Transformation:
  """Step 9: `p - lr wd p` of the parameters after the step, since `u` holds `-lr` here.

  With `dynamic_weight_decay`, `wd` fades once the step is beyond `wd_transition_steps`.
  """
  def decay(leaf, u, p, old):
    amount = numerics.scalar(o.weight_decay, u.dtype)
    if o.dynamic_weight_decay:
      begin, factor, least = (numerics.scalar(x, u.dtype) for x in (
        o.wd_transition_steps, o.wd_decay_factor, o.wd_min_ratio))
      late = (old.count.astype(u.dtype) - begin) / begin
      left = jnp.maximum(least, factor ** jnp.minimum(late, 2))
      amount = amount * jnp.where(late > 0, left, jnp.ones_like(left))
    # Rounded as the original rounds: to the parameter after each of its two steps.
    stepped = p + u
    return (stepped - _rate_at(o, old.count, u.dtype) * amount * stepped) - p, old

  return leafwise.part(
    AddScheduledWeightDecayState, decay, reads_params="add_scheduled_weight_decay")


def _rate_at(o: Any, count: Array, dtype: Any) -> Any:
  """The learning rate of the step of this number, counted from 1."""
  rate = o.learning_rate
  return numerics.scalar(rate(count - 1) if callable(rate) else rate, dtype)


def _spd(inner: Transformation, o: Any) -> Transformation:
  """Step 10, `use_spd`: `p - lr spd_lambda (|d| / |p|) d`, `d` the displacement from the start.

  It selects nothing: it pulls at every step, whatever the gradient asks for.
  """
  def pull(leaf, u, g, p, old, raw):
    (step, param), u = raw, leaf.reused(u)
    stepped, displacement = p + u, old.displacement + u
    share = numerics.safe_divide(numerics.norm(displacement), numerics.norm(stepped))
    amount = _rate_at(o, old.count, u.dtype) * numerics.scalar(o.spd_lambda, u.dtype)
    # Rounded as the original rounds: to the parameter after the optimizer's own step.
    u = leaf.reused((stepped - amount * share * displacement) - p)
    moved = _projection._applied(u, param, step.dtype)
    return u, old._replace(displacement=old.displacement + moved)

  return leafwise.part(
    ProjectToInitState, pull, inner=inner, elements={"displacement": 0.0}, raw=True,
    reads_params="project_to_init")
