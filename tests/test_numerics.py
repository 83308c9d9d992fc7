"""Numbers that CPUs compute in a short way, and in a long one where a leaf of a stack needs it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hina_optax import _numerics
from hina_optax.regularizers import _orthogonal

WAYS = {
  "alone": lambda function, *arrays: jnp.stack([jax.jit(function)(*row) for row in zip(*arrays)]),
  "stacked": lambda function, *arrays: jax.jit(
    jax.vmap(function, axis_name=_numerics.LEAVES))(*arrays),
  "vmapped by others": lambda function, *arrays: jax.jit(jax.vmap(function))(*arrays),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", [
  (1.0, 3.0), (1.0, 1e-25), (1e25, 1.0), (1e-30, 1e30), (0.0, 1.0),
])
def test_a_norm_beside_one_whose_squares_fp32_cannot_hold(sizes, way):
  x = np.random.default_rng(0).normal(size=(2, 50)) * np.array(sizes)[:, None]
  actual = WAYS[way](_numerics.wide_norm, jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(actual, np.linalg.norm(x, axis=-1), 1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shares", [(1.0, 0.7), (1.0, 1e-3), (0.49, 0.51), (0.02, 0.01)])
def test_what_is_left_of_a_gradient_is_orthogonal(shares, way):
  """A difference of squares would lose the digits of a small rest."""
  rng = np.random.default_rng(1)
  w = rng.normal(size=(2, 40))
  rest = rng.normal(size=(2, 40))
  rest -= np.sum(rest * w, -1, keepdims=True) / np.sum(w * w, -1, keepdims=True) * w
  rest *= np.linalg.norm(w, axis=-1, keepdims=True) / np.linalg.norm(rest, axis=-1, keepdims=True)
  g = w + rest * np.array(shares)[:, None]
  expected = rest * (np.linalg.norm(g, axis=-1) / np.linalg.norm(rest, axis=-1))[:, None]
  actual = WAYS[way](_orthogonal._orthogonal, *(jnp.asarray(x, jnp.float32) for x in (g, w)))
  for a, e, share in zip(actual, expected, shares):
    np.testing.assert_allclose(np.linalg.norm(a), np.linalg.norm(e), 3e-7 + 2e-7 / share)
    np.testing.assert_allclose(a, e, 0, 1e-6 + 1e-6 / share)


def test_stacks_on_cpus_branch_instead_of_computing_both_ways():
  x = jnp.ones((3, 50))
  stacked = jax.jit(jax.vmap(_numerics.wide_norm, axis_name=_numerics.LEAVES))
  assert " conditional(" in stacked.lower(x).compile().as_text()
