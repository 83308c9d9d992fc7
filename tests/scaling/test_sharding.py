"""Parameters sharded on a mesh: the numbers of one device, and what crosses between devices."""

import math

import jax
import jax.numpy as jnp
import meshes
import optax
import pytest
import trees
from cases import CASES
from test_properties import as_optimizer

STEPS = 50
MESHES = ((8, 1), (4, 2), (2, 4))
# They hold most of the others' parts, and run every time, on one mesh.
SHOWN = ("hina_adaptive-everything", "attenuate_background-fast")


def program(tx):
  """A training step: the gradient pulls to a place that moves from step to step."""

  def step(params, state, gradient):
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  return jax.jit(step, donate_argnums=(0, 1))


def gradients(params):
  """Five of them, in eighths: their sums are exact in whatever order."""
  return [jax.tree.map(lambda x: jnp.round(8 * x) / 8, g) for g in trees.sequence(params, 5)]


def train(tx, params, given, step=None, state=None):
  state = tx.init(params) if state is None else state
  step = program(tx) if step is None else step
  for i in range(STEPS):
    params, state = step(params, state, given[i % len(given)])
    jax.block_until_ready(params)  # many steps in flight starve eight devices of two cores
  return params, state


def paired(state, params):
  """Leaves of a state that are like a parameter, with that parameter."""
  known = meshes.by_path(params)
  for path, leaf in meshes.by_path(state).items():
    owners = [p for p in known if path.endswith("/" + p) and known[p].shape == leaf.shape]
    if owners:
      yield path, leaf, known[max(owners, key=len)]


def check_state(state, params):
  """Every leaf that is like a parameter lies as it does; all others are small and whole."""
  found = dict.fromkeys(path for path, _, _ in paired(state, params))
  for path, leaf, param in paired(state, params):
    assert leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim), path
  for path, leaf in meshes.by_path(state).items():
    assert path in found or leaf.size < 64, path


def bytes_on_first_device(tree):
  first = jax.devices()[0]
  return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards
             if s.device == first)


def check_bytes(state, params):
  """Bytes on a device are the total over the number of shards."""
  like = list(paired(state, params))
  wanted = sum(x.nbytes // math.prod(
    a // b for a, b in zip(p.shape, p.sharding.shard_shape(p.shape)) if b) for _, x, p in like)
  others = sum(x.nbytes for x in jax.tree.leaves(state)) - sum(x.nbytes for _, x, _ in like)
  assert bytes_on_first_device(state) == wanted + others


def check_traffic(compiled, allowed=()):
  """Nothing of a parameter's size is gathered or moved from device to device."""
  moved = [(kind, size) for kind, size in meshes.traffic(compiled)
           if size >= meshes.SMALLEST and kind not in allowed]
  assert not moved, moved


def on(case, shape):
  shown = case.name in SHOWN and shape == (4, 2)
  name = f"{case.name}-{shape[0]}x{shape[1]}"
  return pytest.param(case, shape, id=name, marks=[] if shown else [pytest.mark.slow])


@pytest.mark.parametrize(("case", "shape"), [on(c, s) for c in CASES for s in MESHES])
def test_sharded_training_is_that_of_one_device(case, shape):
  tx, params = as_optimizer(case, 1e-2), meshes.parameters()
  given = gradients(params)
  expected, _ = train(tx, params, given)
  mesh = meshes.mesh(*shape)
  params = jax.device_put(meshes.parameters(), meshes.shardings(mesh))
  given = [jax.device_put(g, meshes.shardings(mesh)) for g in given]
  state = tx.init(params)
  check_state(state, params)
  check_bytes(state, params)
  compiled = program(tx).lower(params, state, given[0]).compile()
  if "rank_penalty" not in case.name and "compat" not in case.name:
    check_traffic(compiled)
  params, state = train(tx, params, given, compiled, state)
  check_state(state, params)
  trees.assert_close(params, expected, 0.0, 1e-5)
