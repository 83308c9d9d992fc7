"""Metadata of a checkpoint, publicly called its stamp: how it is made, read and checked."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hina_optax import memory, registry
from hina_optax.alias import relative_rates
from hina_optax.base import paths, traits
from hina_optax.checkpoints._entries import Entry
from hina_optax.options import HinaOptions

LIBRARY, VERSION = "hina_optax", 2
_MAX_LISTED = 6
# A field that version 1 saved and version 2 does not: the size of the last gradient, which the
# importance part now measures at the step itself.
_REMOVED_FIELD = "/gradient_size"


def make_metadata(tx: Any, params: Any, records: list[dict[str, Any]]) -> dict[str, Any]:
  """Makes the metadata of a checkpoint as JSON values; `records` come from `describe_entry`."""
  places, leaves, _ = paths.flatten(params)
  return {
    "library": LIBRARY,
    "version": VERSION,
    "options": _describe_options(tx),
    "leaves": [
      [place.path, None if paths.is_absent(x) else list(jnp.shape(x))]
      for place, x in zip(places, leaves)
    ],
    "arrays": records,
  }


def _describe_options(tx: Any) -> dict[str, Any] | None:
  """Describes the options of `hina_adaptive` as JSON values; `None` for other transformations.

  If element-wise learning rates are on, their limits are added in relative units.
  """
  options = traits.get_traits(tx).options
  if not isinstance(options, HinaOptions):
    return None
  described = {name: _to_json(value) for name, value in options.as_dict().items()}
  if options.use_lr_mask:
    described["relative rates (lr_bump, min_lr, max_lr)"] = [
      float(np.float32(x)) for x in relative_rates(options)]
  return described


def _to_json(value: Any) -> Any:
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  if isinstance(value, (list, tuple)):
    return [_to_json(x) for x in value]
  if isinstance(value, (np.generic, np.ndarray, jax.Array)) and np.size(value) == 1:
    return np.asarray(value).item()
  if callable(value):
    return f"<function {getattr(value, '__qualname__', type(value).__qualname__)}>"
  return f"<{type(value).__qualname__}>"


def describe_entry(entry: Entry, keys: list[str]) -> dict[str, Any]:
  """Describes an entry as JSON values.

  The dict's keys are part of the file format: they stay `row` and `own`, though the attributes of
  `Entry` have other names.
  """
  return {
    "keys": keys,
    "names": list(entry.names),
    "row": None if entry.row_shape is None else list(entry.row_shape),
    "own": entry.is_counter,
    "arrays": [[list(x.shape), jnp.dtype(x.dtype).name] for x in jax.tree.leaves(entry.value)],
  }


def read_entries(
  metadata: dict[str, Any], number_fields: frozenset[str]
) -> Iterator[tuple[Entry, list[str]]]:
  """Yields the saved entries, with abstract values, and the keys of their arrays.

  Args:
    metadata: what `make_metadata` made, in this version or in an older one.
    number_fields: names of the state's fields that hold one number per leaf. Version 1 saved such a
      field as a single vector in the order of the leaves, without their names.
  """
  for record in metadata["arrays"]:
    arrays: list[Any] = [jax.ShapeDtypeStruct(tuple(s), jnp.dtype(d)) for s, d in record["arrays"]]
    value = arrays[0] if len(arrays) == 1 else memory.QuantizedLeaf(*arrays)
    row_shape = None if record["row"] is None else tuple(record["row"])
    names = tuple(record["names"])
    if metadata["version"] > 1 or row_shape is not None or names[0] not in number_fields:
      if metadata["version"] > 1 or not names[0].endswith(_REMOVED_FIELD):
        yield Entry(names, row_shape, value, record["own"]), record["keys"]
      continue
    present = [(i, path) for i, (path, shape) in enumerate(metadata["leaves"]) if shape is not None]
    yield Entry(tuple(f"{names[0]}/{path}" for _, path in present), (), value, record["own"],
                tuple(i for i, _ in present)), record["keys"]


def check_metadata(metadata: dict[str, Any], tx: Any, params: Any) -> None:
  """Refuses metadata that does not fit the parameters and the options.

  Raises:
    ValueError: if it was not made by `pack_state`, has a newer version, belongs to other
      parameters, or to options under which the numbers of the state have another meaning.
  """
  if metadata.get("library") != LIBRARY or not isinstance(metadata.get("version"), int):
    raise ValueError("the stamp is not one of hina_optax.pack_state.")
  if metadata["version"] > VERSION:
    raise ValueError(
      f"the checkpoint has version {metadata['version']} of this form, and this hina_optax reads "
      f"versions up to {VERSION}: use the hina_optax it was written with, or a newer one.")
  places, leaves, _ = paths.flatten(params)
  new = {p.path: None if paths.is_absent(x) else list(jnp.shape(x))
         for p, x in zip(places, leaves)}
  old = dict(metadata["leaves"])
  raise_if_different([
    ("leaves only in the checkpoint", [path for path in old if path not in new]),
    ("leaves only in the model", [path for path in new if path not in old]),
    ("leaves of another shape", [
      f"{path} ({old[path]} in the checkpoint, {new[path]} in the model)"
      for path in old if path in new and old[path] != new[path]]),
    ("leaves in another order", _reordered_leaves(list(old), list(new))),
    ("options that change what the state means",
     _changed_options(metadata, tx, meaning_only=True)),
  ], metadata, tx)


def _reordered_leaves(old: list[str], new: list[str]) -> list[str]:
  if set(old) != set(new):
    return []
  return [
    f"{path} (place {i} in the checkpoint, {new.index(path)} in the model)"
    for i, path in enumerate(old) if new[i] != path
  ]


def _changed_options(metadata: dict[str, Any], tx: Any, meaning_only: bool) -> list[str]:
  """Describes the options that differ, or only those that change what the state means."""
  old, new = metadata["options"], _describe_options(tx)
  if old is None or new is None:
    return []
  defining = {name for name, option in registry.options().items() if option.defines_state}
  names = [n for n in (*old, *(n for n in new if n not in old)) if old.get(n) != new.get(n)]
  return [
    f"{name} ({old.get(name)} in the checkpoint, {new.get(name)} now)" for name in names
    if not meaning_only or name in defining or name.startswith("relative rates")
  ]


def raise_if_different(
  differences: list[tuple[str, list[str]]], metadata: dict[str, Any], tx: Any
) -> None:
  """Raises a single error that lists all differences, if there are any.

  Options that differ are listed too, since they are the likely cause.
  """
  lines = [f"  {title}: {shorten(names)}" for title, names in differences if names]
  if not lines:
    return
  changed = _changed_options(metadata, tx, meaning_only=False)
  if changed and not any("options" in line for line in lines):
    lines.append(f"  options that differ: {shorten(changed)}")
  raise ValueError("\n".join(
    ["the checkpoint does not fit this model and optimizer:", *lines]))


def shorten(names: list[str]) -> str:
  """Joins names into a string, leaving out all but the first few."""
  more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
  return ", ".join(names[:_MAX_LISTED]) + more
