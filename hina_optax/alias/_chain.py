"""The chain of parts that the options of `hina_adaptive` describe. No mathematics here."""

import dataclasses
import functools
from typing import Any

import jax
import optax

from hina_optax import core, memory, modulators, regularizers
from hina_optax.alias import _rate_units
from hina_optax.base import paths, traits
from hina_optax.base.traits import Traits
from hina_optax.compat import sd_scripts
from hina_optax.grouped import driver
from hina_optax.grouped.driver import Settings, Stacking
from hina_optax.grouped.layout import Layout
from hina_optax.grouped.measures import LeafGroups, Measure
from hina_optax.options import HinaOptions

# The extra argument in which each leaf is told whether weight decay acts on it.
_DECAYS = "weight_decay_acts"


def settings_of(o: HinaOptions) -> Settings:
  """What the driver runs for these options."""
  mask = None if o.weight_decay_mask is None else functools.partial(_masked, o.weight_decay_mask)
  if o.sd_scripts_compat:
    parts = sd_scripts.sd_scripts_chain(o, mask, rate_units=_rate_units.resolve(o))
  else:
    parts = traits.chain(*_regularizers(o), _optimizer(o, mask))
  long = _is_more_than_adam(o)
  batches = long if o.leaf_batching is None else o.leaf_batching
  limit = memory.MAX_ELEMENTS if o.max_batched_elements is None else int(o.max_batched_elements)
  return Settings(
    traits.bare(parts), Stacking(limit) if batches else None, contains=True,
    short=not (long or batches))


def transformation_of(o: HinaOptions) -> optax.GradientTransformationExtraArgs:
  """The transformation of these options, its state in fp32 on the device."""
  settings = settings_of(o)
  return driver.transformation(lambda params, state: settings, Traits())


def with_layout(o: HinaOptions, layout: Layout | None) -> optax.GradientTransformationExtraArgs:
  """The same, its leaves grouped as `layout` says; `None`: each by itself."""
  settings = dataclasses.replace(settings_of(o), stacking=None, layout=layout)
  return driver.transformation(lambda params, state: settings, Traits())


def layout_of(o: HinaOptions, params: Any) -> Layout | None:
  """How the leaves of `params` are grouped; `None` where each stands alone."""
  settings = settings_of(o)
  if settings.stacking is None:
    return None
  layout = driver.layout_of(settings, params)
  return layout if layout.stacked else None


def _is_more_than_adam(o: HinaOptions) -> bool:
  """Whether a part is on that sums over leaves or compares neighbours: long programs per leaf."""
  return any((
    o.use_agr, o.edge_suppression, o.spatial_awareness, o.background_regularization,
    o.lora_rank_penalty, o.use_orthogonal_grad, o.use_tam, o.use_adopt_stability, o.use_cautious,
    o.use_grams, o.use_lr_mask, o.use_dynamic_adaptation, o.use_spd,
  ))


def _regularizers(o: HinaOptions) -> list[optax.GradientTransformationExtraArgs]:
  axes, parts = o.spatial_axes, []
  if o.use_agr:
    parts.append(regularizers.adaptive_gradient_regularization())
  if o.edge_suppression:
    parts.append(regularizers.suppress_edges(
      o.edge_penalty, o.edge_threshold, spatial_axes=axes))
  if o.spatial_awareness:
    parts.append(regularizers.suppress_high_frequency(o.frequency_penalty, spatial_axes=axes))
    parts.append(regularizers.preserve_detail(o.detail_preservation, spatial_axes=axes))
  if o.background_regularization:
    parts.append(regularizers.attenuate_background(
      mode=o.background_regularization_mode, spatial_axes=axes))
  if o.lora_rank_penalty:
    parts.append(regularizers.add_rank_penalty(
      o.rank_penalty_strength, o.low_rank_emphasis, unpaired=o.unpaired,
      lora_pattern=o.lora_pattern))
  if o.use_orthogonal_grad:
    parts.append(regularizers.orthogonalize_to_params())
  return parts


def _modulated(o: HinaOptions) -> optax.GradientTransformationExtraArgs:
  direction = core.scale_by_hina(
    o.betas[0], o.betas[1], o.eps, torque="average" if o.use_tam else None,
    torque_decay=0.9 if o.tam_beta is None else o.tam_beta,
    stability="adopt" if o.use_adopt_stability else None)
  if o.use_cautious:
    direction = modulators.cautious(direction)
  elif o.use_grams:
    direction = modulators.grams(direction)
  rules = []
  if o.use_lr_mask:
    units = _rate_units.resolve(o)
    rules.append(modulators.sign_agreement_rule(
      units.bump, units.min_scale, units.max_scale, o.warmup_steps))
  if o.use_dynamic_adaptation:
    rules.append(modulators.importance_rule(
      o.adaptation_strength, interval=o.relationship_discovery_interval,
      decay=o.importance_decay, compatibility_threshold=o.compatibility_threshold,
      intrinsic_importance=o.intrinsic_importance))
  return modulators.scale_by_rates(direction, rules) if rules else direction


def _optimizer(o: HinaOptions, mask: Any) -> optax.GradientTransformationExtraArgs:
  decay = core.add_scheduled_weight_decay(
    o.weight_decay, transition_steps=o.wd_transition_steps if o.dynamic_weight_decay else None,
    factor=o.wd_decay_factor, min_ratio=o.wd_min_ratio)
  steps = traits.chain(
    _modulated(o), decay if mask is None else mask(decay),
    traits.leafwise(optax.scale_by_learning_rate(o.learning_rate)))
  return modulators.project_to_init(steps, o.spd_lambda) if o.use_spd else steps


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("acts",))
@dataclasses.dataclass(frozen=True)
class _Acts:
  """Whether weight decay acts on a leaf; static."""

  acts: bool


def _masked(mask: Any, decay: Any) -> optax.GradientTransformationExtraArgs:
  """`optax.masked(decay, mask)`, whose mask is asked of the user's whole tree alone."""
  decay = traits.bare(decay)

  def acts(params: Any) -> list[Any]:
    found = mask(params) if callable(mask) else mask
    spread = jax.tree.map(lambda m, below: jax.tree.map(lambda _: bool(m), below), found, params)
    structure: Any = jax.tree.structure(params, is_leaf=paths.is_absent)
    return [None if paths.is_absent(x) else bool(x) for x in structure.flatten_up_to(spread)]

  def look(leaves: LeafGroups, state: Any) -> tuple[list[Any], Any]:
    told = acts(leaves.structure.unflatten(leaves.params))
    return [_Acts(told[group.places[0]]) for group in leaves.groups], state

  measure = Measure(_DECAYS, None, look, acts)

  def init(params: Any) -> optax.MaskedState:
    acts(params)
    return optax.MaskedState(decay.init(params))

  def update(updates, state, params=None, **extra_args):
    values, _ = measure.of_step(updates, None, params, extra_args)
    _, leaves, structure = paths.flatten(updates)
    chosen = [not paths.is_absent(x) and values[i].acts for i, x in enumerate(leaves)]
    some = structure.unflatten([x if there else None for x, there in zip(leaves, chosen)])
    result, inner_state = decay.update(some, state.inner_state, params, **extra_args)
    new = [y if there else x for x, y, there in zip(
      leaves, structure.flatten_up_to(result), chosen)]
    return structure.unflatten(new), optax.MaskedState(inner_state)

  return traits.with_traits(
    init, update, Traits(leafwise=True, kinds=(acts,), measures=(measure,)))
