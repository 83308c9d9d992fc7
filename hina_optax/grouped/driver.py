"""The grouped update: any transformation in one loop over leaves, with any storage of its state.

For each group of leaves the loop gathers gradients and parameters, opens the group's state, runs
the transformation, closes the state and hands the updates back, before the next group begins.
Wrappers that are nested in each other become one loop.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from hina_optax.base import rounding, shardings, traits
from hina_optax.base.traits import Traits
from hina_optax.grouped import codecs
from hina_optax.grouped.codecs import Layer
from hina_optax.grouped.settings import Settings, Stacking, begin, layout_of
from hina_optax.grouped.step import Step

__all__ = [
  "Settings", "Stacking", "apply_of", "layout_of", "settings_of", "transformation", "with_layer",
  "with_settings",
]

# Settings may depend on the shapes of the parameters (a memory plan), and are then found anew.
Resolve = Callable[[Any, Any], Settings]


def settings_of(inner: Any) -> Resolve:
  """The settings that `inner` runs with, if the driver runs it, else those of `inner` alone."""
  found = traits.traits_of(inner).driver
  if found is not None:
    return found
  plain = Settings(optax.with_extra_args_support(inner))
  return lambda params, state: plain


def with_settings(
  inner: Any, change: Callable[[Settings], Settings]
) -> optax.GradientTransformationExtraArgs:
  """`inner` in the driver with other settings; what is nested becomes one driver."""
  resolve = settings_of(inner)
  known = traits.traits_of(inner)
  return transformation(lambda params, state: change(resolve(params, state)),
                        Traits(options=known.options, decide=known.decide))


def with_layer(inner: Any, layer: Layer, window: int | None = None) -> Any:
  """`inner` with one more layer of storage around its state."""
  resolve = settings_of(inner)
  known = traits.traits_of(inner)

  def outer(params: Any, state: Any) -> Settings:
    below = resolve(params, getattr(state, "inner_state", state))
    return dataclasses.replace(
      below, layers=(*below.layers, layer), window=below.window if window is None else window)

  return transformation(outer, Traits(options=known.options, decide=known.decide))


def transformation(resolve: Resolve, known: Traits) -> optax.GradientTransformationExtraArgs:
  """The transformation that runs in the driver with the settings that `resolve` gives."""
  def init(params: Any) -> Any:
    settings = resolve(params, None)
    state, _ = begin(settings, params)
    forms = codecs.forms_of(settings.layers, _abstract(state))
    counters = codecs.first_counters(settings.layers)
    keys = [None if c is None else (_key(layer, c),) * 2
            for layer, c in zip(settings.layers, counters)]
    _refuse_hosted(settings.layers, forms, state)
    stored = codecs.closed(settings.layers, forms, state, codecs.folded(forms, keys))
    state = codecs.wrapped(settings.layers, stored, counters)
    return state if all(layer.rounds for layer in settings.layers) else codecs.committed(state)

  checked: dict[Any, str | None] = {}

  def update(updates, state, params=None, **extra_args):
    settings = resolve(updates if params is None else params, state)
    return Step(settings, updates, state, params, extra_args, checked).run(add=False)

  def apply(updates, state, params, **extra_args):
    settings = resolve(params, state)
    return Step(settings, updates, state, params, extra_args, checked).run(add=True)

  update.apply = apply  # type: ignore[attr-defined]
  return traits.with_traits(
    init, shardings.automatic(update), dataclasses.replace(known, driver=resolve))


def apply_of(tx: Any) -> Callable[..., tuple[Any, Any]] | None:
  """The update of a transformation in the driver that also adds; `None` for another."""
  return getattr(tx.update, "apply", None) or getattr(
    getattr(tx.update, "__wrapped__", None), "apply", None)


def _key(layer: Layer, counter: Any) -> Any:
  return rounding.key_of(counter[1], counter[0], layer.purpose)


def _refuse_hosted(layers: Sequence[Layer], forms: Any, state: Any) -> None:
  """Refuses to round what is already in host memory."""
  found, leaves, structure = codecs.flatten(state)
  for path, x, form in zip(found, leaves, structure.flatten_up_to(forms)):
    hosted = False
    for stage in form.stages:
      layer = layers[stage.layer]
      if layer.rounds and hosted:
        raise ValueError(
          f"state leaf '{path}' is in host memory, where nothing can be computed: put "
          "with_host_offload outside of the other storage wrappers, not inside.")
      hosted = hosted or not layer.rounds
    if form.stages and any(layers[s.layer].rounds for s in form.stages):
      codecs.refuse_host(path, x)


def _abstract(state: Any) -> Any:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x, state)
