"""The grouped update: runs any transformation in one loop over leaves, with any codecs.

For each group of leaves the loop gathers gradients and parameters, decodes the group's state, runs
the transformation, encodes the state and returns the updates, before the next group begins.
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
from hina_optax.grouped.codecs import Codec
from hina_optax.grouped.settings import Settings, Stacking, init_state, make_layout
from hina_optax.grouped.step import Step

__all__ = [
  "Settings", "Stacking", "get_apply", "get_resolver", "make_layout", "make_transformation",
  "with_codec", "with_settings",
]

# `(params, state) -> settings`. A function, because settings may depend on the shapes of the
# parameters, as with a memory plan. At `init` the state is `None`.
SettingsResolver = Callable[[Any, Any], Settings]


def get_resolver(inner: Any) -> SettingsResolver:
  """Returns the settings that `inner` already runs with, or the default settings around it."""
  resolver = traits.get_traits(inner).resolver
  if resolver is not None:
    return resolver
  default = Settings(optax.with_extra_args_support(inner))
  return lambda params, state: default


def with_settings(
  inner: Any, change: Callable[[Settings], Settings]
) -> optax.GradientTransformationExtraArgs:
  """Returns `inner` with changed settings; nested wrappers share one loop."""
  resolve = get_resolver(inner)
  inner_traits = traits.get_traits(inner)
  return make_transformation(
    lambda params, state: change(resolve(params, state)),
    Traits(options=inner_traits.options, choose_plan=inner_traits.choose_plan))


def with_codec(inner: Any, codec: Codec, window: int | None = None) -> Any:
  """Returns `inner` with one more codec around its state."""
  resolve = get_resolver(inner)
  inner_traits = traits.get_traits(inner)

  def resolve_with_codec(params: Any, state: Any) -> Settings:
    settings = resolve(params, getattr(state, "inner_state", state))
    return dataclasses.replace(
      settings, codecs=(*settings.codecs, codec),
      window=settings.window if window is None else window)

  return make_transformation(
    resolve_with_codec,
    Traits(options=inner_traits.options, choose_plan=inner_traits.choose_plan))


def make_transformation(
  resolve: SettingsResolver, known_traits: Traits
) -> optax.GradientTransformationExtraArgs:
  """Returns the transformation that runs the loop with the settings that `resolve` returns."""
  def init(params: Any) -> Any:
    settings = resolve(params, None)
    state, _ = init_state(settings, params)
    encodings = codecs.choose_encodings(settings.codecs, _to_shapes(state))
    counters = codecs.init_counters(settings.codecs)
    keys = [None if counter is None else (_derive_key(codec, counter),) * 2
            for codec, counter in zip(settings.codecs, counters)]
    _reject_offloaded_leaves(settings.codecs, encodings, state)
    stored = codecs.encode_leaves(
      settings.codecs, encodings, state, codecs.derive_leaf_keys(encodings, keys))
    state = codecs.wrap_state(settings.codecs, stored, counters)
    if all(codec.is_lossy for codec in settings.codecs):
      return state
    return codecs.commit_state(state)

  # What `Step` has found out about the inner transformation, so that it is traced only once.
  cross_leaf_cache: dict[Any, str | None] = {}

  def update(updates, state, params=None, **extra_args):
    settings = resolve(updates if params is None else params, state)
    return Step(settings, updates, state, params, extra_args, cross_leaf_cache).run(add=False)

  def apply(updates, state, params, **extra_args):
    settings = resolve(params, state)
    return Step(settings, updates, state, params, extra_args, cross_leaf_cache).run(add=True)

  update.apply = apply  # type: ignore[attr-defined]
  return traits.attach_traits(
    init, shardings.use_automatic_axes(update), dataclasses.replace(known_traits, resolver=resolve))


def get_apply(tx: Any) -> Callable[..., tuple[Any, Any]] | None:
  """Returns the function that updates and adds in one loop; `None` if `tx` has no such loop."""
  return getattr(tx.update, "apply", None) or getattr(
    getattr(tx.update, "__wrapped__", None), "apply", None)


def _derive_key(codec: Codec, counter: Any) -> Any:
  return rounding.make_key(counter[1], counter[0], codec.purpose)


def _reject_offloaded_leaves(state_codecs: Sequence[Codec], encodings: Any, state: Any) -> None:
  """Refuses to round leaves that are in host memory."""
  leaf_paths, leaves, structure = codecs.flatten_state(state)
  for path, x, encoding in zip(leaf_paths, leaves, structure.flatten_up_to(encodings)):
    is_offloaded = False
    for stage in encoding.stages:
      codec = state_codecs[stage.codec_index]
      if codec.is_lossy and is_offloaded:
        raise ValueError(
          f"state leaf '{path}' is in host memory, where nothing can be computed: put "
          "with_host_offload outside of the other storage wrappers, not inside.")
      is_offloaded = is_offloaded or not codec.is_lossy
    if any(state_codecs[stage.codec_index].is_lossy for stage in encoding.stages):
      codecs.reject_host_memory(path, x)


def _to_shapes(state: Any) -> Any:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x, state)
