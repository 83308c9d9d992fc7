"""Where the numbers of each leaf stand in a state: by path, in trees, in stacks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hina_optax as ho
from hina_optax.base import paths
from tests import trees


def trained(tx, params):
  return trees.run(tx, params, trees.sequence(params, 3), apply=False)[2]


MAKERS = {
  "alone": lambda part: part,
  "batched": ho.with_leaf_batching,
  "host": lambda part: ho.with_host_offload(part, min_bytes=1 << 20),
}


@pytest.mark.parametrize("how", MAKERS)
def test_numbers_of_leaves_are_found_by_path(how):
  params = trees.layers()
  part = ho.scale_by_hina(torque="average")
  found = optax.tree.get(trained(MAKERS[how](part), params), "torque")
  names = [place.path for place in paths.flatten(params)[0]]
  assert sorted(name for name, _ in found.items()) == sorted(names)
  alone = optax.tree.get(trained(part, params), "torque")
  for name in names:
    np.testing.assert_allclose(found[name], alone[name], rtol=1e-6, err_msg=name)
  assert np.asarray(found).shape == (len(names),)
  np.testing.assert_array_equal(np.asarray(found), [float(x) for _, x in found.items()])
  with pytest.raises(KeyError, match=r"no leaf 'nothing'.*'bias'"):
    found["nothing"]


def test_numbers_of_leaves_stay_what_they_are_under_tree_map():
  params = {"a": jnp.ones((3, 3)), "b": {"c": jnp.ones(2)}}
  state = ho.suppress_edges().init(params)
  doubled = jax.tree.map(lambda x: 2 * x, state)
  assert float(doubled.edge_share["b/c"]) == -2.0
  assert jax.tree.structure(doubled) == jax.tree.structure(state)
  [(path, _)] = jax.tree_util.tree_leaves_with_path(state)
  assert jax.tree_util.keystr(path).startswith(".edge_share")
  assert "2 leaves" in repr(state.edge_share)
  other = ho.suppress_edges().init({"a": params["a"], "b": {"d": params["b"]["c"]}})
  assert jax.tree.structure(other) != jax.tree.structure(state)


def test_stacked_state_is_a_mapping_of_stacks_in_the_structure_of_the_inner():
  params = trees.layers()
  inner = ho.scale_by_hina()
  state = ho.with_leaf_batching(inner).init(params)
  assert type(state) is type(inner.init(params))
  mu = optax.tree.get(state, "mu")
  shapes = sorted(x.shape for x in mu.values())
  assert shapes == sorted([(), (5,), (3, 3, 2, 4), (2, 6, 2), (2, 2, 5), (2, 6, 6)])
  assert len(mu) == len(set(mu)) == len(shapes)
  assert all(mu[name] is x for name, x in mu.items())
  assert [name for name in mu if mu[name].shape == (5,)] == ["bias"]
  names = {path[1].key for path, _ in jax.tree_util.tree_leaves_with_path(state) if len(path) > 1}
  assert names == set(mu.keys())


def test_the_layout_is_in_the_structure_of_the_state():
  make = lambda params: jax.tree.structure(  # noqa: E731
    ho.with_leaf_batching(ho.scale_by_hina()).init(params))
  params = trees.layers()
  first, again = make(params), make(trees.layers(seed=3))
  assert first == again
  assert hash(first) == hash(again)
  renamed = {**params, "layers": {"0": params["layers"]["0"], "2": params["layers"]["1"]}}
  assert make(renamed) != first
  # It stands in JAX's messages on structures that do not match.
  assert len(str(first)) < 2000


def test_rows_of_a_stack_are_the_leaves_in_the_order_of_the_tree():
  params = trees.layers()
  g = trees.sequence(params, 1)[0]
  tx = ho.with_leaf_batching(optax.trace(0.9))
  _, state = jax.jit(tx.update)(g, tx.init(params))
  [rows] = [x for x in optax.tree.get(state, "trace").values() if x.shape == (2, 6, 6)]
  trees.assert_equal(list(rows), [g["layers"][i]["square"] for i in ("0", "1")])


def test_map_params_and_set_of_a_stacked_state():
  params = trees.layers()
  tx = ho.with_leaf_batching(ho.scale_by_hina(torque="average"))
  state = trained(tx, params)
  changed = optax.tree.set(state, count=jnp.int32(7))
  assert int(optax.tree.get(changed, "count")) == 7
  shapes = []
  same = optax.tree.map_params(tx, lambda x: shapes.append(x.shape) or x, state)
  trees.assert_equal(same, state)
  assert sorted(shapes) == sorted(2 * [(), (5,), (3, 3, 2, 4), (2, 6, 2), (2, 2, 5), (2, 6, 6)])
