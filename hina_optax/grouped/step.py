"""One step: updates every group, one after the other.

In order, `Step.run` (1) checks the structure of the state, (2) runs the measures across leaves,
(3) packs groups into windows, (4) for each group has `update_group.GroupUpdater` gather gradients
and parameters, decode the state, run the inner transformation and encode the state, (5) puts the
updates into the user's tree and the state together again.
"""

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
from hina_optax.grouped import codecs, leaf_dependencies, measures, update_group, xla_cpu
from hina_optax.grouped import layout as layouts
from hina_optax.grouped.layout import Group, Grouped, Layout
from hina_optax.grouped.settings import Settings, describe_refusal, init_state
from hina_optax.grouped.update_group import GroupUpdater

# Bytes of decoded state in one window of groups; a window waits for the one before. Without this
# bound, compilers may update all groups at once and hold all their temporaries.
_DEFAULT_WINDOW_BYTES = 64 << 20
_OLD_STATE = (
  "A raw state of hina_optax 0.1 cannot be read: save it there with pack_state, and read it here "
  "with unpack_state; or start again from init.")


class _Slot(NamedTuple):
  """One part of a state, split by group.

  Attributes:
    kind: `"rows"` (a tree like the parameters: one entry per group), `"numbers"` (a vector with one
      number per leaf), `"shared"` (the same for all leaves) or `"measured"` (of a measure).
    node: the part as it is stored in the state.
    encodings: a tree like it, of `LeafEncoding`s.
    entries: one per group: the group's part of `node`, and of `encodings`.
  """

  kind: str
  node: Any
  encodings: Any
  entries: list[tuple[Any, Any]]


