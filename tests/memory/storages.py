"""What the tests of the storage wrappers share: inner transformations, a tree, and checks."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hina_optax as ho
from hina_optax import memory
from tests import trees
from tests.cases import EVERYTHING

INNERS = {
  "adamw": lambda: optax.adamw(1e-2, b2=0.99, weight_decay=0.1),
  "sgd": lambda: optax.sgd(1e-2, momentum=0.9),
  "lion": lambda: optax.lion(1e-2),
  "clip_adam": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
  "hina": lambda: ho.hina_adaptive(1e-2),
  "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
  "muon": lambda: optax.contrib.muon(1e-2),
  "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-2),
}
# What gathers small steps into a precise value is no average.
INCLUDE = {"schedule_free": r"^(?!z/)"}
# A sign flips where two numbers are as good as equal.
SLACK = {"lion": 0.05, "hina": 0.05}
every_inner = pytest.mark.parametrize("name", [
  pytest.param(n, marks=[pytest.mark.slow] if n in ("adafactor", "muon", "schedule_free") else [])
  for n in INNERS
])
# Unlike optax.adam, it bears strict promotion.
RMS = optax.rmsprop(1e-2, momentum=0.9)
OUTER = {
  "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale(0.5)),
  "masked": lambda tx: optax.masked(tx, {"w": True, "b": False}),
  "multi": lambda tx: optax.MultiSteps(tx, 2),
  "partition": lambda tx: optax.partition({"x": tx, "y": optax.sgd(0.1)}, {"w": "x", "b": "y"}),
  "finite": lambda tx: optax.apply_if_finite(tx, 3),
}
every_outer = pytest.mark.parametrize("outer", [
  pytest.param(n, marks=[pytest.mark.slow] if n in ("partition", "finite") else []) for n in OUTER
])


def everything():
  return ho.hina_adaptive(1e-3, **EVERYTHING)


def tree(dtype: Any = jnp.float32) -> dict[str, Any]:
  """Leaves of 0, 1, 2 and 4 axes, one of them empty, with a place that is absent."""
  rng = np.random.default_rng(3)
  shapes = {"kernel": (16, 24), "bias": (5,), "conv": (3, 3, 4, 2), "empty": (3, 0), "scale": ()}
  made = {name: jnp.asarray(rng.normal(size=s), dtype) for name, s in shapes.items()}
  return {**made, "absent": None}


def for_inner(name: str, dtype: Any = jnp.float32) -> dict[str, Any]:
  """`tree` without what the inner cannot take (muon: empty leaves) or compiles for long."""
  without = {"muon": {"empty"}, "hina": {"conv", "scale"}}.get(name, set())
  return {k: v for k, v in tree(dtype).items() if k not in without}


def small(dtype: Any = jnp.float32) -> dict[str, Any]:
  """Two leaves, for tests of one property."""
  rng = np.random.default_rng(5)
  return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in (("w", (8, 16)), ("b", (4,)))}


def nbytes(state: Any) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(state))


def check_stable(tx: Any, params: Any, steps: int = 2) -> tuple[Any, Any]:
  """Steps under jit: one compilation, the same tree of shapes and dtypes, nothing but numbers."""
  with jax.numpy_dtype_promotion("standard"):
    state, update = tx.init(params), jax.jit(tx.update)
    wanted = jax.tree.structure(state), trees.dtypes(state)
    assert jax.tree.structure(jax.eval_shape(tx.init, params)) == wanted[0]
    for gradient in trees.sequence(params, steps):
      updates, state = update(gradient, state, params)
      assert (jax.tree.structure(state), trees.dtypes(state)) == wanted
      assert jax.tree.structure(updates) == jax.tree.structure(params)
  assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(updates))
  assert update._cache_size() == 1
  return updates, state


def check_compiled_memory(tx: Any) -> None:
  """What a step is given and what it keeps in place: gradients in fp32 and state, to the byte."""
  params = {"kernel": jnp.ones((256, 256))}
  state = tx.init(params)
  compiled = jax.jit(tx.update, donate_argnums=1).lower(params, state, params).compile()
  analysis = compiled.memory_analysis()
  # Parameters are not read.
  assert analysis.argument_size_in_bytes == 4 * 256**2 + nbytes(state)
  assert analysis.alias_size_in_bytes == nbytes(state)


def check_changes_no_bit(wrap: Any, name: str) -> None:
  """The wrapper around an inner gives the inner's own parameters, updates and state."""
  inner, params = INNERS[name](), for_inner(name)
  gradients = trees.sequence(params, 3)
  plain = trees.run_optax(inner, params, gradients)
  wrapped = trees.run_optax(wrap(inner), params, gradients)
  trees.assert_equal((*wrapped[:2], wrapped[2].inner_state), plain)


def second_moment(tx: Any, size: int = 1024) -> tuple[float, float]:
  """Mean second moment after 6,000 gradients of variance 1 and after 6,000 more of 0.01."""
  params = jnp.zeros(size)

  def run(state, deviation, seed):
    def step(state, i):
      key = jax.random.fold_in(jax.random.key(seed), i)
      return tx.update(deviation * jax.random.normal(key, (size,)), state)[1], None
    return jax.lax.scan(step, state, jnp.arange(6000))[0]

  run = jax.jit(run)
  high = run(tx.init(params), jnp.float32(1.0), 1)
  return mean_nu(high), mean_nu(run(high, jnp.float32(0.1), 2))


def mean_nu(state: Any) -> float:
  nu = optax.tree.get(memory.dequantize_state(state), "nu")
  return float(jnp.mean(nu.astype(jnp.float32)))


@functools.cache
def exact_second_moment() -> tuple[float, float]:
  return second_moment(second_moment_inner())


def second_moment_inner() -> optax.GradientTransformation:
  return optax.scale_by_rms(decay=0.999)


def distance(actual: Any, expected: Any) -> float:
  """Norm of the difference of two trees over the norm of the second."""
  pairs = list(zip(jax.tree.leaves(actual), jax.tree.leaves(expected)))
  gap = sum(np.sum(np.square(np.asarray(a, np.float64) - np.asarray(e, np.float64)))
            for a, e in pairs)
  return float(np.sqrt(gap / sum(np.sum(np.square(np.asarray(e, np.float64))) for _, e in pairs)))


def raises(kind: type[Exception], *parts: str) -> Any:
  """Expects an error whose message holds all `parts`, in this order."""
  return pytest.raises(kind, match="(?s)" + ".*".join(re.escape(p) for p in parts))
