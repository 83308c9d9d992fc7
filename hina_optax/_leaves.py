"""Leaves of a parameter tree: their paths, their spatial axes, one loop that visits them all."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hina_optax import _numerics

SpatialAxes = Callable[[str, Any], Sequence[int]]


class Leaf(NamedTuple):
  """Where a leaf stands: its path (`"block/dense/kernel"`) and its place in the flattened tree."""

  path: str
  index: int  # type: ignore[assignment]  # a tuple has a method of this name


def is_absent(x: Any) -> bool:
  """True for what stands in a tree in place of a leaf: `None` and `optax.MaskedNode`."""
  return x is None or isinstance(x, optax.MaskedNode)


def path_string(path: Sequence[Any]) -> str:
  """A key path as `"a/b/c"`, without the trailing `value` that `flax.nnx` states carry."""
  parts = [_key_name(key) for key in path]
  if len(parts) > 1 and parts[-1] == "value":
    parts = parts[:-1]
  return "/".join(parts)


def _key_name(key: Any) -> str:
  for field in ("key", "name", "idx"):
    if hasattr(key, field):
      return str(getattr(key, field))
  return str(key)


def flatten(tree: Any) -> tuple[list[Leaf], list[Any], Any]:
  """Places, leaves (absent ones among them) and structure of `tree`."""
  pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_absent)
  places = [Leaf(path_string(path), i) for i, (path, _) in enumerate(pairs)]
  return places, [leaf for _, leaf in pairs], structure


def flatten_like(structure: Any, tree: Any, count: int) -> list[Any]:
  """Leaves of `tree` in the order of `structure`; as many absent ones where there is no tree."""
  return [None] * count if tree is None else structure.flatten_up_to(tree)


def leaf_count(tree: Any) -> int:
  """Number of places in `tree`, absent leaves counted."""
  return len(jax.tree.leaves(tree, is_leaf=is_absent))


def per_leaf_scalars(params: Any, value: float = 0.0, dtype: Any = jnp.float32) -> jax.Array:
  """State for one scalar a leaf: a vector, so that 1,000 leaves are one array and not 1,000."""
  return jnp.full((leaf_count(params),), value, dtype)


def per_element_state(params: Any, value: float = 0.0) -> Any:
  """State for one number an element: arrays like `params` in fp32 (fp64 stays fp64)."""
  check_floating(params, "params")
  # Built from the leaf itself, so that it inherits its sharding.
  return jax.tree.map(
    lambda p: jnp.full_like(p, value, dtype=_numerics.compute_dtype(jnp.asarray(p).dtype)), params
  )


def check_floating(tree: Any, what: str) -> None:
  """Refuses leaves that have no gradient step: integers, booleans, complex numbers."""
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    dtype = getattr(leaf, "dtype", None) or np.asarray(leaf).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
      raise TypeError(
        f"{what}: leaf '{path_string(path)}' has dtype {np.dtype(dtype).name}; only real floating "
        "leaves can be trained. Leave it out with optax.masked or optax.partition."
      )


def require_params(params: Any, name: str) -> None:
  """Refuses `params=None` where a transformation reads the parameters."""
  if params is None:
    raise ValueError(
      f"{name} reads the parameters: call update(updates, state, params), not "
      "update(updates, state)."
    )


class Visited(NamedTuple):
  """What a visit of all leaves returned."""

  updates: Any
  trees: tuple[Any, ...]
  scalars: tuple[jax.Array, ...]


def visit(
  function: Callable[..., tuple[jax.Array, tuple, tuple]],
  updates: Any,
  *,
  read: Sequence[Any] = (),
  trees: Sequence[Any] = (),
  scalars: Sequence[jax.Array] = (),
) -> Visited:
  """Applies `function` to each leaf of `updates`, in at least fp32.

  `function(leaf, update, read, trees, scalars)` returns `(update, trees, scalars)`: the new update,
  and the new value of each per-element state in `trees` and of each per-leaf scalar in `scalars`.
  `read` are trees that are only read (parameters, another transformation's input); they are cast as
  the updates are.

  Absent leaves pass, with their state as it was. The function never sees an element of `updates` or
  `read` that is not finite: it sees 0 in its place, and such an update passes unchanged, so an
  overflow in one element stays in that element and out of the state.
  """
  check_floating(updates, "updates")
  places, leaves, structure = flatten(updates)
  columns = [structure.flatten_up_to(tree) for tree in (*read, *trees)]
  new_updates: list[Any] = []
  new_trees: list[list[Any]] = [[] for _ in trees]
  new_scalars: list[list[Any]] = [[] for _ in scalars]
  for leaf, update in zip(places, leaves):
    row = [column[leaf.index] for column in columns]
    olds, values = row[len(read):], [vector[leaf.index] for vector in scalars]
    if is_absent(update):
      result = update, olds, values
    else:
      result = _apply(function, leaf, jnp.asarray(update), row[: len(read)], olds, values)
    new_updates.append(result[0])
    for collected, item in zip((*new_trees, *new_scalars), (*result[1], *result[2])):
      collected.append(item)
  return Visited(
    structure.unflatten(new_updates),
    tuple(structure.unflatten(column) for column in new_trees),
    tuple(stack(column, old) for column, old in zip(new_scalars, scalars)),
  )


def _apply(function, leaf, update, read, trees, scalars):
  dtype = _numerics.compute_dtype(update.dtype)
  finite = jnp.isfinite(update)
  clean = jnp.where(finite, update, jnp.zeros_like(update)).astype(dtype)
  seen = [_finite(x).astype(dtype) for x in read]
  stored = [x.dtype for x in trees]
  new, new_trees, new_scalars = function(
    leaf, clean, tuple(seen), tuple(x.astype(dtype) if _is_float(x) else x for x in trees),
    tuple(scalars),
  )
  new = jnp.where(finite, new.astype(update.dtype), update)
  return new, tuple(x.astype(d) for x, d in zip(new_trees, stored)), new_scalars


def _finite(x: Any) -> jax.Array:
  x = jnp.asarray(x)
  return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))


def _is_float(x: jax.Array) -> bool:
  return jnp.issubdtype(x.dtype, jnp.floating)


def stack(values: Sequence[Any], like: jax.Array) -> jax.Array:
  """One vector from a scalar a leaf, of the dtype of `like`."""
  if not values:
    return like
  return jnp.stack([jnp.asarray(v).astype(like.dtype) for v in values])


def flax_spatial_axes(path: str, leaf: Any) -> tuple[int, ...]:
  """Spatial axes in Flax's order: the default wherever `spatial_axes` is `None`.

  Both axes of a matrix, the leading axes of a convolution kernel `(*window, in, out)`, none of a
  vector or scalar. Rows and columns of a dense weight have no true neighbours: on them a stencil
  compares units that merely stand side by side, as the PyTorch original does. On latents, and on
  the window of a kernel, neighbours are real. A three-dimensional leaf is taken for a kernel of a
  one-dimensional convolution.

  >>> import jax.numpy as jnp
  >>> flax_spatial_axes("conv/kernel", jnp.zeros((3, 3, 4, 8)))
  (0, 1)
  """
  del path
  return (0, 1) if leaf.ndim == 2 else tuple(range(leaf.ndim - 2))


def torch_spatial_axes(path: str, leaf: Any) -> tuple[int, ...]:
  """Spatial axes in PyTorch's order: both of a matrix, the trailing ones of `(out, in, *window)`.

  >>> import jax.numpy as jnp
  >>> torch_spatial_axes("conv.weight", jnp.zeros((8, 4, 3, 3)))
  (2, 3)
  """
  del path
  return (0, 1) if leaf.ndim == 2 else tuple(range(2, leaf.ndim))


def only_matrices(rule: SpatialAxes | None, side: int) -> SpatialAxes:
  """`rule` for matrices of which each side is at least `side`, nothing for other leaves."""

  def axes(path: str, leaf: Any) -> Sequence[int]:
    wide = leaf.ndim == 2 and min(leaf.shape) >= side
    return (rule or flax_spatial_axes)(path, leaf) if wide else ()

  return axes


def two_axes(rule: SpatialAxes | None) -> SpatialAxes:
  """`rule` where it gives two axes, the last two of any other leaf that has as many."""

  def axes(path: str, leaf: Any) -> Sequence[int]:
    given = tuple((rule or flax_spatial_axes)(path, leaf))
    return given if len(given) == 2 or leaf.ndim < 2 else (leaf.ndim - 2, leaf.ndim - 1)

  return axes


def has_axes(rule: SpatialAxes | None, params: Any) -> np.ndarray:
  """For each place of the tree, whether its leaf has spatial axes; checks the rule on the way."""
  places, leaves, _ = flatten(params)
  return np.array(
    [not is_absent(x) and bool(resolve_axes(rule, p.path, x)) for p, x in zip(places, leaves)], bool
  )


def resolve_axes(rule: SpatialAxes | None, path: str, leaf: Any) -> tuple[int, ...]:
  """The axes that `rule` gives for a leaf, counted from the front and checked."""
  axes = (rule or flax_spatial_axes)(path, leaf)
  try:
    resolved = tuple(operator.index(a) + leaf.ndim * (operator.index(a) < 0) for a in axes)
  except TypeError as error:
    raise TypeError(
      f"spatial_axes returned {axes!r} for leaf '{path}'; it must return a tuple of axis numbers."
    ) from error
  if len(set(resolved)) != len(resolved) or any(not 0 <= a < leaf.ndim for a in resolved):
    raise ValueError(
      f"spatial_axes returned {tuple(axes)} for leaf '{path}' of shape {tuple(leaf.shape)}; axes "
      f"must be distinct and lie in [-{leaf.ndim}, {leaf.ndim})."
    )
  return resolved
