"""Any optax transformation on stacked leaves: it sees one row of one stack at a time."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.extend import core

from hina_optax import _leaves
from hina_optax._parts import SURVEYED, Part
from hina_optax._stacks import Group, Layout, Stacks


def aware(inner: optax.GradientTransformation) -> Part:
  """`inner`, which need not know of `Stacks`, as a transformation that takes them.

  A stacked tree is handed to it row by row, under `vmap`. Its state stays in its own structure:
  what it keeps like the parameters, and vectors with one entry a leaf, are one stack a group;
  what is the same for every leaf (counters) is kept once.
  """
  if isinstance(inner, Part):
    return inner
  inner = optax.with_extra_args_support(inner)
  checked: set[Layout] = set()

  def init(params: Any) -> Any:
    if not isinstance(params, Stacks):
      return inner.init(params)
    frames = [_frame(inner, group, array) for group, array in params.items()]
    states = []
    for frame, array in zip(frames, params.arrays):
      def alone(row, frame=frame):
        return frame.flatten(inner.init({frame.name: row}))

      array = frame.shaped(array)
      run = jax.vmap(alone, out_axes=frame.axes) if frame.many(array) else alone
      states.append(run(array))
    return _merged(frames, states, params.layout)

  def update(updates, state, params=None, **extra_args):
    extra_args.pop(SURVEYED, None)
    if not isinstance(updates, Stacks):
      return inner.update(updates, state, params, **extra_args)
    if updates.layout not in checked:
      _refuse_mixing(inner, updates, params, extra_args)
      checked.add(updates.layout)
    likes = updates.arrays if params is None else params.arrays
    frames = [_frame(inner, g, like) for g, like in zip(updates.layout.groups, likes)]
    results, states = [], []
    for i, frame in enumerate(frames):
      own = frame.own(state, i)
      param = None if params is None else likes[i]
      result, new = _at(inner, frame, updates.arrays[i], own, param, extra_args)
      results.append(result)
      states.append(new)
    return Stacks(updates.layout, results), _merged(frames, states, updates.layout)

  # A vector in a foreign state may have as many entries as there are leaves by chance.
  return Part(init, update, None)


class _Frame(NamedTuple):
  """How the inner's state for one leaf divides: positions that each leaf has, and shared ones.

  Attributes:
    name: of the group.
    stacked: whether the group has several leaves.
    shape: of each of them.
    structure: of the state, with each `{name: ...}` as one position.
    axes: of each position: 0 where each leaf has its own value, `None` where all share one.
    keyed: of each position: whether it is a `{name: ...}`.
  """

  name: str
  stacked: bool
  shape: tuple[int, ...]
  structure: Any
  axes: list[int | None]
  keyed: list[bool]

  def shaped(self, array: Any) -> Any:
    """The rows of an array in the shape of their leaves."""
    return array.reshape(-1, *self.shape) if self.many(array) else array

  def many(self, array: Any) -> bool:
    """Whether there are rows to go through."""
    return self.stacked and not _leaves.is_absent(array)

  def flatten(self, state: Any) -> list[Any]:
    """The positions of a state for this group alone."""
    return self.structure.flatten_up_to(state)

  def own(self, state: Any, index: int) -> list[Any]:
    """The positions of this group out of the state of all."""
    found = []
    for axis, keyed, x in zip(self.axes, self.keyed, self.structure.flatten_up_to(state)):
      x = x if axis is None else x.arrays[index]
      found.append({self.name: x} if keyed else x)
    return found


def _frame(inner: Any, group: Group, array: Any) -> _Frame:
  row = array
  if not _leaves.is_absent(array):
    row = jax.ShapeDtypeStruct(group.shape, array.dtype)
  one = jax.eval_shape(inner.init, {group.name: row})
  two = jax.eval_shape(inner.init, {group.name: row, f"{group.name}#": row})

  def keyed(x: Any) -> bool:
    return isinstance(x, dict) and group.name in x

  leaves, structure = _leaves.flat(one, keyed)
  others = structure.flatten_up_to(two)
  is_keyed = [keyed(x) for x in leaves]
  axes = [0 if k or x.shape != y.shape else None for x, y, k in zip(leaves, others, is_keyed)]
  return _Frame(group.name, group.stacked, group.shape, structure, axes, is_keyed)


def _at(inner, frame: _Frame, array, own, param, extra_args):
  if _leaves.is_absent(array):
    return array, own

  def alone(row, own, param):
    params = None if param is None else {frame.name: param}
    state = frame.structure.unflatten(own)
    result, new = inner.update({frame.name: row}, state, params, **extra_args)
    return result[frame.name], frame.flatten(new)

  run: Callable[..., Any] = alone
  if frame.stacked:
    reading = None if param is None else 0
    run = jax.vmap(alone, in_axes=(0, frame.axes, reading), out_axes=(0, frame.axes))
  result, new = run(frame.shaped(array), own, frame.shaped(param))
  return result.reshape(array.shape), new


def _merged(frames: Sequence[_Frame], states: Sequence[list[Any]], layout: Layout) -> Any:
  """The states of all groups as one, in the inner's structure."""
  positions = []
  for p, axis in enumerate(frames[0].axes):
    column = [
      state[p][frame.name] if frame.keyed[p] else state[p] for frame, state in zip(frames, states)
    ]
    positions.append(column[0] if axis is None else Stacks(layout, column))
  return frames[0].structure.unflatten(positions)


