"""One update: every group's turn, one after the other."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hina_optax.base import leafwise, numerics, paths, positions, traits
from hina_optax.base.leafwise import PRESENT
from hina_optax.base.positions import LeafNumbers
from hina_optax.base.traits import Traits
from hina_optax.grouped import codecs, measures, separable, update_group, xla_cpu
from hina_optax.grouped import layout as layouts
from hina_optax.grouped.layout import Group, Grouped, Layout
from hina_optax.grouped.settings import Settings, begin, refusal
from hina_optax.grouped.update_group import Stepper

# Opened bytes of state between a group and the one that it waits for. Without a bound compilers may
# take all groups at once, and hold all that is computed on the way.
_WINDOW = 64 << 20
_OLD_STATE = (
  "A raw state of hina_optax 0.1 cannot be read: save it there with pack_state, and read it here "
  "with unpack_state; or start again from init.")


class _Column(NamedTuple):
  """One position of a state, cut for the groups.

  Attributes:
    kind: `"rows"` (one entry per group), `"numbers"` (a vector), `"shared"` or `"measured"`.
    node: as it stands in the state.
    forms: how its leaves rest, as a tree like it.
    entries: one per group: what stands there of the group, and its forms.
  """

  kind: str
  node: Any
  forms: Any
  entries: list[tuple[Any, Any]]


class Step:
  """One update."""

  def __init__(self, settings: Settings, updates: Any, state: Any, params: Any,
               extra_args: Mapping[str, Any], checked: dict[Any, str | None]):
    self.settings, self.layers = settings, settings.layers
    self.known = traits.traits_of(settings.inner)
    self.extra_args, self.checked = dict(extra_args), checked
    self.updates, self.params = updates, params
    self.tree = updates if params is None else params
    self.structure = positions.structure_of(self.tree)
    self.gradients = self._flat(updates, "updates")
    self.parameters = None if params is None else self._flat(params, "params")
    present = self.extra_args.get(PRESENT)
    self.present = None if present is None else self.structure.flatten_up_to(present)
    self.stored, self.counters = codecs.unwrapped(self.layers, codecs.restored(state))
    self.keys = codecs.keys_of(self.layers, self.counters)

  def _flat(self, tree: Any, what: str) -> list[Any]:
    try:
      return self.structure.flatten_up_to(tree)
    except (TypeError, ValueError) as error:
      raise ValueError(
        f"{what} and parameters are trees of different structure: {error}") from error

  def run(self, add: bool) -> tuple[Any, Any]:
    """The updates, or with `add` the new parameters, and the new state."""
    if self.settings.contains:
      paths.check_floating(self.updates, "updates")
    if all(paths.is_absent(x) for x in paths.flatten(self.tree)[1]):
      return self._at_once(add)
    layout = layouts.layout_in(self.stored)
    self.likes = self._likes(layout)
    self.forms = codecs.forms_of(self.layers, self.likes)
    self._check_structure()
    if not self._goes_group_by_group(layout):
      return self._at_once(add)
    self.layout = layout or layouts.alone(self.tree, self._alone_kinds())
    return self._group_by_group(add)

  def _alone_kinds(self) -> list[Any] | None:
    known = self.known
    if not known.leafwise:
      return None
    columns = [kinds(self.tree) for kinds in known.kinds]
    return [tuple(c[i] for c in columns) for i in range(self.structure.num_leaves)]

  def _likes(self, layout: Layout | None) -> Any:
    """The state, opened, as shapes."""
    fixed = dataclasses.replace(self.settings, layout=layout, stacking=None)
    tree = self.structure.unflatten([
      x if paths.is_absent(x) else jax.ShapeDtypeStruct(x.shape, x.dtype)
      for x in self.structure.flatten_up_to(self.tree)])
    return jax.eval_shape(lambda params: begin(fixed, params)[0], tree)

  def _check_structure(self) -> None:
    """Refuses a state of another transformation, or of an earlier version of this library."""
    expected: Any = jax.tree.structure(self.likes, is_leaf=codecs.is_leaf)
    try:
      leaves = expected.flatten_up_to(self.stored)
    except (TypeError, ValueError, KeyError) as error:
      raise ValueError(
        "the state does not have the structure of this transformation's state: it was made by "
        f"another transformation or for other parameters ({error}). {_OLD_STATE}") from error
    for like, x in zip(jax.tree.leaves(self.likes, is_leaf=codecs.is_leaf), leaves):
      if isinstance(like, LeafNumbers) != isinstance(x, LeafNumbers):
        raise ValueError(
          "the state does not have the structure of this transformation's state: it holds a bare "
          f"vector where numbers of leaves are found by name. {_OLD_STATE}")
    if self.layers:
      codecs.check_forms(self.layers, self.likes, self.forms, self.stored)

  def _goes_group_by_group(self, layout: Layout | None) -> bool:
    """Whether leaves are taken by themselves; refuses where they must be and cannot."""
    if self.known.leafwise:
      return True
    # What is not like the parameters comes as well, such as a tree without the blocks of a mask.
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.likes))
    limit = _WINDOW if self.settings.window is None else self.settings.window // 2
    if layout is None and total <= limit:
      return False
    if layout is None and self.settings.window is None and not self.layers:
      return False
    mixing = self._mixing(layout)
    if mixing is None:
      return True
    if layout is not None or self.settings.window is not None:
      wrapper = "with_leaf_batching can only batch" if layout is not None else (
        "with_host_offload can only bring in windows")
      raise ValueError(refusal(wrapper, mixing))
    return False

  def _mixing(self, layout: Layout | None) -> str | None:
    """What the inner computes from several leaves, or differently for leaves of one stack."""
    arrays = jax.tree.leaves(self.extra_args)
    key = (self.structure, layout, self.params is None, tuple(self.extra_args), tuple(
      (np.shape(x), str(getattr(x, "dtype", None))) for x in (*self.gradients, *arrays)))
    if key not in self.checked:
      found = separable.analyse(
        self.settings.inner, self.tree, self.extra_args, self.params is not None)
      self.checked[key] = found.mixing or _differing(layout, found.programs, self.settings)
    return self.checked[key]

  def _at_once(self, add: bool) -> tuple[Any, Any]:
    """The inner on the user's own tree, its state opened at once."""
    forms = getattr(self, "forms", None)
    keys = [] if forms is None else codecs.folded(forms, self.keys)
    state = self.stored if forms is None else codecs.opened(self.layers, forms, self.stored, keys)
    wide = any(layer.rounds for layer in self.layers)
    updates, params = self.updates, self.params
    if wide:
      updates, params = (jax.tree.map(codecs.widen, tree) for tree in (updates, params))
    extra = {k: v for k, v in self.extra_args.items() if k != PRESENT}
    result, new = self.settings.inner.update(updates, state, params, **extra)
    if self.present is not None:
      result, new = leafwise.keep_absent(
        self.extra_args[PRESENT], self.updates, (result, new), state)
    if wide:
      result = jax.tree.map(_cast_like, result, self.updates, is_leaf=paths.is_absent)
    if forms is not None:
      new = codecs.closed(self.layers, forms, new, keys)
    if add:
      result = optax.apply_updates(self.params, result)
    return result, self._wrapped(new)

  def _wrapped(self, state: Any) -> Any:
    counters = [None if c is None else (self._where_some(codecs.next_step(c[0]), c[0]), c[1])
                for c in self.counters]
    return codecs.wrapped(self.layers, state, counters)

  def _group_by_group(self, add: bool) -> tuple[Any, Any]:
    columns, structure = self._columns()
    values, columns = self._measured(columns)
    stepper = Stepper(
      self.settings.inner, self.layers, self.structure, structure, [c.kind for c in columns],
      self.known.leafwise, {k: v for k, v in self.extra_args.items() if k != PRESENT}, add,
      self.settings.contains, _is_traced((self.gradients, self.stored)))
    shared = [self._shared(c) for c in columns]
    results = list(self.gradients if not add else self.parameters or [])
    after: list[Any] = [None] * len(self.layout.groups)
    new_shared: Any = None
    windows = _windows(self._sizes(columns), self._limit())
    elements = 0 if self.settings.short else sum(g.size for g in self.layout.groups)
    token = jnp.zeros([], jnp.int32)
    done = jnp.zeros([], jnp.float32)
    for number, members in enumerate(windows):
      made = {}
      for unit in self._units(members):
        waits = token if number else None
        made_now = stepper.step(
          self._unit(unit, columns, values, waits), shared, done, elements, self.keys)
        done = made_now.done
        for index, group_result in zip(unit, made_now.groups):
          made[index] = group_result
        new_shared = made_now.shared if new_shared is None else new_shared
      # The last one too: v5e's compiler began it before the others otherwise (libtpu 0.0.42).
      if len(windows) > 1:
        token, made = _after(token, made, add, columns)
      for index, (updates, entries) in made.items():
        after[index] = entries
        for place, u in zip(self.layout.groups[index].places, updates):
          results[place] = u
    new_shared = [
      self._where_some(new, old) if column.kind == "shared" else None
      for column, new, old in zip(columns, new_shared or shared, shared)]
    return self._assembled(columns, structure, after, new_shared, results)

  def _shared(self, column: _Column) -> Any:
    """What each group's turn is given whole. Rows and numbers come cut: all of them in every turn
    would make tracing quadratic in the leaves.
    """
    if column.kind == "shared":
      return codecs.opened(
        self.layers, column.forms, column.node, codecs.folded(column.forms, self.keys))
    return column.node if column.kind == "measured" else None

  def _where_some(self, new: Any, old: Any) -> Any:
    """`new`; `old` where the argument `present` says that no leaf has an update."""
    here = [] if self.present is None else [
      jnp.asarray(x) for x, g in zip(self.present, self.gradients) if not paths.is_absent(g)]
    if not here:
      return new
    some = jnp.any(jnp.stack(here))
    return jax.tree.map(lambda a, b: jnp.where(some, a, b), new, old)

  def _limit(self) -> int:
    return _WINDOW if self.settings.window is None else self.settings.window // 2

  def _sizes(self, columns: Sequence[_Column]) -> list[int]:
    """Opened bytes of each group's state."""
    likes = positions_of(self.likes, self.structure, self.known)[0]
    sizes = [0] * len(self.layout.groups)
    for like, column in zip(likes, columns):
      if column.kind == "rows":
        for i, entry in enumerate(_cut(like, self.structure, self.layout)):
          sizes[i] += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(entry))
    return sizes

  def _columns(self) -> tuple[list[_Column], Any]:
    nodes, structure = positions_of(self.likes, self.structure, self.known)
    stored = structure.flatten_up_to(self.stored)
    forms = structure.flatten_up_to(self.forms)
    columns = []
    for like, node, form in zip(nodes, stored, forms):
      kind = _kind_of(like, self.structure, self.known)
      entries: list[Any] = []
      if kind == "rows":
        entries = list(zip(_cut(node, self.structure, self.layout),
                           _cut(form, self.structure, self.layout)))
      columns.append(_Column(kind, node, form, entries))
    return columns, structure

  def _measured(self, columns: list[_Column]) -> tuple[dict[str, list[Any]], list[_Column]]:
    """What the parts look up across leaves, one value per group, and their new state."""
    values: dict[str, list[Any]] = {}
    if not self.known.measures:
      return values, columns
    leaves = measures.LeafGroups(
      self.layout, self.gradients, self.parameters or self.gradients, self.structure, self.present)
    columns = list(columns)
    seen: dict[type, int] = {}
    for measure in self.known.measures:
      place = None
      if measure.state_type is not None:
        same = [i for i, c in enumerate(columns) if isinstance(c.node, measure.state_type)]
        place = same[seen.get(measure.state_type, 0)]
        seen[measure.state_type] = seen.get(measure.state_type, 0) + 1
      found, state = measure.look(leaves, None if place is None else columns[place].node)
      if place is not None:
        columns[place] = columns[place]._replace(
          node=self._where_some(state, columns[place].node))
      values[measure.name] = found
    return values, columns

  def _units(self, members: Sequence[int]) -> Iterator[list[int]]:
    """Groups that one call of the inner takes: one, or of a foreign inner all that stand alone."""
    if self.known.leafwise:
      yield from ([i] for i in members if self._has_update(i))
      return
    single = [i for i in members if not self.layout.groups[i].stacked and self._has_update(i)]
    if single:
      yield single
    yield from ([i] for i in members if self.layout.groups[i].stacked and self._has_update(i))

  def _has_update(self, index: int) -> bool:
    return any(
      not paths.is_absent(self.gradients[p]) for p in self.layout.groups[index].places)

  def _unit(self, unit: Sequence[int], columns: Sequence[_Column], values: Mapping[str, list[Any]],
            token: Any) -> list[update_group.Inputs]:
    found = []
    for i in unit:
      group = self.layout.groups[i]
      g = [self.gradients[p] for p in group.places]
      rows = [c.entries[i][0] if c.kind == "rows" else _numbers(c.node, group)
              if c.kind == "numbers" else None for c in columns]
      if token is not None:
        # Numbers of leaves wait for nothing: each would be a kernel of its own.
        present = [x for x in g if not paths.is_absent(x)]
        tied = [x if c.kind == "rows" else None for x, c in zip(rows, columns)]
        present, tied, _ = xla_cpu.barrier((present, tied, token))
        rows = [x if c.kind == "rows" else y for x, y, c in zip(tied, rows, columns)]
        given = iter(present)
        g = [x if paths.is_absent(x) else next(given) for x in g]
      found.append(update_group.Inputs(
        group, g, None if self.parameters is None else [self.parameters[p] for p in group.places],
        rows, [c.entries[i][1] if c.kind == "rows" else None for c in columns],
        {name: column[i] for name, column in values.items()},
        None if self.present is None else jnp.stack(
          [jnp.asarray(self.present[p]) for p in group.places])))
    return found

  def _assembled(
    self, columns: Sequence[_Column], structure: Any, after: Sequence[Any], shared: Sequence[Any],
    results: list[Any],
  ) -> tuple[Any, Any]:
    nodes = []
    for k, column in enumerate(columns):
      entries = [None if rows is None else rows[k] for rows in after]
      if column.kind == "shared":
        keys = codecs.folded(column.forms, self.keys)
        nodes.append(codecs.closed(self.layers, column.forms, shared[k], keys))
      elif column.kind == "measured":
        nodes.append(column.node)
      elif column.kind == "numbers":
        nodes.append(_joined_numbers(column.node, self.layout, entries))
      else:
        kept = [old if new is None else new for new, (old, _) in zip(entries, column.entries)]
        nodes.append(_joined(column.node, self.structure, self.layout, kept))
    return self.structure.unflatten(results), self._wrapped(structure.unflatten(nodes))


