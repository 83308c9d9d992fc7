"""States that hina_optax 0.1 saved, in the form of today.

It kept stacks of leaves as flat rows in plain dicts, numbers of leaves as a bare vector in the
order of the parameters, and divided stacks of many elements.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hina_optax import memory
from hina_optax.base import paths, rounding
from hina_optax.base.positions import LeafNumbers
from hina_optax.grouped.codecs import QuantizedLeaf
from hina_optax.grouped.layout import Grouped
from hina_optax.options import HinaOptions

# Elements of one stack, and how many large leaves it held all the same.
_LARGEST, _FEW = 1_200_000, 8
_MAX_ELEMENTS = 1 << 20
_PURPOSE = 6
# Functions that were described by the module they stood in.
_MOVED = {
  "hina_optax._leaves.torch_spatial_axes": "hina_optax.base.paths.torch_spatial_axes",
  "hina_optax._leaves.flax_spatial_axes": "hina_optax.base.paths.flax_spatial_axes",
}

Read = Callable[[str], np.ndarray]


class _Row(NamedTuple):
  """Where a leaf stood: the key of its stack, and its row in it; `None` where it stood alone."""

  key: str
  row: int | None


def identity(saved: Mapping[str, Any]) -> dict[str, Any]:
  """What a saved state must agree with, in today's words."""
  return {k: _MOVED.get(v, v) if isinstance(v, str) else v for k, v in saved.items()}


def upgraded(
  arrays: Mapping[str, Any], read: Read, like: Any, params: Any, options: HinaOptions | None
) -> dict[str, np.ndarray]:
  """The arrays of a state that is like `like`, under its keys, from those of version 1.

  Args:
    arrays: what was saved, by key.
    read: gives the numbers of one of them.
    like: the state of today, as shapes.
    params: the parameters, as shapes, in a mapping by name; absent ones are `None`.
    options: of `hina_adaptive`; `None` for another transformation.
  """
  # In the order in which JAX goes through the mapping: of a plain dict by name.
  names = [place.path for place in paths.flatten(params)[0]]
  params = {name: params[name] for name in names}
  rows = _rows(params, options)
  found: dict[str, Any] = {}

  def leaf(head: str, name: str, shape: tuple[int, ...] | None) -> Any:
    """The number or array that belongs to a parameter, out of the field at `head`."""
    row = rows[name]
    own, stacked = f"{head}[{name!r}]", f"{head}[{row.key!r}]"
    alone = own in arrays or f"{own}.codes" in arrays
    key = own if alone else stacked
    if f"{key}.codes" in arrays:
      stored = QuantizedLeaf(jnp.asarray(read(f"{key}.codes")), jnp.asarray(read(f"{key}.scales")))
      value = np.asarray(memory.dequantize_state(stored))
    elif key in arrays:
      value = read(key)
    else:
      raise KeyError(key)
    value = value if alone or row.row is None else value[row.row]
    return value if shape is None else value.reshape(shape)

  nodes = jax.tree_util.tree_flatten_with_path(
    like, is_leaf=lambda x: isinstance(x, (Grouped, LeafNumbers)))[0]
  for path, node in nodes:
    head = jax.tree_util.keystr(path)
    if isinstance(node, LeafNumbers) and head in arrays:
      index = [names.index(name) for name in node.names.names]
      found[f"{head}['numbers']"] = read(head)[np.array(index)]
    elif isinstance(node, Grouped):
      for number, (group, x) in enumerate(zip(node.layout.groups, node.arrays)):
        codes = x.codes if isinstance(x, QuantizedLeaf) else x
        parts = [leaf(head, p, tuple(codes.shape[1:]) if group.stacked else None)
                 for p in group.paths]
        value = np.stack(parts) if group.stacked else parts[0]
        key = f"{head}[{group.name!r}]"
        if isinstance(x, QuantizedLeaf):
          at = rounding.key_of(rounding.seed_word(0), jnp.zeros([], jnp.int32), _PURPOSE)
          packed = memory.quantize_leaf(jnp.asarray(value), tuple(x.scales.shape), at.fold(number))
          found |= {f"{key}.codes": np.asarray(packed.codes), f"{key}.scales": np.asarray(
            packed.scales)}
        else:
          found[key] = value
    elif head in arrays:
      found[head] = read(head)
  return found


def _rows(params: Any, options: HinaOptions | None) -> dict[str, _Row]:
  """Where version 1 kept the state of each parameter."""
  kinds = _kinds(params, options)
  limit = _MAX_ELEMENTS
  if options is not None and options.max_batched_elements is not None:
    limit = int(options.max_batched_elements)
  together: dict[Any, list[str]] = {}
  for name, x in params.items():
    if x is not None:
      small = 0 < x.size <= limit
      key = (x.shape, x.dtype.name, kinds[name]) if small else name
      together.setdefault(key, []).append(name)
  found: dict[str, _Row] = {}
  taken = set[str]()
  for members in together.values():
    for own in _divided(members, params[members[0]].size):
      shape = "x".join(map(str, params[own[0]].shape))
      key = own[0] if len(own) == 1 else _unique(f"{_shared(own)}[{shape}]", taken)
      taken.add(key)
      found |= {name: _Row(key, i if len(own) > 1 else None) for i, name in enumerate(own)}
  return found


def _kinds(params: Any, o: HinaOptions | None) -> dict[str, Any]:
  if o is None:
    return dict.fromkeys(params)
  mask = o.weight_decay_mask
  given = mask(params) if callable(mask) else mask
  return {
    name: None if x is None else (
      paths.resolve_axes(o.spatial_axes, name, x), True if given is None else bool(given[name]))
    for name, x in params.items()}


def _divided(members: Sequence[str], size: int) -> list[Sequence[str]]:
  count = len(members)
  parts = max(1, min(-(-count * size // _LARGEST), count // _FEW))
  equal = [n for n in range(parts, parts + parts // 2 + 1) if count % n == 0]
  parts = equal[0] if equal else parts
  return [members[i * count // parts:(i + 1) * count // parts] for i in range(parts)]


def _shared(names: Sequence[str]) -> str:
  """What several paths have in common, with `*` for the rest."""
  parts = [name.split("/") for name in names]
  shortest = min(map(len, parts))
  same = [len({p[i] for p in parts}) == 1 for i in range(shortest)]
  head = same.index(False) if False in same else shortest
  tail = 0
  while tail < shortest - head and len({p[-1 - tail] for p in parts}) == 1:
    tail += 1
  return "/".join([*parts[0][:head], "*", *parts[0][len(parts[0]) - tail:]])


def _unique(name: str, taken: set[str]) -> str:
  number, chosen = 2, name
  while chosen in taken:
    chosen, number = f"{name}#{number}", number + 1
  return chosen