def _refuse_mixing(inner: Any, updates: Stacks, params: Any, extra_args: Any) -> None:
  """Raises where the inner's answer for one leaf depends on another leaf."""
  likes = updates.arrays if params is None else params.arrays
  rows = {
    path: jax.ShapeDtypeStruct(group.shape, like.dtype)
    for group, like in zip(updates.layout.groups, likes) if not _leaves.is_absent(like)
    for path in group.paths[:2]
  }
  state = jax.eval_shape(inner.init, rows)
  paths = list(rows)

  def run(updates, state, params):
    return inner.update(updates, state, params, **extra_args)

  closed, shapes = jax.make_jaxpr(run, return_shape=True)(
    rows, state, None if params is None else rows)
  before = [_owner(path, x, paths) for path, x in _with_paths((rows, state, rows))]
  masks = _origins(closed.jaxpr, [max(b, 0) for b in before[:len(closed.jaxpr.invars)]])
  for mask, (path, leaf) in zip(masks, _with_paths(shapes)):
    allowed = _owner(path, leaf, paths)
    if allowed >= 0 and mask & ~allowed:
      _raise_mixing(path, allowed, mask, paths)


def _with_paths(tree: Any) -> list[tuple[Any, Any]]:
  return jax.tree_util.tree_flatten_with_path(tree)[0]


def _owner(path: Any, leaf: Any, paths: list[str]) -> int:
  """The leaf a number belongs to, as a bit; 0 for what all share; -1 for one number a leaf."""
  for i, name in enumerate(paths):
    if jax.tree_util.DictKey(name) in path:
      return 1 << i
  return -1 if leaf.shape[:1] == (len(paths),) else 0


def _origins(jaxpr: Any, masks: list[int]) -> list[int]:
  """For each result of a program, the inputs that it was computed from, as bits."""
  known = dict(zip(jaxpr.invars, masks))

  def of(variable: Any) -> int:
    return 0 if isinstance(variable, core.Literal) else known.get(variable, 0)

  for equation in jaxpr.eqns:
    found = [of(v) for v in equation.invars]
    inside = equation.params.get("jaxpr") if equation.primitive.name in ("jit", "pjit") else None
    if inside is not None:
      results = _origins(inside.jaxpr, found)
    else:
      union = 0
      for mask in found:
        union |= mask
      results = [union] * len(equation.outvars)
    known.update(zip(equation.outvars, results))
  return [of(v) for v in jaxpr.outvars]


def _raise_mixing(path: Any, allowed: int, mask: int, paths: list[str]) -> None:
  names = [name for i, name in enumerate(paths) if mask >> i & 1]
  own = [name for i, name in enumerate(paths) if allowed >> i & 1]
  what = f"leaf '{own[0]}'" if own else f"'{_leaves.path_string(path[1:])}' of its state"
  raise ValueError(
    "with_leaf_batching can only batch a transformation that treats each leaf by itself, but what "
    f"this one computes for {what} depends on {', '.join(repr(n) for n in names[:4])}"
    f"{' and others' if len(names) > 4 else ''}. Put what looks across leaves (global norms, "
    "Prodigy, importance in a chain) outside of the wrapper, in a chain before or behind it."
  )
