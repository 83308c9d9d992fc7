"""The chain of parts that the options of `hina_adaptive` describe. No mathematics here."""

import functools
from typing import Any

import jax
import optax

from hina_optax import (
  _leaves,
  _parts,
  _rate_units,
  _stacks,
  core,
  memory,
  modulators,
  regularizers,
)
from hina_optax.options import HinaOptions

# Of the original: the product of all learning-rate scales is held between these.
_ORIGINAL_SCALE_BOUNDS = (0.001, 10.0)


def chain_of(
  o: HinaOptions, apart: frozenset[str] | None = None
) -> optax.GradientTransformationExtraArgs:
  """The chain of parts, its state in fp32 on the device.

  Leaves whose paths are in `apart` are not stacked; `None`: those that are seen to be sharded.
  """
  parts = core.in_bounds(_parts.chain(*_regularizers(o), _optimizer(o)))
  batches = _is_more_than_adam(o) if o.leaf_batching is None else o.leaf_batching
  if not batches:
    return parts
  limit = memory.MAX_ELEMENTS if o.max_batched_elements is None else int(o.max_batched_elements)
  return memory.batched(parts, limit, functools.partial(_kinds, o), apart=apart,
                        careful=o.leaf_batching is None)


def _is_more_than_adam(o: HinaOptions) -> bool:
  """Whether a part is on that sums over leaves or compares neighbours: long programs a leaf."""
  return any((
    o.use_agr, o.edge_suppression, o.spatial_awareness, o.background_regularization,
    o.lora_rank_penalty, o.use_orthogonal_grad, o.use_tam, o.use_adopt_stability, o.use_cautious,
    o.use_grams, o.use_lr_mask, o.use_dynamic_adaptation, o.use_spd,
  ))


def _kinds(o: HinaOptions, params: Any) -> list[Any]:
  """For each place of the tree what the parts ask of a leaf beside its shape."""
  places, leaves, structure = _leaves.flatten(params)
  decays = [True] * len(leaves)
  if o.weight_decay_mask is not None:
    mask = o.weight_decay_mask
    spread = jax.tree.map(
      lambda m, below: jax.tree.map(lambda _: bool(m), below),
      mask(params) if callable(mask) else mask, params)
    decays = structure.flatten_up_to(spread)
  return [
    None if _leaves.is_absent(x) else (_leaves.resolve_axes(o.spatial_axes, place.path, x), decay)
    for place, x, decay in zip(places, leaves, decays)
  ]


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
  if o.weight_decay_mask is None:
    return decay

  def mask(tree: Any) -> Any:
    if isinstance(tree, _stacks.Stacks):
      return _stacks.map_groups(lambda group: group.kind[1], tree)
    return o.weight_decay_mask(tree) if callable(o.weight_decay_mask) else o.weight_decay_mask

  return optax.masked(decay, mask)


def _optimizer(o: HinaOptions) -> optax.GradientTransformationExtraArgs:
  scale = optax.scale_by_learning_rate(o.learning_rate)
  if o.sd_scripts_compat:
    steps = _parts.chain(_modulated(o), scale, _weight_decay(o, o.learning_rate))
  else:
    steps = _parts.chain(_modulated(o), _weight_decay(o, None), scale)
  if not o.use_spd:
    return steps
  return modulators.project_to_init(
    steps, o.spd_lambda, learning_rate=o.learning_rate if o.sd_scripts_compat else None
  )
