"""The update of one group: stack its leaves, decode, run, encode, split."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hina_optax.base import numerics, paths
from hina_optax.base.positions import LeafNumbers, intern_names
from hina_optax.grouped import codecs, xla_cpu
from hina_optax.grouped.arrangements import Arrangement, CpuArrangement, GroupSignature
from hina_optax.grouped.codecs import Codec, CodecKeys
from hina_optax.grouped.layout import Group


class GroupInputs(NamedTuple):
  """The inputs of one group's update.

  Attributes:
    group: the group.
    gradients: one per leaf, absent ones included.
    params: one per leaf; `None` if the update gets no parameters.
    state: for each slot of the state the group's part, encoded; a vector for a slot with numbers of
      leaves; `None` for a shared slot.
    encodings: how these parts are encoded.
    values: values of measures, one row per leaf.
    present: one boolean per leaf; `None` if all leaves have an update.
  """

  group: Group
  gradients: list[Any]
  params: list[Any] | None
  state: list[Any]
  encodings: list[Any]
  values: dict[str, Any]
  present: Any


class GroupResults(NamedTuple):
  """The results of the updates of some groups.

  Attributes:
    groups: for each group its updates and its new state, in the format of `GroupInputs.state`.
    shared: the new shared state.
    token: a number that depends on the updates, in a program for CPUs.
  """

  groups: list[tuple[list[Any], list[Any]]]
  shared: list[Any]
  token: Any


class GroupUpdater:
  """Updates the groups of one step.

  Args:
    inner: the transformation.
    state_codecs: how the state is stored, from the inside out.
    params_structure: structure of the user's tree.
    state_structure: structure of the state above its slots.
    slot_kinds: kind of each slot.
    is_leafwise: whether the inner treats each leaf by itself by construction. If so, it runs
      under `vmap` on a tree that holds one leaf only, and groups with equal signatures share one
      program.
    extra_args: extra arguments of the inner.
    add: whether to return new parameters instead of updates.
    guards_non_finite: see `Settings`.
    traced: whether the step is traced.
  """

  def __init__(self, inner: Any, state_codecs: Sequence[Codec], params_structure: Any,
               state_structure: Any, slot_kinds: Sequence[str], is_leafwise: bool,
               extra_args: dict[str, Any], add: bool, guards_non_finite: bool, traced: bool):
    self.inner, self.codecs = inner, state_codecs
    self.params_structure, self.state_structure = params_structure, state_structure
    self.slot_kinds, self.is_leafwise = slot_kinds, is_leafwise
    self.extra_args, self.add = extra_args, add
    self.guards_non_finite, self.traced = guards_non_finite, traced
    # Place and path of the first leaf per signature. Groups of equal signature run in its place, so
    # that they share one program.
    self._first_leaves: dict[GroupSignature, tuple[int, str]] = {}
    # Jitted only inside of a trace: `_update_group` is a new function per step, so an eager call
    # would be compiled anew.
    self._update_jitted = (
      jax.jit(self._update_group, static_argnums=(0, 1, 2)) if traced else self._update_group)
    self._update_called = xla_cpu.jit_without_inlining(
      self._update_group, static_argnums=(0, 1, 2))

  def update(self, batch: Sequence[GroupInputs], shared: list[Any], token: Any, element_count: int,
             keys: CodecKeys) -> GroupResults:
    """Updates the groups of one call of the inner.

    Args:
      batch: one group, or several leaves that are not stacked.
      shared: the shared state, decoded.
      token: `GroupResults.token` of the groups before. On CPUs this update waits for it.
      element_count: number of elements of all groups of the step.
      keys: keys of the codecs.
    """
    if len(batch) > 1 or (not self.is_leafwise and not batch[0].group.stacked):
      return self._update_unstacked(batch, shared, token, keys)
    [inputs] = batch
    encodings, encodings_structure = jax.tree.flatten(inputs.encodings)
    signature = GroupSignature(
      len(inputs.group.places), inputs.group.shape, inputs.group.kind,
      tuple(paths.is_absent(g) for g in inputs.gradients), (tuple(encodings), encodings_structure))
    first_leaf = inputs.group.places[0], inputs.group.paths[0]
    if self.is_leafwise:
      first_leaf = self._first_leaves.setdefault(signature, first_leaf)
    leaf_keys = codecs.derive_leaf_keys(inputs.encodings, keys)
    existing_g = [g for g in inputs.gradients if not paths.is_absent(g)]
    args = (token, existing_g, inputs.params, inputs.state, shared, inputs.values, inputs.present,
            leaf_keys)

    def default(token: Any, g: Any, p: Any, *rest: Any) -> Any:
      return (*self._update_jitted(signature, first_leaf, False, g, p, *rest), token)

    def on_cpu(token: Any, g: Any, p: Any, state: Any, *rest: Any) -> Any:
      g = [xla_cpu.delay_until(token, g[0]), *g[1:]]
      # Reshaped outside of the call: XLA cannot write new state in the place of the old if a
      # reshape stands in the kernel.
      flat_state = _flatten_stacks(signature, state)
      updates, new_state, new_shared = self._update_called(
        signature, first_leaf, True, g, p, flat_state, *rest)
      new_state = jax.tree.map(lambda x, old: x.reshape(old.shape), new_state, state)
      token = xla_cpu.make_token(updates[:1])
      # Outside of the call, so that it shares a kernel with the addition to the parameter.
      if self.guards_non_finite:
        updates = [self._restore_non_finite(u, x) for u, x in zip(updates, g)]
      return updates, new_state, new_shared, token

    offloads = any(not codec.is_lossy for codec in self.codecs)
    if (self.traced and self.is_leafwise and not offloads
        and xla_cpu.is_worthwhile(element_count)):
      updates, state, new_shared, token = xla_cpu.run_per_platform(on_cpu, default, *args)
    else:
      updates, state, new_shared, token = default(*args)
    return GroupResults([(self._finish_updates(inputs, updates), state)], new_shared, token)

  def _update_group(
    self, signature: GroupSignature, first_leaf: tuple[int, str], on_cpu: bool, gradients: Any,
    params: Any, state: Any, shared: Any, values: Any, present: Any, keys: Any,
  ) -> Any:
    """Returns the updates of the present leaves, the new encoded state and the new shared state."""
    encodings = jax.tree.unflatten(signature.encodings[1], signature.encodings[0])
    decoded = self._decode(encodings, state, keys)
    g: Any = _insert_absent(gradients, signature.absent)
    arrangement = CpuArrangement(signature) if on_cpu else Arrangement(signature, self.traced)
    g = arrangement.stack_leaves(self._widen(g))
    p = None if params is None else arrangement.stack_params(self._widen(params))
    raw_g, p = arrangement.materialize(g, p)
    g = raw_g
    if self.guards_non_finite:
      g = numerics.clip_to_squarable(
        numerics.zero_non_finite(raw_g).astype(numerics.compute_dtype(raw_g.dtype)))
    # Under `vmap` each leaf sees a vector with its own number.
    has_axis = [kind == "numbers" and signature.stacked for kind in self.slot_kinds]
    slots = [x[:, None] if is_vector else x for x, is_vector in zip(decoded, has_axis)]
    slots = [arrangement.enter_state(x) if kind == "rows" else x
             for kind, x in zip(self.slot_kinds, slots)]

    def update_leaf(g: Any, p: Any, slots: Any, values: Any) -> Any:
      return self._update_leaf(first_leaf, arrangement, g, p, slots, shared, values)

    if signature.stacked:
      axes = 0, arrangement.params_axis, 0, 0
      run = jax.vmap(update_leaf, in_axes=axes, out_axes=(0, 0, None))
    else:
      run, values = update_leaf, jax.tree.map(lambda x: x[0], values)
    u, new_slots, new_shared = run(g, p, slots, values)
    new = [x[:, 0] if is_vector else x for x, is_vector in zip(new_slots, has_axis)]
    new = [arrangement.leave_state(x, old) if kind == "rows" else x
           for kind, x, old in zip(self.slot_kinds, new, decoded)]
    new = self._keep_absent(signature, new, decoded, present)
    encoded = self._encode(encodings, new, keys)
    if self.guards_non_finite and not on_cpu:
      u = self._restore_non_finite(u, raw_g)
    updates = [x for x, is_absent in zip(arrangement.split_updates(u), signature.absent)
               if not is_absent]
    return updates, encoded, new_shared

  def _decode(self, encodings: Sequence[Any], state: Sequence[Any], keys: Sequence[Any]) -> Any:
    return _map_encoded(
      lambda encoding, x, leaf_keys: codecs.decode_leaves(self.codecs, encoding, x, leaf_keys),
      encodings, state, keys)

  def _encode(self, encodings: Sequence[Any], state: Sequence[Any], keys: Sequence[Any]) -> Any:
    return _map_encoded(
      lambda encoding, x, leaf_keys: codecs.encode_leaves(self.codecs, encoding, x, leaf_keys),
      encodings, state, keys)

  def _widen(self, leaves: Sequence[Any]) -> list[Any]:
    is_lossy = any(codec.is_lossy for codec in self.codecs)
    return [codecs.widen(x) if is_lossy and not paths.is_absent(x) else x for x in leaves]

  def _update_leaf(self, first_leaf: tuple[int, str], arrangement: Any, g: Any, p: Any,
                   slots: Any, shared: Any, values: Any) -> Any:
    """Runs the inner on one leaf, in the place of the first leaf of its signature."""
    place, path = first_leaf

    def make_tree(x: Any, placeholders: Any = None) -> Any:
      leaves = list(placeholders or [None] * self.params_structure.num_leaves)
      leaves[place] = x
      return self.params_structure.unflatten(leaves)

    nodes = []
    placeholders = self._make_placeholders({place: g})
    for k, (kind, x, shared_node) in enumerate(zip(self.slot_kinds, slots, shared)):
      if kind == "rows":
        nodes.append(make_tree(arrangement.wrap_leaf(x), placeholders[k]))
      elif kind == "numbers":
        nodes.append(LeafNumbers(intern_names((path,)), x))
      else:
        nodes.append(shared_node)
    leaf_values = {name: {place: value} for name, value in values.items()}
    updates, new_state = self.inner.update(
      make_tree(arrangement.wrap_leaf(g)), self.state_structure.unflatten(nodes),
      None if p is None else make_tree(arrangement.wrap_param(p)), **self.extra_args, **leaf_values)
    new_slots, new_shared = [], []
    for kind, node in zip(self.slot_kinds, self.state_structure.flatten_up_to(new_state)):
      new = None
      if kind == "rows":
        new = arrangement.unwrap_leaf(self.params_structure.flatten_up_to(node)[place])
      elif kind == "numbers":
        new = node.numbers
      new_slots.append(new)
      new_shared.append(node if kind == "shared" else None)
    u = arrangement.unwrap_leaf(self.params_structure.flatten_up_to(updates)[place])
    return u, new_slots, new_shared

  def _make_placeholders(self, leaves: dict[int, Any]) -> list[Any]:
    """Returns, for each slot, what the inner's state holds in the place of all other leaves.

    Masks leave a `MaskedNode` for some absent leaves, and nothing for others. The inner's `update`
    expects what its `init` returns for the same tree.
    """
    if self.is_leafwise:
      return [None] * len(self.slot_kinds)
    count = self.params_structure.num_leaves
    shapes = [jax.ShapeDtypeStruct(leaves[i].shape, leaves[i].dtype) if i in leaves else None
              for i in range(count)]
    state = jax.eval_shape(self.inner.init, self.params_structure.unflatten(shapes))
    return [self.params_structure.flatten_up_to(node) if kind == "rows" else None
            for kind, node in zip(self.slot_kinds, self.state_structure.flatten_up_to(state))]

  def _keep_absent(self, signature: GroupSignature, new: list[Any], old: list[Any], present: Any
                   ) -> list[Any]:
    """Returns the new state, with the old state of leaves that have no update."""
    if any(signature.absent):
      new = _select_leaves(signature, ~np.array(signature.absent), new, old)
    if present is not None:
      new = _select_leaves(signature, present, new, old)
    return new

  def _restore_non_finite(self, u: Any, gradient: Any) -> Any:
    """Returns `u`, with the gradient itself where that is not finite."""
    dtype = numerics.compute_dtype(u.dtype, gradient.dtype)
    return jnp.where(jnp.isfinite(gradient), u.astype(dtype), gradient.astype(dtype))

  def _finish_updates(self, inputs: GroupInputs, updates: Sequence[Any]) -> list[Any]:
    """Returns one update per leaf, or its new parameter; an absent leaf stays absent."""
    remaining, finished = iter(updates), []
    is_lossy = any(codec.is_lossy for codec in self.codecs)
    for i, gradient in enumerate(inputs.gradients):
      if paths.is_absent(gradient):
        finished.append(
          inputs.params[i] if self.add and inputs.params is not None else gradient)
        continue
      x, gradient = next(remaining), jnp.asarray(gradient)
      param: Any = None if inputs.params is None else jnp.asarray(inputs.params[i])
      if self.guards_non_finite and param is not None:
        x = numerics.saturate_cast(x, param.dtype)
      elif is_lossy and codecs.is_floating(gradient):
        x = numerics.saturate_cast(x, gradient.dtype) if x.dtype != gradient.dtype else x
      if inputs.present is not None:
        x = jnp.where(inputs.present[i], x, jnp.zeros_like(x))
      if self.add:
        same = param.dtype == x.dtype
        dtype = param.dtype if same else numerics.compute_dtype(param.dtype, x.dtype)
        x = (param.astype(dtype) + x.astype(dtype)).astype(param.dtype)
      finished.append(x)
    return finished

  def _update_unstacked(
    self, batch: Sequence[GroupInputs], shared: list[Any], token: Any, keys: CodecKeys
  ) -> GroupResults:
    """Updates leaves that are not stacked in one call, on the user's tree without other leaves."""
    def make_tree(values: Sequence[Any], placeholders: Any = None) -> Any:
      leaves = list(placeholders or [None] * self.params_structure.num_leaves)
      for inputs, x in zip(batch, values):
        leaves[inputs.group.places[0]] = x
      return self.params_structure.unflatten(leaves)

    leaf_keys = [codecs.derive_leaf_keys(inputs.encodings, keys) for inputs in batch]
    decoded = [self._decode(inputs.encodings, inputs.state, own_keys)
               for inputs, own_keys in zip(batch, leaf_keys)]
    gradients = self._widen([inputs.gradients[0] for inputs in batch])
    placeholders = self._make_placeholders(
      {inputs.group.places[0]: g for inputs, g in zip(batch, gradients)})
    nodes: list[Any] = []
    for k, kind in enumerate(self.slot_kinds):
      entries = [slots[k] for slots in decoded]
      if kind == "rows":
        nodes.append(make_tree(entries, placeholders[k]))
      elif kind == "numbers":
        names = tuple(inputs.group.paths[0] for inputs in batch)
        nodes.append(LeafNumbers(intern_names(names), jnp.concatenate(entries)))
      else:
        nodes.append(shared[k])
    params = None if batch[0].params is None else make_tree(
      self._widen([inputs.params[0] for inputs in batch if inputs.params is not None]))
    updates, new_state = self.inner.update(
      make_tree(gradients), self.state_structure.unflatten(nodes), params, **self.extra_args)
    leaf_updates = self.params_structure.flatten_up_to(updates)
    new_nodes = self.state_structure.flatten_up_to(new_state)
    new_shared = [x if kind == "shared" else None for kind, x in zip(self.slot_kinds, new_nodes)]
    groups = []
    for i, inputs in enumerate(batch):
      place = inputs.group.places[0]
      signature = GroupSignature(1, inputs.group.shape, None, (False,), None)
      new = [
        self.params_structure.flatten_up_to(x)[place] if kind == "rows"
        else x.numbers[i:i + 1] if kind == "numbers" else None
        for kind, x in zip(self.slot_kinds, new_nodes)]
      new = self._keep_absent(signature, new, decoded[i], inputs.present)
      encoded = self._encode(inputs.encodings, new, leaf_keys[i])
      groups.append((self._finish_updates(inputs, [leaf_updates[place]]), encoded))
    return GroupResults(groups, new_shared, token)


