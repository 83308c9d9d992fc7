"""The state that an `init` would make, without making it: shapes, dtypes, and where they lie."""

import contextlib
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec


def abstract_state(tx: Any, params: Any) -> Any:
  """The state of `tx.init(params)` as `jax.ShapeDtypeStruct`s with shardings; nothing is allocated.

  `jax.eval_shape(tx.init, params)` forgets how the parameters are sharded. This keeps it: each leaf
  that is like a parameter has that parameter's sharding, all others lie whole on every device.
  State in host memory has its memory kind. It says to Orbax where a checkpoint is to be restored,
  and to `jax.jit` what `out_shardings` an `init` is to have.

  Args:
    tx: any optax transformation.
    params: arrays, or `jax.ShapeDtypeStruct`s with shardings, all on one mesh or one device.

  Returns:
    A tree like the state. As bytes: none.

  Raises:
    ValueError: if parameters are on different meshes.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> import hina_optax
    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> rows = jax.NamedSharding(mesh, jax.P("data"))
    >>> params = {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=rows)}
    >>> state = hina_optax.abstract_state(hina_optax.hina_adaptive(1e-3), params)
    >>> optax.tree.get(state, "mu")["w"].sharding.spec
    P('data', None)
  """
  mesh = mesh_of(params)
  if mesh is None:
    device = next((x.sharding for x in jax.tree.leaves(params) if _sharding(x) is not None), None)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    return _evaluated(tx, shapes, lambda x, kind: device and device.with_memory_kind(kind))
  # On explicit axes sharding is part of an array's type and passes through what `init` does.
  typed = mesh.abstract_mesh.update_axis_types(dict.fromkeys(mesh.axis_names, AxisType.Explicit))
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=NamedSharding(typed, spec_of(x))), params)

  def placed(x: Any, kind: str | None) -> NamedSharding:
    spec = jax.typeof(x).sharding.spec
    return NamedSharding(mesh, PartitionSpec(*spec), memory_kind=kind)

  return _evaluated(tx, shapes, placed, typed)


def mesh_of(params: Any) -> Any:
  """The mesh that parameters are sharded on; `None` where they are on one device."""
  found = {s.mesh for x in jax.tree.leaves(params) if isinstance(s := _sharding(x), NamedSharding)}
  if len(found) > 1:
    raise ValueError(f"parameters are on {len(found)} different meshes, which must be one.")
  return found.pop() if found else None


def _sharding(x: Any) -> Any:
  return getattr(x, "sharding", None)


def spec_of(x: Any) -> PartitionSpec:
  """How each axis is sharded; nothing where it is not on a mesh."""
  sharding = _sharding(x)
  return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


def _evaluated(tx: Any, shapes: Any, placed: Any, mesh: AbstractMesh | None = None) -> Any:
  places: list[Any] = []

  def init(params: Any) -> Any:
    state = tx.init(params)
    for x in jax.tree.leaves(state):
      host = jax.typeof(x).memory_space == jax.memory.Space.Host
      places.append(placed(x, "pinned_host" if host else None))
    return state

  with jax.sharding.use_abstract_mesh(mesh) if mesh is not None else contextlib.nullcontext():
    state = jax.eval_shape(init, shapes)
  leaves = jax.tree.leaves(state)
  structure: Any = jax.tree.structure(state)
  return structure.unflatten([
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x, place in zip(leaves, places)])
