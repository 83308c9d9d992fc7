"""One group's turn: gather, open, run, close, hand back."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hina_optax.base import numerics, paths
from hina_optax.base.leaf import array_of
from hina_optax.base.positions import LeafNumbers, names_of
from hina_optax.grouped import codecs, layout, xla_cpu
from hina_optax.grouped.codecs import Keys, Layer
from hina_optax.grouped.layout import Group


class Inputs(NamedTuple):
  """What a step knows of one group.

  Attributes:
    group: which.
    gradients: one per leaf, absent ones among them.
    params: one per leaf; `None` where the update is given none.
    rows: for each position of the state what it holds of the group, as it rests; a vector where it
      holds numbers of leaves; `None` where it is shared.
    forms: how these rest.
    values: what was looked up across leaves, one row per leaf.
    present: one boolean per leaf; `None` where all leaves have an update.
  """

  group: Group
  gradients: list[Any]
  params: list[Any] | None
  rows: list[Any]
  forms: list[Any]
  values: dict[str, Any]
  present: Any


class Made(NamedTuple):
  """What a step made of some groups.

  Attributes:
    groups: updates and state of each, as in `Inputs`.
    shared: what all leaves share of the state.
    done: a number that is there when all else is, in a program for CPUs.
  """

  groups: list[tuple[list[Any], list[Any]]]
  shared: list[Any]
  done: Any


@dataclasses.dataclass(frozen=True)
class _Kind:
  """What decides the program of a group's turn, beside the shapes of its arrays.

  Attributes:
    count: of its leaves.
    shape: of each.
    kind: of the layout.
    absent: which leaves have no update.
    forms: how the state rests.
  """

  count: int
  shape: tuple[int, ...]
  kind: Any
  absent: tuple[bool, ...]
  forms: Any

  @property
  def stacked(self) -> bool:
    """Whether its leaves are one array."""
    return self.count > 1


class Stepper:
  """The turns of all groups of one update."""

  def __init__(self, inner: Any, layers: Sequence[Layer], structure: Any, state: Any,
               kinds: Sequence[str], ours: bool, extra_args: dict[str, Any], add: bool,
               contains: bool, traced: bool):
    """`structure` is the parameters', `state` that of the state's positions, of these kinds."""
    self.inner, self.layers, self.structure, self.state = inner, layers, structure, state
    self.kinds, self.ours, self.extra_args, self.add = kinds, ours, extra_args, add
    # The place and path of the first group of each kind: groups that are alike run its program.
    self._first: dict[_Kind, tuple[int, str]] = {}
    self.contains, self.traced = contains, traced
    # Outside of a trace each call would be compiled anew.
    self._turn = jax.jit(self._run, static_argnums=(0, 1, 2)) if traced else self._run
    self._called = xla_cpu.as_call(self._run, static_argnums=(0, 1, 2))

  def step(self, unit: Sequence[Inputs], shared: list[Any], done: Any, elements: int, keys: Keys
           ) -> Made:
    """The turn of some groups; `elements` are those of all groups of the step."""
    if len(unit) > 1 or (not self.ours and not unit[0].group.stacked):
      return self._bundle(unit, shared, done, keys)
    [given] = unit
    forms, structure = jax.tree.flatten(given.forms)
    kind = _Kind(len(given.group.places), given.group.shape, given.group.kind,
                 tuple(paths.is_absent(g) for g in given.gradients), (tuple(forms), structure))
    first = given.group.places[0], given.group.paths[0]
    if self.ours:
      first = self._first.setdefault(kind, first)
    folded = codecs.folded(given.forms, keys)
    present = [g for g in given.gradients if not paths.is_absent(g)]
    args = (done, present, given.params, given.rows, shared, given.values, given.present, folded)

    def elsewhere(done: Any, g: Any, p: Any, *rest: Any) -> Any:
      return (*self._turn(kind, first, False, g, p, *rest), done)

    def on_cpu(done: Any, g: Any, p: Any, rows: Any, *rest: Any) -> Any:
      # Where a reshape stands in a kernel, XLA cannot write new state in the place of the old.
      g = [xla_cpu.after(done, g[0]), *g[1:]]
      made, new, after = self._called(kind, first, True, g, p, _flat_rows(kind, rows), *rest)
      new = jax.tree.map(lambda x, old: x.reshape(old.shape), new, rows)
      # Outside of the call, where it is one kernel with the addition to the parameter.
      updates = [self._contained(x, y) for x, y in zip(made, g)] if self.contains else made
      return updates, new, after, xla_cpu.number_of(made[:1])

    on_host = any(not layer.rounds for layer in self.layers)
    if self.traced and self.ours and not on_host and xla_cpu.is_worthwhile(elements):
      updates, rows, new, done = xla_cpu.either(on_cpu, elsewhere, *args)
    else:
      updates, rows, new, done = elsewhere(*args)
    return Made([(self._finished(given, updates), rows)], new, done)

  def _run(self, kind: _Kind, first: tuple[int, str], on_cpu: bool, gradients: Any, params: Any,
           rows: Any, shared: Any, values: Any, present: Any, keys: Any) -> Any:
    forms = jax.tree.unflatten(kind.forms[1], kind.forms[0])
    opened = _map_rows(lambda f, x, own: codecs.opened(self.layers, f, x, own), forms, rows, keys)
    g = _with_absent(gradients, kind.absent)
    turn = _OnCpu(kind) if on_cpu else _Plain(kind, self.traced)
    stacked_g = turn.gather(self._wide(g))
    stacked_p = None if params is None else turn.gather_params(self._wide(params))
    raw, stacked_p = turn.settled(stacked_g, stacked_p)
    stacked_g = raw
    if self.contains:
      stacked_g = numerics.squarable(
        numerics.finite(raw).astype(numerics.compute_dtype(raw.dtype)))
    numbers = [x[:, None] if k == "numbers" and kind.stacked else x
               for k, x in zip(self.kinds, opened)]
    inside = [turn.enter(x) if k == "rows" else x for k, x in zip(self.kinds, numbers)]

    def alone(g: Any, p: Any, rows: Any, values: Any) -> Any:
      return self._alone(first, turn, g, p, rows, shared, values)

    if not kind.stacked:
      values = jax.tree.map(lambda x: x[0], values)
    axes = 0, turn.params_axis, 0, 0
    run = jax.vmap(alone, in_axes=axes, out_axes=(0, 0, None)) if kind.stacked else alone
    u, new_rows, new_shared = run(stacked_g, stacked_p, inside, values)
    new = [turn.leave(x, old) if k == "rows" else x[:, 0] if k == "numbers" and kind.stacked else x
           for k, x, old in zip(self.kinds, new_rows, opened)]
    new = self._kept(kind, new, opened, present)
    closed = _map_rows(lambda f, x, own: codecs.closed(self.layers, f, x, own), forms, new, keys)
    if self.contains and not on_cpu:
      u = self._contained(u, raw)
    updates = [x for x, gone in zip(turn.rows(u), kind.absent) if not gone]
    return updates, closed, new_shared

  def _wide(self, leaves: Sequence[Any]) -> list[Any]:
    wide = any(layer.rounds for layer in self.layers)
    return [codecs.widen(x) if wide and not paths.is_absent(x) else x for x in leaves]

  def _alone(self, first: tuple[int, str], turn: Any, g: Any, p: Any, rows: Any, shared: Any,
             values: Any) -> Any:
    """The inner's update of one leaf, in the place of the first leaf of its kind."""
    place, path = first

    def tree(x: Any, others: Any = None) -> Any:
      leaves = list(others or [None] * self.structure.num_leaves)
      leaves[place] = x
      return self.structure.unflatten(leaves)

    nodes = []
    others = self._others({place: g})
    for k, (kind, row, whole) in enumerate(zip(self.kinds, rows, shared)):
      if kind == "rows":
        nodes.append(tree(turn.leaf(row), others[k]))
      elif kind == "numbers":
        nodes.append(LeafNumbers(names_of((path,)), row))
      else:
        nodes.append(whole)
    measured = {name: {place: value} for name, value in values.items()}
    updates, new = self.inner.update(
      tree(turn.leaf(g)), self.state.unflatten(nodes), None if p is None else tree(turn.param(p)),
      **self.extra_args, **measured)
    new_rows, new_shared = [], []
    for kind, node in zip(self.kinds, self.state.flatten_up_to(new)):
      row = None
      if kind == "rows":
        row = turn.bare(self.structure.flatten_up_to(node)[place])
      elif kind == "numbers":
        row = node.numbers
      new_rows.append(row)
      new_shared.append(node if kind == "shared" else None)
    return turn.bare(self.structure.flatten_up_to(updates)[place]), new_rows, new_shared

  def _others(self, leaves: dict[int, Any]) -> list[Any]:
    """For each position of the state what the inner has there in place of the other leaves.

    Masks leave a `MaskedNode` for some leaves that are not there, and nothing for others: what its
    `init` makes of the same tree its update expects.
    """
    nothing: list[Any] = [None] * len(self.kinds)
    if self.ours:
      return nothing
    count = self.structure.num_leaves
    shapes = [jax.ShapeDtypeStruct(leaves[i].shape, leaves[i].dtype) if i in leaves else None
              for i in range(count)]
    state = jax.eval_shape(self.inner.init, self.structure.unflatten(shapes))
    return [self.structure.flatten_up_to(node) if kind == "rows" else None
            for kind, node in zip(self.kinds, self.state.flatten_up_to(state))]

  def _kept(self, kind: _Kind, new: list[Any], old: list[Any], present: Any) -> list[Any]:
    """New rows of the state; the old ones of leaves without an update."""
    if any(kind.absent):
      here = ~np.array(kind.absent)
      new = _map_rows(lambda a, b: _choose(kind, here, a, b), new, old)
    if present is not None:
      new = _map_rows(lambda a, b: _choose(kind, present, a, b), new, old)
    return new

  def _contained(self, x: Any, gradient: Any) -> Any:
    """`x`, and what went in where that is not finite."""
    dtype = numerics.compute_dtype(x.dtype, gradient.dtype)
    return jnp.where(jnp.isfinite(gradient), x.astype(dtype), gradient.astype(dtype))

  def _finished(self, given: Inputs, updates: Sequence[Any]) -> list[Any]:
    """One update per leaf, or with `add` the new parameter; absent leaves as they came."""
    made, found = iter(updates), []
    rounds = any(layer.rounds for layer in self.layers)
    for i, gradient in enumerate(given.gradients):
      if paths.is_absent(gradient):
        found.append(given.params[i] if self.add and given.params is not None else gradient)
        continue
      x, gradient = next(made), jnp.asarray(gradient)
      param: Any = None if given.params is None else jnp.asarray(given.params[i])
      if self.contains and param is not None:
        x = numerics.narrowed(x, param.dtype)
      elif rounds and codecs.is_floating(gradient):
        x = numerics.narrowed(x, gradient.dtype) if x.dtype != gradient.dtype else x
      if given.present is not None:
        x = jnp.where(given.present[i], x, jnp.zeros_like(x))
      if self.add:
        same = param.dtype == x.dtype
        wide = param.dtype if same else numerics.compute_dtype(param.dtype, x.dtype)
        x = (param.astype(wide) + x.astype(wide)).astype(param.dtype)
      found.append(x)
    return found

  def _bundle(self, unit: Sequence[Inputs], shared: list[Any], done: Any, keys: Keys) -> Made:
    """The turn of leaves that stand alone, on the user's tree without the others."""
    def tree(values: Sequence[Any], others: Any = None) -> Any:
      leaves = list(others or [None] * self.structure.num_leaves)
      for given, x in zip(unit, values):
        leaves[given.group.places[0]] = x
      return self.structure.unflatten(leaves)

    opened = [
      _map_rows(lambda f, x, own: codecs.opened(self.layers, f, x, own), given.forms, given.rows,
                codecs.folded(given.forms, keys))
      for given in unit]
    nodes: list[Any] = []
    others = self._others({given.group.places[0]: x for given, x in zip(
      unit, self._wide([given.gradients[0] for given in unit]))})
    for k, kind in enumerate(self.kinds):
      column = [rows[k] for rows in opened]
      if kind == "rows":
        nodes.append(tree(column, others[k]))
      elif kind == "numbers":
        names = tuple(given.group.paths[0] for given in unit)
        nodes.append(LeafNumbers(names_of(names), jnp.concatenate(column)))
      else:
        nodes.append(shared[k])
    g = tree(self._wide([given.gradients[0] for given in unit]))
    params = None if unit[0].params is None else tree(
      self._wide([given.params[0] for given in unit if given.params is not None]))
    updates, new = self.inner.update(g, self.state.unflatten(nodes), params, **self.extra_args)
    found = self.structure.flatten_up_to(updates)
    after = self.state.flatten_up_to(new)
    groups, new_shared = [], [x if k == "shared" else None for k, x in zip(self.kinds, after)]
    for i, given in enumerate(unit):
      place, alone = given.group.places[0], _Kind(1, given.group.shape, None, (False,), None)
      rows = [
        self.structure.flatten_up_to(x)[place] if k == "rows"
        else x.numbers[i:i + 1] if k == "numbers" else None for k, x in zip(self.kinds, after)]
      rows = self._kept(alone, rows, opened[i], given.present)
      closed = _map_rows(lambda f, x, own: codecs.closed(self.layers, f, x, own), given.forms, rows,
                         codecs.folded(given.forms, keys))
      groups.append((self._finished(given, [found[place]]), closed))
    return Made(groups, new_shared, done)


