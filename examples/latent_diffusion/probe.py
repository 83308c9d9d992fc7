"""Measures what each part of the optimizer does to the gradient at one step of the training."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import hina_optax
from latent_diffusion.training import Program, Row, TrainState

TOUCHED = 0.01


def regularizers(options: Any) -> dict[str, optax.GradientTransformationExtraArgs]:
  """Makes the regularizers that `hina_adaptive` puts in front of its core with these options."""
  parts = {}
  if options.use_agr:
    parts["adaptive gradient"] = hina_optax.adaptive_gradient_regularization()
  if options.edge_suppression:
    parts["edges"] = hina_optax.suppress_edges(options.edge_penalty, options.edge_threshold)
  if options.spatial_awareness:
    parts["high frequency"] = hina_optax.suppress_high_frequency(options.frequency_penalty)
    parts["detail"] = hina_optax.preserve_detail(options.detail_preservation)
  if options.background_regularization:
    parts["background"] = hina_optax.attenuate_background(
      mode=options.background_regularization_mode)
  if options.lora_rank_penalty:
    parts["rank"] = hina_optax.add_rank_penalty(
      options.rank_penalty_strength, options.low_rank_emphasis)
  if options.leaf_batching is False:
    return parts
  # The parts get their states from the optimizer, so they must be batched as they are there.
  return {name: hina_optax.with_leaf_batching(part) for name, part in parts.items()}


class Probe:
  """Applies the regularizers one after the other, with the states they have in the optimizer."""

  def __init__(self, program: Program):
    options = getattr(program.optimizer, "options", None)
    faithful = options is not None and not options.sd_scripts_compat
    self.program, self.parts = program, regularizers(options) if faithful else {}
    self._effects = jax.jit(self._trace)

  def __call__(self, state: TrainState, batch: jax.Array, key: jax.Array) -> Row:
    """Returns the share of elements that each part changed by 1%, and the size of the change."""
    info = hina_optax.get_optimization_info(state.optimizer)["figures"]
    figures = {name: float(value) for name, value in info.items() if name != "step"}
    if not self.parts:
      return figures
    effects = self._effects(state, self.program.frozen, batch, key)
    return figures | {
      f"{kind} {name}": float(value)
      for name, pair in effects.items() for kind, value in zip(("touched", "change"), pair)}

  def _trace(self, state: TrainState, frozen: Any, batch: jax.Array, key: jax.Array) -> Row:
    grads = jax.grad(self.program.loss_of)(state.params, frozen, batch, key)
    effects = {}
    for name, part in self.parts.items():
      fresh = jax.eval_shape(part.init, state.params)
      found = next(find(state.optimizer, type(fresh)), None)
      after, _ = part.update(grads, part.init(state.params) if found is None else found,
                             state.params)
      effects[name] = compare(grads, after)
      grads = after
    return effects


def find(state: Any, kind: type) -> Iterator[Any]:
  """Yields the states of one type, at any depth of an optimizer's state."""
  if isinstance(state, kind):
    yield state
  elif isinstance(state, (tuple, list)):
    for child in state:
      yield from find(child, kind)


def compare(before: Any, after: Any) -> tuple[jax.Array, jax.Array]:
  """Returns the share of changed elements, and the norm of the change over the gradient's norm."""
  pairs = list(zip(jax.tree.leaves(before), jax.tree.leaves(after)))
  count = sum(x.size for x, _ in pairs)
  touched = sum(jnp.sum(jnp.abs(y - x) > TOUCHED * jnp.abs(x)) for x, y in pairs) / count
  change = optax.tree.norm([y - x for x, y in pairs])
  return touched, change / jnp.maximum(optax.tree.norm([x for x, _ in pairs]), 1e-30)
