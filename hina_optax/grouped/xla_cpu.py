"""What is there for XLA's CPU backend alone: the only file that names a platform.

Figures are of jaxlib 0.10.2 on two cores; `benchmarks/README.md` has the tables they come from.
Every trick gives the numbers of the plain program. Other platforms never see it: what is chosen
here is chosen when a program is lowered for a platform.
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
from hina_optax.base.leaf import Carried, Leaf, Neighbours
from hina_optax.grouped import layout

Array = jax.Array

# Below as many elements in all a step is too short to gain by anything here.
LEAST = 1 << 21
# Up to as many rows are taken out of a stack without a function for it.
_FEW_ROWS = 8
# Eigenvalue problems in the body of a loop. XLA takes fewer one by one, more side by side.
_AT_ONCE = 10


def is_worthwhile(elements: int) -> bool:
  """Whether a program for CPUs is made beside the plain one."""
  return jax.default_backend() == "cpu" and elements >= LEAST


def either(on_cpu: Callable[..., Any], elsewhere: Callable[..., Any], *args: Any) -> Any:
  """`on_cpu(*args)` in a program for CPUs, `elsewhere(*args)` in one for other platforms."""
  return lax.platform_dependent(*args, cpu=on_cpu, default=elsewhere)


def barrier(values: Any) -> Any:
  """`lax.optimization_barrier`; on CPUs it would order nothing and copy each array."""
  leaves: list[Any]
  structure: Any
  leaves, structure = jax.tree.flatten(values)
  if jax.default_backend() != "cpu" or not any(isinstance(x, jax.core.Tracer) for x in leaves):
    return lax.optimization_barrier(values)
  tied = either(lambda *xs: list(xs), lambda *xs: list(lax.optimization_barrier(xs)), *leaves)
  return structure.unflatten(tied)


def as_call(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
  """`function`, jitted with `options`, as a call that XLA leaves one.

  XLA's CPU thunk executor orders the kernels of one function in a time that grows with the square
  of their number, fuses nothing across a call, and generates code once for calls of equal shapes.
  Bought: 420 LoRA factors compile in 8 s instead of 20, a U-Net of 1,680 arrays in 109 s instead of
  more than 9 minutes.
  """
  @functools.wraps(function)
  def inside(*args: Any, **kwargs: Any) -> Any:
    # What is jitted in there, as much of jax.numpy is, should be inlined.
    with set_xla_metadata(inlineable=None):
      return function(*args, **kwargs)

  jitted = jax.jit(inside, **options)

  @functools.wraps(function)
  def call(*args: Any, **kwargs: Any) -> Any:
    with set_xla_metadata(inlineable="false"):
      return jitted(*args, **kwargs)

  return call


@as_call
def _handed_on(x: Array) -> Array:
  # XLA drops a call that gives back its argument.
  return lax.optimization_barrier(x)


# Inlined, what `number` depends on would be computed again for each element of an array.
@as_call
def _never(number: Array) -> Array:
  """False, which the compiler cannot work out."""
  return lax.population_count(number.astype(jnp.int32)) > 32


def after(number: Array, x: Array) -> Array:
  """`x`, which XLA takes to depend on a number that is made earlier, and so computes later.

  A barrier is gone before XLA fuses for CPUs. Group after group a step has the memory of one group
  in the caches: 420 factors 165 ms to 127 ms, temporaries 180 MB to 82 MB.
  """
  return jnp.where(_never(number), jnp.zeros_like(x), x)


def number_of(arrays: Sequence[Array]) -> Array:
  """A number that is there when all of `arrays` are."""
  numbers = [y[(0,) * y.ndim].astype(jnp.float32) for y in jax.tree.leaves(arrays) if y.size]
  return sum(numbers, jnp.zeros([], jnp.float32))


class CalledLeaf(Leaf):
  """A leaf in its own shape, in a program for CPUs."""

  def reused(self, x: Array) -> Array:
    """By a call, which costs no copy: edges of 17 M parameters 92 ms to 57 ms."""
    return _handed_on(x)

  def seldom(
    self, fits: Array, short: Array, long: Callable[..., Array], *operands: Array
  ) -> Array:
    """In a branch, which a stack takes if one of its leaves must."""
    return jnp.where(fits, short, _branch(long)(fits, short, *operands))


def _branch(long: Callable[..., Array]) -> Callable[..., Array]:
  @custom_vmap
  def run(fits: Array, short: Array, *operands: Array) -> Array:
    return lax.cond(jnp.all(fits), lambda short, *_: short, lambda _, *xs: long(*xs),
                    short, *operands)

  @run.def_vmap
  def rule(size: int, batched: Any, fits: Array, short: Array, *operands: Array) -> Any:
    def spread(x: Array, is_batched: bool) -> Array:
      return x if is_batched else jnp.broadcast_to(x, (size, *x.shape))

    every, default, *rows = (spread(*pair) for pair in zip((fits, short, *operands), batched))
    found = lax.cond(jnp.all(every), lambda default, *_: default,
                     lambda _, *xs: jax.vmap(long)(*xs), default, *rows)
    return found, True

  return run


class FlatLeaf(CalledLeaf):
  """A leaf that lies flat.

  The innermost loop then runs over all elements instead of the sixteen of a LoRA factor's last
  axis: one pass over 7.4 M elements 3.7 ms to 1.2 ms.
  """

  def unravel(self, x: Array) -> Array:
    """`x` in the shape of the leaf."""
    return x.reshape(self.shape)

  def ravel(self, x: Array) -> Array:
    """Inverse of `unravel`."""
    return x.reshape(-1)

  def neighbours(self, x: Array, axes: tuple[int, ...]) -> Iterator[Neighbours]:
    """Slices of one frame of zeros, so that no branch stands in the innermost loop."""
    if not x.size:
      yield from (Neighbours(x, x, x == 0, x == 0) for _ in axes)
      return
    strides = [math.prod(self.shape[axis + 1:]) for axis in axes]
    reach, count = max(strides, default=0), x.size
    # Without the first barrier arithmetic would be done on the way into the frame, with a branch
    # for each element; without the second the frame would be made again for each neighbour. A pad
    # takes twice as long as a concatenation.
    x = lax.optimization_barrier(x)
    zeros = jnp.zeros((reach,), x.dtype)
    frame = lax.optimization_barrier(lax.concatenate([zeros, x, zeros], 0))
    places = lax.iota(jnp.uint32, count)
    for axis, stride in zip(axes, strides):
      size = self.shape[axis]
      if size * stride == count:
        first, last = places < np.uint32(stride), places >= np.uint32(count - stride)
      else:
        along = lax.rem(lax.div(places, jnp.full_like(places, stride)),
                        jnp.full_like(places, size))
        first, last = along == 0, along == np.uint32(size - 1)
      lower, upper = (lax.slice(frame, [reach + shift], [reach + shift + count])
                      for shift in (-stride, stride))
      yield Neighbours(lower, upper, first, last)


def carried(array: Any, shape: tuple[int, ...], flat: bool) -> Carried:
  """A leaf for a program on CPUs."""
  return Carried(array, shape, FlatLeaf if flat else CalledLeaf)


def stack_flat(rows: Sequence[Array], dtype: Any) -> Array:
  """Leaves of one shape as the rows of one array, each flat."""
  # By lax, since the methods of arrays take three times as long to trace.
  parts = [lax.reshape(x, (math.prod(x.shape),)).astype(dtype) for x in rows]
  # The barrier keeps XLA from computing the concatenation again in each of its readers.
  while len(parts) > 1:
    parts = [lax.optimization_barrier(lax.concatenate(parts[i:i + 512], 0))
             for i in range(0, len(parts), 512)]
  return parts[0].reshape(len(rows), -1)


@jax.tree_util.register_pytree_node_class
class Late(Carried):
  """The parameters of a stack, stacked when a formula first reads them beside an update.

  Stacked at the beginning they would lie in memory while stencils need theirs. Of a temporary
  beyond 32 MB glibc takes fresh pages at every step: 420 factors with everything on took 6.2 times
  as long as `optax.adamw` with 48 MB, and 4.6 times where malloc was told to keep its pages.
  """

  def __init__(self, rows: Sequence[Array], shape: tuple[int, ...], flat: bool):
    super().__init__(None, shape, FlatLeaf if flat else CalledLeaf)
    self.rows, self.flat = list(rows), flat

  def tree_flatten(self) -> tuple[Any, Any]:
    """Its children are the parameters."""
    return tuple(self.rows), (self.shape, self.flat)

  @classmethod
  def tree_unflatten(cls, static: Any, children: Any) -> "Late":
    """Inverse of `tree_flatten`."""
    return cls(children, *static)

  def read(self, beside: Any) -> Any:
    """One row of the stack, which is made after `beside`."""
    return _late_row(beside, *self.rows)


@custom_vmap
def _late_row(beside: Array, *rows: Array) -> Array:
  return rows[0].reshape(beside.shape).astype(_joint_dtype(rows))


@_late_row.def_vmap
def _late_stack(size: int, batched: Any, beside: Array, *rows: Array) -> Any:
  del batched
  assert size == len(rows)
  first = after(number_of([beside]), rows[0])
  return stack_flat([first, *rows[1:]], _joint_dtype(rows)).reshape(beside.shape), True


def _joint_dtype(rows: Sequence[Array]) -> Any:
  dtypes = {x.dtype for x in rows}
  return dtypes.pop() if len(dtypes) == 1 else numerics.compute_dtype(*dtypes)


def unstack(array: Array) -> list[Array]:
  """The rows of a stack, taken out by functions that XLA does not inline.

  It generates code for each slice, but once for those of equal functions: as many of them as each
  has slices. 1,000 rows of 640 x 16 compile in 3.4 s instead of 20 s.
  """
  count = array.shape[0]
  if count <= _FEW_ROWS:
    return [lax.index_in_dim(array, i, keepdims=False) for i in range(count)]
  # Of a known beginning XLA would make each call a function of its own.
  zero = jnp.minimum(lax.population_count(array[(0,) * array.ndim].astype(jnp.int32)), 0)
  most = max(_FEW_ROWS, math.isqrt(count))
  return [row for begin in range(0, count, most)
          for row in _rows_from(array, zero + begin, min(most, count - begin))]


@functools.partial(as_call, static_argnames="count")
def _rows_from(array: Array, begin: Array, count: int) -> list[Array]:
  # Not of a flat array: what is computed on the way would look up the row of each element.
  rows = (lax.dynamic_slice_in_dim(array, begin + i, 1, allow_negative_indices=False)
          for i in range(count))
  return [lax.squeeze(row, (0,)) for row in rows]


def each_matrix(function: Callable[[Array], Any], matrices: Array, *, side_by_side: bool) -> Any:
  """A function of LAPACK for a batch: on CPUs in a loop, with some matrices in its body.

  Of a batch jaxlib 0.10 keeps one of XLA's threads waiting until the others have done it. As many
  batches at once as there are threads, of LoRA factors of several ranks for example, wait for ever
  (seen with jaxlib 0.10.2; tests/test_spectra.py hangs without this).
  """
  def in_a_loop(matrices: Array) -> Any:
    return lax.scan(lambda _, x: (None, function(x)), None, matrices,
                    unroll=_AT_ONCE if side_by_side else 1)[1]

  return either(in_a_loop, function, matrices)


def unstacked(array: Array, plain: Callable[[Array], list[Array]]) -> list[Array]:
  """The rows of a stack: by calls in a program for CPUs, by `plain` elsewhere."""
  if array.shape[0] <= _FEW_ROWS or jax.default_backend() != "cpu":
    return plain(array)
  return either(unstack, plain, array)


def each_row(
  function: Callable[..., Any], columns: Sequence[Sequence[Array]], shape: tuple[int, ...],
  stacked: Callable[..., Any],
) -> Any:
  """`function` of leaves of one shape, as the rows of one array; elsewhere `stacked`.

  Nothing is copied into a stack for it: the share of the rank penalty in a step of 420 factors fell
  from 37 ms to 23 ms, and a visit of importance takes the memory of one leaf instead of 8 stacks.
  """
  alone = as_call(function)

  def one_by_one(*columns: Any) -> Any:
    return jax.tree.map(lambda *xs: layout.stack(xs, xs[0].shape), *map(alone, *columns))

  if not any(isinstance(x, jax.core.Tracer) for x in columns[0]) or not is_worthwhile(LEAST):
    return stacked(*columns)
  return either(one_by_one, stacked, *columns)