def positions_of(state: Any, structure: Any, known: Traits) -> tuple[list[Any], Any]:
  """The positions of a state, and its structure above them."""
  is_tree = positions.is_tree_like(structure)
  types = tuple(m.state_type for m in known.measures if m.state_type is not None)
  return jax.tree.flatten(state, is_leaf=lambda x: (
    isinstance(x, (Grouped, LeafNumbers, *types)) or is_tree(x)))


def _kind_of(node: Any, structure: Any, known: Traits) -> str:
  types = tuple(m.state_type for m in known.measures if m.state_type is not None)
  if isinstance(node, types):
    return "measured"
  if isinstance(node, LeafNumbers):
    return "numbers"
  is_tree = positions.is_tree_like(structure)
  return "rows" if isinstance(node, Grouped) or is_tree(node) else "shared"


def _cut(node: Any, structure: Any, layout: Layout) -> list[Any]:
  """What stands in a position of the state, for each group."""
  if isinstance(node, Grouped):
    return node.arrays
  rows = structure.flatten_up_to(node)
  return [rows[group.places[0]] for group in layout.groups]


def _joined(node: Any, structure: Any, layout: Layout, entries: Sequence[Any]) -> Any:
  """Inverse of `_cut`, in the place of `node`."""
  if isinstance(node, Grouped):
    return Grouped(node.layout, entries)
  rows = structure.flatten_up_to(node)
  for group, entry in zip(layout.groups, entries):
    rows[group.places[0]] = entry
  return structure.unflatten(rows)


