"""Storage that is decided when the shapes of the parameters are first seen."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from hina_optax.grouped.layout import Layout, layout_in
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
  decide: Callable[[Any, Layout | None], Decision], layout_of: Callable[[Any], Layout | None]
) -> Callable[..., Decision]:
  """`decide`, asked once for each tree of shapes and each way in which its leaves are grouped.

  `decide(shapes, layout)` sees shapes and dtypes alone, so that `init` and `update` reach the same
  answer, traced or not: how leaves are grouped `init` sees from the parameters, and `update` from
  the state.
  """
  known: dict[Any, Decision] = {}

  def decision(params: Any, state: Any = None) -> Decision:
    layout = layout_of(params) if state is None else layout_in(state)
    shapes = jax.eval_shape(lambda tree: tree, params)
    leaves, structure = jax.tree.flatten(shapes)
    key = structure, tuple((x.shape, x.dtype.name) for x in leaves), layout
    if key not in known:
      shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
      known[key] = decide(shapes, layout)
    return known[key]

  return decision
