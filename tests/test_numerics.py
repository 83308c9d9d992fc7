"""Numbers that are found in a short way, and in a long one where a leaf needs it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hina_optax as ho
from hina_optax.base import numerics
from hina_optax.base.leaf import Leaf, get_array
from hina_optax.grouped.xla_cpu import CpuLeaf, FlatCpuLeaf, make_reshaped_leaf

# Programs of whatever platform, and those for CPUs, whose long ways are branches.
KINDS = {"plain": Leaf, "for CPUs": CpuLeaf, "flat, for CPUs": FlatCpuLeaf}
WAYS = {
  "alone": lambda function, *arrays: jnp.stack([jax.jit(function)(*row) for row in zip(*arrays)]),
  "stacked": lambda function, *arrays: jax.jit(jax.vmap(function))(*arrays),
  "not jitted": lambda function, *arrays: jax.vmap(function)(*arrays),
}
SIZES = [(1.0, 3.0), (1.0, 1e-25), (1e25, 1.0), (1e-30, 1e30), (0.0, 1.0)]


def norm(leaf, x):
  """The norm of a leaf: from its squares where fp32 holds them, else scaled first."""
  squares = numerics.inner_product(x, x)
  return leaf.recompute_unless((squares > 1e-30) & (squares < 1e36), jnp.sqrt(squares),
                     numerics.scaled_norm, x)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_a_norm_beside_one_whose_squares_fp32_cannot_hold(sizes, kind, way):
  x = np.random.default_rng(0).normal(size=(2, 50)) * np.array(sizes)[:, None]
  expected = np.linalg.norm(x, axis=-1)
  x, leaf = jnp.asarray(x, jnp.float32), KINDS[kind]((50,))
  np.testing.assert_allclose(WAYS[way](numerics.scaled_norm, x), expected, 1e-6)
  np.testing.assert_allclose(WAYS[way](lambda x: norm(leaf, x), x), expected, 1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shares", [(1.0, 0.7), (1.0, 1e-3), (0.49, 0.51), (0.02, 0.01)])
def test_what_is_left_of_a_gradient_is_orthogonal(shares, kind, way):
  """A difference of squares would lose the digits of a small rest."""
  rng = np.random.default_rng(1)
  w = rng.normal(size=(2, 5, 8))
  rest = rng.normal(size=(2, 5, 8))
  rest -= inner(rest, w) / inner(w, w) * w
  rest *= length(w) / length(rest)
  g = w + rest * np.array(shares)[:, None, None]
  expected = rest * length(g) / length(rest)
  tx, flat = ho.orthogonalize_to_params(), kind == "flat, for CPUs"

  def update(*leaves):
    if kind != "plain":
      leaves = [make_reshaped_leaf(x.ravel() if flat else x, x.shape, flat) for x in leaves]
    return get_array(tx.update(leaves[0], tx.init(w[0]), leaves[1])[0])

  actual = WAYS[way](update, *(jnp.asarray(x, jnp.float32) for x in (g, w)))
  for a, e, share in zip(actual, expected, shares):
    np.testing.assert_allclose(np.linalg.norm(a), np.linalg.norm(e), 3e-7 + 2e-7 / share)
    np.testing.assert_allclose(a.reshape(e.shape), e, 0, 1e-6 + 1e-6 / share)


def inner(x, y):
  return np.sum(x * y, (-2, -1), keepdims=True)


def length(x):
  return np.sqrt(inner(x, x))


@pytest.mark.parametrize("kind", ["for CPUs", "flat, for CPUs"])
def test_stacks_on_cpus_branch_instead_of_computing_both_ways(kind):
  x, leaf = jnp.ones((3, 50)), KINDS[kind]((50,))
  stacked = jax.jit(jax.vmap(lambda x: norm(leaf, x)))
  assert " conditional(" in stacked.lower(x).compile().as_text()
