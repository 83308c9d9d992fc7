"""What each part must reduce to: the identity at strength 0, AdamW with everything off, ..."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hina_optax as ho
from tests import trees
from tests.cases import CASES, EVERYTHING, OFF, REGULARIZERS

STEPS = 5


@pytest.mark.exact
@pytest.mark.parametrize("case", [c for c in CASES if c.identity], ids=str)
def test_strength_zero_is_the_identity_bit_for_bit(case):
  params = trees.mixed()
  gradients = trees.sequence(params, STEPS)
  _, actual, _ = trees.run(case.identity(), params, gradients, apply=False)
  if not case.wraps:
    expected = gradients
  else:
    inner = ho.scale_by_hina()
    if case.steps:
      inner = optax.chain(inner, optax.scale_by_learning_rate(0.05))
    _, expected, _ = trees.run(inner, params, gradients, apply=False)
  trees.assert_equal(actual, expected)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("compat", [False, True])
def test_everything_off_is_adamw(weight_decay, compat):
  params = trees.mixed()
  gradients = trees.sequence(params, 50)
  ours = ho.hina_adaptive(1e-2, weight_decay=weight_decay, sd_scripts_compat=compat, **OFF)
  theirs = optax.adamw(1e-2, weight_decay=weight_decay)
  expected = trees.run_optax(theirs, params, gradients)[0]
  if compat:  # whose bias correction is more precise than optax's in fp32
    with jax.enable_x64(True):
      wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, gradients))
      expected = trees.run_optax(theirs, *jax.tree.map(jnp.asarray, wide))[0]
  # The original decays the parameters after the step, a difference of second order in the rate.
  tolerance = 1e-6 if not (compat and weight_decay) else 2e-3
  trees.assert_close(
    trees.run(ours, params, gradients)[0], expected, tolerance, tolerance,
  )


def test_the_plain_core_is_adam_and_adopt_is_optax_s():
  params = trees.mixed()
  gradients = trees.sequence(params, 30)
  pairs = [
    (ho.scale_by_hina(), optax.scale_by_adam()),
    (ho.scale_by_hina(0.9, 0.99, 1e-6, stability="adopt"),
     optax.contrib.scale_by_adopt(0.9, 0.99, 1e-6)),
  ]
  for ours, theirs in pairs:
    trees.assert_close(
      trees.run(ours, params, gradients)[1], trees.run_optax(theirs, params, gradients)[1],
      1e-6, 1e-6,
    )


def test_constant_weight_decay_is_optax_s():
  params = trees.mixed()
  gradients = trees.sequence(params, 3)
  trees.assert_close(
    trees.run(ho.add_scheduled_weight_decay(0.3), params, gradients)[1],
    trees.run(optax.add_decayed_weights(0.3), params, gradients)[1],
  )


def test_agreeing_gradients_make_torque_adam():
  """With a constant gradient the torque tends to 1 and the direction to Adam's."""
  params = {"w": jnp.ones((3, 4))}
  gradients = [{"w": jnp.full((3, 4), 0.3)}] * 300
  _, updates, state = trees.run(ho.scale_by_hina(torque="average"), params, gradients)
  assert float(state.torque["w"]) > 0.999
  np.testing.assert_allclose(updates[-1]["w"], 1.0, rtol=1e-2)


@pytest.mark.parametrize("scale", [1e-4, 1e3])
@pytest.mark.parametrize("case", [c for c in REGULARIZERS if c.scale_free], ids=str)
def test_the_scale_of_the_gradient_does_not_matter(case, scale):
  params = trees.mixed()
  plain = trees.sequence(params, STEPS)
  scaled = [jax.tree.map(lambda g: g * scale, g) for g in plain]
  _, expected, _ = trees.run(case.make(), params, plain, apply=False)
  _, actual, _ = trees.run(case.make(), params, scaled, apply=False)
  for a, e, g in zip(actual, expected, plain):
    back = jax.tree.map(lambda x: x / scale, a)
    trees.assert_close(back, e, 1e-5, 1e-6)
    # and it does something: the relative effect is not that of the identity
    changed = [float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(e), jax.tree.leaves(g))
               if x.size]
    assert max(changed) > 1e-3


def original(**options):
  """The original with nothing on but what is given."""
  return ho.hina_adaptive(
    1e-2, **{**OFF, "weight_decay": 0.0, "sd_scripts_compat": True, **options})


