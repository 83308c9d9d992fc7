"""Shapes, dtypes and shardings of the state that an `init` would make, without making it."""

import contextlib
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec


def abstract_state(tx: Any, params: Any) -> Any:
  """Returns `tx.init(params)` as `jax.ShapeDtypeStruct`s with shardings; nothing is allocated.

  `jax.eval_shape(tx.init, params)` forgets how the parameters are sharded. This function keeps it:
  each leaf in the shape of a parameter has that parameter's sharding; all other leaves are
  replicated on every device. State in host memory has its memory kind. The result tells Orbax where
  to restore a checkpoint, and gives `jax.jit` the `out_shardings` of an `init`.

  Args:
    tx: any optax transformation.
    params: arrays, or `jax.ShapeDtypeStruct`s with shardings, all on one mesh or one device.

  Returns:
    A tree with the structure of the state. It holds no arrays.

  Raises:
    ValueError: if the parameters are on different meshes.

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
  mesh = find_mesh(params)
  if mesh is None:
    device = next((x.sharding for x in jax.tree.leaves(params) if _sharding(x) is not None), None)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    return _eval_init(tx, shapes, lambda x, kind: device and device.with_memory_kind(kind))
  # With explicit axes the sharding is part of an array's type, so that tracing `init` tells the
  # sharding of each leaf of the state.
  explicit = mesh.abstract_mesh.update_axis_types(dict.fromkeys(mesh.axis_names, AxisType.Explicit))
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=NamedSharding(explicit, partition_spec(x))), params)

  def sharding_of(x: Any, memory_kind: str | None) -> NamedSharding:
    spec = jax.typeof(x).sharding.spec
    return NamedSharding(mesh, PartitionSpec(*spec), memory_kind=memory_kind)

  return _eval_init(tx, shapes, sharding_of, explicit)


def find_mesh(params: Any) -> Any:
  """Returns the mesh that the parameters are sharded on, or `None` if they are on one device."""
  shardings = map(_sharding, jax.tree.leaves(params))
  meshes = {s.mesh for s in shardings if isinstance(s, NamedSharding)}
  if len(meshes) > 1:
    raise ValueError(f"parameters are on {len(meshes)} different meshes, which must be one.")
  return meshes.pop() if meshes else None


def _sharding(x: Any) -> Any:
  return getattr(x, "sharding", None)


def partition_spec(x: Any) -> PartitionSpec:
  """Returns the partition spec of an array; it is empty if the array is not on a mesh."""
  sharding = _sharding(x)
  return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


def _eval_init(tx: Any, shapes: Any, sharding_of: Any, mesh: AbstractMesh | None = None) -> Any:
  """Traces `tx.init` and returns the abstract state, with shardings from `sharding_of`."""
  shardings: list[Any] = []

  def init(params: Any) -> Any:
    state = tx.init(params)
    # The type of a traced array tells its sharding and its memory space.
    for x in jax.tree.leaves(state):
      on_host = jax.typeof(x).memory_space == jax.memory.Space.Host
      shardings.append(sharding_of(x, "pinned_host" if on_host else None))
    return state

  with jax.sharding.use_abstract_mesh(mesh) if mesh is not None else contextlib.nullcontext():
    state = jax.eval_shape(init, shapes)
  leaves = jax.tree.leaves(state)
  structure: Any = jax.tree.structure(state)
  return structure.unflatten([
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in zip(leaves, shardings)])