class Step:
  """One update of all parameters."""

  def __init__(self, settings: Settings, updates: Any, state: Any, params: Any,
               extra_args: Mapping[str, Any], cross_leaf_cache: dict[Any, str | None]):
    self.settings, self.codecs = settings, settings.codecs
    self.traits = traits.get_traits(settings.inner)
    self.extra_args, self.cross_leaf_cache = dict(extra_args), cross_leaf_cache
    self.updates, self.params = updates, params
    self.tree = updates if params is None else params
    self.structure = positions.get_structure(self.tree)
    self.gradients = self._flatten(updates, "updates")
    self.parameters = None if params is None else self._flatten(params, "params")
    present = self.extra_args.get(PRESENT)
    self.present = None if present is None else self.structure.flatten_up_to(present)
    self.stored, self.counters = codecs.unwrap_state(
      self.codecs, codecs.restore_quantized_leaves(state))
    self.keys = codecs.derive_codec_keys(self.codecs, self.counters)

  def _flatten(self, tree: Any, what: str) -> list[Any]:
    try:
      return self.structure.flatten_up_to(tree)
    except (TypeError, ValueError) as error:
      raise ValueError(
        f"{what} and parameters are trees of different structure: {error}") from error

  def run(self, add: bool) -> tuple[Any, Any]:
    """Returns the updates, or the new parameters if `add` is set, and the new state."""
    if self.settings.guards_non_finite:
      paths.check_floating(self.updates, "updates")
    if all(paths.is_absent(x) for x in paths.flatten(self.tree)[1]):
      return self._update_whole_tree(add)
    layout = layouts.find_layout(self.stored)
    self.state_shapes = self._find_state_shapes(layout)
    self.encodings = codecs.choose_encodings(self.codecs, self.state_shapes)
    self._check_structure()
    if not self._can_update_by_group(layout):
      return self._update_whole_tree(add)
    self.layout = layout or layouts.separate_leaves(self.tree, self._find_leaf_kinds())
    return self._update_by_group(add)

  def _find_leaf_kinds(self) -> list[Any] | None:
    if not self.traits.leafwise:
      return None
    columns = [kinds(self.tree) for kinds in self.traits.kinds]
    return [tuple(column[i] for column in columns) for i in range(self.structure.num_leaves)]

  def _find_state_shapes(self, layout: Layout | None) -> Any:
    """Returns the decoded state as a tree of shapes."""
    fixed = dataclasses.replace(self.settings, layout=layout, stacking=None)
    tree = self.structure.unflatten([
      x if paths.is_absent(x) else jax.ShapeDtypeStruct(x.shape, x.dtype)
      for x in self.structure.flatten_up_to(self.tree)])
    return jax.eval_shape(lambda params: init_state(fixed, params)[0], tree)

  def _check_structure(self) -> None:
    """Refuses a state of another transformation, or of an earlier version of this library."""
    expected: Any = jax.tree.structure(self.state_shapes, is_leaf=codecs.is_leaf)
    try:
      leaves = expected.flatten_up_to(self.stored)
    except (TypeError, ValueError, KeyError) as error:
      raise ValueError(
        "the state does not have the structure of this transformation's state: it was made by "
        f"another transformation or for other parameters ({error}). {_OLD_STATE}") from error
    for like, x in zip(jax.tree.leaves(self.state_shapes, is_leaf=codecs.is_leaf), leaves):
      if isinstance(like, LeafNumbers) != isinstance(x, LeafNumbers):
        raise ValueError(
          "the state does not have the structure of this transformation's state: it holds a bare "
          f"vector where numbers of leaves are found by name. {_OLD_STATE}")
    if self.codecs:
      codecs.check_encodings(self.codecs, self.state_shapes, self.encodings, self.stored)

  def _can_update_by_group(self, layout: Layout | None) -> bool:
    """Whether groups can be updated one by one; raises if they must be and cannot."""
    if self.traits.leafwise:
      return True
    # Not only trees like the parameters count, but also others, such as a tree without the blocks
    # that a mask leaves out.
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.state_shapes))
    if layout is None and total <= self._window_limit():
      return False
    if layout is None and self.settings.window is None and not self.codecs:
      return False
    cross_leaf = self._find_cross_leaf(layout)
    if cross_leaf is None:
      return True
    if layout is not None or self.settings.window is not None:
      wrapper = "with_leaf_batching can only batch" if layout is not None else (
        "with_host_offload can only bring in windows")
      raise ValueError(describe_refusal(wrapper, cross_leaf))
    return False

  def _find_cross_leaf(self, layout: Layout | None) -> str | None:
    """Says what the inner computes from several leaves, or differently for leaves of one stack."""
    arrays = jax.tree.leaves(self.extra_args)
    key = (self.structure, layout, self.params is None, tuple(self.extra_args), tuple(
      (np.shape(x), str(getattr(x, "dtype", None))) for x in (*self.gradients, *arrays)))
    if key not in self.cross_leaf_cache:
      dependencies = leaf_dependencies.trace_dependencies(
        self.settings.inner, self.tree, self.extra_args, self.params is not None)
      self.cross_leaf_cache[key] = dependencies.cross_leaf or _describe_difference(
        layout, dependencies.programs, self.settings)
    return self.cross_leaf_cache[key]

  def _update_whole_tree(self, add: bool) -> tuple[Any, Any]:
    """Runs the inner once, on the user's own tree and with all of its state decoded."""
    encodings = getattr(self, "encodings", None)
    state, keys = self.stored, []
    if encodings is not None:
      keys = codecs.derive_leaf_keys(encodings, self.keys)
      state = codecs.decode_leaves(self.codecs, encodings, self.stored, keys)
    is_lossy = any(codec.is_lossy for codec in self.codecs)
    updates, params = self.updates, self.params
    if is_lossy:
      updates, params = (jax.tree.map(codecs.widen, tree) for tree in (updates, params))
    extra_args = {k: v for k, v in self.extra_args.items() if k != PRESENT}
    result, new_state = self.settings.inner.update(updates, state, params, **extra_args)
    if self.present is not None:
      result, new_state = leafwise.freeze_without_update(
        self.extra_args[PRESENT], self.updates, (result, new_state), state)
    if is_lossy:
      result = jax.tree.map(_cast_like, result, self.updates, is_leaf=paths.is_absent)
    if encodings is not None:
      new_state = codecs.encode_leaves(self.codecs, encodings, new_state, keys)
    if add:
      result = optax.apply_updates(self.params, result)
    return result, self._wrap_state(new_state)

  def _wrap_state(self, state: Any) -> Any:
    counters = [
      None if counter is None else (
        self._select_if_any_present(codecs.increment_step(counter[0]), counter[0]), counter[1])
      for counter in self.counters]
    return codecs.wrap_state(self.codecs, state, counters)

  def _update_by_group(self, add: bool) -> tuple[Any, Any]:
    slots, structure = self._split_state()
    values, slots = self._run_measures(slots)
    updater = GroupUpdater(
      self.settings.inner, self.codecs, self.structure, structure, [slot.kind for slot in slots],
      self.traits.leafwise, {k: v for k, v in self.extra_args.items() if k != PRESENT}, add,
      self.settings.guards_non_finite, _is_traced((self.gradients, self.stored)))
    shared = [self._decode_shared(slot) for slot in slots]
    leaf_results = list(self.gradients if not add else self.parameters or [])
    new_entries: list[Any] = [None] * len(self.layout.groups)
    new_shared: Any = None
    windows = _make_windows(self._count_group_bytes(slots), self._window_limit())
    element_count = (
      0 if self.settings.is_lightweight else sum(group.size for group in self.layout.groups))
    # `window_token` orders windows on every platform, `group_token` orders groups on CPUs.
    window_token = jnp.zeros([], jnp.int32)
    group_token = jnp.zeros([], jnp.float32)
    for members in windows:
      window_results = {}
      for batch in self._batch_groups(members):
        # The first window is tied as well: the compiler for the TPU v5e left its update to the end
        # otherwise (libtpu 0.0.42; 110 MB of temporaries instead of 75).
        inputs = self._gather_inputs(
          batch, slots, values, window_token if len(windows) > 1 else None)
        results = updater.update(inputs, shared, group_token, element_count, self.keys)
        group_token = results.token
        for index, group_result in zip(batch, results.groups):
          window_results[index] = group_result
        # Each group computes the same shared state.
        new_shared = results.shared if new_shared is None else new_shared
      # The last window needs a barrier too. Without it the compiler for the TPU v5e started that
      # window before the earlier ones (seen with libtpu 0.0.42).
      if len(windows) > 1:
        window_token, window_results = _finish_window(window_token, window_results, add, slots)
      for index, (updates, entries) in window_results.items():
        new_entries[index] = entries
        for place, u in zip(self.layout.groups[index].places, updates):
          leaf_results[place] = u
    new_shared = [
      self._select_if_any_present(new, old) if slot.kind == "shared" else None
      for slot, new, old in zip(slots, new_shared or shared, shared)]
    return self._assemble(slots, structure, new_entries, new_shared, leaf_results)

  def _decode_shared(self, slot: _Slot) -> Any:
    """Returns what every group gets whole of a slot.

    Rows and numbers are split by group instead: if every group got all of them, the time of tracing
    would grow with the square of the number of leaves.
    """
    if slot.kind == "shared":
      return codecs.decode_leaves(
        self.codecs, slot.encodings, slot.node, codecs.derive_leaf_keys(slot.encodings, self.keys))
    return slot.node if slot.kind == "measured" else None

  def _select_if_any_present(self, new: Any, old: Any) -> Any:
    """Returns `new`, or `old` if the argument `present` says that no leaf has an update."""
    flags = [] if self.present is None else [
      jnp.asarray(x) for x, g in zip(self.present, self.gradients) if not paths.is_absent(g)]
    if not flags:
      return new
    any_present = jnp.any(jnp.stack(flags))
    return jax.tree.map(lambda a, b: jnp.where(any_present, a, b), new, old)

  def _window_limit(self) -> int:
    # Half of the user's window: one window is on its way in while another is on its way out.
    return _DEFAULT_WINDOW_BYTES if self.settings.window is None else self.settings.window // 2

  def _count_group_bytes(self, slots: Sequence[_Slot]) -> list[int]:
    """Returns the bytes of each group's decoded state."""
    nodes = flatten_slots(self.state_shapes, self.structure, self.traits)[0]
    sizes = [0] * len(self.layout.groups)
    for node, slot in zip(nodes, slots):
      if slot.kind == "rows":
        for i, entry in enumerate(_split_by_group(node, self.structure, self.layout)):
          sizes[i] += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(entry))
    return sizes

  def _split_state(self) -> tuple[list[_Slot], Any]:
    """Returns the slots of the state, and the structure of the state above them."""
    shapes, structure = flatten_slots(self.state_shapes, self.structure, self.traits)
    stored = structure.flatten_up_to(self.stored)
    encodings = structure.flatten_up_to(self.encodings)
    slots = []
    for shape_node, node, encoding in zip(shapes, stored, encodings):
      kind = _classify_slot(shape_node, self.structure, self.traits)
      entries: list[Any] = []
      if kind == "rows":
        entries = list(zip(_split_by_group(node, self.structure, self.layout),
                           _split_by_group(encoding, self.structure, self.layout)))
      slots.append(_Slot(kind, node, encoding, entries))
    return slots, structure

  def _run_measures(self, slots: list[_Slot]) -> tuple[dict[str, list[Any]], list[_Slot]]:
    """Returns the values of each measure, one per group, and the slots with their new state."""
    values: dict[str, list[Any]] = {}
    if not self.traits.measures:
      return values, slots
    leaves = measures.LeafGroups(
      self.layout, self.gradients, self.parameters or self.gradients, self.structure, self.present)
    slots = list(slots)
    # Two measures may have the same type of state. Their states appear in the order of measures.
    type_counts: dict[type, int] = {}
    for measure in self.traits.measures:
      index = None
      if measure.state_type is not None:
        same = [i for i, slot in enumerate(slots) if isinstance(slot.node, measure.state_type)]
        index = same[type_counts.get(measure.state_type, 0)]
        type_counts[measure.state_type] = type_counts.get(measure.state_type, 0) + 1
      group_values, state = measure.compute(leaves, None if index is None else slots[index].node)
      if index is not None:
        slots[index] = slots[index]._replace(
          node=self._select_if_any_present(state, slots[index].node))
      values[measure.name] = group_values
    return values, slots

  def _batch_groups(self, members: Sequence[int]) -> Iterator[list[int]]:
    """Yields the groups of each call of the inner.

    A leafwise inner gets one group per call. Any other inner gets all leaves that are not stacked
    in one call, and one stack in every other call.
    """
    members = [i for i in members if self._has_update(i)]
    if self.traits.leafwise:
      yield from ([i] for i in members)
      return
    unstacked = [i for i in members if not self.layout.groups[i].stacked]
    if unstacked:
      yield unstacked
    yield from ([i] for i in members if self.layout.groups[i].stacked)

  def _has_update(self, index: int) -> bool:
    return any(
      not paths.is_absent(self.gradients[place]) for place in self.layout.groups[index].places)

  def _gather_inputs(
    self, batch: Sequence[int], slots: Sequence[_Slot], values: Mapping[str, list[Any]],
    window_token: Any,
  ) -> list[update_group.GroupInputs]:
    inputs = []
    for i in batch:
      group = self.layout.groups[i]
      g = [self.gradients[place] for place in group.places]
      state = [self._select_entry(slot, i) for slot in slots]
      if window_token is not None:
        # Numbers of leaves do not wait: each would become a kernel of its own.
        g_present = [x for x in g if not paths.is_absent(x)]
        rows = [x if slot.kind == "rows" else None for x, slot in zip(state, slots)]
        g_present, rows, _ = xla_cpu.barrier((g_present, rows, window_token))
        state = [x if slot.kind == "rows" else y for x, y, slot in zip(rows, state, slots)]
        remaining = iter(g_present)
        g = [x if paths.is_absent(x) else next(remaining) for x in g]
      inputs.append(update_group.GroupInputs(
        group, g,
        None if self.parameters is None else [self.parameters[place] for place in group.places],
        state, [slot.entries[i][1] if slot.kind == "rows" else None for slot in slots],
        {name: group_values[i] for name, group_values in values.items()},
        None if self.present is None else jnp.stack(
          [jnp.asarray(self.present[place]) for place in group.places])))
    return inputs

  def _select_entry(self, slot: _Slot, index: int) -> Any:
    """Returns a group's own part of a slot; `None` if the slot is not split by group."""
    if slot.kind == "rows":
      return slot.entries[index][0]
    if slot.kind == "numbers":
      return _select_numbers(slot.node, self.layout.groups[index])
    return None

  def _assemble(
    self, slots: Sequence[_Slot], structure: Any, new_entries: Sequence[Any], shared: Sequence[Any],
    leaf_results: list[Any],
  ) -> tuple[Any, Any]:
    """Puts the results of all groups back into the user's tree and the structure of the state."""
    nodes = []
    for k, slot in enumerate(slots):
      entries = [None if group_entries is None else group_entries[k]
                 for group_entries in new_entries]
      if slot.kind == "shared":
        keys = codecs.derive_leaf_keys(slot.encodings, self.keys)
        nodes.append(codecs.encode_leaves(self.codecs, slot.encodings, shared[k], keys))
      elif slot.kind == "measured":
        nodes.append(slot.node)
      elif slot.kind == "numbers":
        nodes.append(_join_numbers(slot.node, self.layout, entries))
      else:
        merged = [old if new is None else new for new, (old, _) in zip(entries, slot.entries)]
        nodes.append(_join_groups(slot.node, self.structure, self.layout, merged))
    return self.structure.unflatten(leaf_results), self._wrap_state(structure.unflatten(nodes))


