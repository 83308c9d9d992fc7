"""Stencils: against loops over neighbours, for leaves in their own shape and flat ones."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hina_optax as ho
from hina_optax.base.leaf import Leaf
from hina_optax.grouped.xla_cpu import CpuLeaf, FlatCpuLeaf, make_reshaped_leaf
from tests.cases import OFF

KINDS = (Leaf, CpuLeaf, FlatCpuLeaf)
GRIDS = [
  ((5, 4), (0, 1)), ((1, 6), (0, 1)), ((7, 1), (0, 1)), ((3, 3, 2, 4), (0, 1)),
  ((4, 2, 3, 5), (2, 3)), ((2, 7, 3), (1,)), ((2, 2), (1,)),
]
STENCILS = {
  "laplacian": lambda leaf, x: leaf.laplacian(x),
  "squared": lambda leaf, x: leaf.squared_differences(x),
}
grids = pytest.mark.parametrize(("shape", "axes"), GRIDS, ids=str)
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def by_loops(name, x, axes):
  """The sum over neighbours, place by place."""
  result = np.zeros_like(x)
  for place in np.ndindex(x.shape):
    for axis in axes:
      beside = []
      for step in (-1, 1):
        other = list(place)
        other[axis] += step
        inside = 0 <= other[axis] < x.shape[axis]
        beside.append(x[tuple(other)] - x[place] if inside else None)
      result[place] += along_axis(name, *beside)
  return result


def along_axis(name, below, above):
  if name == "laplacian-zero" and (below is None or above is None):
    return 0.0
  if name == "absolute":
    return 0.0 if below is None else abs(below)
  power = 2 if name == "squared" else 1
  return sum(d ** power for d in (below, above) if d is not None)


def box_by_loops(x, axes, **border):
  for axis in axes:
    edges = [(int(a == axis),) * 2 for a in range(x.ndim)]
    framed = np.pad(x, edges, **border)
    x = sum(np.take(framed, range(i, i + x.shape[axis]), axis) for i in range(3)) / 3
  return x


def stored(leaf, x):
  """`x` as an array of a leaf of this kind."""
  return leaf.ravel(jnp.asarray(x, jnp.float32))


@grids
@kinds
@pytest.mark.parametrize("name", STENCILS)
def test_flat_and_shaped_leaves_give_what_loops_give(name, kind, shape, axes):
  leaf, x = kind(shape, axes), np.random.default_rng(0).normal(size=shape)
  actual = jax.jit(lambda x: STENCILS[name](leaf, x))(stored(leaf, x))
  assert actual.shape == stored(leaf, x).shape
  np.testing.assert_allclose(leaf.unravel(actual), by_loops(name, x, axes), 1e-5, 2e-6)


@grids
@kinds
def test_box_mean_of_flat_and_shaped_leaves(kind, shape, axes):
  leaf, x = kind(shape, axes), np.random.default_rng(1).normal(size=shape)
  expected = box_by_loops(x, axes, mode="edge")
  np.testing.assert_allclose(leaf.unravel(leaf.box_mean(stored(leaf, x))), expected, 1e-5, 2e-6)


@kinds
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", [*STENCILS, "box"])
def test_a_stack_of_leaves_is_each_of_them(name, stacked, kind):
  """Under `vmap`, as the driver runs them, and inside of a jitted function."""
  shape, axes = (3, 4, 2), (0, 1)
  leaf, x = kind(shape, axes), np.random.default_rng(2).normal(size=(5, *shape))
  function = STENCILS.get(name, lambda leaf, x: leaf.box_mean(x))
  rows = jnp.stack([stored(leaf, row) for row in x])
  expected = jnp.stack([function(Leaf(shape, axes), jnp.asarray(row, jnp.float32)) for row in x])
  vmapped = jax.vmap(lambda row: function(leaf, row))
  actual = (jax.jit(vmapped) if stacked else vmapped)(rows)
  np.testing.assert_allclose(actual.reshape(expected.shape), expected, 1e-6, 1e-6)


@kinds
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("name", [*STENCILS, "box"])
def test_empty_leaves_pass(name, shape, kind):
  leaf = kind(shape, (0, 1))
  x = stored(leaf, np.zeros(shape))
  result = STENCILS.get(name, lambda leaf, x: leaf.box_mean(x))(leaf, x)
  assert result.shape == x.shape


SEEN = {"kernel": (3, 3, 2, 4), "matrix": (5, 6), "row": (1, 6), "square": (3, 3), "thin": (2, 7)}


def seen_by_moments(**options):
  """Random gradients, and what the original's regularizers make of them, at the first step.

  The first moment of a first step is a tenth of what arrives at the moments.
  """
  rng = np.random.default_rng(3)
  g = {name: np.float32(rng.normal(size=shape)) for name, shape in SEEN.items()}
  tx = ho.hina_adaptive(1e-2, **{**OFF, "sd_scripts_compat": True, "leaf_batching": False,
                                 **options})
  _, state = jax.jit(tx.update)(g, tx.init(g), g)
  return g, {name: 10 * x for name, x in optax.tree.get(state, "mu").items()}, state


def test_the_original_s_edges():
  given, actual, _ = seen_by_moments(edge_suppression=True, edge_penalty=0.7, edge_threshold=1.0)
  for name, g in given.items():
    expected = g
    if g.ndim == 2 and min(g.shape) > 2:
      edges = np.abs(by_loops("laplacian-zero", g, (0, 1)))
      expected = g / (1 + 0.7 * np.where(edges > 1.0, edges, 0))
      assert 0 < np.mean(edges > 1.0) < 1
    np.testing.assert_allclose(actual[name], expected, 1e-5, 2e-6, err_msg=name)


def test_the_original_s_high_frequency_and_detail():
  given, actual, _ = seen_by_moments(
    spatial_awareness=True, frequency_penalty=0.4, detail_preservation=0.6)
  for name, g in given.items():
    expected, variance = g, np.ones_like(g)
    if g.ndim == 2 and min(g.shape) > 1:
      expected = g - 0.4 * by_loops("absolute", g, (0, 1))
    if g.ndim == 2 and min(g.shape) > 2:
      variance = 0.9 + 0.1 * by_loops("squared", expected, (0, 1))
    elif g.ndim >= 2:
      variance = 0.9 * variance
    np.testing.assert_allclose(
      actual[name], expected / (1 + 0.6 * variance), 1e-5, 2e-6, err_msg=name)


def test_the_original_s_background():
  given, actual, state = seen_by_moments(
    background_regularization=True, background_regularization_mode="fast")
  for name, g in given.items():
    axes = (0, 1) if g.ndim == 2 or name == "kernel" else (g.ndim - 2, g.ndim - 1)
    activity = np.abs(g)
    if min(g.shape[axis] for axis in axes) > 2:
      activity = box_by_loops(activity, axes, mode="constant")
    quiet = activity < np.sort(activity, axis=None)[int(0.3 * g.size)]
    share = 0.95 * 0.5 + 0.05 * 0.1 * np.mean(quiet)
    assert 0.2 < share < 0.7
    often = 0.1 * quiet
    np.testing.assert_allclose(
      optax.tree.get(state, "background")[name], often, 1e-5, 2e-6, err_msg=name)
    np.testing.assert_allclose(
      actual[name], g * (0.3 * often + 1.1 * (1 - often)), 1e-5, 2e-6, err_msg=name)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends keep it by themselves")
@pytest.mark.parametrize("flat", [False, True])
def test_on_cpus_edges_are_computed_once_for_their_three_readers(flat):
  tx = ho.suppress_edges(0.1, spatial_axes=lambda path, leaf: (0, 1))
  state = tx.init({"w": jnp.ones((8, 8))})

  @jax.jit
  def update(w, state):
    updates, state = tx.update({"w": make_reshaped_leaf(w, (8, 8), flat)}, state)
    return updates["w"].array, state

  program = update.lower(jnp.ones(64) if flat else jnp.ones((8, 8)), state).compile().as_text()
  assert len(re.findall(r" abs\(", program)) == 1
