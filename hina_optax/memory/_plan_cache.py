"""Memory plans that are made when the shapes of the parameters are first seen."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from hina_optax.grouped.layout import Layout, find_layout
from hina_optax.memory._plan_table import MemoryPlan


class PlannedTransformation(NamedTuple):
  """A transformation with the plan for its state.

  Attributes:
    base: the transformation without storage wrappers.
    stored: the transformation in the storage wrappers of the plan.
    plan: the plan.
  """

  base: optax.GradientTransformationExtraArgs
  stored: optax.GradientTransformationExtraArgs
  plan: MemoryPlan


def cache_plans(
  make_plan: Callable[[Any, Layout | None], PlannedTransformation],
  find_params_layout: Callable[[Any], Layout | None],
) -> Callable[..., PlannedTransformation]:
  """Returns `choose_plan(params, state=None)`, which plans once per tree of shapes and layout.

  `make_plan(shapes, layout)` gets shapes and dtypes only, so `init` and `update` get the same plan,
  traced or not. `init` finds the layout from the parameters, and `update` from the state.
  """
  plans: dict[Any, PlannedTransformation] = {}

  def choose_plan(params: Any, state: Any = None) -> PlannedTransformation:
    layout = find_params_layout(params) if state is None else find_layout(state)
    shapes = jax.eval_shape(lambda tree: tree, params)
    leaves, structure = jax.tree.flatten(shapes)
    key = structure, tuple((x.shape, x.dtype.name) for x in leaves), layout
    if key not in plans:
      shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
      plans[key] = make_plan(shapes, layout)
    return plans[key]

  return choose_plan
