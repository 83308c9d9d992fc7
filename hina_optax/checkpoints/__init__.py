"""Checkpoints of optimizer state that can be restored under any sharding, plan and batching."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hina_optax.base import paths
from hina_optax.base.positions import LeafNumbers
from hina_optax.checkpoints import _abstract_state, _entries, _metadata
from hina_optax.checkpoints._abstract_state import abstract_state
from hina_optax.checkpoints._entries import Entry


def pack_state(tx: Any, state: Any, params: Any) -> tuple[dict[str, jax.Array], dict[str, Any]]:
  """Packs an optimizer's state into a flat dict of arrays, and a stamp of metadata about them.

  Save both: the arrays with Orbax (or NumPy), the stamp as JSON. Nothing is converted or copied
  here; `unpack_state` converts the arrays to whatever storage they are restored to.

  Args:
    tx: the transformation that made the state.
    state: its state.
    params: the parameters that the state was made for, arrays or abstract.

  Returns:
    The arrays under the keys `"00000"`, `"00001"`, ... They take as many bytes as the state; arrays
    without elements are left out. And the stamp, a dict of strings, numbers and lists: the version
    of the file format, the options of `hina_adaptive`, the paths and shapes of the parameters, and
    what each array is.

  Raises:
    ValueError: if the state is not of this transformation and these parameters.

  Example:
    >>> import jax.numpy as jnp, optax
    >>> import hina_optax
    >>> params = {"w": jnp.ones((64, 64))}
    >>> old = hina_optax.hina_adaptive(1e-3)
    >>> arrays, stamp = hina_optax.pack_state(old, old.init(params), params)
    >>> new = hina_optax.hina_adaptive(1e-3, reduce_precision=True)
    >>> state = hina_optax.unpack_state(new, arrays, stamp, params)
    >>> print(optax.tree.get(state, "mu")["w"].dtype)
    bfloat16
  """
  _entries.check_state(tx, state, params)
  arrays: dict[str, jax.Array] = {}
  records = []
  mesh = _abstract_state.find_mesh(params)
  for entry in _entries.list_entries(state):
    keys = []
    for x in jax.tree.leaves(entry.value):
      # Arrays without elements are not saved: their key is empty.
      keys.append(f"{len(arrays):05d}" if jnp.size(x) else "")
      if keys[-1]:
        arrays[keys[-1]] = _replicate_local(x, mesh)
    records.append(_metadata.describe_entry(entry, keys))
  return arrays, _metadata.make_metadata(tx, params, records)


def packed_shapes(stamp: dict[str, Any], tx: Any, params: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes, dtypes and shardings of the packed arrays, as the target for Orbax.

  Call it before reading the arrays: it finds everything that can be wrong with a checkpoint from
  the stamp alone. Arrays in the shape of a parameter get that parameter's sharding, so that each
  device reads only its own part.

  Args:
    stamp: the metadata from `pack_state`.
    tx: the transformation that continues the training.
    params: its parameters, arrays or abstract, on one mesh or one device.

  Returns:
    A dict with the keys of the arrays from `pack_state`. Its values are `jax.ShapeDtypeStruct`s
    with shardings.

  Raises:
    ValueError: if the checkpoint does not fit. The message lists every difference: leaves that were
      added, removed, reordered or reshaped, parts of the optimizer, options that change what the
      state means, a newer version.

  Example:
    >>> import jax.numpy as jnp
    >>> import hina_optax
    >>> params = {"w": jnp.ones((64, 64))}
    >>> tx = hina_optax.scale_by_hina()
    >>> arrays, stamp = hina_optax.pack_state(tx, tx.init(params), params)
    >>> hina_optax.packed_shapes(stamp, tx, {"v": params["w"]})
    Traceback (most recent call last):
    ...
    ValueError: the checkpoint does not fit this model and optimizer:
      leaves only in the checkpoint: w
      leaves only in the model: v
  """
  _metadata.check_metadata(stamp, tx, params)
  abstract = abstract_state(tx, params)
  number_fields = _leaf_number_fields(abstract)
  _check_entries(stamp, tx, _entries.list_entries(abstract), number_fields)
  mesh = _abstract_state.find_mesh(params)
  params_by_path = {place.path: x for place, x in zip(*paths.flatten(params)[:2])}
  shapes = {}
  for entry, keys in _metadata.read_entries(stamp, number_fields):
    param = _matching_param(entry, params_by_path)
    for key, x in zip(keys, jax.tree.leaves(entry.value)):
      if key:
        sharding = _choose_sharding(x.shape, param, mesh)
        shapes[key] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return shapes


