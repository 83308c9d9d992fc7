"""A transformation whose storage is decided when it first sees the shapes of the parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from hina_optax import _leaves
from hina_optax.memory._plan_table import MemoryPlan


class Decision(NamedTuple):
  """What was decided for some shapes.

  Attributes:
    base: the transformation without storage wrappers.
    stored: the same in the wrappers of the plan.
    plan: the plan.
  """

  base: optax.GradientTransformationExtraArgs
  stored: optax.GradientTransformationExtraArgs
  plan: MemoryPlan


def decided_by_shapes(
  decide: Callable[[Any], Decision],
) -> tuple[optax.GradientTransformationExtraArgs, Callable[[Any], Decision]]:
  """A transformation that asks `decide` once for each tree of shapes, and the cached `decide`.

  `decide` sees shapes and dtypes only, so that `init` and `update` reach the same answer, traced or
  not.
  """
  known: dict[Any, Decision] = {}

  def decision(params: Any) -> Decision:
    shapes = jax.eval_shape(lambda tree: tree, params)
    leaves, structure = jax.tree.flatten(shapes)
    key = structure, tuple((x.shape, x.dtype.name) for x in leaves)
    if key not in known:
      known[key] = decide(shapes)
    return known[key]

  def init(params: Any) -> Any:
    return decision(params).stored.init(params)

  def update(updates, state, params=None, **extra_args):
    _leaves.require_params(params, "a transformation with a memory plan")
    return decision(params).stored.update(updates, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(init, update), decision