def _map_rows(function: Any, *columns: Any) -> list[Any]:
  """`function` of each position, where it holds something of the group.

  Keys come as one list for all leaves, in order: those of a position are taken from its front.
  """
  found: list[Any] = []
  keyed = len(columns) == 3
  keys = list(columns[2]) if keyed else []
  for row in zip(*columns[:2]):
    if row[0] is None and row[1] is None:
      found.append(None)
    elif keyed and row[0] is None:
      found.append(row[1])
    elif keyed:
      count = len(jax.tree.leaves(row[0]))
      found.append(function(*row, keys[:count]))
      keys = keys[count:]
    else:
      found.append(function(*row))
  return found


def _flat_rows(kind: _Kind, rows: list[Any]) -> list[Any]:
  """Arrays that are like the leaves of a stack, flat; what is kept in 8 bits stays as it is."""
  def flat(x: Any) -> Any:
    whole = kind.stacked and len(kind.shape) > 1 and not isinstance(x, codecs.QuantizedLeaf)
    return x.reshape(kind.count, -1) if whole and x.shape == (kind.count, *kind.shape) else x

  return jax.tree.map(flat, rows, is_leaf=lambda x: isinstance(x, codecs.QuantizedLeaf))


def _with_absent(present: Sequence[Any], absent: Sequence[bool]) -> list[Any]:
  given = iter(present)
  return [None if gone else next(given) for gone in absent]