def flatten_slots(state: Any, structure: Any, inner_traits: Traits) -> tuple[list[Any], Any]:
  """Returns the slots of a state as nodes, and the structure of the state above them."""
  is_tree = positions.is_tree_like(structure)
  types = _find_measure_types(inner_traits)
  return jax.tree.flatten(state, is_leaf=lambda x: (
    isinstance(x, (Grouped, LeafNumbers, *types)) or is_tree(x)))


def _classify_slot(node: Any, structure: Any, inner_traits: Traits) -> str:
  if isinstance(node, _find_measure_types(inner_traits)):
    return "measured"
  if isinstance(node, LeafNumbers):
    return "numbers"
  is_tree = positions.is_tree_like(structure)
  return "rows" if isinstance(node, Grouped) or is_tree(node) else "shared"


def _find_measure_types(inner_traits: Traits) -> tuple[type, ...]:
  return tuple(m.state_type for m in inner_traits.measures if m.state_type is not None)


def _split_by_group(node: Any, structure: Any, layout: Layout) -> list[Any]:
  """Splits a tree like the parameters, which may be a `Grouped`, into one entry per group."""
  if isinstance(node, Grouped):
    return node.arrays
  leaves = structure.flatten_up_to(node)
  return [leaves[group.places[0]] for group in layout.groups]


