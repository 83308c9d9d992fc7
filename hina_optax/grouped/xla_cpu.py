"""Workarounds for XLA's CPU backend. This is the only file that names a platform.

Figures were measured with jaxlib 0.10.2 on two cores; `benchmarks/HISTORY.md` has the tables they
come from. Every workaround returns the numbers of the plain program. It is selected when a program
is lowered for a platform, so programs for other platforms do not contain it.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.xla_metadata import set_xla_metadata

from hina_optax.base import numerics
from hina_optax.base.leaf import Leaf, Neighbours, ReshapedLeaf
from hina_optax.grouped import layout

Array = jax.Array

# A step with fewer elements in all is too short to gain anything from these workarounds.
MIN_ELEMENTS = 1 << 21
# A stack of at most this many rows is split by plain slices.
_MAX_PLAIN_ROWS = 8
# Operands of one concatenation; see `layout`.
_MAX_OPERANDS = 512
# Eigenvalue problems per iteration of a loop. XLA solves fewer of them one by one, and this many
# side by side.
_MATRICES_PER_ITERATION = 10


def is_worthwhile(element_count: int) -> bool:
  """Whether to compile a program for CPUs beside the plain one."""
  return jax.default_backend() == "cpu" and element_count >= MIN_ELEMENTS


def run_per_platform(on_cpu: Callable[..., Any], default: Callable[..., Any], *args: Any) -> Any:
  """Runs `on_cpu(*args)` in a program for CPUs, `default(*args)` in one for other platforms."""
  return lax.platform_dependent(*args, cpu=on_cpu, default=default)


def barrier(values: Any) -> Any:
  """Applies `lax.optimization_barrier`, but not on CPUs.

  On CPUs it would order nothing, and copy each array.
  """
  leaves: list[Any]
  structure: Any
  leaves, structure = jax.tree.flatten(values)
  if jax.default_backend() != "cpu" or not any(isinstance(x, jax.core.Tracer) for x in leaves):
    return lax.optimization_barrier(values)
  tied = run_per_platform(
    lambda *xs: list(xs), lambda *xs: list(lax.optimization_barrier(xs)), *leaves)
  return structure.unflatten(tied)


def jit_without_inlining(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
  """Jits `function` with `options`, as a call that XLA does not inline.

  XLA's CPU thunk executor orders the kernels of one function in a time that grows with the square
  of their number. It fuses nothing across a call, and generates code once for calls of equal
  shapes. With calls, 420 LoRA factors compile in 8 s instead of 20 s, and a U-Net of 1,680 arrays
  in 109 s instead of more than 9 minutes.
  """
  @functools.wraps(function)
  def run_inlineable(*args: Any, **kwargs: Any) -> Any:
    # Functions that are jitted inside, as much of jax.numpy is, should still be inlined.
    with set_xla_metadata(inlineable=None):
      return function(*args, **kwargs)

  jitted = jax.jit(run_inlineable, **options)

  @functools.wraps(function)
  def call(*args: Any, **kwargs: Any) -> Any:
    with set_xla_metadata(inlineable="false"):
      return jitted(*args, **kwargs)

  return call


@jit_without_inlining
def _call_identity(x: Array) -> Array:
  # Without the barrier XLA would drop a call that returns its argument.
  return lax.optimization_barrier(x)


# A call, because XLA would otherwise compute `number` again for each element of an array.
@jit_without_inlining
def _make_opaque_false(number: Array) -> Array:
  """Returns False in a way that the compiler cannot work out."""
  return lax.population_count(number.astype(jnp.int32)) > 32


def delay_until(token: Array, x: Array) -> Array:
  """Returns `x`, but XLA takes it to depend on `token`, and so computes its consumers later.

  A barrier does not help, since XLA removes barriers before it fuses for CPUs. When groups are
  updated one after the other, the memory of one group stays in the caches: a step of 420 factors
  takes 127 ms instead of 165 ms, and temporaries take 82 MB instead of 180 MB.
  """
  return jnp.where(_make_opaque_false(token), jnp.zeros_like(x), x)


def make_token(arrays: Sequence[Array]) -> Array:
  """Returns a number that depends on all `arrays`, for `delay_until`."""
  numbers = [y[(0,) * y.ndim].astype(jnp.float32) for y in jax.tree.leaves(arrays) if y.size]
  return sum(numbers, jnp.zeros([], jnp.float32))


class CpuLeaf(Leaf):
  """A leaf in its own shape, in a program for CPUs."""

  def compute_once(self, x: Array) -> Array:
    """Passes `x` through a call, which copies nothing: edges of 17 M parameters 92 ms to 57 ms."""
    return _call_identity(x)

  def recompute_unless(
    self, is_valid: Array, x: Array, compute: Callable[..., Array], *operands: Array
  ) -> Array:
    """Recomputes in a branch; a stack takes the branch if one of its leaves needs it."""
    return jnp.where(is_valid, x, _make_branch(compute)(is_valid, x, *operands))


def _make_branch(compute: Callable[..., Array]) -> Callable[..., Array]:
  # Under `vmap` a `lax.cond` with a batched predicate becomes a select, which computes both sides.
  # With this rule a stack still has one branch.
  @custom_vmap
  def run(is_valid: Array, x: Array, *operands: Array) -> Array:
    return lax.cond(
      jnp.all(is_valid), lambda x, *_: x, lambda _, *xs: compute(*xs), x, *operands)

  @run.def_vmap
  def run_stack(size: int, batched: Any, *args: Array) -> Any:
    def add_axis(x: Array, is_batched: bool) -> Array:
      return x if is_batched else jnp.broadcast_to(x, (size, *x.shape))

    is_valid, x, *operands = (add_axis(*pair) for pair in zip(args, batched))
    result = lax.cond(jnp.all(is_valid), lambda x, *_: x,
                      lambda _, *xs: jax.vmap(compute)(*xs), x, *operands)
    return result, True

  return run


class FlatCpuLeaf(CpuLeaf):
  """A leaf that is flattened, in a program for CPUs.

  The innermost loop then runs over all elements instead of the sixteen of a LoRA factor's last
  axis: one pass over 7.4 M elements takes 1.2 ms instead of 3.7 ms.
  """

  def unravel(self, x: Array) -> Array:
    """Returns `x` in the shape of the leaf."""
    return x.reshape(self.shape)

  def ravel(self, x: Array) -> Array:
    """Inverse of `unravel`."""
    return x.reshape(-1)

  def neighbours(self, x: Array, axes: tuple[int, ...]) -> Iterator[Neighbours]:
    """Slices one array that is padded with zeros, so that the innermost loop has no branch."""
    if not x.size:
      yield from (Neighbours(x, x, x == 0, x == 0) for _ in axes)
      return
    strides = [math.prod(self.shape[axis + 1:]) for axis in axes]
    margin, count = max(strides, default=0), x.size
    # Without the first barrier, XLA would fuse arithmetic into the padding, with a branch for each
    # element. Without the second, it would pad again for each neighbour. A concatenation is used
    # because a pad takes twice as long.
    x = lax.optimization_barrier(x)
    zeros = jnp.zeros((margin,), x.dtype)
    padded = lax.optimization_barrier(lax.concatenate([zeros, x, zeros], 0))
    positions = lax.iota(jnp.uint32, count)
    for axis, stride in zip(axes, strides):
      size = self.shape[axis]
      if size * stride == count:
        is_first = positions < np.uint32(stride)
        is_last = positions >= np.uint32(count - stride)
      else:
        index = lax.rem(lax.div(positions, jnp.full_like(positions, stride)),
                        jnp.full_like(positions, size))
        is_first, is_last = index == 0, index == np.uint32(size - 1)
      lower, upper = (lax.slice(padded, [margin + shift], [margin + shift + count])
                      for shift in (-stride, stride))
      yield Neighbours(lower, upper, is_first, is_last)


def make_reshaped_leaf(array: Any, shape: tuple[int, ...], flat: bool) -> ReshapedLeaf:
  """Returns a leaf for a program on CPUs."""
  return ReshapedLeaf(array, shape, FlatCpuLeaf if flat else CpuLeaf)


def stack_flat(leaves: Sequence[Array], dtype: Any) -> Array:
  """Stacks leaves of one shape into one array, each leaf flattened."""
  # By lax, since the methods of arrays take three times as long to trace.
  parts = [lax.reshape(x, (math.prod(x.shape),)).astype(dtype) for x in leaves]
  # The barrier keeps XLA from computing the concatenation again for each of its consumers.
  while len(parts) > 1:
    parts = [lax.optimization_barrier(lax.concatenate(parts[i:i + _MAX_OPERANDS], 0))
             for i in range(0, len(parts), _MAX_OPERANDS)]
  return parts[0].reshape(len(leaves), -1)


@jax.tree_util.register_pytree_node_class
class DeferredStack(ReshapedLeaf):
  """The parameters of a group, stacked when a formula first reads them beside an update.

  If they were stacked at the beginning, the stack would take memory while stencils need theirs. For
  a temporary of more than 32 MB glibc maps fresh pages at every step: 420 factors with everything
  on took 6.2 times as long as `optax.adamw` with 48 MB, and 4.6 times if malloc was told to keep
  its pages.
  """

  def __init__(self, params: Sequence[Array], shape: tuple[int, ...], flat: bool):
    super().__init__(None, shape, FlatCpuLeaf if flat else CpuLeaf)
    self.params, self.flat = list(params), flat

  def tree_flatten(self) -> tuple[Any, Any]:
    """The parameters are the children."""
    return tuple(self.params), (self.shape, self.flat)

  @classmethod
  def tree_unflatten(cls, static: Any, children: Any) -> "DeferredStack":
    """Inverse of `tree_flatten`."""
    return cls(children, *static)

  def read(self, beside: Any) -> Any:
    """Returns one row of the stack, which is built after `beside` is computed."""
    return _read_row(beside, *self.params)


@custom_vmap
def _read_row(beside: Array, *params: Array) -> Array:
  return params[0].reshape(beside.shape).astype(_find_joint_dtype(params))


@_read_row.def_vmap
def _read_stack(size: int, batched: Any, beside: Array, *params: Array) -> Any:
  del batched
  assert size == len(params)
  first = delay_until(make_token([beside]), params[0])
  stack = stack_flat([first, *params[1:]], _find_joint_dtype(params))
  return stack.reshape(beside.shape), True


def _find_joint_dtype(arrays: Sequence[Array]) -> Any:
  dtypes = {x.dtype for x in arrays}
  return dtypes.pop() if len(dtypes) == 1 else numerics.compute_dtype(*dtypes)


def unstack(array: Array) -> list[Array]:
  """Splits a stack into its rows, by functions that XLA does not inline.

  XLA generates code for each slice, but only once for the slices of equal functions. The number of
  calls is about the number of slices per function, so that there is little code of either. 1,000
  rows of 640 x 16 compile in 3.4 s instead of 20 s.
  """
  count = array.shape[0]
  if count <= _MAX_PLAIN_ROWS:
    return [lax.index_in_dim(array, i, keepdims=False) for i in range(count)]
  # This zero is unknown to the compiler. With a constant first row, XLA would turn each call into a
  # function of its own.
  zero = jnp.minimum(lax.population_count(array[(0,) * array.ndim].astype(jnp.int32)), 0)
  rows_per_call = max(_MAX_PLAIN_ROWS, math.isqrt(count))
  return [row for begin in range(0, count, rows_per_call)
          for row in _slice_rows(array, zero + begin, min(rows_per_call, count - begin))]


@functools.partial(jit_without_inlining, static_argnames="count")
def _slice_rows(array: Array, begin: Array, count: int) -> list[Array]:
  # The stack is not flattened further: computations fused into the slice would look up the row of
  # each element.
  rows = (lax.dynamic_slice_in_dim(array, begin + i, 1, allow_negative_indices=False)
          for i in range(count))
  return [lax.squeeze(row, (0,)) for row in rows]


def map_matrices(function: Callable[[Array], Any], matrices: Array, *, side_by_side: bool) -> Any:
  """Applies a function of LAPACK to a batch of matrices; on CPUs in a loop.

  In jaxlib 0.10 a batched LAPACK call keeps one of XLA's threads waiting until the others have
  computed it. As many batches at once as there are threads, for example LoRA factors of several
  ranks, wait forever (seen with jaxlib 0.10.2; tests/test_spectra.py hangs without this).
  """
  def on_cpu(matrices: Array) -> Any:
    return lax.scan(lambda _, x: (None, function(x)), None, matrices,
                    unroll=_MATRICES_PER_ITERATION if side_by_side else 1)[1]

  return run_per_platform(on_cpu, function, matrices)


def unstack_per_platform(array: Array, default: Callable[[Array], list[Array]]) -> list[Array]:
  """Splits a stack by `unstack` in a program for CPUs, by `default` in one for other platforms."""
  if array.shape[0] <= _MAX_PLAIN_ROWS or jax.default_backend() != "cpu":
    return default(array)
  return run_per_platform(unstack, default, array)


def map_rows(
  function: Callable[..., Any], columns: Sequence[Sequence[Array]],
  run_stacked: Callable[..., Any],
) -> Any:
  """Applies `function` to each leaf of a group, and stacks the results.

  On CPUs each leaf is one call, and nothing is copied into a stack: the share of the rank penalty
  in a step of 420 factors fell from 37 ms to 23 ms, and measuring importance takes the memory of
  one leaf instead of 8 stacks. Other platforms run `run_stacked(*columns)`.
  """
  call = jit_without_inlining(function)

  def on_cpu(*columns: Any) -> Any:
    return jax.tree.map(lambda *xs: layout.stack(xs, xs[0].shape), *map(call, *columns))

  if (not any(isinstance(x, jax.core.Tracer) for x in columns[0])
      or not is_worthwhile(MIN_ELEMENTS)):
    return run_stacked(*columns)
  return run_per_platform(on_cpu, run_stacked, *columns)
