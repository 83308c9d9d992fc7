"""Conversion of the states that hina_optax 0.1 saved (version 1) to the present format.

Version 1 stored stacks of leaves as flat rows in plain dicts, and a number per leaf as a vector in
the order of the parameters. It divided stacks of many elements into several.
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

# The most elements of one stack. A stack could have more only if it held fewer leaves than this.
_MAX_STACK_ELEMENTS, _MIN_STACK_LEAVES = 1_200_000, 8
# Larger leaves were not stacked, unless the option `max_batched_elements` was set.
_MAX_LEAF_ELEMENTS = 1 << 20
# Seeds the random bits of this module's rounding apart from those of other modules.
_PURPOSE = 6
# Saved names of functions that have moved to another module.
_MOVED_FUNCTIONS = {
  "hina_optax._leaves.torch_spatial_axes": "hina_optax.base.paths.torch_spatial_axes",
  "hina_optax._leaves.flax_spatial_axes": "hina_optax.base.paths.flax_spatial_axes",
}

ReadArray = Callable[[str], np.ndarray]


class _StackRow(NamedTuple):
  """The place of a parameter's state: the key of its stack, and its row in that stack.

  The row is `None` if the parameter was not stacked; the key is then its name.
  """

  key: str
  row: int | None


def upgrade_identity(saved: Mapping[str, Any]) -> dict[str, Any]:
  """Replaces the names of functions that have moved since."""
  return {k: _MOVED_FUNCTIONS.get(v, v) if isinstance(v, str) else v for k, v in saved.items()}


def upgrade_arrays(
  arrays: Mapping[str, Any], read: ReadArray, abstract: Any, params: Any,
  options: HinaOptions | None,
) -> dict[str, np.ndarray]:
  """Converts the arrays of version 1 to those of a present state, under its keys.

  Args:
    arrays: the saved arrays by key.
    read: returns the values of the array with a key.
    abstract: shapes and dtypes of the present state.
    params: shapes and dtypes of the parameters, in a mapping by name; absent ones are `None`.
    options: the options of `hina_adaptive`, or `None` for another transformation.
  """
  # The order in which JAX flattens the mapping: a plain dict is sorted by name.
  names = [place.path for place in paths.flatten(params)[0]]
  params = {name: params[name] for name in names}
  stack_rows = _stack_rows(params, options)
  upgraded: dict[str, Any] = {}

  def read_leaf(field: str, name: str, shape: tuple[int, ...] | None) -> Any:
    """Reads the number or array that belongs to a parameter from a field of the state."""
    stack_row = stack_rows[name]
    leaf_key, stack_key = f"{field}[{name!r}]", f"{field}[{stack_row.key!r}]"
    unstacked = leaf_key in arrays or f"{leaf_key}.codes" in arrays
    key = leaf_key if unstacked else stack_key
    if f"{key}.codes" in arrays:
      stored = QuantizedLeaf(jnp.asarray(read(f"{key}.codes")), jnp.asarray(read(f"{key}.scales")))
      value = np.asarray(memory.dequantize_state(stored))
    elif key in arrays:
      value = read(key)
    else:
      raise KeyError(key)
    value = value if unstacked or stack_row.row is None else value[stack_row.row]
    return value if shape is None else value.reshape(shape)

  nodes = jax.tree_util.tree_flatten_with_path(
    abstract, is_leaf=lambda x: isinstance(x, (Grouped, LeafNumbers)))[0]
  for path, node in nodes:
    field = jax.tree_util.keystr(path)
    if isinstance(node, LeafNumbers) and field in arrays:
      indices = [names.index(name) for name in node.names.names]
      upgraded[f"{field}['numbers']"] = read(field)[np.array(indices)]
    elif isinstance(node, Grouped):
      for number, (group, x) in enumerate(zip(node.layout.groups, node.arrays)):
        codes = x.codes if isinstance(x, QuantizedLeaf) else x
        leaves = [read_leaf(field, p, tuple(codes.shape[1:]) if group.stacked else None)
                  for p in group.paths]
        value = np.stack(leaves) if group.stacked else leaves[0]
        key = f"{field}[{group.name!r}]"
        if isinstance(x, QuantizedLeaf):
          at = rounding.make_key(rounding.seed_word(0), jnp.zeros([], jnp.int32), _PURPOSE)
          packed = memory.quantize_leaf(jnp.asarray(value), tuple(x.scales.shape), at.fold(number))
          upgraded |= {f"{key}.codes": np.asarray(packed.codes), f"{key}.scales": np.asarray(
            packed.scales)}
        else:
          upgraded[key] = value
    elif field in arrays:
      upgraded[field] = read(field)
  return upgraded


# The functions below repeat how version 1 stacked leaves and named the stacks. They must stay as
# they are, whatever `grouped.layout` does now.


def _stack_rows(params: Any, options: HinaOptions | None) -> dict[str, _StackRow]:
  """Returns where version 1 stored the state of each parameter."""
  kinds = _leaf_kinds(params, options)
  max_elements = _MAX_LEAF_ELEMENTS
  if options is not None and options.max_batched_elements is not None:
    max_elements = int(options.max_batched_elements)
  equal_leaves: dict[Any, list[str]] = {}
  for name, x in params.items():
    if x is not None:
      can_stack = 0 < x.size <= max_elements
      kind = (x.shape, x.dtype.name, kinds[name]) if can_stack else name
      equal_leaves.setdefault(kind, []).append(name)
  stack_rows: dict[str, _StackRow] = {}
  used_keys = set[str]()
  for leaves in equal_leaves.values():
    for stack in _divide_stack(leaves, params[leaves[0]].size):
      shape = "x".join(map(str, params[stack[0]].shape))
      key = stack[0] if len(stack) == 1 else _make_unique(
        f"{_common_path(stack)}[{shape}]", used_keys)
      used_keys.add(key)
      stack_rows |= {
        name: _StackRow(key, i if len(stack) > 1 else None) for i, name in enumerate(stack)}
  return stack_rows


def _leaf_kinds(params: Any, o: HinaOptions | None) -> dict[str, Any]:
  """Returns what leaves of one shape had to share to be stacked: spatial axes and decay mask."""
  if o is None:
    return dict.fromkeys(params)
  mask = o.weight_decay_mask
  decayed = mask(params) if callable(mask) else mask
  return {
    name: None if x is None else (
      paths.resolve_axes(o.spatial_axes, name, x),
      True if decayed is None else bool(decayed[name]))
    for name, x in params.items()}


def _divide_stack(leaves: Sequence[str], size: int) -> list[Sequence[str]]:
  """Divides the leaves of a stack, in equal parts if possible; `size` is that of one leaf."""
  count = len(leaves)
  parts = max(1, min(-(-count * size // _MAX_STACK_ELEMENTS), count // _MIN_STACK_LEAVES))
  divisors = [n for n in range(parts, parts + parts // 2 + 1) if count % n == 0]
  parts = divisors[0] if divisors else parts
  return [leaves[i * count // parts:(i + 1) * count // parts] for i in range(parts)]


def _common_path(names: Sequence[str]) -> str:
  """Returns what the paths have in common at both ends, with `*` for the rest."""
  split = [name.split("/") for name in names]
  shortest = min(map(len, split))
  is_common = [len({path[i] for path in split}) == 1 for i in range(shortest)]
  head = is_common.index(False) if False in is_common else shortest
  tail = 0
  while tail < shortest - head and len({path[-1 - tail] for path in split}) == 1:
    tail += 1
  return "/".join([*split[0][:head], "*", *split[0][len(split[0]) - tail:]])


def _make_unique(name: str, used: set[str]) -> str:
  number, unique = 2, name
  while unique in used:
    unique, number = f"{name}#{number}", number + 1
  return unique
