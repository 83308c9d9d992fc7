"""Every part in its default form against a NumPy oracle written from its definition."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hina_optax as ho
from hina_optax.modulators import mean_scale
from tests.reference import core, leaves, modulators, regularizers
from tests.reference.regularizers import Pair

pytestmark = pytest.mark.exact

STEPS = 20
ZERO_STEP = 6  # the whole gradient is zero at this step, counted from 1

MIXED = {
  "attn": {"lora_a": (6, 2), "lora_b": (2, 5)},
  "conv": {"kernel": (3, 3, 4, 2), "bias": (4,)},
  "conv1d": {"kernel": (3, 4, 2)},
  "dense": {"kernel": (7, 5), "bias": (5,)},
  "empty": (0, 4),
  "one": (1, 1),
  "origin": (2, 3),  # parameters zero
  "row": (1, 6),
  "scale": (),
  "sparse": (4, 6),  # gradient zero but for the first column
  "square": (2, 2),
  "still": (2, 3),  # gradient zero
  "vector": (1,),
}
TORCH = {"conv": {"weight": (4, 2, 3, 3)}, "conv1d": {"weight": (4, 2, 3)}, "dense": {"w": (5, 7)}}
PAIRS = {
  "conv": {"lora_a": (3, 3, 4, 2), "lora_b": (1, 1, 2, 5)},
  "dense": {"kernel": (6, 5), "lora_a": (6, 2), "lora_b": (2, 5)},
  "scan": {"lora_a": (4, 6, 3), "lora_b": (4, 3, 5)},
  "thin": {"lora_a": (5, 2), "lora_b": (2, 1)},  # one output: B^T B is singular
  "torch": {"lora_A": {"weight": (3, 7)}, "lora_B": {"weight": (5, 3)}},
  "torch_conv": {"lora_down": {"weight": (2, 4, 3, 3)}, "lora_up": {"weight": (6, 2, 1, 1)}},
  "torch_conv1d": {"lora_down": {"weight": (2, 4, 3)}, "lora_up": {"weight": (6, 2, 1)}},
  "untouched": {"lora_a": (6, 2), "lora_b": (2, 5)},  # B = 0, and its gradient too
}
RELATED = {
  "a": (40, 30),  # the same first elements in each, by half
  "b": (30, 40),
  "bias": (30,),
  "c": (44, 25),
  "d": (7, 5),
  "e": (5, 7),
  "empty": (0, 4),
  "f": (9, 9),
  "kernel": (3, 3, 4, 2),
  "one": (1, 1),
  "origin": (2, 3),
  "pair": (2, 1),
  "scale": (),
  "wide": (3, 400),
}
NARROW = {"lora_a": (2, 3), "lora_b": (3, 5)}  # more rank than inputs: A A^T is singular
SPREAD = {
  "deficient": {"lora_a": (6, 3), "lora_b": (3, 5)},  # B has rank one
  "spread": {"lora_a": (6, 3), "lora_b": (3, 5)},  # singular values 1, 0.1, 0.01
}
TREES = {
  "mixed": MIXED, "torch": TORCH, "pairs": PAIRS, "narrow": NARROW, "spread": SPREAD,
  "related": RELATED,
}
SPREAD_PAIRS = tuple(Pair(f"{name}/lora_a", f"{name}/lora_b") for name in SPREAD)
MIXED_PAIRS = (Pair("attn/lora_a", "attn/lora_b"),)
ALL_PAIRS = (
  Pair("conv/lora_a", "conv/lora_b"),
  Pair("dense/lora_a", "dense/lora_b"),
  Pair("scan/lora_a", "scan/lora_b", layers=1),
  Pair("thin/lora_a", "thin/lora_b"),
  Pair("torch/lora_A/weight", "torch/lora_B/weight", torch=True),
  Pair("torch_conv/lora_down/weight", "torch_conv/lora_up/weight", torch=True),
  Pair("torch_conv1d/lora_down/weight", "torch_conv1d/lora_up/weight", torch=True),
  Pair("untouched/lora_a", "untouched/lora_b"),
)


@dataclasses.dataclass(frozen=True)
class Case:
  """A part, its oracle, and the tree on which both are stepped.

  Attributes:
    name: of the case.
    make: builds the part.
    oracle: builds the oracle.
    tree: name of the shapes.
    seed: of parameters and gradients.
    rate: what the parameters move by, times the updates.
    rtol: relative tolerance.
    atol: absolute tolerance.
  """

  name: str
  make: Callable[[], Any]
  oracle: Callable[[], Any]
  tree: str = "mixed"
  seed: int = 0
  rate: float = -0.05
  rtol: float = 1e-5
  atol: float = 1e-6

  def __str__(self) -> str:
    return self.name


def part(name, oracle, label="", case=None, own=None, **options):
  """A case of the public `name`; `own` are arguments of the oracle alone."""
  make = functools.partial(getattr(ho, name), **options)
  options.pop("spatial_axes", None)
  return Case(
    f"{name}-{label}" if label else name, make,
    functools.partial(oracle, **options, **(own or {})), **(case or {}),
  )


INNERS = {
  "hina": (ho.scale_by_hina, core.Hina),
  "trace": (functools.partial(optax.trace, decay=0.9), core.Trace),
  "sgd": (functools.partial(optax.sgd, 0.1, momentum=0.9), core.Sgd),
}


def wrapper(name, oracle, inner, label="", case=None, **options):
  """A case of the public `name` around `inner`."""
  make, inner_oracle = INNERS[inner]
  return Case(
    "-".join(filter(None, (name, inner, label))),
    lambda: getattr(ho, name)(make(), **options),
    lambda: oracle(inner_oracle(), **options), **(case or {}),
  )


class OptaxOracle:
  """An optax transformation in the place of an oracle."""

  def __init__(self, tx):
    self.tx, self.step = tx, jax.jit(tx.update)

  def init(self, params):
    self.inner_state = self.tx.init(as_float32(params))

  def update(self, g, params):
    with jax.numpy_dtype_promotion("standard"):
      updates, self.inner_state = self.step(as_float32(g), self.inner_state)
    return flat(updates)

  def state(self):
    s = self.inner_state
    return {"count": int(s.count), "mu": flat(s.mu), "nu": flat(s.nu)}


CASES = (
  part("suppress_edges", regularizers.SuppressEdges),
  part("suppress_edges", regularizers.SuppressEdges, "strong", strength=2.0, threshold=0.2),
  part("suppress_edges", regularizers.SuppressEdges, "torch", {"tree": "torch"},
       {"axes": leaves.torch_axes}, spatial_axes=ho.torch_spatial_axes, strength=1.0),
  part("suppress_high_frequency", regularizers.SuppressHighFrequency),
  part("suppress_high_frequency", regularizers.SuppressHighFrequency, "strong", strength=0.9),
  part("suppress_high_frequency", regularizers.SuppressHighFrequency, "torch", {"tree": "torch"},
       {"axes": leaves.torch_axes}, spatial_axes=ho.torch_spatial_axes, strength=0.5),
  part("preserve_detail", regularizers.PreserveDetail),
  part("preserve_detail", regularizers.PreserveDetail, "little", detail_preservation=0.1,
       decay=0.5),
  part("preserve_detail", regularizers.PreserveDetail, "torch", {"tree": "torch"},
       {"axes": leaves.torch_axes}, spatial_axes=ho.torch_spatial_axes, detail_preservation=0.3),
  part("attenuate_background", regularizers.AttenuateBackground),
  part("attenuate_background", regularizers.AttenuateBackground, "half", strength=0.5),
  part("attenuate_background", regularizers.AttenuateBackground, "fast", mode="fast"),
  part("attenuate_background", regularizers.AttenuateBackground, "fast-torch", {"tree": "torch"},
       {"axes": leaves.torch_axes}, spatial_axes=ho.torch_spatial_axes, mode="fast", strength=0.6),
  # The library squares the factors: a rounding of 1e-7 grows by the square of the ratio of the
  # singular values, which this seed and this rate keep below 6.
  *(
    part("add_rank_penalty", regularizers.AddRankPenalty, f"emphasis-{emphasis}",
         {"tree": "pairs", "rate": -0.001, "seed": 14, "atol": 3e-6}, {"pairs": ALL_PAIRS},
         emphasis=emphasis, strength=0.3)
    for emphasis in (1.0, 1.2, 1.5)
  ),
  part("add_rank_penalty", regularizers.AddRankPenalty, "more-rank-than-inputs",
       {"tree": "narrow", "rate": 0.0, "atol": 3e-6},
       {"pairs": (Pair("lora_a", "lora_b"),)}, emphasis=1.5, strength=0.3),
  # A ratio of 100 makes 1e-7 into 1e-3.
  part("add_rank_penalty", regularizers.AddRankPenalty, "spread",
       {"tree": "spread", "rate": 0.0, "rtol": 3e-3, "atol": 3e-3}, {"pairs": SPREAD_PAIRS},
       emphasis=1.5, strength=1.0),
  part("add_rank_penalty", regularizers.AddRankPenalty, "defaults", own={"pairs": MIXED_PAIRS}),
  # Newton-Schulz comes near U V^T, whose elements are at most 1: to 1e-2 of it, times strength.
  part("add_rank_penalty", regularizers.AddRankPenalty, "unpaired", {"atol": 0.5e-2},
       {"pairs": MIXED_PAIRS}, unpaired="nuclear", strength=0.5, emphasis=1.5),
  part("adaptive_gradient_regularization", regularizers.AdaptiveGradientRegularization),
  part("adaptive_gradient_regularization", regularizers.AdaptiveGradientRegularization, "published",
       limit=1.0),
  part("orthogonalize_to_params", regularizers.OrthogonalizeToParams),
  part("orthogonalize_to_params", regularizers.OrthogonalizeToParams, "vectors",
       include_vectors=True),
  part("scale_by_hina", core.Hina),
  part("scale_by_hina", core.Hina, "other-betas", b1=0.5, b2=0.95, eps=1e-3),
  Case("scale_by_hina-optax", ho.scale_by_hina, lambda: OptaxOracle(optax.scale_by_adam())),
  part("scale_by_hina", core.Hina, "torque-average", torque="average"),
  part("scale_by_hina", core.Hina, "torque-sum", torque="sum", torque_decay=0.6),
  part("scale_by_hina", core.Hina, "adopt", stability="adopt"),
  Case("scale_by_hina-adopt-optax",
       functools.partial(ho.scale_by_hina, 0.9, 0.99, 1e-6, stability="adopt"),
       lambda: OptaxOracle(optax.contrib.scale_by_adopt(0.9, 0.99, 1e-6))),
  part("scale_by_hina", core.Hina, "torque-average-adopt", torque="average", stability="adopt"),
  part("scale_by_hina", core.Hina, "torque-sum-adopt", torque="sum", stability="adopt",
       b2=0.9, eps=0.3),
  part("add_scheduled_weight_decay", core.AddScheduledWeightDecay),
  part("add_scheduled_weight_decay", core.AddScheduledWeightDecay, "fading",
       weight_decay=0.4, transition_steps=6, factor=0.4),
  part("add_scheduled_weight_decay", core.AddScheduledWeightDecay, "floor",
       weight_decay=0.4, transition_steps=5, factor=0.2, min_ratio=0.3),
  wrapper("cautious", modulators.Cautious, "hina"),
  wrapper("cautious", modulators.Cautious, "trace"),
  wrapper("grams", modulators.Grams, "hina"),
  wrapper("grams", modulators.Grams, "trace"),
  wrapper("scale_by_sign_agreement", modulators.SignAgreement, "hina"),
  wrapper("scale_by_sign_agreement", modulators.SignAgreement, "trace", "bounded",
          bump=0.3, min_scale=0.25, max_scale=1.75, warmup_steps=16),
  wrapper("scale_by_sign_agreement", modulators.SignAgreement, "trace", "steps-past-bounds",
          bump=0.7, min_scale=0.25, max_scale=1.1),
  wrapper("scale_by_sign_agreement", modulators.SignAgreement, "hina", "start-outside",
          bump=0.3, min_scale=1.5, max_scale=2.25),
  wrapper("scale_by_importance", modulators.Importance, "trace", "rare"),
  wrapper("scale_by_importance", modulators.Importance, "hina", "full", interval=3, decay=0.5),
  wrapper("scale_by_importance", modulators.Importance, "trace", "estimated", interval=3,
          decay=0.5, intrinsic_importance="estimated"),
  wrapper("scale_by_importance", modulators.Importance, "trace", "related", {"tree": "related"},
          interval=4, decay=0.7, strength=0.8),
  # The change of a norm over one step is a difference of numbers that agree in two or three digits.
  wrapper("scale_by_importance", modulators.Importance, "hina", "every-step",
          {"tree": "related", "rtol": 1e-4},
          interval=1, decay=0.0, strength=3.0, compatibility_threshold=0.5,
          intrinsic_importance="estimated"),
  wrapper("project_to_init", modulators.ProjectToInit, "sgd", "", {"rate": 1.0}),
  wrapper("project_to_init", modulators.ProjectToInit, "sgd", "strong", {"rate": 1.0},
          strength=1.0),
)


def path_string(path):
  return "/".join(key.key for key in path)


def flat(tree):
  """A tree as an oracle takes it."""
  return {
    path_string(path): np.asarray(x, np.float64)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def as_float32(values):
  return {path: jnp.asarray(x, jnp.float32) for path, x in values.items()}


def random_tree(shapes, rng, scales):
  """Normal numbers, times a scale for each leaf."""
  flat_shapes, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
  return jax.tree.unflatten(
    structure,
    [np.asarray(s * rng.normal(size=shape), np.float32) for s, shape in zip(scales, flat_shapes)],
  )


def change(tree, factors):
  """`tree` with the leaves at these paths multiplied."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: np.float32(x * factors.get(path_string(path), 1.0)), tree
  )


