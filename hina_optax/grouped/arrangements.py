"""Arrangements: how the leaves of a group are laid out in arrays while they are updated."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hina_optax.base import numerics, paths
from hina_optax.base.leaf import get_array
from hina_optax.grouped import layout as layouts
from hina_optax.grouped import xla_cpu


@dataclasses.dataclass(frozen=True)
class GroupSignature:
  """What determines the program of a group's update, beside dtypes and the shapes of its state.

  Attributes:
    count: number of its leaves.
    shape: shape of each leaf.
    kind: kind of its leaves in the layout.
    absent: for each leaf whether it has no update.
    encodings: how its state is encoded.
  """

  count: int
  shape: tuple[int, ...]
  kind: Any
  absent: tuple[bool, ...]
  encodings: Any

  @property
  def stacked(self) -> bool:
    """Whether its leaves are stacked into one array."""
    return self.count > 1


class Arrangement:
  """How the leaves of a group are arranged in arrays: each in its own shape."""

  # Axis of the stacked parameters under `vmap`.
  params_axis: int | None = 0

  def __init__(self, signature: GroupSignature, traced: bool = True):
    self.signature, self.traced = signature, traced

  def stack_leaves(self, leaves: Sequence[Any]) -> Any:
    """Returns the leaves of a group as one array, or its only leaf."""
    if not self.signature.stacked:
      return leaves[0]
    return layouts.stack(leaves, self.signature.shape)

  def stack_params(self, leaves: Sequence[Any]) -> Any:
    """Returns the parameters of a group as one array, or its only parameter."""
    return self.stack_leaves(leaves)

  def materialize(self, g: Any, p: Any) -> Any:
    """Keeps XLA from computing the stacks again for each of their consumers."""
    return jax.lax.optimization_barrier((g, p)) if self.signature.stacked else (g, p)

  def enter_state(self, x: Any) -> Any:
    """Rearranges a part of the state for the update under `vmap`."""
    return x

  def leave_state(self, x: Any, like: Any) -> Any:
    """Returns `x` in the shapes of `like`: the inverse of `enter_state`."""
    del like
    return x

  def wrap_leaf(self, x: Any) -> Any:
    """Wraps one leaf for the inner."""
    return x

  def wrap_param(self, x: Any) -> Any:
    """Wraps one parameter for the inner."""
    return self.wrap_leaf(x)

  def unwrap_leaf(self, x: Any) -> Any:
    """Returns the array of a leaf: the inverse of `wrap_leaf`."""
    return x

  def split_updates(self, u: Any) -> list[Any]:
    """Returns the updates of a group's leaves as separate arrays."""
    if not self.signature.stacked:
      return [u]
    return xla_cpu.unstack_per_platform(u, layouts.unstack) if self.traced else layouts.unstack(u)


class CpuArrangement(Arrangement):
  """The arrangement in programs for CPUs: the leaves of a stack are flat."""

  # Parameters are not stacked before `vmap`; see `stack_params`.
  params_axis = None

  @property
  def is_flat(self) -> bool:
    """Whether each leaf is flattened."""
    return self.signature.stacked and len(self.signature.shape) > 1

  def stack_leaves(self, leaves: Sequence[Any]) -> Any:
    """Returns the leaves of a group as one array of flat leaves, or its only leaf."""
    if not self.signature.stacked:
      return leaves[0]
    dtypes = {jnp.dtype(x.dtype) for x in leaves if not paths.is_absent(x)}
    dtype = dtypes.pop() if len(dtypes) == 1 else numerics.compute_dtype(*dtypes)
    shape = self.signature.shape
    leaves = [jnp.zeros(shape, dtype) if paths.is_absent(x) else x for x in leaves]
    return xla_cpu.stack_flat(leaves, dtype)

  def stack_params(self, leaves: Sequence[Any]) -> Any:
    """Returns the parameters themselves; a `DeferredStack` stacks them when they are first read."""
    return list(leaves)

  def materialize(self, g: Any, p: Any) -> Any:
    """Returns both unchanged, since `stack_flat` has a barrier of its own."""
    return g, p

  def enter_state(self, x: Any) -> Any:
    """Flattens each leaf of a part of the state."""
    count, shape = self.signature.count, self.signature.shape
    if not self.signature.stacked:
      return x
    return jax.tree.map(
      lambda y: y.reshape(count, -1) if y.shape[1:] == shape and self.is_flat else y, x)

  def leave_state(self, x: Any, like: Any) -> Any:
    """Returns `x` in the shapes of `like`: the inverse of `enter_state`."""
    return jax.tree.map(lambda y, old: y.reshape(old.shape), x, like)

  def wrap_leaf(self, x: Any) -> Any:
    """Wraps one leaf with its own shape, which a flat array does not show."""
    return xla_cpu.make_reshaped_leaf(x, self.signature.shape, self.is_flat)

  def wrap_param(self, x: Any) -> Any:
    """Wraps a parameter; those of a stack are stacked when they are first read."""
    if not self.signature.stacked:
      return self.wrap_leaf(x[0])
    return xla_cpu.DeferredStack(x, self.signature.shape, self.is_flat)

  def unwrap_leaf(self, x: Any) -> Any:
    """Returns the array of a leaf: the inverse of `wrap_leaf`."""
    return get_array(x)

  def split_updates(self, u: Any) -> list[Any]:
    """Returns the updates of a group's leaves as separate arrays."""
    if not self.signature.stacked:
      return [u]
    return [x.reshape(self.signature.shape) for x in xla_cpu.unstack(u)]
