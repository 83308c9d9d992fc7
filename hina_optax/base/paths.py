"""The leaves of a parameter tree: their paths and their spatial axes."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hina_optax.base import numerics
from hina_optax.base.leaf import ReshapedLeaf

SpatialAxes = Callable[[str, Any], Sequence[int]]


class Place(NamedTuple):
  """The place of a leaf in a tree.

  Attributes:
    path: the path, such as `"block/dense/kernel"`.
    index: the index in the flattened tree.
  """

  path: str
  index: int  # type: ignore[assignment]  # a tuple has a method of this name


def is_absent(x: Any) -> bool:
  """Whether a tree has no leaf here: true for `None` and `optax.MaskedNode`."""
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


def flatten(tree: Any) -> tuple[list[Place], list[Any], Any]:
  """The places, the leaves (absent ones included) and the structure of `tree`."""
  pairs, structure = jax.tree_util.tree_flatten_with_path(
    tree, is_leaf=lambda x: is_absent(x) or isinstance(x, ReshapedLeaf))
  places = [Place(path_string(path), i) for i, (path, _) in enumerate(pairs)]
  return places, [leaf for _, leaf in pairs], structure


def per_element_state(params: Any, value: float = 0.0, dtype: Any = None) -> Any:
  """State with one number per element: arrays like `params`, in fp32, or fp64 for fp64."""
  check_floating(params, "params")
  # Built from the parameter, so that the state inherits its sharding.
  return jax.tree.map(
    lambda p: jnp.full_like(p, value, dtype=dtype or numerics.compute_dtype(jnp.asarray(p).dtype)),
    params
  )


def check_floating(tree: Any, what: str) -> None:
  """Refuses leaves that are not real floating: integers, booleans, complex numbers."""
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    dtype = getattr(leaf, "dtype", None) or np.asarray(leaf).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
      raise TypeError(
        f"{what}: leaf '{path_string(path)}' has dtype {np.dtype(dtype).name}; only real floating "
        "leaves can be trained. Leave it out with optax.masked or optax.partition."
      )


def require_params(params: Any, name: str) -> None:
  """Refuses `params=None`, for a transformation that reads the parameters."""
  if params is None:
    raise ValueError(
      f"{name} reads the parameters: call update(updates, state, params), not "
      "update(updates, state)."
    )


def flax_spatial_axes(path: str, leaf: Any) -> tuple[int, ...]:
  """Spatial axes in Flax's order: the default wherever `spatial_axes` is `None`.

  The spatial axes are both axes of a matrix and the leading axes of a convolution kernel
  `(*window, in, out)`; a vector or scalar has none. The rows and columns of a dense weight have no
  true neighbours: a stencil compares units that merely stand side by side, as the PyTorch original
  does. Latents and the window of a kernel have real neighbours. A three-dimensional leaf is taken
  for the kernel of a one-dimensional convolution.

  >>> import jax.numpy as jnp
  >>> flax_spatial_axes("conv/kernel", jnp.zeros((3, 3, 4, 8)))
  (0, 1)
  """
  del path
  return (0, 1) if leaf.ndim == 2 else tuple(range(leaf.ndim - 2))


def torch_spatial_axes(path: str, leaf: Any) -> tuple[int, ...]:
  """Spatial axes in PyTorch's order: both of a matrix, the window's of `(out, in, *window)`.

  >>> import jax.numpy as jnp
  >>> torch_spatial_axes("conv.weight", jnp.zeros((8, 4, 3, 3)))
  (2, 3)
  """
  del path
  return (0, 1) if leaf.ndim == 2 else tuple(range(2, leaf.ndim))


def resolve_axes(rule: SpatialAxes | None, path: str, leaf: Any) -> tuple[int, ...]:
  """The axes that `rule` gives for a leaf, checked and counted from the front."""
  if isinstance(leaf, ReshapedLeaf):
    leaf = jax.ShapeDtypeStruct(leaf.shape, leaf.array.dtype)
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
