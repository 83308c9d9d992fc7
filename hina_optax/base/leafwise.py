"""Lifts a formula for one leaf to an optax transformation of a tree."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hina_optax.base import numerics, paths, positions, shardings, traits
from hina_optax.base.leaf import Leaf, get_array, make_leaf, read_array, replace_array
from hina_optax.base.traits import Traits

# `formula(leaf, u, [g,] [p,] old, ...) -> (u, new)`; `part` explains the arguments.
Formula = Callable[..., tuple[Any, Any]]
InitialValue = float | Callable[[Leaf], float]
# The extra argument that says which leaves have an update, as a tree of boolean scalars.
PRESENT = "present"


def no_axes(path: str, leaf: Any) -> tuple[int, ...]:
  """The axes rule of parts that compare no neighbours."""
  del path, leaf
  return ()


def part(
  state_type: Any,
  formula: Formula,
  *,
  inner: Any = None,
  elements: Mapping[str, float | tuple[float, Any]] | None = None,
  numbers: Mapping[str, InitialValue] | None = None,
  shared: Callable[[], Mapping[str, Any]] | None = None,
  axes: paths.SpatialAxes | None = no_axes,
  reads_params: str | None = None,
  raw: bool = False,
  measure: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """A transformation that applies `formula` to each leaf, in at least fp32.

  `formula(leaf, g, old)` returns the new update and the new state. `old` is a `state_type` that
  holds the arrays of this leaf. Its `count` is the number of this step, counted from 1. With
  `inner`, the signature is `formula(leaf, u, g, old)`, where `u` is the update that the inner made
  of the gradient `g`. With `reads_params`, the parameter comes before `old`. With `measure`, the
  value measured for this leaf comes after `old`.

  A formula never sees an element that is not finite. It sees 0 in its place, and an update that is
  not finite passes unchanged. So an overflow in one element stays in that element and never reaches
  the state. The transformation's `bare` form leaves this guard to its caller.

  Args:
    state_type: a NamedTuple class. Its field `count` counts steps, its field `inner_state` holds
      the state of `inner`.
    formula: the formula for one leaf.
    inner: a transformation that runs first.
    elements: the fields with one number per element: their first value, and their dtype if it is
      not fp32.
    numbers: the fields with one number per leaf: their first value.
    shared: returns the fields that all leaves share, at `init` and at every update.
    axes: the rule for the axes along which neighbours are compared.
    reads_params: the public name of the part if it reads the parameters, for its error message.
    raw: whether the formula also gets `raw=(u, p)`, neither cast nor guarded.
    measure: a `Measure` of what the formula needs to know about other leaves.
  """
  elements, numbers = dict(elements or {}), dict(numbers or {})
  function = lift_formula(formula, raw)
  measured_kinds = _get_measure_kinds(measure)

  def build(inner: Any, guard: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def init(params: Any) -> Any:
      state = init_state(state_type, params, elements, numbers, axes)
      for kinds in measured_kinds:
        kinds(params)  # So that a LoRA pair without a factor is refused before the first update.
      fields = dict(shared()) if shared else {}
      if inner is not None:
        fields["inner_state"] = inner.init(params)
      return state._replace(**fields)

    def update(updates, state, params=None, **extra_args):
      if reads_params:
        paths.require_params(params, reads_params)
      gradients, fields = updates, {}
      if inner is not None:
        updates, fields["inner_state"] = inner.update(
          updates, state.inner_state, params, **extra_args)
      values = None
      if measure is not None:
        values, state = measure.evaluate(gradients, state, params, extra_args)
      reads = ([gradients] if inner is not None else []) + ([params] if reads_params else [])
      if "count" in state_type._fields and measure is None:
        fields["count"] = optax.safe_increment(state.count)
      state = state._replace(**fields, **(shared() if shared else {}))
      return map_leaves(
        function, updates, state, reads, elements=tuple(elements), numbers=tuple(numbers),
        axes=axes, values=values, guard=guard)

    return init, update

  return build_guarded(build, inner, Traits(
    leafwise=True, kinds=(() if axes is no_axes else (make_axes_kinds(axes),)) + measured_kinds,
    measures=() if measure is None else (measure,)))


def build_guarded(
  build: Callable[..., tuple[Callable[..., Any], Callable[..., Any]]], inner: Any,
  own_traits: Traits,
) -> optax.GradientTransformationExtraArgs:
  """Builds a part with a guard against numbers that are not finite.

  The same part without the guard becomes its trait `bare`.

  Args:
    build: `build(inner, guard)` returns `init` and `update`.
    inner: the transformation that the part wraps, or `None`.
    own_traits: the traits of the part without those of `inner`.
  """
  def build_one(
    inner: Any, guard: bool, part_traits: Traits
  ) -> optax.GradientTransformationExtraArgs:
    init, update = build(inner, guard)
    if guard:
      update = shardings.use_automatic_axes(_freeze_leaves_without_update(update))
    return traits.attach_traits(init, update, part_traits)

  if inner is not None:
    inner_traits = traits.join_traits([inner])
    own_traits = Traits(
      inner_traits.leafwise, inner_traits.kinds + own_traits.kinds,
      inner_traits.measures + own_traits.measures)
    inner = optax.with_extra_args_support(inner)
  bare = build_one(None if inner is None else traits.strip_guard(inner), False, own_traits)
  return build_one(inner, True, dataclasses.replace(own_traits, bare=bare))


def lift_formula(formula: Formula, raw: bool = False) -> Callable[..., tuple[Any, Any]]:
  """`formula` as `map_leaves` calls it. With a guard, JAX traces it once per kind of leaf."""
  apply = functools.partial(_apply, formula, raw)
  traced_once = jax.jit(apply, static_argnums=(0, 1))

  def function(leaf: Leaf, guard: bool, x: Any, *rest: Any) -> tuple[Any, Any]:
    run = traced_once if guard and isinstance(x, jax.core.Tracer) else apply
    return run(leaf, guard, x, *rest)

  return function


def make_axes_kinds(rule: paths.SpatialAxes | None) -> traits.Kinds:
  """A function that gives the axes by `rule` for each place of a tree."""
  def kinds(params: Any) -> list[Any]:
    places, leaves, _ = paths.flatten(params)
    return [None if paths.is_absent(x) else paths.resolve_axes(rule, place.path, x)
            for place, x in zip(places, leaves)]

  return kinds


def _get_measure_kinds(measure: Any) -> tuple[traits.Kinds, ...]:
  return () if measure is None or measure.kinds is None else (measure.kinds,)


def init_state(
  state_type: Any, params: Any, elements: Mapping[str, Any], numbers: Mapping[str, InitialValue],
  axes: paths.SpatialAxes | None = no_axes,
) -> Any:
  """The initial state of a part. Fields that are neither named nor `count` are `None`."""
  paths.check_floating(params, "params")
  places, leaves, _ = paths.flatten(params)
  present = [(place.path, x) for place, x in zip(places, leaves) if not paths.is_absent(x)]
  leaf_infos = [make_leaf(x, paths.resolve_axes(axes, path, x)) for path, x in present]
  fields: dict[str, Any] = dict.fromkeys(state_type._fields)
  if "count" in fields:
    fields["count"] = jnp.zeros([], jnp.int32)
  for name, initial in elements.items():
    value, dtype = initial if isinstance(initial, tuple) else (initial, None)
    fields[name] = paths.per_element_state(params, value, dtype)
  for name, initial in numbers.items():
    values = [initial(leaf) if callable(initial) else initial for leaf in leaf_infos]
    fields[name] = positions.make_leaf_numbers(
      [path for path, _ in present], jnp.asarray(values, jnp.float32))
  return state_type(**fields)


def map_leaves(
  function: Callable[..., Any], updates: Any, state: Any, reads: Sequence[Any] = (), *,
  elements: tuple[str, ...] = (), numbers: tuple[str, ...] = (),
  axes: paths.SpatialAxes | None = no_axes, values: Mapping[int, Any] | None = None,
  guard: bool = True,
) -> tuple[Any, Any]:
  """Applies `function` to each leaf of `updates`, with the leaf's state and arrays of `reads`.

  Absent leaves pass, and their state does not change.

  Args:
    function: a formula, lifted by `lift_formula`.
    updates: the tree of updates.
    state: the state of the part for the whole tree.
    reads: trees that the formula reads beside the updates, such as the parameters.
    elements: names of the fields of `state` with one number per element.
    numbers: names of the fields of `state` with one number per leaf.
    axes: the rule for the axes along which neighbours are compared.
    values: the value that a measure has for each place of the tree.
    guard: whether to keep elements that are not finite from the formula.

  Returns:
    The new updates and the new state.
  """
  if guard:
    paths.check_floating(updates, "updates")
  places, leaves, structure = paths.flatten(updates)
  columns = [structure.flatten_up_to(tree) for tree in reads]
  trees = {name: structure.flatten_up_to(getattr(state, name)) for name in elements}
  vectors = {name: getattr(state, name) for name in numbers}
  results = list(leaves)
  new_numbers: dict[str, list[Any]] = {name: [] for name in numbers}
  visited: list[str] = []
  # The formula of a wrapper is not traced with the state of its inner.
  hidden = dict.fromkeys(("inner_state",) if "inner_state" in state._fields else ())
  for i, (place, x) in enumerate(zip(places, leaves)):
    if paths.is_absent(x):
      continue
    leaf = make_leaf(x, paths.resolve_axes(axes, place.path, x) if axes is not no_axes else ())
    row = {name: get_array(column[i]) for name, column in trees.items()}
    row |= {name: vector[place.path] for name, vector in vectors.items()}
    u = jnp.asarray(get_array(x))
    operands = [None if paths.is_absent(column[i]) else jnp.asarray(read_array(column[i], u))
                for column in columns]
    measured = () if values is None else (values[i],)
    new_u, new_row = function(
      leaf, guard, u, operands, state._replace(**hidden, **row), *measured)
    results[i] = replace_array(x, new_u)
    for name in elements:
      trees[name][i] = replace_array(trees[name][i], getattr(new_row, name))
    for name in numbers:
      new_numbers[name].append(getattr(new_row, name))
    visited.append(place.path)
  changed = {name: structure.unflatten(column) for name, column in trees.items()}
  changed |= {name: _replace_numbers(vectors[name], visited, new_numbers[name]) for name in numbers}
  return structure.unflatten(results), state._replace(**changed)


def _apply(
  formula: Formula, raw: bool, leaf: Leaf, guard: bool, x: Any, operands: Sequence[Any], old: Any,
  *values: Any,
) -> tuple[Any, Any]:
  """Calls `formula` with arrays in at least fp32 that, with `guard`, are finite."""
  dtype = numerics.compute_dtype(x.dtype)

  def prepare_input(y: Any) -> Any:
    return None if y is None else (numerics.zero_non_finite(y) if guard else y).astype(dtype)

  def widen(y: Any) -> Any:
    return y.astype(dtype) if y is not None and jnp.issubdtype(y.dtype, jnp.floating) else y

  raw_inputs = {"raw": (x, operands[-1])} if raw else {}
  new, new_state = formula(
    leaf, prepare_input(x), *map(prepare_input, operands), jax.tree.map(widen, old), *values,
    **raw_inputs)
  new = numerics.saturate_cast(new, x.dtype)
  if guard:
    new = jnp.where(jnp.isfinite(x), new, x)
  return new, jax.tree.map(lambda y, stored: y.astype(stored.dtype), new_state, old)


def _replace_numbers(old: Any, leaf_paths: Sequence[str], numbers: Sequence[Any]) -> Any:
  """The `LeafNumbers` `old` with new numbers for the leaves at `leaf_paths`."""
  if not leaf_paths:
    return old
  new = jnp.stack([jnp.asarray(x).astype(old.numbers.dtype) for x in numbers])
  index = [old.names.index[path] for path in leaf_paths]
  rest = sorted(set(range(len(old.names.names))) - set(index))
  if rest:
    new = jnp.concatenate([new, old.numbers[jnp.asarray(rest)]])
  order = [*index, *rest]
  if order != sorted(order):
    new = new[jnp.asarray(sorted(range(len(order)), key=order.__getitem__))]
  return positions.LeafNumbers(old.names, new)


def _freeze_leaves_without_update(update: Callable[..., Any]) -> Callable[..., Any]:
  """Makes `update` take the extra argument `present`: other leaves keep their state."""
  def decorated(updates, state, params=None, **extra_args):
    results, new = update(updates, state, params, **extra_args)
    if extra_args.get(PRESENT) is None:
      return results, new
    return freeze_without_update(extra_args[PRESENT], updates, (results, new), state)

  return decorated


def freeze_without_update(
  present: Any, updates: Any, new: tuple[Any, Any], old: Any
) -> tuple[Any, Any]:
  """Sets the update of each leaf whose flag in `present` is false to 0, and restores its state."""
  structure = positions.get_structure(updates)
  flags = [None if paths.is_absent(x) else x for x in structure.flatten_up_to(present)]
  names = [place.path for place in paths.flatten(updates)[0]]
  is_tree = positions.is_tree_like(structure)
  results = structure.unflatten([
    x if flag is None or paths.is_absent(x) else jnp.where(flag, x, jnp.zeros_like(x))
    for flag, x in zip(flags, structure.flatten_up_to(new[0]))])
  any_present = jnp.any(jnp.stack([x for x in flags if x is not None])) if any(
    x is not None for x in flags) else True

  def choose(after: Any, before: Any) -> Any:
    if isinstance(before, positions.LeafNumbers):
      flag_by_path = dict(zip(names, flags))
      mask = jnp.stack([jnp.asarray(flag_by_path[n]) for n in before.names.names])
      return positions.LeafNumbers(before.names, jnp.where(mask, after.numbers, before.numbers))
    if is_tree(before):
      rows = zip(flags, structure.flatten_up_to(after), structure.flatten_up_to(before))
      return structure.unflatten([
        jax.tree.map(lambda a, b, flag=flag: jnp.where(flag, a, b), a, b)
        if flag is not None else a for flag, a, b in rows])
    return jax.tree.map(lambda a, b: jnp.where(any_present, a, b), after, before)

  state = jax.tree.map(choose, new[1], old,
                       is_leaf=lambda x: isinstance(x, positions.LeafNumbers) or is_tree(x))
  return results, state
