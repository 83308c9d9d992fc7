"""`hina_adaptive`: the guide's optimizer as a chain of the library's parts. No mathematics here."""

import functools
from collections.abc import Callable
from typing import Any

import optax

from hina_optax import (
  _leaves,
  _memory_options,
  _rate_units,
  core,
  memory,
  modulators,
  regularizers,
)
from hina_optax.options import HinaOptions, explain_unknown_options

# Of the original: the product of all learning-rate scales is held between these.
_ORIGINAL_SCALE_BOUNDS = (0.001, 10.0)


class HinaTransformation(optax.GradientTransformationExtraArgs):
  """An `optax.GradientTransformationExtraArgs` that knows the options it was built from.

  Attributes:
    options: the `HinaOptions`; `get_optimization_info` reads them.
    decide: `decide(params)` gives the `MemoryPlan` for these shapes, and the transformation with
      and without it; `plan_memory` and `optimize_for_vram` ask it.
  """

  options: HinaOptions
  decide: Callable[[Any], memory.Decision]


@explain_unknown_options
def hina_adaptive(
  learning_rate: optax.ScalarOrSchedule = 1e-3,
  *,
  betas: tuple[float, float] = (0.9, 0.999),
  eps: float = 1e-8,
  weight_decay: float = 0.01,
  edge_suppression: bool = False,
  edge_penalty: float = 0.1,
  edge_threshold: float = 0.6,
  spatial_awareness: bool = False,
  frequency_penalty: float = 0.05,
  detail_preservation: float = 0.8,
  background_regularization: bool = True,
  background_regularization_mode: str = "simple",
  lora_rank_penalty: bool = False,
  rank_penalty_strength: float = 0.01,
  low_rank_emphasis: float = 1.2,
  use_agr: bool = True,
  use_orthogonal_grad: bool = False,
  use_tam: bool = True,
  tam_beta: float | None = None,
  use_adopt_stability: bool = True,
  use_cautious: bool = True,
  use_grams: bool = False,
  use_lr_mask: bool = True,
  lr_bump: float | None = None,
  min_lr: float | None = None,
  max_lr: float | None = None,
  warmup_steps: int = 500,
  reference_lr: float | None = None,
  use_dynamic_adaptation: bool = True,
  adaptation_strength: float = 1.0,
  relationship_discovery_interval: int = 100,
  importance_decay: float = 0.95,
  compatibility_threshold: float = 0.3,
  intrinsic_importance: str = "full",
  dynamic_weight_decay: bool = True,
  wd_transition_steps: int = 1000,
  wd_decay_factor: float = 0.7,
  wd_min_ratio: float = 0.1,
  weight_decay_mask: Any = None,
  use_spd: bool = True,
  spd_lambda: float = 0.06,
  unpaired: str = "ignore",
  lora_pattern: str | None = None,
  spatial_axes: _leaves.SpatialAxes | None = None,
  sd_scripts_compat: bool = False,
  memory_efficient: bool = False,
  vram_budget_gb: float | None = None,
  reduce_precision: bool = False,
  cpu_offload_states: bool = False,
  max_buffer_memory_mb: float | None = None,
  adaptive_features: bool = False,
  emergency_simplify: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""The guide's optimizer: regularizers, an adaptive core and modulators, chosen by options.

  The chain, each part only where its option is on:

  .. math::
    g \to \text{AGR} \to \text{edges} \to \text{high frequency} \to \text{detail} \to
    \text{background} \to \text{rank} \to \text{OrthoGrad} \to
    \text{SPD}(\text{importance}(\text{sign agreement}(\text{cautious}(\text{core})))
    \to \text{decay} \to -\eta)

  All arithmetic is fp32, whatever the dtype of the parameters. With everything off it is
  `optax.adamw`. Options and defaults are those of the PyTorch class `HinaAdaptive`, except where
  said below; each option's part documents it in full.

  Args:
    learning_rate: step size, a number or an optax schedule.
    betas: decays of the two moments (`scale_by_hina`).
    eps: added to the root of the second moment (`scale_by_hina`).
    weight_decay: decoupled, per unit of learning rate (`add_scheduled_weight_decay`).
    edge_suppression: damp edges of the gradient (`suppress_edges`).
    edge_penalty: its strength.
    edge_threshold: in [0, 1], a share of each leaf's strongest edge (compat: in units of the
      gradient).
    spatial_awareness: smooth the gradient and keep its detail (`suppress_high_frequency`,
      `preserve_detail`).
    frequency_penalty: share of the high-pass part that is subtracted.
    detail_preservation: in [0, 1], the least factor that varied places keep.
    background_regularization: damp what stays quiet (`attenuate_background`). On by default, as in
      the original.
    background_regularization_mode: `"simple"` or `"fast"`.
    lora_rank_penalty: nuclear norm of each LoRA pair (`add_rank_penalty`).
    rank_penalty_strength: in units of the loss per unit of nuclear norm.
    low_rank_emphasis: >= 1, weight of small singular values. The original never used it.
    use_agr: `adaptive_gradient_regularization`; the original clips each leaf to norm 1 instead.
    use_orthogonal_grad: `orthogonalize_to_params`.
    use_tam: torque-aware momentum (`scale_by_hina`).
    tam_beta: decay of the torque. `None`: 0.9 as published, with compat 0.999.
    use_adopt_stability: ADOPT's second moment (`scale_by_hina`).
    use_cautious: `cautious`.
    use_grams: `grams`, in place of `use_cautious`. Off by default; the original accepts and never
      applies it, and so does compat.
    use_lr_mask: a learning rate for each element (`scale_by_sign_agreement`).
    lr_bump: its step. `None`: 0.03 of the reference rate, with compat 3e-6.
    min_lr: its lower bound. `None`: 0.001 of the reference rate, with compat 1e-7.
    max_lr: its upper bound. `None`: 10 times the reference rate, with compat 1e-3.
    warmup_steps: steps during which it moves.
    reference_lr: the rate that the three above are measured against. `None`: `learning_rate`, for a
      schedule its largest value over `warmup_steps`.
    use_dynamic_adaptation: move learning rate between leaves (`scale_by_importance`).
    adaptation_strength: its strength.
    relationship_discovery_interval: steps between its visits.
    importance_decay: its average over visits.
    compatibility_threshold: least compatibility of two related matrices.
    intrinsic_importance: `"full"` or `"estimated"`.
    dynamic_weight_decay: let weight decay fade (`add_scheduled_weight_decay`).
    wd_transition_steps: when it begins to fade.
    wd_decay_factor: what is left after as many steps again.
    wd_min_ratio: the least share that is left.
    weight_decay_mask: where weight decay acts, as `optax.masked` takes it; `None`: everywhere.
    use_spd: pull back to the start selectively (`project_to_init`).
    spd_lambda: in [0, 1], its strength.
    unpaired: `"ignore"` or `"nuclear"`, for matrices that are no LoRA factor (`add_rank_penalty`).
    lora_pattern: regular expression with the groups `down` and `up` for other names of factors.
    spatial_axes: `f(path, leaf) -> axes`; `None` is `flax_spatial_axes`. Under
      `optax.inject_hyperparams` name it in `static_args`.
    sd_scripts_compat: the PyTorch original's arithmetic, step by step, faults included.
    memory_efficient: keep state as `plan_memory` advises for `vram_budget_gb`, or without one for
      all the memory that the device reports (CPUs report none: nothing changes).
    vram_budget_gb: memory in GB (2^30 bytes) for parameters, gradients and state, > 0; implies
      `memory_efficient`. Activations are not in it.
    reduce_precision: keep all state in bf16, rounded stochastically (compat: to nearest), also
      where the budget would not need it.
    cpu_offload_states: keep all state in host memory, also where the budget would not need it.
    max_buffer_memory_mb: MB of hosted state that are on the device at once; `None`: 128, or the
      state of the largest parameter.
    adaptive_features: plan for 80% of the budget; `optimize_for_vram` re-plans a running state.
    emergency_simplify: where fp32 state needs more than 90% of the budget, switch off features with
      large state first (background, spatial, learning-rate mask, SPD), with a warning.

  Returns:
    A `HinaTransformation`: an `optax.GradientTransformationExtraArgs` with an attribute `options`.
    State: 8 bytes a parameter for the core, 4 each for detail, background and SPD, 2 for the
    learning rates of elements.

  Raises:
    ValueError: an unknown or removed option (with what to use), a value outside its range, Grams
      together with Cautious, `params` missing at the update, a LoRA factor without its partner.
    TypeError: an option of the wrong type, a leaf that is not floating.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> import hina_optax
    >>> tx = hina_optax.hina_adaptive(1e-2, edge_suppression=True, spatial_awareness=True)
    >>> params = {"kernel": jnp.full((4, 4), 2.0)}
    >>> state = tx.init(params)
    >>> for _ in range(20):
    ...   grads = jax.grad(lambda p: jnp.sum(p["kernel"] ** 2))(params)
    ...   updates, state = tx.update(grads, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> bool(jnp.all(params["kernel"] < 2.0))
    True

  References:
    `HinaAdaptive` of a fork of kohya's sd-scripts; the papers at each part.
  """
  return build(HinaOptions(**locals()))


def build(o: HinaOptions) -> HinaTransformation:
  """The transformation that checked options describe."""
  decided, decide = memory.decided_by_shapes(functools.partial(_memory_options.decide, o, chain_of))
  chosen = decided if _memory_options.is_planned(o) else chain_of(o)
  transformation = HinaTransformation(chosen.init, chosen.update)
  transformation.options, transformation.decide = o, decide
  return transformation


def chain_of(o: HinaOptions) -> optax.GradientTransformationExtraArgs:
  """The chain of parts, its state in fp32 on the device."""
  return optax.chain(
    core.upcast_updates(), *_regularizers(o), _optimizer(o), core.cast_updates_to_params()
  )


def _regularizers(o: HinaOptions) -> list[optax.GradientTransformationExtraArgs]:
  compat = o.sd_scripts_compat
  border = "zero" if compat else "replicate"
  wide, matrix = (
    (_leaves.only_matrices(o.spatial_axes, side) if compat else o.spatial_axes) for side in (3, 2)
  )
  parts = []
  if o.use_agr:
    parts.append(regularizers.adaptive_gradient_regularization("clip" if compat else "coefficient"))
  if o.edge_suppression:
    parts.append(regularizers.suppress_edges(
      o.edge_penalty, o.edge_threshold, spatial_axes=wide, relative=not compat, border=border))
  if o.spatial_awareness:
    parts.append(regularizers.suppress_high_frequency(
      o.frequency_penalty, spatial_axes=matrix, subtract="magnitude" if compat else "high_pass"))
    parts.append(regularizers.preserve_detail(
      o.detail_preservation, spatial_axes=wide, relative=not compat))
  if o.background_regularization:
    parts.append(regularizers.attenuate_background(
      mode=o.background_regularization_mode, unbiased=not compat, border=border,
      spatial_axes=_leaves.two_axes(o.spatial_axes) if compat else o.spatial_axes))
  if o.lora_rank_penalty:
    parts.append(regularizers.add_rank_penalty(
      o.rank_penalty_strength, o.low_rank_emphasis, unpaired=o.unpaired,
      lora_pattern=o.lora_pattern, measure="top_eigenvalues" if compat else "nuclear"))
  if o.use_orthogonal_grad:
    parts.append(regularizers.orthogonalize_to_params(include_vectors=compat))
  return parts


def _core(o: HinaOptions) -> optax.GradientTransformationExtraArgs:
  compat = o.sd_scripts_compat
  default_beta = 0.999 if compat else 0.9
  return core.scale_by_hina(
    o.betas[0], o.betas[1], o.eps,
    torque=("direction" if compat else "average") if o.use_tam else None,
    torque_decay=default_beta if o.tam_beta is None else o.tam_beta,
    stability=("max" if compat else "adopt") if o.use_adopt_stability else None,
    precise_debias=compat,
  )


def _modulated(o: HinaOptions) -> optax.GradientTransformationExtraArgs:
  direction = _core(o)
  if o.use_cautious:
    direction = modulators.cautious(direction, per="leaf" if o.sd_scripts_compat else "element")
  elif o.use_grams and not o.sd_scripts_compat:
    direction = modulators.grams(direction)
  rules = []
  if o.use_lr_mask:
    units = _rate_units.resolve(o)
    rules.append(modulators.sign_agreement_rule(
      units.bump, units.min_scale, units.max_scale, o.warmup_steps,
      signal="gradient" if o.sd_scripts_compat else "update"))
  if o.use_dynamic_adaptation:
    rules.append(modulators.importance_rule(
      o.adaptation_strength, interval=o.relationship_discovery_interval,
      decay=o.importance_decay, compatibility_threshold=o.compatibility_threshold,
      intrinsic_importance=o.intrinsic_importance, relative=not o.sd_scripts_compat))
  if not rules:
    return direction
  bounds = _ORIGINAL_SCALE_BOUNDS if o.sd_scripts_compat else None
  return modulators.scale_by_rates(direction, rules, bounds)


def _weight_decay(
  o: HinaOptions, learning_rate: optax.ScalarOrSchedule | None
) -> optax.GradientTransformationExtraArgs:
  decay = core.add_scheduled_weight_decay(
    o.weight_decay, transition_steps=o.wd_transition_steps if o.dynamic_weight_decay else None,
    factor=o.wd_decay_factor, min_ratio=o.wd_min_ratio, learning_rate=learning_rate,
  )
  return decay if o.weight_decay_mask is None else optax.masked(decay, o.weight_decay_mask)


def _optimizer(o: HinaOptions) -> optax.GradientTransformationExtraArgs:
  scale = optax.scale_by_learning_rate(o.learning_rate)
  if o.sd_scripts_compat:
    steps = optax.chain(_modulated(o), scale, _weight_decay(o, o.learning_rate))
  else:
    steps = optax.chain(_modulated(o), _weight_decay(o, None), scale)
  if not o.use_spd:
    return steps
  return modulators.project_to_init(
    steps, o.spd_lambda, learning_rate=o.learning_rate if o.sd_scripts_compat else None
  )
