"""What random examples found, each as a test of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hina_optax as ho
from hina_optax.compat import sd_scripts


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_displacement_is_how_far_stored_parameters_moved(dtype):
  """Inside of jit XLA leaves out casts to fewer bits and back; the parameters are rounded still."""
  start = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), dtype)
  tx = ho.project_to_init(optax.sgd(0.01), 0.0)

  @jax.jit
  def step(params, state):
    updates, state = tx.update(jnp.ones_like(params), state, params)
    return optax.apply_updates(params, updates), state

  params, state = start, tx.init(start)
  for _ in range(5):
    params, state = step(params, state)
  moved = params.astype(jnp.float32) - start.astype(jnp.float32)
  np.testing.assert_allclose(state.displacement, moved, 0, 1e-6)


def test_a_huge_gradient_does_not_freeze_an_element():
  tx = ho.scale_by_hina(b2=0.5)
  state = tx.init(jnp.zeros(2))
  _, state = tx.update(jnp.array([1e30, 1.0]), state)
  assert np.isfinite(state.nu).all()
  update = jax.jit(tx.update)
  for _ in range(700):
    updates, state = update(jnp.ones(2), state)
  np.testing.assert_allclose(updates, 1.0, 1e-3)


def test_an_update_does_not_overflow_its_dtype():
  g = jnp.asarray([[65504.0, 1.0, -65504.0, 2.0]], jnp.float16)
  tx = ho.attenuate_background(mode="fast")
  updates, _ = jax.jit(tx.update)(g, tx.init(g))
  assert np.isfinite(np.asarray(updates, np.float32)).all()
  tx = ho.hina_adaptive(1e3, use_agr=False)
  params = jnp.ones((4, 4), jnp.float16)
  updates, _ = tx.update(params * 2, tx.init(params), params)
  assert np.isfinite(np.asarray(updates, np.float32)).all()


@pytest.mark.parametrize("size", [1e-3, 1e20, 1e30])
def test_a_clip_to_norm_one_holds_at_any_size(size):
  """What the original calls AGR."""
  tx = sd_scripts.agr(None)
  g = size * jnp.array([[3.0, 4.0]])
  for update in (tx.update, jax.jit(tx.update)):
    updates, _ = update(g, tx.init(g))
    np.testing.assert_allclose(updates, g * min(1.0, 0.2 / size), 1e-6)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_the_size_of_a_gradient_is_a_number_where_its_square_is_none(size):
  tx = ho.scale_by_importance(optax.identity(), interval=1, decay=0.0)
  params = {"a": jnp.ones(3), "b": jnp.ones(3)}
  g = {"a": jnp.full(3, size), "b": jnp.full(3, size / 3)}
  updates, state = tx.update(g, tx.init(params), params)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
  if size < 1:
    np.testing.assert_allclose(updates["a"] / updates["b"], 3 * 1.2 / 0.8, 1e-3)


def test_a_rate_next_to_nothing_has_finite_bounds():
  """The original's absolute rates of elements are multiples of it, which fp32 would not hold."""
  params = {"w": jnp.ones((4, 4))}
  tx = ho.hina_adaptive(2e-183, sd_scripts_compat=True)
  updates, state = jax.jit(tx.update)(params, tx.init(params), params)
  assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves((updates, state)))
