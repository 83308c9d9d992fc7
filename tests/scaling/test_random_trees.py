"""Random trees, options and gradients of any size: what must hold for every transformation.

Compiling is all that costs here, so shapes, dtypes and forms come from a small pool, and all
numbers among the options are traced: programs are compiled once and see many examples.
"""

import functools
import os

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from hina_optax import memory
from tests import bounds
from tests.cases import CASES, Case
from tests.scaling import meshes

# Over all cases 10,008 examples.
EXAMPLES = int(os.environ.get("HINA_EXAMPLES", "278"))
STEPS = 3
_F32, _BF16, _F16 = jnp.float32, jnp.bfloat16, jnp.float16
# Leaves by shape and dtype: sides of 0 and 1, scalars, places without a leaf, pairs of a LoRA.
POOL = (
  {"a": ((), _F32), "b": ((1,), _F32), "none": None, "w": ((8, 3), _F32), "v": ((8, 3), _F32)},
  {"empty": ((0, 4), _F32), "row": ((1, 8), _BF16), "column": ((8, 1), _F16), "nested": {
    "none": None, "deep": [None, ((16,), _F32), ((16,), _F32)]}},
  {"x": {"lora_a": ((8, 2), _BF16), "lora_b": ((2, 5), _BF16)},
   "y": {"lora_a": ((8, 2), _BF16), "lora_b": ((2, 5), _BF16)}, "one": ((1, 1, 1), _F32)},
  {"conv": ((3, 1, 2, 8), _F32), "latents": ((8, 8, 2), _F32), "other": ((8, 8, 2), _F32),
   "none": (), "gone": ((3, 0, 2), _BF16)},
)
SMALLEST = 2
# How a step is computed on which tree. Without jit each operation is compiled by itself, and with
# eight devices each step waits for all: they come more seldom, and without jit on two trees.
FORMS = (
  *((tree, form) for tree in range(len(POOL)) for form in ("jit", "jit", "batched", "batched")),
  *((tree, "sharded") for tree in range(len(POOL))), (0, "no jit"), (2, "no jit"),
)
# What the options may be, by name; others stay as the case has them.
RANGES = {
  **dict.fromkeys(("strength", "threshold", "detail_preservation", "factor", "decay",
                   "compatibility_threshold", "edge_penalty", "edge_threshold", "spd_lambda",
                   "frequency_penalty", "weight_decay", "rank_penalty_strength"), (0.0, 0.99)),
  "bump": (0.0, 0.5), "min_scale": (0.0, 1.0), "max_scale": (1.0, 9.0), "learning_rate": (0, 0.1),
  "emphasis": (1.0, 2.0), "b1": (0.0, 0.99), "b2": (0.1, 0.9999), "torque_decay": (0.0, 0.99),
  "adaptation_strength": (0.0, 3.0),
}
CORE = ("b1", "b2", "torque_decay")


def options_of(case: Case) -> tuple[str, ...]:
  if case.kind == "moments":
    return CORE
  if case.wraps:
    return case.ranges
  return tuple(name for name in case.kwargs if name in RANGES)


def build(case: Case, options: dict) -> object:
  if case.factory is not None:
    return case.factory(**{**case.kwargs, **options})
  return case.make(**options)


def parameters(tree: dict, seed: int, scale: float) -> dict:
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf[0]), leaf[1]), tree,
                      is_leaf=lambda x: isinstance(x, tuple) and bool(x))


def gradient(params: dict, seed: int, exponent: float) -> dict:
  """Normal numbers times a power of ten, cut to what their dtype holds."""
  rng = np.random.default_rng(seed)

  def one(x):
    values = rng.normal(size=x.shape) * 10.0**exponent
    values *= rng.random(x.shape) > 0.1  # and some zeros
    top = float(jnp.finfo(x.dtype).max)
    return jnp.asarray(np.clip(values, -top, top), x.dtype)

  return jax.tree.map(one, params)


def lay_out(tree, on):
  """Axes that eight devices divide are sharded, the first of each leaf."""
  def one(x):
    first = next((i for i, n in enumerate(x.shape) if n and n % 8 == 0), None)
    spec = () if first is None else (*(None,) * first, ("data", "model"))
    return jax.device_put(x, NamedSharding(on, PartitionSpec(*spec)))

  return jax.tree.map(one, tree)


