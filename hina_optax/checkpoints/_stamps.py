"""What a checkpoint says of itself, and whether it fits."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hina_optax import memory
from hina_optax.alias import relative_rates
from hina_optax.base import paths, traits
from hina_optax.checkpoints._portable import Entry
from hina_optax.options import HinaOptions

LIBRARY, VERSION = "hina_optax", 2
_SHOWN = 6
# What version 1 kept and this one does not: the size of the last gradient, which importance now
# measures at the step itself.
_GONE = "/gradient_size"
# They change what the numbers of a state mean, though not their shapes.
_MEANINGS = (
  "sd_scripts_compat", "use_adopt_stability", "background_regularization_mode", "use_tam",
)


def stamp(tx: Any, params: Any, records: list[dict[str, Any]]) -> dict[str, Any]:
  """The whole stamp, fit for JSON."""
  places, leaves, _ = paths.flatten(params)
  return {
    "library": LIBRARY,
    "version": VERSION,
    "options": options_of(tx),
    "leaves": [
      [place.path, None if paths.is_absent(x) else list(jnp.shape(x))]
      for place, x in zip(places, leaves)
    ],
    "arrays": records,
  }


def options_of(tx: Any) -> dict[str, Any] | None:
  """Options of `hina_adaptive` as JSON has them, and its rates by element in relative units."""
  options = traits.traits_of(tx).options
  if not isinstance(options, HinaOptions):
    return None
  found = {name: _plain(value) for name, value in options.as_dict().items()}
  if options.use_lr_mask:
    found["relative rates (lr_bump, min_lr, max_lr)"] = [
      float(np.float32(x)) for x in relative_rates(options)]
  return found


def _plain(value: Any) -> Any:
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  if isinstance(value, (list, tuple)):
    return [_plain(x) for x in value]
  if isinstance(value, (np.generic, np.ndarray, jax.Array)) and np.size(value) == 1:
    return np.asarray(value).item()
  if callable(value):
    return f"<function {getattr(value, '__qualname__', type(value).__qualname__)}>"
  return f"<{type(value).__qualname__}>"


def record(entry: Entry, keys: list[str]) -> dict[str, Any]:
  """One entry as JSON has it."""
  return {
    "keys": keys,
    "names": list(entry.names),
    "row": None if entry.row is None else list(entry.row),
    "own": entry.own,
    "arrays": [[list(x.shape), jnp.dtype(x.dtype).name] for x in jax.tree.leaves(entry.value)],
  }


def saved(stamp: dict[str, Any], fields: frozenset[str]) -> Iterator[tuple[Entry, list[str]]]:
  """The entries of a stamp, their values abstract, and the keys of their arrays.

  Version 1 kept numbers of leaves as a bare vector in the order of the leaves; `fields` are the
  names of the state's fields of such numbers.
  """
  for item in stamp["arrays"]:
    arrays: list[Any] = [jax.ShapeDtypeStruct(tuple(s), jnp.dtype(d)) for s, d in item["arrays"]]
    value = arrays[0] if len(arrays) == 1 else memory.QuantizedLeaf(*arrays)
    row = None if item["row"] is None else tuple(item["row"])
    names = tuple(item["names"])
    if stamp["version"] > 1 or row is not None or names[0] not in fields:
      if stamp["version"] > 1 or not names[0].endswith(_GONE):
        yield Entry(names, row, value, item["own"]), item["keys"]
      continue
    there = [(i, path) for i, (path, shape) in enumerate(stamp["leaves"]) if shape is not None]
    yield Entry(tuple(f"{names[0]}/{path}" for _, path in there), (), value, item["own"],
                tuple(i for i, _ in there)), item["keys"]


def check_leaves(stamp: dict[str, Any], tx: Any, params: Any) -> None:
  """Refuses what is no stamp, is newer, is of other parameters, or means other numbers."""
  if stamp.get("library") != LIBRARY or not isinstance(stamp.get("version"), int):
    raise ValueError("the stamp is not one of hina_optax.pack_state.")
  if stamp["version"] > VERSION:
    raise ValueError(
      f"the checkpoint has version {stamp['version']} of this form, and this hina_optax reads "
      f"versions up to {VERSION}: use the hina_optax it was written with, or a newer one.")
  places, leaves, _ = paths.flatten(params)
  new = {p.path: None if paths.is_absent(x) else list(jnp.shape(x))
         for p, x in zip(places, leaves)}
  old = dict(stamp["leaves"])
  refuse([
    ("leaves only in the checkpoint", [path for path in old if path not in new]),
    ("leaves only in the model", [path for path in new if path not in old]),
    ("leaves of another shape", [
      f"{path} ({old[path]} in the checkpoint, {new[path]} in the model)"
      for path in old if path in new and old[path] != new[path]]),
    ("leaves in another order", _moved(list(old), list(new))),
    ("options that change what the state means", _changed(stamp, tx, meanings=True)),
  ], stamp, tx)


def _moved(old: list[str], new: list[str]) -> list[str]:
  if set(old) != set(new):
    return []
  return [
    f"{path} (place {i} in the checkpoint, {new.index(path)} in the model)"
    for i, path in enumerate(old) if new[i] != path
  ]


def _changed(stamp: dict[str, Any], tx: Any, meanings: bool) -> list[str]:
  """Options that differ: those that change meanings, or any."""
  old, new = stamp["options"], options_of(tx)
  if old is None or new is None:
    return []
  names = [n for n in (*old, *(n for n in new if n not in old)) if old.get(n) != new.get(n)]
  return [
    f"{name} ({old.get(name)} in the checkpoint, {new.get(name)} now)" for name in names
    if not meanings or name in _MEANINGS or name.startswith("relative rates")
  ]


def refuse(differences: list[tuple[str, list[str]]], stamp: dict[str, Any], tx: Any) -> None:
  """Raises one error that names all that differs, if anything does."""
  found = [f"  {what}: {few(names)}" for what, names in differences if names]
  if not found:
    return
  changed = _changed(stamp, tx, meanings=False)
  if changed and not any("options" in line for line in found):
    found.append(f"  options that differ: {few(changed)}")
  raise ValueError("\n".join(
    ["the checkpoint does not fit this model and optimizer:", *found]))


def few(names: list[str]) -> str:
  """The first of many names."""
  more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
  return ", ".join(names[:_SHOWN]) + more
