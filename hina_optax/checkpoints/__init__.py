"""State in a form for checkpoints, which any sharding, plan and batching can read."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hina_optax.base import paths
from hina_optax.base.positions import LeafNumbers
from hina_optax.checkpoints import _abstract, _portable, _stamps
from hina_optax.checkpoints._abstract import abstract_state
from hina_optax.checkpoints._portable import Entry


def pack_state(tx: Any, state: Any, params: Any) -> tuple[dict[str, jax.Array], dict[str, Any]]:
  """An optimizer's state as a flat dict of arrays, and a stamp that says what they are.

  Save both: the arrays with Orbax (or NumPy), the stamp as JSON. Nothing is converted or copied
  here; `unpack_state` does that for whatever it restores to.

  Args:
    tx: the transformation that made the state.
    state: its state.
    params: the parameters it was made for, arrays or abstract.

  Returns:
    The arrays under `"00000"`, `"00001"`, ... (as many bytes as the state; arrays without elements
    are left out), and a dict of strings, numbers and lists: the version of this form, the options
    of `hina_adaptive`, the parameters' paths and shapes, and what each array is.

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
  _portable.check_state(tx, state, params)
  found = _portable.entries(state)
  arrays: dict[str, jax.Array] = {}
  records = []
  mesh = _abstract.mesh_of(params)
  for entry in found:
    keys = []
    for x in jax.tree.leaves(entry.value):
      keys.append(f"{len(arrays):05d}" if jnp.size(x) else "")
      if keys[-1]:
        arrays[keys[-1]] = _on_mesh(x, mesh)
    records.append(_stamps.record(entry, keys))
  return arrays, _stamps.stamp(tx, params, records)


def packed_shapes(stamp: dict[str, Any], tx: Any, params: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """What `pack_state` saved, as abstract arrays placed for these parameters: what Orbax restores.

  Call it before reading: all that can be wrong with a checkpoint is found here, from the stamp
  alone. What is like a parameter is read in parts, each device its own.

  Args:
    stamp: of `pack_state`.
    tx: the transformation that is to go on.
    params: its parameters, arrays or abstract, on one mesh or one device.

  Returns:
    A dict like the first result of `pack_state`, of `jax.ShapeDtypeStruct`s with shardings.

  Raises:
    ValueError: if the checkpoint does not fit, with all that differs: leaves added, removed,
      reordered or of another shape, parts of the optimizer, options that change what its numbers
      mean, a newer version.

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
  _stamps.check_leaves(stamp, tx, params)
  abstract, entries = _target(tx, params)
  fields = _number_fields(abstract)
  _check_parts(stamp, tx, entries, fields)
  mesh = _abstract.mesh_of(params)
  known = {place.path: x for place, x in zip(*paths.flatten(params)[:2])}
  shapes = {}
  for entry, keys in _stamps.saved(stamp, fields):
    owner = _owner(entry, known)
    for key, x in zip(keys, jax.tree.leaves(entry.value)):
      if key:
        place = _place(x.shape, owner, mesh)
        shapes[key] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  return shapes


def unpack_state(tx: Any, arrays: dict[str, Any], stamp: dict[str, Any], params: Any) -> Any:
  """The state of `tx` that goes on where a packed one was.

  Sharding, storage (fp32, bf16, 8 bits, host memory) and stacking are those that `tx.init(params)`
  gives now, whatever they were. Numbers whose storage changes are rounded once, all others are the
  same to the bit. The noise of stochastic rounding begins anew where the storage changes.

  Args:
    tx: the transformation that is to go on.
    arrays: of `pack_state`, as they were read.
    stamp: of `pack_state`.
    params: the parameters of `tx`, arrays or abstract, on one mesh or one device.

  Returns:
    A state of `tx`.

  Raises:
    ValueError: as `packed_shapes`, or if arrays are missing; then nothing has been made.

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
  wanted = packed_shapes(stamp, tx, params)
  missing = sorted(wanted.keys() - arrays.keys())
  if missing:
    raise ValueError(
      f"{len(missing)} arrays of the checkpoint are missing: {_stamps.few(missing)}.")
  abstract, entries = _target(tx, params)
  fields = _number_fields(abstract)
  saved = [_filled(entry, keys, arrays) for entry, keys in _stamps.saved(stamp, fields)]
  whole = {_portable.form(entry): entry for entry in saved}
  source = {name: entry for entry in saved for name in entry.names}
  fresh = _fresh(tx, params, entries, source)
  made = []
  for i, entry in enumerate(entries):
    same = whole.get(_portable.form(entry))
    if same is not None:
      made += [_portable.placed(jnp.asarray(x), like) for x, like in zip(
        jax.tree.leaves(same.value), jax.tree.leaves(entry.value))]
    elif entry.names[0] not in source:
      made.append(_portable.placed(fresh[entry.names[0]], entry.value))
    else:
      parts: dict[str, jax.Array] = {}
      for name in entry.names:
        if name not in parts:
          parts |= _portable.pieces(source[name])
      made += jax.tree.leaves(_portable.assembled(entry, parts, i))
  return jax.tree.unflatten(jax.tree.structure(abstract), made)


def _target(tx: Any, params: Any) -> tuple[Any, list[Entry]]:
  """The abstract state of `tx`, and its entries, in the order of its leaves."""
  abstract = abstract_state(tx, params)
  return abstract, _portable.entries(abstract)


def _number_fields(state: Any) -> frozenset[str]:
  """The names of a state's fields that hold one number per leaf."""
  pairs = jax.tree_util.tree_flatten_with_path(
    state, is_leaf=lambda x: isinstance(x, LeafNumbers))[0]
  return frozenset(
    paths.path_string(_without_wrappers(state, path)) for path, x in pairs
    if isinstance(x, LeafNumbers))


def _without_wrappers(state: Any, path: Any) -> tuple[Any, ...]:
  """A key path without the fields of storage wrappers, as the names of entries have it."""
  node, kept = state, []
  for key in path:
    if not _portable.is_wrapper(node):
      kept.append(key)
    name = getattr(key, "name", None)
    node = getattr(node, name) if name is not None else node[
      key.idx if hasattr(key, "idx") else key.key]
  return tuple(kept)


def _check_parts(
  stamp: dict[str, Any], tx: Any, entries: list[Entry], fields: frozenset[str]
) -> None:
  """Refuses a checkpoint whose optimizer kept other numbers."""
  kept = {name: e for e, _ in _stamps.saved(stamp, fields) if not e.own for name in e.names}
  wanted = {name: e for e in entries if not e.own for name in e.names}
  shapes = [
    f"{name} ({list(_portable.shape(kept[name]))} in the checkpoint, "
    f"{list(_portable.shape(wanted[name]))} in the optimizer)"
    for name in kept.keys() & wanted.keys()
    if _portable.shape(kept[name]) != _portable.shape(wanted[name])
  ]
  _stamps.refuse([
    ("state only in the checkpoint", sorted(kept.keys() - wanted.keys())),
    ("state only in the optimizer", sorted(wanted.keys() - kept.keys())),
    ("state of another shape", sorted(shapes)),
  ], stamp, tx)


def _fresh(
  tx: Any, params: Any, entries: list[Entry], source: dict[str, Entry]
) -> dict[str, Any]:
  """Counters and seeds of storage wrappers that the checkpoint had not, as `init` gives them."""
  new = {entry.names[0] for entry in entries if entry.names[0] not in source}
  if not new:
    return {}
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)

  def counters() -> dict[str, Any]:
    # Compiled, nothing but these few numbers is computed.
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    found = _portable.entries(tx.init(zeros))
    return {e.names[0]: e.value for e in found if e.names[0] in new}

  return jax.jit(counters)()


