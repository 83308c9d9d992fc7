"""`sd_scripts_compat=True` follows the recorded trajectories of the PyTorch original."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hina_optax as ho

pytestmark = pytest.mark.exact

FOLDER = pathlib.Path(__file__).parent / "parity"
CONFIGS = json.loads((FOLDER / "configs.json").read_text())
TOLERANCE = 3e-6
STORED_IN_BF16 = "seed_advanced_bf16"


@functools.cache
def recorded():
  inputs, trajectories = np.load(FOLDER / "inputs.npz"), np.load(FOLDER / "trajectories.npz")
  names = [key.split("/")[1] for key in inputs.files if key.startswith("param0/")]
  params = {n: jnp.asarray(inputs[f"param0/{n}"]) for n in names}
  gradients = {n: jnp.asarray(inputs[f"grad/{n}"]) for n in names}
  return params, gradients, {k: trajectories[k] for k in trajectories.files}


def optimizer(name):
  options = dict(CONFIGS[name])
  if name.startswith("dynamic_adaptation"):
    options["intrinsic_importance"] = name.rsplit("_", 1)[1]
  return ho.hina_adaptive(
    options.pop("lr"), sd_scripts_compat=True, spatial_axes=ho.torch_spatial_axes, **options
  )


def scanned(tx, params, gradients):
  """All steps in one compiled scan, the state donated; parameters after each step."""

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def train(params, state):
    def step(carry, g):
      params, state = carry
      updates, state = tx.update(g, state, params)
      params = optax.apply_updates(params, updates)
      return (params, state), params

    return jax.lax.scan(step, (params, state), gradients)

  return train(jax.tree.map(jnp.copy, params), tx.init(params))[1]


def check(name, trajectory):
  params, _, expected = recorded()
  for leaf, values in trajectory.items():
    wanted = expected[f"{name}/{leaf}"]
    if name == STORED_IN_BF16:
      moved = np.abs(wanted - np.asarray(params[leaf])).max()
      np.testing.assert_allclose(values, wanted, rtol=0, atol=0.05 * moved, err_msg=leaf)
    else:
      np.testing.assert_allclose(values, wanted, rtol=0, atol=TOLERANCE, err_msg=leaf)


@pytest.mark.parametrize("name", CONFIGS)
def test_follows_the_original(name):
  params, gradients, _ = recorded()
  check(name, scanned(optimizer(name), params, gradients))


@pytest.mark.slow
def test_follows_the_original_step_by_step_without_jit():
  params, gradients, _ = recorded()
  tx, state, trajectory = optimizer("seed_advanced"), None, []
  state = tx.init(params)
  for i in range(2):
    g = {n: gradients[n][i] for n in gradients}
    updates, state = tx.update(g, state, params)
    params = optax.apply_updates(params, updates)
    trajectory.append(params)
  stacked = {n: np.stack([np.asarray(p[n]) for p in trajectory]) for n in params}
  expected = recorded()[2]
  for leaf, values in stacked.items():
    wanted = expected[f"seed_advanced/{leaf}"][:2]
    np.testing.assert_allclose(values, wanted, rtol=0, atol=TOLERANCE, err_msg=leaf)


# In the order of the original's parameter list, on which its relations between tensors depend.
NESTED = {
  "dense": ("a", "dense", "weight"), "wide": ("a", "wide", "weight"),
  "lora_down": ("b", "0"), "lora_up": ("b", "1"), "tiny": ("c", "x"), "bias": ("c", "y"),
  "conv": ("c", "z", "weight"),
}


def nest(flat):
  tree = {}
  for name, value in flat.items():
    *branches, last = NESTED[name]
    node = tree
    for branch in branches:
      node = node.setdefault(branch, {})
    node[last] = value
  return tree


def unnest(tree):
  return {name: functools.reduce(lambda t, k: t[k], path, tree) for name, path in NESTED.items()}


@pytest.mark.parametrize("name", ["seed_advanced", "dynamic_adaptation_full", "lora_rank"])
def test_names_and_nesting_do_not_matter(name):
  params, gradients, _ = recorded()
  check(name, unnest(scanned(optimizer(name), nest(params), nest(gradients))))


def test_every_recorded_configuration_is_run():
  names = {key.split("/")[0] for key in recorded()[2]}
  assert names == set(CONFIGS)
  assert len(names) == 24
