"""A transformation whose storage is decided when it first sees the shapes of the parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from hina_optax import _layouts, _leaves
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
  decide: Callable[[Any, frozenset[str]], Decision], careful: bool = False,
) -> tuple[optax.GradientTransformationExtraArgs, Callable[..., Decision]]:
  """A transformation that asks `decide` once for each tree of shapes, and the cached `decide`.

  `decide(shapes, apart)` sees shapes, dtypes and the paths of leaves that are sharded, so that
  `init` and `update` reach the same answer, traced or not: `update` reads these paths from the keys
  of the state. With `careful` they are all where sharding cannot be seen.
  """
  known: dict[Any, tuple[Decision, set[frozenset[str]]]] = {}

  def look_up(params: Any, apart: frozenset[str]) -> tuple[Decision, set[frozenset[str]]]:
    shapes = jax.eval_shape(lambda tree: tree, params)
    leaves, structure = jax.tree.flatten(shapes)
    key = structure, tuple((x.shape, x.dtype.name) for x in leaves), apart
    if key not in known:
      shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
      found = decide(shapes, apart)
      keys = _layouts.keys_in(jax.eval_shape(lambda tree: found.base.init(tree), shapes))
      known[key] = found, set(keys)
    return known[key]

  def decision(params: Any, state: Any = None) -> Decision:
    seen = _layouts.standing_alone(params, careful)
    state = _layouts.made() if state is None else state
    if state is not None:
      keys = set(_layouts.keys_in(state))
      for apart in (seen, *_layouts.paths_in(state, params)):
        found, wanted = look_up(params, apart)
        if wanted <= keys:
          return found
    return look_up(params, seen)[0]

  def init(params: Any) -> Any:
    return decision(params).stored.init(params)

  def update(updates, state, params=None, **extra_args):
    _leaves.require_params(params, "a transformation with a memory plan")
    return decision(params, state).stored.update(updates, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(init, update), decision