def _filled(entry: Entry, keys: list[str], arrays: dict[str, Any]) -> Entry:
  structure: Any = jax.tree.structure(entry.value)
  likes = jax.tree.leaves(entry.value)
  return entry._replace(value=structure.unflatten([
    arrays[key] if key else jnp.zeros(x.shape, x.dtype) for key, x in zip(keys, likes)]))


def _owner(entry: Entry, known: dict[str, Any]) -> Any:
  """The parameter that an entry is like, if it is like one."""
  shape = _portable.shape(entry)
  own = [p for p in known if f"/{entry.names[0]}".endswith(f"/{p}") and known[p].shape == shape]
  return known[max(own, key=len)] if own and entry.row is None else None


def _place(shape: tuple[int, ...], owner: Any, mesh: Any) -> Any:
  """The sharding for an array that is like `owner`, or has one number for a block of it."""
  if mesh is None:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  spec = [] if owner is None else list(_abstract.spec_of(owner))[:len(shape)]
  sizes = dict(mesh.shape)
  for i, axes in enumerate(spec):
    names = axes if isinstance(axes, tuple) else (axes,)
    if axes is not None and shape[i] % int(np.prod([sizes[name] for name in names])):
      spec[i] = None
  return NamedSharding(mesh, PartitionSpec(*spec))


def _on_mesh(x: Any, mesh: Any) -> Any:
  """Counters of a fresh state are this process's own: saved from several, they lie on the mesh."""
  if mesh is None or x.sharding.device_set == set(mesh.devices.flat):
    return x
  return jax.device_put(np.asarray(x), NamedSharding(mesh, PartitionSpec()))


__all__ = ["abstract_state", "pack_state", "packed_shapes", "unpack_state"]