class Programs:
  """The compiled programs of one case, one for each tree and form."""

  def __init__(self, case: Case):
    self.case, self.names = case, options_of(case)
    self.mesh = meshes.mesh(4, 2)
    self.step = functools.cache(self._step)

  def transformation(self, form: str, options: dict):
    tx = build(self.case, options)
    return memory.with_leaf_batching(tx) if form == "batched" else tx

  def _step(self, tree: int, form: str):
    def step(options, gradient, state, params):
      return self.transformation(form, options).update(gradient, state, params)

    return step if form == "no jit" else jax.jit(step)

  def run(self, tree, form, options, params, gradients):
    """The updates and states of a few steps."""
    if form == "sharded":
      params = lay_out(params, self.mesh)
      gradients = [lay_out(g, self.mesh) for g in gradients]
    plain = {k: jnp.float32(v) for k, v in options.items()}
    state, made = self.transformation(form, plain).init(params), []
    step = self.step(tree, form)
    for g in gradients:
      updates, state = step(plain, g, state, params)
      made.append((updates, state))
    return made


def finite(tree) -> bool:
  return all(np.isfinite(np.asarray(x, np.float64)).all() for x in jax.tree.leaves(tree))


def check_bound(case: Case, options: dict, number: int, g, u, p) -> None:
  """What a docstring says of the size of an update; the slack is for fp32, or bf16 and f16."""
  if case.bound is not None:
    case.bound(bounds.LeafStep(
      options, number, g, u, p, slack=1.01 if g.dtype == _F32 else 1.03,
      least=1e-37 if g.dtype != _F16 else 1e-7))


def tolerance(case: Case, x) -> tuple[float, float]:
  """Relative, and absolute for a leaf; a thousand-millionth of a step is no difference."""
  wide = 1e-4 if x.dtype == _F32 else 0.02
  unit = 1e-9 if case.kind in ("moments", "alias") or case.wraps else 1e-30
  return wide, wide * bounds.size(x) + unit


def check(programs: Programs, place, options, seed, exponents, spread) -> None:
  (tree, form), case = place, programs.case
  params = parameters(POOL[tree], seed, spread)
  gradients = [gradient(params, seed + i, e) for i, e in enumerate(exponents)]
  seen = lay_out(params, programs.mesh) if form == "sharded" else params
  start = jax.tree.structure(programs.transformation(form, options).init(seen))
  made = programs.run(tree, "jit", options, params, gradients)
  for step, (g, (updates, state)) in enumerate(zip(gradients, made), 1):
    assert jax.tree.structure(updates) == jax.tree.structure(g)
    assert finite(state), "state"
    assert finite(updates), "updates"
    for each in zip(*map(jax.tree.leaves, (g, updates, params))):
      check_bound(case, options, step, *each)
  if form == "jit":
    return
  others = programs.run(tree, form, options, params, gradients)
  for (updates, _), (other, state) in zip(made, others):
    assert jax.tree.structure(state) == start
    for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(other)):
      np.testing.assert_allclose(
        np.asarray(y, np.float64), np.asarray(x, np.float64), *tolerance(case, x))


def examples(case: Case, forms):
  """Trees, forms, options, seeds and sizes of gradients."""
  numbers = {name: st.floats(*RANGES[name]) for name in options_of(case)}
  exponent = st.floats(-30, 30)
  return dict(
    place=st.sampled_from(forms),
    options=st.fixed_dictionaries(numbers), seed=st.integers(0, 10_000),
    exponents=st.one_of(
      exponent.map(lambda e: [e] * STEPS), st.lists(exponent, min_size=STEPS, max_size=STEPS)),
    spread=st.sampled_from([1e-6, 0.1, 1.0, 100.0]),
  )


def explore(case: Case, count: int, forms=FORMS) -> None:
  programs = Programs(case)

  @hypothesis.settings(
    max_examples=count, deadline=None, database=None, derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck))
  @hypothesis.given(**examples(case, forms))
  def run(**example):
    check(programs, **example)

  run()
  jax.clear_caches()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_few_random_examples(case):
  """On the smallest tree, in stacks and by itself: two programs."""
  explore(case, 6, [(SMALLEST, "batched")])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_random_examples(case):
  explore(case, EXAMPLES)
