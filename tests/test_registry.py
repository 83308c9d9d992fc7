"""Registration: the walk through CONTRIBUTING.md, taken step by step outside of the package."""

import importlib
import importlib.util
import inspect
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hina_optax as ho
from hina_optax import cli, registry
from hina_optax.registry import Option
from tests import test_bad_input, test_properties, trees
from tests.cases import OFF, cases_of
from tests.memory import test_leaf_batching
from tests.scaling import test_random_trees, test_sharding

ROOT = pathlib.Path(__file__).parents[1]


def blocks():
  return re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)


@pytest.fixture
def outside(tmp_path):
  """The module that CONTRIBUTING.md writes, registered by its one line."""
  code, line, _ = blocks()
  path = tmp_path / "outliers.py"
  path.write_text(code)
  spec = importlib.util.spec_from_file_location("outliers", path)
  module = sys.modules["outliers"] = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  exec(line, vars(module))
  yield module
  registry.unregister("limit_outliers")
  del sys.modules["outliers"]


def test_it_is_an_option_of_the_alias(outside):
  params = trees.mixed()
  gradients = trees.sequence(params, 3)
  off = {**OFF, "outlier_limits": True, "outlier_limit": 0.5}
  chain = optax.chain(outside.limit_outliers(0.5), ho.scale_by_hina(), optax.scale(-1e-2))
  alias = ho.hina_adaptive(1e-2, weight_decay=0.0, **off)
  actual, expected = (trees.run(tx, params, gradients)[1] for tx in (alias, chain))
  trees.assert_close(actual, expected, 1e-5, 1e-7)
  assert alias.options.outlier_limit == 0.5
  assert "outlier_limits" in inspect.signature(ho.hina_adaptive).parameters
  scope: dict = {}
  exec(blocks()[2], scope)
  assert scope["tx"].options.outlier_limit == 3.0


def test_it_stands_where_it_says_in_the_chain(outside):
  names = [part.name for part in registry.parts("gradient")]
  assert names.index("limit_outliers") == names.index("suppress_edges") + 1


def test_its_options_are_checked(outside):
  with pytest.raises(ValueError, match="outlier_limit must lie in"):
    ho.hina_adaptive(outlier_limit=-1.0)
  with pytest.raises(TypeError, match="outlier_limits must be True or False"):
    ho.hina_adaptive(outlier_limits=1)
  with pytest.raises(ValueError, match="Did you mean 'outlier_limit'"):
    ho.hina_adaptive(outlier_limt=2.0)


def test_the_original_s_arithmetic_does_not_ignore_it(outside):
  with pytest.raises(ValueError, match=r"outlier_limits: .*sd_scripts_compat"):
    ho.hina_adaptive(sd_scripts_compat=True, outlier_limits=True)


def test_its_options_can_be_injected(outside):
  params = trees.few()
  tx = optax.inject_hyperparams(ho.hina_adaptive)(1e-2, outlier_limits=True, outlier_limit=2.0)
  state = tx.init(params)
  assert float(state.hyperparams["outlier_limit"]) == 2.0
  jax.jit(tx.update)(params, state, params)


def test_info_names_it_and_gives_its_figure(outside):
  tx = ho.hina_adaptive(1e-2, **OFF, outlier_limits=True, outlier_limit=0.0)
  params = trees.mixed()
  _, _, state = trees.run(tx, params, trees.sequence(params, 1))
  info = ho.get_optimization_info(state, tx)
  assert info["features"] == ["outlier_limits"]
  assert info["figures"]["outlier_share"] > 0.9
  assert info["options"]["outlier_limit"] == 0.0


def test_the_table_of_options_has_it(outside, capsys):
  assert cli.main(["options"]) == 0
  printed = capsys.readouterr().out
  assert re.search(r"\| `outlier_limit` \| `4.0` \| >= 0 \| in units of the leaf's root", printed)


def test_the_bridge_takes_it(outside):
  torch = pytest.importorskip("torch")
  torch_bridge = importlib.import_module("hina_optax.torch_bridge")
  weight = torch.nn.Parameter(torch.ones(4, 4))
  optimizer = torch_bridge.HinaAdaptive([weight], lr=1e-2, outlier_limits=True, outlier_limit=1.0)
  weight.sum().backward()
  optimizer.step()
  assert float((weight.detach() - 1).abs().max()) > 0