def spread_singular_values(params):
  """Makes the pairs what `SPREAD` says."""
  down, up = params["spread"].values()
  mix = np.linalg.qr(down[:3])[0]
  up = np.array([[1.0], [0.1], [0.01]]) * np.linalg.qr(up.T)[0].T
  params["spread"] = {
    "lora_a": np.float32(np.linalg.qr(down)[0] @ mix), "lora_b": np.float32(mix.T @ up)
  }
  up = params["deficient"]["lora_b"]
  params["deficient"]["lora_b"] = np.outer([1.0, -2.0, 0.5], up[0]).astype(np.float32)


def make_data(name, seed):
  """Parameters and the gradients of all steps."""
  shapes, rng = TREES[name], np.random.default_rng(seed)
  scales = np.exp(rng.uniform(-1.2, 1.2, size=100))
  params = change(random_tree(shapes, rng, np.ones(100)), {"origin": 0.0, "untouched/lora_b": 0.0})
  if name == "related":
    half = rng.normal(size=1200)
    for key in ("a", "b", "c", "wide"):
      n = params[key].size
      params[key] = np.float32(params[key] + half[:n].reshape(params[key].shape))
  if name == "spread":
    spread_singular_values(params)
  column = np.zeros((4, 6))
  column[:, 0] = 1
  gone = {"still": 0.0, "sparse": column, "untouched/lora_b": 0.0}
  gradients = [change(random_tree(shapes, rng, scales), gone) for _ in range(STEPS)]
  gradients[ZERO_STEP - 1] = jax.tree.map(np.zeros_like, params)
  return params, gradients


