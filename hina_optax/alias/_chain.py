"""The chain of parts that the options of `hina_adaptive` describe. No mathematics here."""

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

# The extra argument in which each leaf is told whether weight decay acts on it.
_DECAYS = "weight_decay_acts"


def settings_of(o: HinaOptions) -> Settings:
  """What the driver runs for these options."""
  mask = None if o.weight_decay_mask is None else functools.partial(_masked, o.weight_decay_mask)
  if o.sd_scripts_compat:
    parts = sd_scripts.sd_scripts_chain(o, mask, rate_units=rate_units.resolve(o))
  else:
    parts = traits.chain(*(part.build(o) for part in _on(o, "gradient")), _step(o, mask))
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
  return any(getattr(o, name) for name in registry.switches())


def _on(o: HinaOptions, place: str) -> list[registry.Part]:
  return [part for part in registry.parts(place) if part.asked_for(o)]


def _direction(o: HinaOptions) -> optax.GradientTransformationExtraArgs:
  direction = _on(o, "moments")[-1].build(o)
  for part in _on(o, "direction"):
    direction = part.build(o, direction)
  rules = [part.build(o) for part in _on(o, "rate")]
  return modulators.scale_by_rates(direction, rules) if rules else direction


def _step(o: HinaOptions, mask: Any) -> optax.GradientTransformationExtraArgs:
  decays = [part.build(o) for part in _on(o, "decay")]
  step = traits.chain(
    _direction(o), *(decays if mask is None else map(mask, decays)),
    traits.leafwise(optax.scale_by_learning_rate(o.learning_rate)))
  for part in _on(o, "step"):
    step = part.build(o, step)
  return step


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