def _choose(kind: _Kind, here: Any, new: Any, old: Any) -> Any:
  """Rows of `new` where a leaf is here, of `old` elsewhere."""
  def choose(a: Any, b: Any) -> Any:
    flags = jnp.asarray(here)
    return jnp.where(flags.reshape(-1, *[1] * (a.ndim - 1)) if kind.stacked else flags[0], a, b)

  return jax.tree.map(choose, new, old)


class _Plain:
  """Leaves in their own shape."""

  def __init__(self, kind: _Kind, traced: bool = True):
    self.kind, self.traced = kind, traced

  def gather(self, leaves: Sequence[Any]) -> Any:
    """The leaves of a group as one array, or its only leaf."""
    return layout.stack(leaves, self.kind.shape) if self.kind.stacked else leaves[0]

  # Of the parameters' stack, under vmap.
  params_axis: int | None = 0

  def gather_params(self, leaves: Sequence[Any]) -> Any:
    """The parameters of a group's leaves, likewise."""
    return self.gather(leaves)

  def param(self, x: Any) -> Any:
    """A parameter as the inner takes it."""
    return self.leaf(x)

  def settled(self, g: Any, p: Any) -> Any:
    """Stacks that are written once, and not computed again by each of their readers."""
    return jax.lax.optimization_barrier((g, p)) if self.kind.stacked else (g, p)

  def enter(self, x: Any) -> Any:
    """Rows of a state as the vmapped update takes them."""
    return x

  def leave(self, x: Any, like: Any) -> Any:
    """Inverse of `enter`: in the shape of what entered."""
    del like
    return x

  def leaf(self, x: Any) -> Any:
    """A leaf as the inner takes it."""
    return x

  def bare(self, x: Any) -> Any:
    """Inverse of `leaf`."""
    return x

  def rows(self, u: Any) -> list[Any]:
    """The updates of a group's leaves."""
    if not self.kind.stacked:
      return [u]
    return xla_cpu.unstacked(u, layout.unstack) if self.traced else layout.unstack(u)