def field(state, name):
  """The part of a state at a dotted name."""
  for word in name.split("."):
    state = state[int(word)] if word.isdigit() else getattr(state, word)
  return state


def compare(case, step, what, actual, expected):
  """Compares a tree, or a vector or number, and says where they part.

  The absolute tolerance is in units of the largest element where that is above 1: a sum of terms
  that cancel keeps the rounding of the terms.
  """
  tree = isinstance(expected, dict)
  actual = flat(actual) if tree else {"": np.asarray(actual, np.float64)}
  expected = expected if tree else {"": np.asarray(expected, np.float64)}
  assert list(actual) == list(expected), f"{case}: other leaves in {what} at step {step}"
  for path, value in expected.items():
    peak = np.max(np.abs(value), initial=1.0)
    np.testing.assert_allclose(
      actual[path], value, rtol=case.rtol, atol=case.atol * peak,
      err_msg=f"{case}: {what} at step {step}" + f", leaf {path}" * tree,
    )


@jax.jit
def mean_scales(rule):
  """Mean rate of each leaf, by path."""
  paths = jax.tree_util.tree_leaves_with_path(rule.bumps)
  return {
    path_string(path): mean_scale(rule._replace(bumps=words)) for path, words in paths
  }


def compare_rates(case, step, state, updates, oracle):
  """The rates of sign agreement: the mean over each leaf, and what the updates show of each.

  The latter to 1e-4, for small directions round more; that still tells one bump from the next.
  """
  means, updates = mean_scales(state.rules[0]), flat(updates)
  coarse = dataclasses.replace(case, rtol=1e-4)
  for path, rates in oracle.scale.items():
    if rates.size:
      compare(case, step, f"mean rate of {path}", means[path], np.mean(rates))
      direction = oracle.direction[path]
      seen = np.abs(direction) > 0.05
      shown = np.where(seen, updates[path], rates) / np.where(seen, direction, 1.0)
      compare(coarse, step, f"rates of {path}", shown, rates)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_part_follows_its_definition(case):
  params, gradients = make_data(case.tree, case.seed)
  tx, oracle = case.make(), case.oracle()
  state, update = tx.init(params), jax.jit(tx.update)
  oracle.init(flat(params))
  for step, g in enumerate(gradients, 1):
    updates, state = update(g, state, params)
    expected = oracle.update(flat(g), flat(params))
    compare(case, step, "updates", updates, expected)
    for name, value in oracle.state().items():
      compare(case, step, f"state {name}", field(state, name), value)
    if isinstance(oracle, modulators.SignAgreement):
      compare_rates(case, step, state, updates, oracle)
    params = jax.tree.map(lambda p, u: np.float32(p + case.rate * np.asarray(u)), params, updates)