def _join_groups(node: Any, structure: Any, layout: Layout, entries: Sequence[Any]) -> Any:
  """Replaces the entries of `node`: the inverse of `_split_by_group`."""
  if isinstance(node, Grouped):
    return Grouped(node.layout, entries)
  leaves = structure.flatten_up_to(node)
  for group, entry in zip(layout.groups, entries):
    leaves[group.places[0]] = entry
  return structure.unflatten(leaves)


def _select_numbers(node: LeafNumbers, group: Group) -> Any:
  """Returns the numbers of a group's leaves as a vector."""
  order = [node.names.index[path] for path in group.paths]
  begin, end = order[0], order[-1] + 1
  # A slice where possible: it is cheaper than a gather.
  if order == list(range(begin, end)):
    return node.numbers[begin:end]
  return node.numbers[np.array(order)]


def _join_numbers(node: LeafNumbers, layout: Layout, entries: Sequence[Any]) -> LeafNumbers:
  """Returns the numbers of all leaves; the old ones if a group had no update."""
  group_numbers = [(group, _select_numbers(node, group) if new is None else new)
                   for group, new in zip(layout.groups, entries)]
  order = [node.names.index[path] for group, _ in group_numbers for path in group.paths]
  joined = jnp.concatenate([x for _, x in group_numbers])
  if order != list(range(len(order))):
    joined = joined[np.argsort(order)]
  return LeafNumbers(node.names, joined)