def _numbers(node: LeafNumbers, group: Group) -> Any:
  """The numbers of a group's leaves: a vector."""
  order = [node.names.index[path] for path in group.paths]
  begin, end = order[0], order[-1] + 1
  if order == list(range(begin, end)):
    return node.numbers[begin:end]
  return node.numbers[np.array(order)]


def _joined_numbers(node: LeafNumbers, layout: Layout, entries: Sequence[Any]) -> LeafNumbers:
  """The vector of all leaves; old numbers where a group had no update."""
  rows = [(group, _numbers(node, group) if new is None else new)
          for group, new in zip(layout.groups, entries)]
  order = [node.names.index[path] for group, _ in rows for path in group.paths]
  joined = jnp.concatenate([x for _, x in rows])
  if order != list(range(len(order))):
    joined = joined[np.argsort(order)]
  return LeafNumbers(node.names, joined)


def _windows(sizes: Sequence[int], limit: int) -> list[list[int]]:
  """Groups in order, in windows of at most `limit` bytes each, or of one group."""
  windows: list[list[int]] = [[]]
  used = 0
  for i, size in enumerate(sizes):
    if windows[-1] and used + size > limit:
      windows.append([])
      used = 0
    windows[-1].append(i)
    used += size
  return windows


def _after(
  token: Any, made: dict[int, Any], add: bool, columns: Sequence[_Column]
) -> tuple[Any, dict[int, Any]]:
  """A token that is there when the states of a window are closed.

  Updates are left out: what is tied could not be added to the parameters in the same kernel.
  """
  tied = {i: (updates if add else None, [x if c.kind == "rows" else None
                                         for x, c in zip(entries, columns)])
          for i, (updates, entries) in made.items()}
  token, tied = xla_cpu.barrier((token, tied))
  return token, {
    i: (tied[i][0] if add else updates, [x if c.kind == "rows" else y for x, y, c in zip(
      tied[i][1], entries, columns)])
    for i, (updates, entries) in made.items()}


def _differing(layout: Layout | None, programs: Sequence[Any], settings: Settings) -> str | None:
  """Leaves of one stack that are treated differently, in words."""
  told = settings.stacking is not None and settings.stacking.kind is not None
  for group in layout.groups if layout is not None and not told else ():
    for path, place in zip(group.paths[1:], group.places[1:]):
      if programs[place] != programs[group.places[0]]:
        return (f"what it computes for leaf '{path}' is not what it computes for "
                f"'{group.paths[0]}' (they are alike in shape and dtype; give with_leaf_batching a "
                "kind that tells them apart)")
  return None


def _cast_like(x: Any, like: Any) -> Any:
  """A floating array in the dtype of another."""
  if codecs.is_floating(x) and codecs.is_floating(like):
    return numerics.narrowed(x, like.dtype) if x.dtype != like.dtype else x
  return x


def _is_traced(tree: Any) -> bool:
  return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))
