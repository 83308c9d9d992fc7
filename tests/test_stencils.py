"""Stencils: against loops over neighbours, for leaves in their own shape and flat ones."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hina_optax as ho
from hina_optax import _stencils

GRIDS = [
  _stencils.Grid((5, 4), (0, 1)), _stencils.Grid((1, 6), (0, 1)), _stencils.Grid((7, 1), (0, 1)),
  _stencils.Grid((3, 3, 2, 4), (0, 1)), _stencils.Grid((4, 2, 3, 5), (2, 3)),
  _stencils.Grid((2, 7, 3), (1,)), _stencils.Grid((2, 2), (1,)),
]
STENCILS = {
  "laplacian": _stencils.laplacian,
  "laplacian-zero": lambda field: _stencils.laplacian(field, "zero"),
  "squared": _stencils.squared_differences,
  "absolute": _stencils.absolute_differences,
}


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


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", STENCILS)
def test_flat_and_shaped_leaves_give_what_loops_give(name, grid):
  x = np.random.default_rng(0).normal(size=grid.shape)
  expected = by_loops(name, x, grid.axes)
  for leaf in (jnp.asarray(x, jnp.float32), jnp.asarray(x.ravel(), jnp.float32)):
    actual = jax.jit(lambda leaf: STENCILS[name](_stencils.field(leaf, grid)))(leaf)
    assert actual.shape == leaf.shape
    np.testing.assert_allclose(actual.reshape(grid.shape), expected, 1e-5, 2e-6)


@pytest.mark.parametrize("border", ["replicate", "zero"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_box_mean_of_flat_and_shaped_leaves(grid, border):
  x = np.random.default_rng(1).normal(size=grid.shape)
  expected = x
  for axis in grid.axes:
    edges = [(int(a == axis),) * 2 for a in range(x.ndim)]
    framed = np.pad(expected, edges, **(
      {"mode": "edge"} if border == "replicate" else {"mode": "constant"}))
    size = x.shape[axis]
    expected = sum(np.take(framed, range(i, i + size), axis) for i in range(3)) / 3
  for leaf in (jnp.asarray(x, jnp.float32), jnp.asarray(x.ravel(), jnp.float32)):
    actual = _stencils.box_mean(leaf, grid, border)
    np.testing.assert_allclose(actual.reshape(grid.shape), expected, 1e-5, 2e-6)


@pytest.mark.parametrize("name", STENCILS)
def test_empty_leaves_pass(name):
  grid = _stencils.Grid((0, 3), (0, 1))
  assert STENCILS[name](_stencils.field(jnp.zeros((0, 3)), grid)).shape == (0, 3)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends keep it by themselves")
def test_edges_are_computed_once_for_their_three_readers():
  gradients = {"w": jnp.ones((8, 8))}
  tx = ho.suppress_edges(0.1, spatial_axes=lambda path, leaf: (0, 1))
  program = jax.jit(tx.update).lower(gradients, tx.init(gradients)).compile().as_text()
  assert len(re.findall(r" abs\(", program)) == 1