def unpack_state(tx: Any, arrays: dict[str, Any], stamp: dict[str, Any], params: Any) -> Any:
  """Restores a state of `tx` from what `pack_state` returned.

  The sharding, storage (fp32, bf16, 8 bits, host memory) and stacking of the result are those of
  `tx.init(params)`, whatever they were in the checkpoint. Values whose storage changes are rounded
  once; all others are restored bit for bit. The noise of stochastic rounding starts anew where the
  storage changes.

  Args:
    tx: the transformation that continues the training.
    arrays: the arrays from `pack_state`, as they were read.
    stamp: the metadata from `pack_state`.
    params: the parameters of `tx`, arrays or abstract, on one mesh or one device.

  Returns:
    A state of `tx`.

  Raises:
    ValueError: if the checkpoint does not fit (see `packed_shapes`), or if arrays are missing.
      Nothing has been allocated then.

  Example:
    >>> import jax.numpy as jnp
    >>> import hina_optax
    >>> params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
    >>> tx = hina_optax.scale_by_hina()
    >>> packed = hina_optax.pack_state(tx, tx.init(params), params)
    >>> state = hina_optax.unpack_state(hina_optax.with_leaf_batching(tx), *packed, params)
    >>> {name: x.shape for name, x in state.mu.items()}
    {'*[8x8]': (2, 8, 8)}
  """
  shapes = packed_shapes(stamp, tx, params)
  missing = sorted(shapes.keys() - arrays.keys())
  if missing:
    raise ValueError(
      f"{len(missing)} arrays of the checkpoint are missing: {_metadata.shorten(missing)}.")
  abstract = abstract_state(tx, params)
  targets = _entries.list_entries(abstract)
  saved = [_fill_entry(entry, keys, arrays)
           for entry, keys in _metadata.read_entries(stamp, _leaf_number_fields(abstract))]
  saved_by_layout = {_entries.layout_key(entry): entry for entry in saved}
  saved_by_name = {name: entry for entry in saved for name in entry.names}
  new_counters = _init_missing_counters(tx, params, targets, saved_by_name)
  leaves = []
  for i, target in enumerate(targets):
    same_layout = saved_by_layout.get(_entries.layout_key(target))
    if same_layout is not None:
      leaves += [_entries.place_like(jnp.asarray(x), like) for x, like in zip(
        jax.tree.leaves(same_layout.value), jax.tree.leaves(target.value))]
    elif target.names[0] not in saved_by_name:
      leaves.append(_entries.place_like(new_counters[target.names[0]], target.value))
    else:
      pieces: dict[str, jax.Array] = {}
      for name in target.names:
        if name not in pieces:
          pieces |= _entries.split_entry(saved_by_name[name])
      leaves += jax.tree.leaves(_entries.assemble_entry(target, pieces, i))
  return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _leaf_number_fields(state: Any) -> frozenset[str]:
  """Returns the names of the state's fields that hold one number per leaf."""
  pairs = jax.tree_util.tree_flatten_with_path(
    state, is_leaf=lambda x: isinstance(x, LeafNumbers))[0]
  return frozenset(
    paths.path_string(_drop_wrapper_keys(state, path)) for path, x in pairs
    if isinstance(x, LeafNumbers))


def _drop_wrapper_keys(state: Any, path: Any) -> tuple[Any, ...]:
  """Drops the fields of storage wrappers from a key path, since entry names omit them too."""
  node, keys = state, []
  for key in path:
    if not _entries.is_wrapper(node):
      keys.append(key)
    name = getattr(key, "name", None)
    node = getattr(node, name) if name is not None else node[
      key.idx if hasattr(key, "idx") else key.key]
  return tuple(keys)