def _map_encoded(
  function: Any, encodings: Sequence[Any], state: Sequence[Any], keys: Sequence[Any]
) -> list[Any]:
  """Applies `function(encodings, part, keys)` to each slot that has encodings.

  `keys` is one list for the leaves of all slots, in order.
  """
  results: list[Any] = []
  keys = list(keys)
  for encoding, x in zip(encodings, state):
    if encoding is None:
      results.append(x)
      continue
    count = len(jax.tree.leaves(encoding))
    results.append(function(encoding, x, keys[:count]))
    keys = keys[count:]
  return results


def _select_leaves(
  signature: GroupSignature, has_update: Any, new: Sequence[Any], old: Sequence[Any]
) -> list[Any]:
  """Selects the state of each leaf: `new` if the leaf has an update, else `old`."""
  def select(a: Any, b: Any) -> Any:
    flags = jnp.asarray(has_update)
    if not signature.stacked:
      return jnp.where(flags[0], a, b)
    return jnp.where(flags.reshape(-1, *[1] * (a.ndim - 1)), a, b)

  return [None if x is None and y is None else jax.tree.map(select, x, y)
          for x, y in zip(new, old)]


def _flatten_stacks(signature: GroupSignature, state: list[Any]) -> list[Any]:
  """Flattens each leaf of the stacks in a state; leaves in 8 bits keep their shape."""
  def flatten(x: Any) -> Any:
    if isinstance(x, codecs.QuantizedLeaf) or not signature.stacked or len(signature.shape) <= 1:
      return x
    stack_shape = (signature.count, *signature.shape)
    return x.reshape(signature.count, -1) if x.shape == stack_shape else x

  return jax.tree.map(flatten, state, is_leaf=lambda x: isinstance(x, codecs.QuantizedLeaf))


def _insert_absent(present: Sequence[Any], absent: Sequence[bool]) -> list[Any]:
  remaining = iter(present)
  return [None if is_absent else next(remaining) for is_absent in absent]