def test_its_state_is_saved_and_comes_back(outside):
  tx, params = ho.hina_adaptive(1e-2, outlier_limits=True), trees.mixed()
  _, _, state = trees.run(tx, params, trees.sequence(params, 2))
  again = ho.unpack_state(tx, *ho.pack_state(tx, state, params), params)
  trees.assert_equal(again, state)
  assert ho.pack_state(tx, state, params)[1]["options"]["outlier_limit"] == 4.0


@pytest.mark.parametrize("check", [
  test_properties.test_extra_args_one_compilation_and_a_stable_state,
  test_properties.test_vmap_is_a_loop,
  test_properties.test_jit_changes_nothing,
  test_properties.test_x64,
  test_properties.test_updates_have_the_dtype_of_the_parameters,
  test_properties.test_a_missing_gradient_leaves_its_leaf_and_state_alone,
  test_bad_input.test_zero_gradients_give_no_nan,
  test_bad_input.test_integer_leaves_are_named,
  test_leaf_batching.test_batched_is_unbatched,
  test_sharding.test_every_case_on_a_mesh,
  test_random_trees.test_a_few_random_examples,
], ids=lambda check: check.__name__)
def test_what_is_tested_of_every_part_is_tested_of_it(outside, check):
  [case] = cases_of(outside.PART)
  check(case)


def test_the_formula_is_the_one_that_is_documented(outside):
  params = trees.mixed()
  [gradient] = trees.sequence(params, 1)
  tx = outside.limit_outliers(1.5)
  updates, state = tx.update(gradient, tx.init(params))
  for path, x in jax.tree_util.tree_leaves_with_path(gradient):
    name = "/".join(key.key for key in path)
    x = np.asarray(x, np.float64)
    most = 1.5 * np.sqrt(np.mean(x * x)) if x.size else 0.0
    found = dict(jax.tree_util.tree_leaves_with_path(updates))[path]
    np.testing.assert_allclose(found, np.clip(x, -most, most), 1e-6)
    if x.size:
      np.testing.assert_allclose(state.outlier_share[name], np.mean(np.abs(x) > most), atol=1e-6)


def test_the_table_in_the_readme_is_the_one_that_is_declared():
  assert registry.option_table() in (ROOT / "README.md").read_text()


def test_every_part_is_in_the_docstring_s_chain_once():
  positions = [(part.stage, part.position) for part in registry.parts()]
  assert len(set(positions)) == len(positions)


@pytest.mark.parametrize(("changed", "words"), [
  (dict(stage="nowhere"), "stage must be one of gradient"),
  (dict(switches=("missing",)), "none of its options"),
  (dict(options=(Option("edge_penalty", 1.0, registry.NUMBER, "twice"),), switches=()),
   "'edge_penalty'.*another option"),
])
def test_a_wrong_declaration_is_named(changed, words):
  def nothing():
    return optax.identity()

  part = registry.Part(nothing, optax.EmptyState, "gradient", 5, (), (), lambda options: nothing())
  with pytest.raises(ValueError, match=words):
    registry.register(registry.dataclasses.replace(part, **changed))
  assert "nothing" not in [part.name for part in registry.parts()]


def test_a_name_is_taken_once():
  [part] = [part for part in registry.parts() if part.name == "grams"]
  with pytest.raises(ValueError, match="'grams' is registered already"):
    registry.register(part)
  with pytest.raises(ValueError, match="no part with the name 'nobody'"):
    registry.unregister("nobody")


def test_options_are_a_mapping_that_does_not_change():
  options = ho.hina_adaptive(1e-2, edge_penalty=0.5).options
  assert options["edge_penalty"] == options.edge_penalty == 0.5
  assert options.replace(edge_penalty=0.25).edge_penalty == 0.25
  assert set(options) == set(registry.options())
  assert "edge_penalty=0.5" in repr(options)
  assert "eps" not in repr(options)
  with pytest.raises(AttributeError, match=r"replace\(edge_penalty"):
    options.edge_penalty = 1.0
  with pytest.raises(AttributeError, match="no option 'nothing'"):
    _ = options.nothing
  with pytest.raises(ValueError, match="edge_penalty must lie in"):
    options.replace(edge_penalty=-jnp.ones([]))
