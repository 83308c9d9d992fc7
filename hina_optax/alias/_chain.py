"""The chain of parts that the options of `hina_adaptive` describe. It contains no mathematics."""

import dataclasses
import functools
from typing import Any

import jax
import optax

from hina_optax import memory, modulators, registry
from hina_optax.base import paths, traits
from hina_optax.base.traits import Traits
from hina_optax.compat import sd_scripts
from hina_optax.grouped import driver
from hina_optax.grouped.driver import Settings, Stacking
from hina_optax.grouped.layout import Layout
from hina_optax.grouped.measures import LeafGroups, Measure
from hina_optax.modulators import rate_units
from hina_optax.options import HinaOptions

# The name of the extra argument that tells each leaf whether weight decay acts on it.
_DECAYS = "weight_decay_acts"


def make_settings(o: HinaOptions) -> Settings:
  """What the driver runs for these options."""
  mask = None
  if o.weight_decay_mask is not None:
    mask = functools.partial(_mask_decay, o.weight_decay_mask)
  if o.sd_scripts_compat:
    _refuse_parts_of_others(o)
    parts = sd_scripts.sd_scripts_chain(o, mask, rate_units=rate_units.resolve(o))
  else:
    regularizers = [part.build(o) for part in _enabled_parts(o, "gradient")]
    parts = traits.chain(*regularizers, _build_step(o, mask))
  has_long_programs = _is_more_than_adam(o)
  batches = has_long_programs if o.leaf_batching is None else o.leaf_batching
  limit = memory.MAX_ELEMENTS if o.max_batched_elements is None else int(o.max_batched_elements)
  return Settings(
    traits.strip_guard(parts), Stacking(limit) if batches else None, guards_non_finite=True,
    is_lightweight=not (has_long_programs or batches))


def _refuse_parts_of_others(o: HinaOptions) -> None:
  """Refuses switches of parts that the PyTorch original does not have."""
  others = [name for name in registry.switches() if getattr(o, name)
            and name not in sd_scripts.SWITCHES]
  if others:
    raise ValueError(
      f"{', '.join(others)}: the PyTorch original has no such part, and sd_scripts_compat=True "
      "would ignore it. Switch one of the two off.")


def build_transformation(o: HinaOptions) -> optax.GradientTransformationExtraArgs:
  """The transformation of these options, with its state in fp32 on the device."""
  settings = make_settings(o)
  return driver.make_transformation(lambda params, state: settings, Traits())


def build_with_layout(
  o: HinaOptions, layout: Layout | None
) -> optax.GradientTransformationExtraArgs:
  """The same transformation with its leaves grouped by `layout`; `None`: each leaf by itself."""
  settings = dataclasses.replace(make_settings(o), stacking=None, layout=layout)
  return driver.make_transformation(lambda params, state: settings, Traits())


def make_layout(o: HinaOptions, params: Any) -> Layout | None:
  """How the leaves of `params` are grouped; `None` if each leaf is by itself."""
  settings = make_settings(o)
  if settings.stacking is None:
    return None
  layout = driver.make_layout(settings, params)
  return layout if layout.stacked else None


def _is_more_than_adam(o: HinaOptions) -> bool:
  """Whether any switch is on, which means more than Adam's moments and weight decay.

  Most such parts make long programs per leaf, which is why leaves are then batched by default.
  """
  return any(getattr(o, name) for name in registry.switches())


def _enabled_parts(o: HinaOptions, stage: str) -> list[registry.Part]:
  return [part for part in registry.parts(stage) if part.is_enabled(o)]


def _build_direction(o: HinaOptions) -> optax.GradientTransformationExtraArgs:
  direction = _enabled_parts(o, "moments")[-1].build(o)
  for part in _enabled_parts(o, "direction"):
    direction = part.build(o, direction)
  rules = [part.build(o) for part in _enabled_parts(o, "rate")]
  return modulators.scale_by_rates(direction, rules) if rules else direction


def _build_step(o: HinaOptions, mask: Any) -> optax.GradientTransformationExtraArgs:
  decays = [part.build(o) for part in _enabled_parts(o, "decay")]
  step = traits.chain(
    _build_direction(o), *(decays if mask is None else map(mask, decays)),
    traits.mark_leafwise(optax.scale_by_learning_rate(o.learning_rate)))
  for part in _enabled_parts(o, "step"):
    step = part.build(o, step)
  return step


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("acts",))
@dataclasses.dataclass(frozen=True)
class _Acts:
  """Whether weight decay acts on a leaf; static."""

  acts: bool


def _mask_decay(mask: Any, decay: Any) -> optax.GradientTransformationExtraArgs:
  """`optax.masked(decay, mask)`, except that the mask is only evaluated on the whole tree.

  The driver updates groups of leaves, while the mask may be a function of the user's whole tree.
  """
  decay = traits.strip_guard(decay)

  def evaluate_mask(params: Any) -> list[Any]:
    prefix = mask(params) if callable(mask) else mask
    full = jax.tree.map(lambda m, subtree: jax.tree.map(lambda _: bool(m), subtree), prefix, params)
    structure: Any = jax.tree.structure(params, is_leaf=paths.is_absent)
    return [None if paths.is_absent(x) else bool(x) for x in structure.flatten_up_to(full)]

  def measure_groups(leaves: LeafGroups, state: Any) -> tuple[list[Any], Any]:
    mask_leaves = evaluate_mask(leaves.structure.unflatten(leaves.params))
    return [_Acts(mask_leaves[group.places[0]]) for group in leaves.groups], state

  measure = Measure(_DECAYS, None, measure_groups, evaluate_mask)

  def init(params: Any) -> optax.MaskedState:
    evaluate_mask(params)  # So that a mask that does not fit is refused at `init`.
    return optax.MaskedState(decay.init(params))

  def update(updates, state, params=None, **extra_args):
    values, _ = measure.evaluate(updates, None, params, extra_args)
    _, leaves, structure = paths.flatten(updates)
    decays = [not paths.is_absent(x) and values[i].acts for i, x in enumerate(leaves)]
    masked = structure.unflatten([x if acts else None for x, acts in zip(leaves, decays)])
    result, inner_state = decay.update(masked, state.inner_state, params, **extra_args)
    new = [y if acts else x for x, y, acts in zip(
      leaves, structure.flatten_up_to(result), decays)]
    return structure.unflatten(new), optax.MaskedState(inner_state)

  return traits.attach_traits(
    init, update, Traits(leafwise=True, kinds=(evaluate_mask,), measures=(measure,)))