def _check_entries(
  metadata: dict[str, Any], tx: Any, targets: list[Entry], number_fields: frozenset[str]
) -> None:
  """Refuses a checkpoint of an optimizer with different state."""
  saved = {name: entry for entry, _ in _metadata.read_entries(metadata, number_fields)
           if not entry.is_counter for name in entry.names}
  wanted = {name: entry for entry in targets if not entry.is_counter for name in entry.names}
  reshaped = [
    f"{name} ({list(_entries.leaf_shape(saved[name]))} in the checkpoint, "
    f"{list(_entries.leaf_shape(wanted[name]))} in the optimizer)"
    for name in saved.keys() & wanted.keys()
    if _entries.leaf_shape(saved[name]) != _entries.leaf_shape(wanted[name])
  ]
  _metadata.raise_if_different([
    ("state only in the checkpoint", sorted(saved.keys() - wanted.keys())),
    ("state only in the optimizer", sorted(wanted.keys() - saved.keys())),
    ("state of another shape", sorted(reshaped)),
  ], metadata, tx)


def _init_missing_counters(
  tx: Any, params: Any, targets: list[Entry], saved_by_name: dict[str, Entry]
) -> dict[str, Any]:
  """Initializes the counters and seeds of storage wrappers that the checkpoint does not have."""
  missing = {entry.names[0] for entry in targets if entry.names[0] not in saved_by_name}
  if not missing:
    return {}
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)

  def init_counters() -> dict[str, Any]:
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    entries = _entries.list_entries(tx.init(zeros))
    return {entry.names[0]: entry.value for entry in entries if entry.names[0] in missing}

  # Under jit nothing but these few scalars is computed.
  return jax.jit(init_counters)()


def _fill_entry(entry: Entry, keys: list[str], arrays: dict[str, Any]) -> Entry:
  """Replaces the abstract arrays of a saved entry with those that were read."""
  structure: Any = jax.tree.structure(entry.value)
  shapes = jax.tree.leaves(entry.value)
  return entry._replace(value=structure.unflatten([
    arrays[key] if key else jnp.zeros(x.shape, x.dtype) for key, x in zip(keys, shapes)]))


def _matching_param(entry: Entry, params_by_path: dict[str, Any]) -> Any:
  """Returns the parameter that an entry belongs to and has the shape of, or `None`."""
  shape = _entries.leaf_shape(entry)
  matching = [path for path, x in params_by_path.items()
              if f"/{entry.names[0]}".endswith(f"/{path}") and x.shape == shape]
  if not matching or entry.row_shape is not None:
    return None
  return params_by_path[max(matching, key=len)]


def _choose_sharding(shape: tuple[int, ...], param: Any, mesh: Any) -> Any:
  """Chooses the sharding of an array that has one number per element, or per block, of `param`."""
  if mesh is None:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  spec = [] if param is None else list(_abstract_state.partition_spec(param))[:len(shape)]
  sizes = dict(mesh.shape)
  for i, axes in enumerate(spec):
    names = axes if isinstance(axes, tuple) else (axes,)
    # The scales of 8-bit state are shorter than the parameter: an axis may not divide any more.
    if axes is not None and shape[i] % int(np.prod([sizes[name] for name in names])):
      spec[i] = None
  return NamedSharding(mesh, PartitionSpec(*spec))


def _replicate_local(x: Any, mesh: Any) -> Any:
  """Replicates an array over the mesh unless it is there already.

  The counters of a fresh state belong to their process alone. To be saved from several processes
  they must lie on the common mesh.
  """
  if mesh is None or x.sharding.device_set == set(mesh.devices.flat):
    return x
  return jax.device_put(np.asarray(x), NamedSharding(mesh, PartitionSpec()))


__all__ = ["abstract_state", "pack_state", "packed_shapes", "unpack_state"]
