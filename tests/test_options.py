"""Signature, presets, injected options and reference rates of the alias."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hina_optax as ho
from hina_optax import alias, registry
from tests import trees
from tests.cases import OFF

PRESETS = (ho.lora_preset, ho.large_model_preset, ho.quick_preset, ho.extreme_memory_preset)


def test_the_signature_is_what_the_parts_declare():
  parameters = inspect.signature(ho.hina_adaptive).parameters
  declared = registry.options()
  assert set(parameters) == set(declared)
  for name, parameter in parameters.items():
    assert parameter.default == declared[name].default, name
    assert type(parameter.default) is type(declared[name].default), name


def test_the_signature_is_explicit_and_typed():
  parameters = inspect.signature(ho.hina_adaptive).parameters
  assert next(iter(parameters)) == "learning_rate"
  assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
  assert all(p.annotation is not p.empty for p in parameters.values())
  assert len(parameters) > 40


def test_every_option_is_in_the_docstring():
  doc = ho.hina_adaptive.__doc__
  missing = [n for n in inspect.signature(ho.hina_adaptive).parameters if f"\n    {n}: " not in doc]
  assert missing == []


# What each option is set to, and the options that must be on for it to be read.
CHANGES = {
  "learning_rate": (2e-2, {}),
  "betas": ((0.8, 0.99), {}),
  "eps": (1e-1, {}),
  "weight_decay": (0.3, {}),
  "edge_suppression": (True, {}),
  "edge_penalty": (0.9, {"edge_suppression": True}),
  "edge_threshold": (0.1, {"edge_suppression": True}),
  "spatial_awareness": (True, {}),
  "frequency_penalty": (0.9, {"spatial_awareness": True}),
  "detail_preservation": (0.1, {"spatial_awareness": True}),
  "background_regularization": (True, {}),
  "background_regularization_mode": ("fast", {"background_regularization": True}),
  "lora_rank_penalty": (True, {}),
  "rank_penalty_strength": (0.9, {"lora_rank_penalty": True}),
  "low_rank_emphasis": (3.0, {"lora_rank_penalty": True}),
  "unpaired": ("nuclear", {"lora_rank_penalty": True}),
  "lora_pattern": ("(?P<down>nothing)|(?P<up>nobody)", {"lora_rank_penalty": True}),
  "use_agr": (True, {}),
  "agr_limit": (0.9, {"use_agr": True}),
  "use_orthogonal_grad": (True, {}),
  "use_tam": (True, {}),
  "tam_beta": (0.2, {"use_tam": True}),
  "use_adopt_stability": (True, {}),
  "use_cautious": (True, {}),
  "use_grams": (True, {}),
  "use_lr_mask": (True, {}),
  "lr_bump": (1e-3, {"use_lr_mask": True}),
  "min_lr": (9.5e-3, {"use_lr_mask": True, "lr_bump": 2e-3}),
  "max_lr": (1.05e-2, {"use_lr_mask": True, "lr_bump": 2e-3}),
  "warmup_steps": (2, {"use_lr_mask": True}),
  "reference_lr": (2e-2, {"use_lr_mask": True, "lr_bump": 2e-3}),
  "use_dynamic_adaptation": (True, {"relationship_discovery_interval": 2}),
  "adaptation_strength": (
    0.2, {"use_dynamic_adaptation": True, "relationship_discovery_interval": 2}),
  "relationship_discovery_interval": (2, {"use_dynamic_adaptation": True}),
  "importance_decay": (
    0.1, {"use_dynamic_adaptation": True, "relationship_discovery_interval": 2}),
  "compatibility_threshold": (
    1.0, {"use_dynamic_adaptation": True, "relationship_discovery_interval": 2}),
  "intrinsic_importance": (
    "estimated", {"use_dynamic_adaptation": True, "relationship_discovery_interval": 2}),
  "dynamic_weight_decay": (True, {"wd_transition_steps": 2}),
  "wd_transition_steps": (3, {"dynamic_weight_decay": True}),
  "wd_decay_factor": (0.2, {"dynamic_weight_decay": True, "wd_transition_steps": 2}),
  "wd_min_ratio": (0.9, {"dynamic_weight_decay": True, "wd_transition_steps": 2}),
  "weight_decay_mask": (lambda params: jax.tree.map(lambda p: False, params), {}),
  "use_spd": (True, {}),
  "spd_lambda": (0.9, {"use_spd": True}),
  "spatial_axes": (lambda path, leaf: (), {"edge_suppression": True}),
  "sd_scripts_compat": (True, {}),
  "reduce_precision": (True, {}),
}
# They change where and how state lies and what is reported, not what is computed.
MEMORY_ONLY = {
  "memory_efficient", "vram_budget_gb", "cpu_offload_states", "max_buffer_memory_mb",
  "adaptive_features", "emergency_simplify", "leaf_batching", "max_batched_elements",
}


def test_every_option_is_tried():
  names = set(inspect.signature(ho.hina_adaptive).parameters)
  assert names == set(CHANGES) | MEMORY_ONLY


@pytest.mark.parametrize("name", CHANGES)
def test_every_option_changes_something(name):
  """No option is read and ignored: each away from its default changes a training run."""
  rng = np.random.default_rng(0)
  shapes = {"kernel": (6, 6), "lora_a": (6, 2), "lora_b": (2, 6), "wide": (40, 30)}
  params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
  value, needed = CHANGES[name]
  base = {"learning_rate": 1e-2, "weight_decay": 0.1, **OFF, **needed}

  def run(**options):
    final, _, _ = trees.run(ho.hina_adaptive(**{**base, **options}), params,
                            trees.sequence(params, 6))
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(final)])

  assert not np.array_equal(run(), run(**{name: value}))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.__name__)
def test_presets_are_options_that_can_be_changed(preset):
  options = preset()
  assert set(options) <= set(inspect.signature(ho.hina_adaptive).parameters)
  assert preset(learning_rate=0.5)["learning_rate"] == 0.5
  assert preset()["learning_rate"] < 1e-3
  options["learning_rate"] = 7.0
  assert preset()["learning_rate"] < 1e-3
  ho.hina_adaptive(**preset())


def test_presets_are_those_of_the_guide():
  assert ho.lora_preset() == dict(
    learning_rate=1e-4, lora_rank_penalty=True, rank_penalty_strength=0.01, low_rank_emphasis=1.2,
    edge_suppression=True, edge_penalty=0.08, memory_efficient=True, vram_budget_gb=8.0,
  )
  assert ho.extreme_memory_preset()["vram_budget_gb"] == 4.0
  assert ho.large_model_preset()["frequency_penalty"] == 0.06
  assert ho.quick_preset()["vram_budget_gb"] == 6.0


def units(**options):
  return alias.relative_rates(ho.hina_adaptive(**options).options)


def test_element_rates_are_measured_against_the_reference_rate():
  assert units(learning_rate=1e-2) == (0.03, 1e-3, 10.0)
  np.testing.assert_allclose(units(learning_rate=1e-3, lr_bump=1e-5, max_lr=2e-3)[0], 0.01)
  np.testing.assert_allclose(
    units(learning_rate=1e-4, sd_scripts_compat=True), (0.03, 1e-3, 10.0), rtol=1e-6
  )


def test_a_schedule_is_measured_at_its_largest_rate():
  with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix dtypes
    _check_peak(optax.warmup_cosine_decay_schedule(0.0, 2e-3, 200, 1000))


def _check_peak(warmup):
  np.testing.assert_allclose(
    units(learning_rate=warmup, lr_bump=2e-5)[0], 0.01, rtol=1e-2
  )
  np.testing.assert_allclose(
    units(learning_rate=warmup, lr_bump=2e-5, reference_lr=1e-3)[0], 0.02, rtol=1e-6
  )


def test_a_learning_rate_of_zero_moves_nothing():
  params = trees.mixed()
  tx = ho.hina_adaptive(0.0)
  final, _, _ = trees.run(tx, params, trees.sequence(params, 2))
  trees.assert_equal(final, params)


def test_an_injected_rate_changes_without_compiling_again():
  params = {"w": jnp.ones((4, 4))}
  tx = optax.inject_hyperparams(ho.hina_adaptive)(learning_rate=1e-2)
  state, update = tx.init(params), jax.jit(tx.update)
  g = trees.sequence(params, 1)[0]
  _, state = update(g, state, params)
  full, _ = update(g, state, params)
  state.hyperparams["learning_rate"] = jnp.asarray(1e-4, jnp.float32)
  small, _ = update(g, state, params)
  ratio = float(jnp.linalg.norm(full["w"]) / jnp.linalg.norm(small["w"]))
  assert 50 < ratio < 200
  assert update._cache_size() == 1


def test_weight_decay_can_leave_leaves_out():
  params = {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}
  zero = jax.tree.map(jnp.zeros_like, params)
  mask = lambda p: jax.tree.map(lambda x: x.ndim > 1, p)  # noqa: E731
  tx = ho.hina_adaptive(0.1, weight_decay=0.5, weight_decay_mask=mask)
  updates, _ = tx.update(zero, tx.init(params), params)
  np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
  trees.assert_equal(updates["bias"], jnp.zeros(3))
