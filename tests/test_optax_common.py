"""optax's own tests of contributed optimizers, with `hina_adaptive` in their list."""

import functools
import importlib.util
import pathlib
import unittest

import jax
import optax
import pytest

import hina_optax as ho

# What is switched off decays, pulls back or moves the rates of single elements: it stops elsewhere.
OPTIONS = {"learning_rate": 1e-2, "weight_decay": 0.0, "use_spd": False, "use_lr_mask": False}
# OrthoGrad is left out: a matrix keeps its norm under it, and so its distance from these minima.
REGULARIZERS = {
  "edge_suppression": True, "spatial_awareness": True, "background_regularization": True,
  "lora_rank_penalty": True,
}
VARIANTS = {"defaults": OPTIONS, "all regularizers": {**OPTIONS, **REGULARIZERS}}


@functools.cache
def optax_tests(variant):
  """The tests that optax makes of each optimizer in its list, made of ours."""
  path = pathlib.Path(optax.__file__).parent / "contrib" / "_common_test.py"
  source = path.read_text()
  entry = [{"opt_name": "hina_adaptive", "opt_kwargs": VARIANTS[variant], "wrapper_name": None,
            "wrapper_kwargs": None}]
  split = source.index("def _get_opt_factory")
  lists = f"_ALL_OPTIMIZERS_UNDER_TEST = _MAIN_OPTIMIZERS_UNDER_TEST = {entry!r}\n\n\n"
  module = importlib.util.module_from_spec(
    importlib.util.spec_from_loader("optax_common_test", loader=None))
  exec(compile(source[:split] + lists + source[split:], str(path), "exec"), vars(module))
  vars(module)["_get_opt_factory"] = functools.partial(getattr, ho)
  return list(unittest.defaultTestLoader.loadTestsFromTestCase(module.ContribTest))


@pytest.mark.parametrize("variant", VARIANTS)
def test_optax_finds_nothing(variant):
  tests = optax_tests(variant)
  assert len(tests) >= 10
  result = unittest.TestResult()
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    unittest.TestSuite(tests).run(result)
  assert result.testsRun == len(tests)
  assert not [text for _, text in (*result.failures, *result.errors)]
