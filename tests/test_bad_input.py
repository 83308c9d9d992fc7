"""Bad input: errors that name the argument or the leaf, and non-finite gradients that stay put."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hina_optax as ho
from tests import trees
from tests.cases import CASES, EVERYTHING, every_case, every_driven_case

WRONG_PARTS = [
  (ho.suppress_edges, dict(strength=-0.1), "strength"),
  (ho.suppress_edges, dict(strength=math.nan), "strength"),
  (ho.suppress_edges, dict(threshold=1.5), "threshold"),
  (ho.suppress_edges, dict(threshold=-0.5), "threshold"),
  (ho.suppress_high_frequency, dict(strength=math.inf), "strength"),
  (ho.preserve_detail, dict(detail_preservation=1.1), "detail_preservation"),
  (ho.preserve_detail, dict(decay=1.0), "decay"),
  (ho.attenuate_background, dict(strength=2.0), "strength"),
  (ho.attenuate_background, dict(mode="quick"), "mode"),
  (ho.add_rank_penalty, dict(strength=-1.0), "strength"),
  (ho.add_rank_penalty, dict(emphasis=0.5), "emphasis"),
  (ho.add_rank_penalty, dict(unpaired="drop"), "unpaired"),
  (ho.add_rank_penalty, dict(lora_pattern="(?P<down>a)"), "lora_pattern"),
  (ho.add_rank_penalty, dict(lora_pattern="("), "lora_pattern"),
  (ho.orthogonalize_to_params, dict(include_vectors="no"), "include_vectors"),
  (ho.scale_by_hina, dict(b1=1.0), "b1"),
  (ho.scale_by_hina, dict(b2=-0.1), "b2"),
  (ho.scale_by_hina, dict(eps=0.0), "eps"),
  (ho.scale_by_hina, dict(torque="twist"), "torque"),
  (ho.scale_by_hina, dict(stability="very"), "stability"),
  (ho.add_scheduled_weight_decay, dict(weight_decay=-1.0), "weight_decay"),
  (ho.add_scheduled_weight_decay, dict(transition_steps=0), "transition_steps"),
  (ho.add_scheduled_weight_decay, dict(min_ratio=2.0), "min_ratio"),
]
WRONG_WRAPPERS = [
  (ho.scale_by_sign_agreement, dict(bump=-1.0), "bump"),
  (ho.scale_by_sign_agreement, dict(min_scale=2.0, max_scale=1.0), "min_scale"),
  (ho.scale_by_sign_agreement, dict(warmup_steps=1.5), "warmup_steps"),
  (ho.scale_by_importance, dict(strength=-1.0), "strength"),
  (ho.scale_by_importance, dict(interval=0), "interval"),
  (ho.scale_by_importance, dict(intrinsic_importance="random"), "intrinsic_importance"),
  (ho.project_to_init, dict(strength=1.5), "strength"),
]
WRONG_OPTIONS = [
  (dict(edge_penalty=-1.0), "edge_penalty"),
  (dict(edge_penalty=math.nan), "edge_penalty"),
  (dict(edge_threshold=1.5), "edge_threshold"),
  (dict(frequency_penalty=-0.1), "frequency_penalty"),
  (dict(detail_preservation=2.0), "detail_preservation"),
  (dict(background_regularization_mode="slow"), "background_regularization_mode"),
  (dict(low_rank_emphasis=0.2), "low_rank_emphasis"),
  (dict(rank_penalty_strength=-0.1), "rank_penalty_strength"),
  (dict(spd_lambda=1.2), "spd_lambda"),
  (dict(tam_beta=1.0), "tam_beta"),
  (dict(betas=0.9), "betas"),
  (dict(betas=(0.9, 1.0)), r"betas\[1\]"),
  (dict(eps=0.0), "eps"),
  (dict(learning_rate=-1.0), "learning_rate"),
  (dict(max_lr=1e-4, learning_rate=1e-3), "max_lr"),
  (dict(min_lr=1e-2, learning_rate=1e-3), "min_lr"),
  (dict(wd_decay_factor=0.0), "wd_decay_factor"),
  (dict(relationship_discovery_interval=0), "relationship_discovery_interval"),
  (dict(vram_budget_gb=0.0), "vram_budget_gb"),
  (dict(use_grams=True), "use_grams"),
  (dict(unpaired="x"), "unpaired"),
]


@pytest.mark.parametrize(("factory", "options", "name"), WRONG_PARTS)
def test_a_part_names_the_wrong_argument(factory, options, name):
  with pytest.raises(ValueError, match=name):
    factory(**options)


@pytest.mark.parametrize(("factory", "options", "name"), WRONG_WRAPPERS)
def test_a_wrapper_names_the_wrong_argument(factory, options, name):
  with pytest.raises(ValueError, match=name):
    factory(optax.identity(), **options)


@pytest.mark.parametrize(("options", "name"), WRONG_OPTIONS)
def test_the_alias_names_the_option_as_the_user_wrote_it(options, name):
  with pytest.raises(ValueError, match=name):
    ho.hina_adaptive(**options)


@pytest.mark.parametrize(
  ("options", "name"),
  [(dict(edge_penalty="0.1"), "edge_penalty"), (dict(use_tam=1), "use_tam"),
   (dict(eps=True), "eps"), (dict(spatial_axes=(0, 1)), "spatial_axes")],
)
def test_the_alias_refuses_wrong_types(options, name):
  with pytest.raises(TypeError, match=name):
    ho.hina_adaptive(1e-3, **options)


@pytest.mark.parametrize(
  ("name", "hint"),
  [("edge_penality", "edge_penalty"), ("use_cautios", "use_cautious"), ("lr", "learning_rate"),
   ("wd_transition_step", "wd_transition_steps"), ("b1", "betas")],
)
def test_an_unknown_option_suggests_the_nearest(name, hint):
  with pytest.raises(ValueError, match=f"'{name}'.*'{hint}'"):
    ho.hina_adaptive(1e-3, **{name: 0.1})


@pytest.mark.parametrize("name", ["fourier_feature_loss", "super_resolution_mode"])
def test_a_removed_option_says_what_replaces_it(name):
  with pytest.raises(ValueError, match=rf"{name}.*latents.*edge_suppression.*spatial_awareness"):
    ho.hina_adaptive(1e-3, **{name: True})


@pytest.mark.parametrize("case", [c for c in CASES if c.reads_params], ids=str)
def test_missing_params_are_named(case):
  params = trees.mixed()
  tx = case.make()
  with pytest.raises(ValueError, match=r"reads the parameters.*update\(updates, state, params\)"):
    tx.update(trees.sequence(params, 1)[0], tx.init(params))


@every_case
def test_integer_leaves_are_named(case):
  tx = case.make()
  with pytest.raises(TypeError, match=r"'a/step'.*int32.*optax\.masked"):
    tx.init({"a": {"step": jnp.zeros([], jnp.int32), "w": jnp.zeros((2, 2))}})


def test_integer_updates_are_named():
  tx = ho.suppress_edges()
  state = tx.init({"w": jnp.zeros((3, 3))})
  with pytest.raises(TypeError, match=r"'w'.*int32"):
    tx.update({"w": jnp.zeros((3, 3), jnp.int32)}, state)


@pytest.mark.parametrize(
  ("rule", "error", "words"),
  [(lambda p, x: (0, 5), ValueError, "'bias'|'attn/lora_a'"),
   (lambda p, x: (0, 0), ValueError, "distinct"),
   (lambda p, x: "ab", TypeError, "tuple of axis numbers"),
   (lambda p, x: None, TypeError, "tuple of axis numbers")],
)
def test_a_wrong_spatial_axes_rule_is_named(rule, error, words):
  with pytest.raises(error, match=words):
    ho.suppress_edges(spatial_axes=rule).init(trees.mixed())


def test_spatial_axes_under_inject_hyperparams_says_static_args():
  injected = optax.inject_hyperparams(ho.suppress_edges)
  with pytest.raises(TypeError, match="static_args"):
    injected(spatial_axes=lambda path, leaf=None: ()).init(trees.mixed())
  rule = lambda p, x: ()  # noqa: E731
  tx = optax.inject_hyperparams(ho.suppress_edges, static_args="spatial_axes")(spatial_axes=rule)
  tx.init(trees.mixed())


def test_a_decay_that_bf16_would_make_one_is_refused():
  tx = optax.inject_hyperparams(ho.scale_by_hina)()
  with pytest.raises(ValueError, match=r"bfloat16.*hyperparam_dtype"):
    tx.init({"w": jnp.zeros(3, jnp.bfloat16)})
  good = optax.inject_hyperparams(ho.scale_by_hina, hyperparam_dtype=jnp.float32)()
  good.init({"w": jnp.zeros(3, jnp.bfloat16)})


class TestLoraPairs:
  def test_a_factor_without_partner_is_named(self):
    tx = ho.add_rank_penalty()
    with pytest.raises(ValueError, match=r"'block/lora_a'.*down.*no up.*lora_pattern"):
      tx.init({"block": {"lora_a": jnp.zeros((4, 2)), "kernel": jnp.zeros((4, 4))}})

  @pytest.mark.parametrize("make", [
    lambda: ho.hina_adaptive(lora_rank_penalty=True),
    lambda: ho.hina_adaptive(lora_rank_penalty=True, leaf_batching=False),
    lambda: ho.with_leaf_batching(ho.add_rank_penalty()),
  ], ids=["alias", "alias, not batched", "batched"])
  def test_it_is_named_however_the_part_is_driven(self, make):
    with pytest.raises(ValueError, match=r"'block/lora_a'.*down.*no up.*lora_pattern"):
      make().init({"block": {"lora_a": jnp.zeros((4, 2)), "kernel": jnp.zeros((4, 4))}})

  def test_a_masked_partner_is_no_error(self):
    params = {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 4))}
    labels = {"lora_a": "slow", "lora_b": "fast"}
    tx = optax.partition(
      {"slow": ho.add_rank_penalty(), "fast": ho.add_rank_penalty()}, labels
    )
    updates, _ = tx.update(params, tx.init(params), params)
    trees.assert_equal(updates, params)

  def test_a_masked_branch_is_no_error(self):
    params = {"a": {"lora_down": jnp.ones((2, 4))}, "b": jnp.ones(3)}
    masked = {"a": {"lora_down": jnp.ones((2, 4)), "lora_up": optax.MaskedNode()}, "b": params["b"]}
    tx = ho.add_rank_penalty()
    tx.init(masked)
    with pytest.raises(ValueError, match="lora_down"):
      tx.init(params)

  def test_factors_that_share_no_rank_are_named(self):
    with pytest.raises(ValueError, match=r"\(4, 2\).*\(3, 5\).*share no rank"):
      ho.add_rank_penalty().init({"lora_a": jnp.zeros((4, 2)), "lora_b": jnp.zeros((3, 5))})


@every_driven_case
def test_zero_gradients_give_no_nan(case):
  params = trees.mixed()
  zero = jax.tree.map(jnp.zeros_like, params)
  for at in (params, zero):
    _, updates, state = trees.run(case.make(), at, [zero] * 4)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves((updates, state)))


@every_case
def test_a_bad_element_stays_where_it_is(case):
  """No other element turns non-finite, inf does not turn into NaN, and the state stays finite."""
  params = trees.mixed()
  gradients = trees.sequence(params, 5)
  for step, bad in ((1, math.inf), (2, -math.inf), (3, math.nan)):
    gradients[step]["square"] = gradients[step]["square"].at[2, step].set(bad)
    gradients[step]["attn"]["lora_a"] = jnp.full_like(params["attn"]["lora_a"], bad)
  _, updates, state = trees.run(case.make(), params, gradients, apply=False)
  for step, (u, g) in enumerate(zip(updates, gradients)):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(u), jax.tree.leaves(g)):
      where = f"step {step} {jax.tree_util.keystr(path)}"
      assert np.isfinite(np.asarray(x))[np.isfinite(np.asarray(y))].all(), where
      assert not np.isnan(np.asarray(x))[~np.isnan(np.asarray(y))].any(), where
  assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(state))


@every_case
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales_give_no_nan(case, scale):
  params = trees.mixed()
  _, updates, _ = trees.run(
    case.make(), params, trees.sequence(params, 3, scale=scale), apply=False
  )
  assert not any(bool(jnp.any(jnp.isnan(x))) for x in jax.tree.leaves(updates))


def test_apply_if_finite_skips_the_step_whole():
  params = trees.mixed()
  tx = optax.apply_if_finite(ho.hina_adaptive(1e-2, **EVERYTHING), max_consecutive_errors=3)
  good, bad = trees.sequence(params, 2)
  bad["square"] = bad["square"].at[0, 0].set(math.nan)
  state = tx.init(params)
  update = jax.jit(tx.update)
  _, state = update(good, state, params)
  updates, skipped = update(bad, state, params)
  trees.assert_equal(updates, jax.tree.map(jnp.zeros_like, params))
  trees.assert_equal(skipped.inner_state, state.inner_state)
  assert int(skipped.total_notfinite) == 1