@pytest.mark.exact
@pytest.mark.parametrize(("on", "strength"), [
  (dict(edge_suppression=True), dict(edge_penalty=0.0)),
  (dict(spatial_awareness=True), dict(frequency_penalty=0.0, detail_preservation=0.0)),
  (dict(lora_rank_penalty=True), dict(rank_penalty_strength=0.0)),
  (dict(use_lr_mask=True, max_lr=1.0), dict(lr_bump=0.0)),
], ids=lambda options: next(iter(options)))
def test_a_stage_of_the_original_of_strength_zero_is_the_identity(on, strength):
  params = trees.mixed()
  gradients = trees.sequence(params, STEPS)
  expected = trees.run(original(), params, gradients)[1]
  trees.assert_equal(trees.run(original(**on, **strength), params, gradients)[1], expected)
  different = trees.run(original(**on, **dict.fromkeys(strength, 0.5)), params, gradients)[1]
  changed = [float(jnp.abs(x - y).max()) for x, y in zip(
    *map(jax.tree.leaves, (different, expected))) if x.size]
  assert max(changed) > 1e-3


@pytest.mark.parametrize("scale", [1e-4, 1e3])
@pytest.mark.parametrize("on", [
  dict(spatial_awareness=True, frequency_penalty=0.3, detail_preservation=0.0),
  dict(background_regularization=True),
  dict(background_regularization=True, background_regularization_mode="fast"),
  dict(use_orthogonal_grad=True),
], ids=["high frequency", "background", "background-fast", "orthogonal"])
def test_where_the_original_does_not_depend_on_scale_either(on, scale):
  """Adam's direction does not, so that what differs comes from the stage before it."""
  # Small, since the original rounds its updates as it rounds parameters.
  params = jax.tree.map(lambda p: 1e-3 * p, trees.mixed())
  plain = trees.sequence(params, STEPS)
  scaled = [jax.tree.map(lambda g: g * scale, g) for g in plain]
  tx = original(eps=1e-20, **on)
  trees.assert_close(
    trees.run(tx, params, scaled, apply=False)[1], trees.run(tx, params, plain, apply=False)[1],
    1e-5, 1e-7)


def test_the_original_s_absolute_threshold_does_depend_on_scale():
  """The counterpart of the tests above: they can fail."""
  params = {"w": jnp.zeros((6, 6))}
  plain, edges = original(eps=1e-20), original(
    eps=1e-20, edge_suppression=True, edge_penalty=0.5, edge_threshold=0.6)
  large = trees.sequence(params, STEPS)
  small = [jax.tree.map(lambda x: x * 1e-4, g) for g in large]
  differ = lambda g: float(jnp.abs(  # noqa: E731
    trees.run(edges, params, g)[1][-1]["w"] - trees.run(plain, params, g)[1][-1]["w"]).max())
  assert differ(large) > 1e-3
  assert differ(small) == 0


def test_high_frequency_suppression_is_a_linear_contraction_that_keeps_the_mean():
  tx = ho.suppress_high_frequency(1.0)
  a, b = trees.sequence({"w": jnp.zeros((8, 9))}, 2)
  apply = lambda g: tx.update(g, tx.init(g))[0]["w"]  # noqa: E731
  both = apply(jax.tree.map(lambda x, y: 2 * x + y, a, b))
  np.testing.assert_allclose(both, 2 * apply(a) + apply(b), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(apply(a).mean(), a["w"].mean(), atol=1e-6)
  assert float(jnp.linalg.norm(apply(a))) < float(jnp.linalg.norm(a["w"]))


def test_importance_moves_learning_rate_and_keeps_its_mean():
  params = trees.mixed()
  tx = ho.scale_by_importance(optax.identity(), interval=1, decay=0.5)
  state = tx.init(params)
  g = {**trees.sequence(params, 1)[0]}
  g["square"] = g["square"] * 10
  _, state = tx.update(g, state, params)
  updates, state = tx.update(g, state, params)
  factors = [
    float(u.ravel()[0] / x.ravel()[0])
    for u, x in zip(jax.tree.leaves(updates), jax.tree.leaves(g)) if x.size
  ]
  assert max(factors) > 1.5
  # the empty leaf counts as well: it has the factor that is missing
  leaves = len(jax.tree.leaves(params))
  assert leaves - 3 < sum(factors) < leaves


@pytest.mark.parametrize("name", sorted(OFF))
def test_a_feature_that_is_off_allocates_nothing(name):
  """Per-element arrays are allocated by exactly the features that say so."""
  params = {"w": jnp.zeros((16, 16))}
  everything = {**EVERYTHING, "lora_rank_penalty": False}

  def count(**options):
    state = ho.hina_adaptive(1e-3, **{**everything, **options}).init(params)
    return sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim == 2)

  saved = {"use_lr_mask": 2, "use_spd": 4, "background_regularization": 4}.get(name, 0)
  assert count() - count(**{name: False}) == saved * 256


def test_state_bytes_with_everything_on():
  params = {"w": jnp.zeros((64, 64))}
  state = ho.hina_adaptive(1e-3, **{**EVERYTHING, "lora_rank_penalty": False}).init(params)
  per_parameter = sum(x.nbytes for x in jax.tree.leaves(state)) / 64**2
  assert per_parameter <= 22.1  # moments 8, detail 4, background 4, SPD 4, element rates 2