def _make_windows(sizes: Sequence[int], limit: int) -> list[list[int]]:
  """Splits groups, in order, into windows of at most `limit` bytes each, or of a single group."""
  windows: list[list[int]] = [[]]
  used = 0
  for i, size in enumerate(sizes):
    if windows[-1] and used + size > limit:
      windows.append([])
      used = 0
    windows[-1].append(i)
    used += size
  return windows


def _finish_window(
  token: Any, results: dict[int, Any], add: bool, slots: Sequence[_Slot]
) -> tuple[Any, dict[int, Any]]:
  """Returns a token that depends on the encoded states of a window, and the window's results.

  Updates are left out unless they are already added to the parameters: an update behind the barrier
  could not be added in the kernel that computes it.
  """
  tied = {
    i: (updates if add else None,
        [x if slot.kind == "rows" else None for x, slot in zip(entries, slots)])
    for i, (updates, entries) in results.items()}
  token, tied = xla_cpu.barrier((token, tied))
  return token, {
    i: (tied[i][0] if add else updates,
        [x if slot.kind == "rows" else y for x, y, slot in zip(tied[i][1], entries, slots)])
    for i, (updates, entries) in results.items()}


def _describe_difference(
  layout: Layout | None, programs: Sequence[Any], settings: Settings
) -> str | None:
  """Says which leaves of one stack are treated differently; `None` if there are none."""
  if layout is None or (settings.stacking is not None and settings.stacking.kind is not None):
    return None
  for group in layout.groups:
    for path, place in zip(group.paths[1:], group.places[1:]):
      if programs[place] != programs[group.places[0]]:
        return (f"what it computes for leaf '{path}' is not what it computes for "
                f"'{group.paths[0]}' (they are alike in shape and dtype; give with_leaf_batching a "
                "kind that tells them apart)")
  return None


def _cast_like(x: Any, like: Any) -> Any:
  """Casts a floating-point array to the dtype of another."""
  if codecs.is_floating(x) and codecs.is_floating(like):
    return numerics.saturate_cast(x, like.dtype) if x.dtype != like.dtype else x
  return x


def _is_traced(tree: Any) -> bool:
  return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))
