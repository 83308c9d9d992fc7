"""How arrays are spread over devices, as far as it can be seen, and JAX's explicit mode."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding


def is_sharded(x: Any) -> bool:
  """Whether `x` is seen to lie in parts on several devices.

  Concrete arrays show it, `jax.ShapeDtypeStruct`s that were given a sharding, and traced arrays on
  explicit mesh axes. Traced arrays on automatic axes show nothing.
  """
  if isinstance(x, jax.core.Tracer):
    return _is_explicit(x) and not jax.typeof(x).sharding.is_fully_replicated
  sharding = getattr(x, "sharding", None)
  return sharding is not None and not sharding.is_fully_replicated


def is_mesh_set() -> bool:
  """Whether a mesh of several devices is set, on which traced leaves may be sharded unseen."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and mesh.size > 1 and AxisType.Auto in mesh.axis_types


def _is_explicit(x: Any) -> bool:
  sharding = jax.typeof(x).sharding
  return AxisType.Explicit in sharding.mesh.axis_types and any(sharding.spec)


def automatic(update: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
  """`update`, computed on automatic mesh axes where its arguments are sharded on explicit ones.

  There each operation would have to say how its result is sharded. The updates come out as the
  gradients went in, and the state as it was.
  """

  @functools.wraps(update)
  def decorated(updates, state, params=None, **extra_args):
    given = updates, state, params
    if not any(_is_explicit(x) for x in jax.tree.leaves(given)):
      return update(updates, state, params, **extra_args)
    arrays = {k: v for k, v in extra_args.items() if isinstance(v, jax.Array)}
    others = {k: v for k, v in extra_args.items() if k not in arrays}

    def run(updates, state, params, arrays):
      return update(updates, state, params, **arrays, **others)

    mesh = next(jax.typeof(x).sharding.mesh for x in jax.tree.leaves(given) if _is_explicit(x))
    wanted = jax.tree.map(
      lambda x: NamedSharding(mesh, jax.typeof(x).sharding.spec), (updates, state))
    return jax.sharding.auto_axes(run, out_sharding=wanted)(*given, arrays)

  return decorated