class _OnCpu(_Plain):
  """Stacked leaves are flat, all are computed in calls, one group after the other."""

  @property
  def flat(self) -> bool:
    """Whether leaves lie flat."""
    return self.kind.stacked and len(self.kind.shape) > 1

  def gather(self, leaves: Sequence[Any]) -> Any:
    """As `_Plain`, flat."""
    if not self.kind.stacked:
      return leaves[0]
    dtypes = {jnp.dtype(x.dtype) for x in leaves if not paths.is_absent(x)}
    dtype = dtypes.pop() if len(dtypes) == 1 else numerics.compute_dtype(*dtypes)
    rows = [jnp.zeros(self.kind.shape, dtype) if paths.is_absent(x) else x for x in leaves]
    return xla_cpu.stack_flat(rows, dtype)

  params_axis = None

  def gather_params(self, leaves: Sequence[Any]) -> Any:
    """The leaves themselves: they are stacked when a part first reads them."""
    return list(leaves)

  def param(self, x: Any) -> Any:
    """Parameters that are stacked later."""
    if not self.kind.stacked:
      return self.leaf(x[0])
    return xla_cpu.Late(x, self.kind.shape, self.flat)

  def settled(self, g: Any, p: Any) -> Any:
    """They are written already."""
    return g, p

  def enter(self, x: Any) -> Any:
    """Rows of a state, flat."""
    count, shape = self.kind.count, self.kind.shape
    if not self.kind.stacked:
      return x
    return jax.tree.map(
      lambda y: y.reshape(count, -1) if y.shape[1:] == shape and self.flat else y, x)

  def leave(self, x: Any, like: Any) -> Any:
    """Inverse of `enter`."""
    return jax.tree.map(lambda y, old: y.reshape(old.shape), x, like)

  def leaf(self, x: Any) -> Any:
    """A leaf that knows how it lies."""
    return xla_cpu.carried(x, self.kind.shape, self.flat)

  def bare(self, x: Any) -> Any:
    """Inverse of `leaf`."""
    return array_of(x)

  def rows(self, u: Any) -> list[Any]:
    """The updates of a group's leaves, by calls."""
    if not self.kind.stacked:
      return [u]
    return [x.reshape(self.kind.shape) for x in xla_cpu.unstack(u)]
