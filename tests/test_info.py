"""`get_optimization_info`: features, memory and figures out of options and state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hina_optax as ho
from tests import trees
from tests.cases import EVERYTHING, OFF

ALL_FIGURES = {
  "step", "edge_share", "background_share", "alignment", "torque", "mean_importance",
  "mean_rate_scale",
}


def trained(tx, steps=3):
  params = {"w": jnp.ones((6, 5)), "b": jnp.ones(4)}
  _, _, state = trees.run_optax(tx, params, trees.sequence(params, steps))
  return state


def test_features_and_figures_with_everything_on():
  tx = ho.hina_adaptive(1e-2, **EVERYTHING, lr_bump=5e-4, max_lr=0.1, vram_budget_gb=8.0)
  info = ho.get_optimization_info(trained(tx), tx)
  assert info["features"] == sorted([
    "background_regularization", "edge_suppression", "lora_rank_penalty", "spatial_awareness",
    "use_agr", "use_cautious", "use_dynamic_adaptation", "use_lr_mask", "use_orthogonal_grad",
    "use_spd", "use_tam",
  ])
  figures = info["figures"]
  assert set(figures) == ALL_FIGURES
  assert figures["step"] == 3
  assert 0 < figures["edge_share"] < 1
  assert 0 <= figures["background_share"] <= 1
  assert 0 <= figures["alignment"] <= 1
  assert -1 <= figures["torque"] <= 1
  assert 0.8 < figures["mean_rate_scale"] < 1.2
  assert info["memory_optimization"]["vram_budget_gb"] == 8.0
  assert info["options"]["lr_bump"] == 5e-4


def test_nothing_on_has_no_features():
  tx = ho.hina_adaptive(1e-2, **OFF)
  info = ho.get_optimization_info(trained(tx), tx)
  assert info["features"] == []
  assert set(info["figures"]) == {"step"}


def test_state_bytes_are_those_of_the_arrays():
  tx = ho.hina_adaptive(1e-2)
  state = trained(tx)
  memory = ho.get_optimization_info(state)["memory_optimization"]
  assert memory["state_bytes"] == sum(x.nbytes for x in jax.tree.leaves(state))
  assert set(memory["state_bytes_by_dtype"]) == {"float32", "int16", "int32"}


def test_the_edge_share_is_the_share_at_the_last_step():
  tx = ho.suppress_edges(1.0, 0.5)
  g = {"w": jnp.zeros((5, 5)).at[2, 2].set(1.0), "bias": jnp.ones(3)}
  _, state = tx.update(g, tx.init(g))
  share = ho.get_optimization_info(state)["figures"]["edge_share"]
  np.testing.assert_allclose(share, 1 / 25, rtol=1e-6)


def test_the_mean_rate_scale_counts_elements():
  tx = ho.scale_by_sign_agreement(optax.identity(), bump=0.25)
  params = {"a": jnp.zeros(3), "b": jnp.zeros((3, 3))}
  state = tx.init(params)
  for sign in (-1.0, -1.0):
    g = {"a": jnp.full(3, sign), "b": jnp.full((3, 3), -sign)}
    _, state = tx.update(g, state, params)
  # a: negative repeats from the start, +2 bumps; b: -1 bump, then +1.
  expected = (3 * 1.5 + 9 * 1.0) / 12
  np.testing.assert_allclose(
    ho.get_optimization_info(state)["figures"]["mean_rate_scale"], expected, rtol=1e-6
  )


@pytest.mark.parametrize("wrap", [
  lambda tx, p: optax.MultiSteps(tx, 1).gradient_transformation(),
  lambda tx, p: optax.masked(tx, jax.tree.map(lambda x: x.ndim > 1, p)),
  lambda tx, p: optax.apply_if_finite(tx, 2),
  lambda tx, p: optax.partition({"x": tx, "y": optax.sgd(0.1)}, {"w": "x", "b": "y"}),
  lambda tx, p: optax.chain(optax.clip_by_global_norm(1.0), tx),
], ids=["multi-steps", "masked", "apply-if-finite", "partition", "chain"])
def test_reads_the_state_inside_of_wrappers(wrap):
  tx = ho.hina_adaptive(1e-2, edge_suppression=True)
  params = {"w": jnp.ones((6, 5)), "b": jnp.ones(4)}
  state = trained(wrap(tx, params))
  info = ho.get_optimization_info(state, tx)
  assert "edge_suppression" in info["features"]
  assert info["figures"]["step"] >= 1


@pytest.mark.parametrize("wrap", [
  lambda tx: ho.with_state_dtype(tx, min_size=0),
  lambda tx: ho.with_quantized_state(tx, min_size=1),
  lambda tx: ho.with_host_offload(ho.with_quantized_state(tx, min_size=1), min_bytes=0),
], ids=["bf16", "8-bit", "8-bit-on-the-host"])
def test_reads_stored_state(wrap):
  tx = ho.hina_adaptive(1e-2, edge_suppression=True)
  stored = ho.get_optimization_info(trained(wrap(tx)), tx)
  plain = ho.get_optimization_info(trained(tx), tx)
  assert stored["features"] == plain["features"]
  assert stored["figures"].keys() == plain["figures"].keys()
  for name, value in plain["figures"].items():
    np.testing.assert_allclose(stored["figures"][name], value, rtol=0.1, atol=0.02, err_msg=name)


def test_does_not_compile_again():
  tx = ho.hina_adaptive(1e-2, **EVERYTHING)
  params = {"w": jnp.ones((6, 5))}
  state, update, compiled = tx.init(params), jax.jit(tx.update), []
  for g in trees.sequence(params, 3):
    _, state = update(g, state, params)
    ho.get_optimization_info(state, tx)
    compiled.append(update._cache_size())
  assert compiled == [1, 1, 1]


def test_refuses_what_it_cannot_read():
  tx = ho.hina_adaptive(1e-2)
  params = {"w": jnp.ones((3, 3))}
  with pytest.raises(TypeError, match="outside of jit"):
    jax.jit(lambda s: ho.get_optimization_info(s))(tx.init(params))
  with pytest.raises(TypeError, match="GradientTransformation"):
    ho.get_optimization_info(tx.init(params), optax.chain(tx))
