"""Which arrays are sharded, as far as that is visible, and JAX's explicit sharding mode."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding


def is_sharded(x: Any) -> bool:
  """Whether `x` is visibly split over several devices.

  This is visible on concrete arrays, on a `jax.ShapeDtypeStruct` with a sharding, and on traced
  arrays on explicit mesh axes. It is not visible on traced arrays on automatic axes.
  """
  if isinstance(x, jax.core.Tracer):
    return _is_explicit(x) and not jax.typeof(x).sharding.is_fully_replicated
  sharding = getattr(x, "sharding", None)
  return sharding is not None and not sharding.is_fully_replicated


def is_mesh_set() -> bool:
  """Whether a mesh of several devices is set, on which traced leaves may be sharded invisibly."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and mesh.size > 1 and AxisType.Auto in mesh.axis_types


def _is_explicit(x: Any) -> bool:
  sharding = jax.typeof(x).sharding
  return AxisType.Explicit in sharding.mesh.axis_types and any(sharding.spec)


def use_automatic_axes(update: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
  """Runs `update` on automatic mesh axes if its arguments are sharded on explicit ones.

  On explicit axes each operation would have to say how its result is sharded. The new updates get
  the shardings of the gradients, and the new state those of the old state.
  """

  @functools.wraps(update)
  def decorated(updates, state, params=None, **extra_args):
    trees = updates, state, params
    if not any(_is_explicit(x) for x in jax.tree.leaves(trees)):
      return update(updates, state, params, **extra_args)
    arrays = {k: v for k, v in extra_args.items() if isinstance(v, jax.Array)}
    static_args = {k: v for k, v in extra_args.items() if k not in arrays}

    def run(updates, state, params, arrays):
      return update(updates, state, params, **arrays, **static_args)

    mesh = next(jax.typeof(x).sharding.mesh for x in jax.tree.leaves(trees) if _is_explicit(x))
    out_shardings = jax.tree.map(
      lambda x: NamedSharding(mesh, jax.typeof(x).sharding.spec), (updates, state))
    return jax.sharding.auto_axes(run, out_sharding=out_shardings)(*trees, arrays)

  return decorated
