"""From a formula for one leaf to an optax transformation of a tree."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hina_optax.base import numerics, paths, positions, shardings, traits
from hina_optax.base.leaf import Leaf, array_of, leaf_of, like, read
from hina_optax.base.traits import Traits

# `formula(leaf, u, [g,] [p,] old, ...) -> (u, new)`: see `part`.
Formula = Callable[..., tuple[Any, Any]]
Start = float | Callable[[Leaf], float]
# The extra argument that says which leaves have an update: a tree of boolean scalars.
PRESENT = "present"


def no_axes(path: str, leaf: Any) -> tuple[int, ...]:
  """The rule of parts that compare no neighbours."""
  del path, leaf
  return ()


def part(
  state_type: Any,
  formula: Formula,
  *,
  inner: Any = None,
  elements: Mapping[str, float | tuple[float, Any]] | None = None,
  numbers: Mapping[str, Start] | None = None,
  shared: Callable[[], Mapping[str, Any]] | None = None,
  axes: paths.SpatialAxes | None = no_axes,
  reads_params: str | None = None,
  raw: bool = False,
  measure: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """A transformation that applies `formula` to each leaf, in at least fp32.

  `formula(leaf, g, old)` returns the new update and the new state: `old` is a `state_type` that
  holds the arrays of this leaf, and `count` is the number of this step, counted from 1. With
  `inner` it is `formula(leaf, u, g, old)`, where `u` is what the inner made of the gradient `g`.
  With `reads_params` the parameter stands before `old`, with `measure` what it found for this leaf
  behind it.

  A formula never sees an element that is not finite: it sees 0 in its place, and such an update
  passes unchanged, so an overflow in one element stays in that element and out of the state. The
  transformation's `bare` form leaves that to whoever calls it.

  Args:
    state_type: a NamedTuple class. Its field `count` counts steps, `inner_state` is the inner's.
    formula: of one leaf.
    inner: a transformation that runs first.
    elements: fields with one number per element: their first value, and their dtype if it is not
      fp32.
    numbers: fields with one number per leaf: their first value.
    shared: gives the fields that all leaves share, at `init` and at every update.
    axes: the rule for the axes along which neighbours are compared.
    reads_params: the public name of a part that reads the parameters.
    raw: whether the formula is also given `raw=(u, p)`, as they came.
    measure: a `Measure` of what the formula needs to know of other leaves.
  """
  elements, numbers = dict(elements or {}), dict(numbers or {})
  function = on_leaf(formula, raw)
  measured = _kinds_by_measure(measure)

  def build(inner: Any, guard: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def init(params: Any) -> Any:
      state = begin(state_type, params, elements, numbers, axes)
      for kinds in measured:
        kinds(params)  # A pair that lacks a factor is refused before the first update.
      own = dict(shared()) if shared else {}
      if inner is not None:
        own["inner_state"] = inner.init(params)
      return state._replace(**own)

    def update(updates, state, params=None, **extra_args):
      if reads_params:
        paths.require_params(params, reads_params)
      gradients, new = updates, {}
      if inner is not None:
        updates, new["inner_state"] = inner.update(
          updates, state.inner_state, params, **extra_args)
      values = None
      if measure is not None:
        values, state = measure.of_step(gradients, state, params, extra_args)
      reads = ([gradients] if inner is not None else []) + ([params] if reads_params else [])
      if "count" in state_type._fields and measure is None:
        new["count"] = optax.safe_increment(state.count)
      state = state._replace(**new, **(shared() if shared else {}))
      return map_leaves(
        function, updates, state, reads, elements=tuple(elements), numbers=tuple(numbers),
        axes=axes, values=values, guard=guard)

    return init, update

  return both_forms(build, inner, Traits(
    leafwise=True, kinds=(() if axes is no_axes else (kinds_by_axes(axes),)) + measured,
    measures=() if measure is None else (measure,)))


def both_forms(
  build: Callable[..., tuple[Callable[..., Any], Callable[..., Any]]], inner: Any, own: Traits
) -> optax.GradientTransformationExtraArgs:
  """The part of which `build(inner, guard)` gives `init` and `update`; its bare form hangs on it.

  `own` is what is known of the part beside its `inner`, which may be `None`.
  """
  def form(inner: Any, guard: bool, known: Traits) -> optax.GradientTransformationExtraArgs:
    init, update = build(inner, guard)
    if guard:
      update = shardings.automatic(_keeping_absent(update))
    return traits.with_traits(init, update, known)

  if inner is not None:
    below = traits.joined([inner])
    own = Traits(below.leafwise, below.kinds + own.kinds, below.measures + own.measures)
    inner = optax.with_extra_args_support(inner)
  plain = form(None if inner is None else traits.bare(inner), False, own)
  return form(inner, True, dataclasses.replace(own, bare=plain))


def on_leaf(formula: Formula, raw: bool = False) -> Callable[..., tuple[Any, Any]]:
  """`formula` as `map_leaves` calls it; with a guard, traced once for all leaves that are alike."""
  apply = functools.partial(_apply, formula, raw)
  traced_once = jax.jit(apply, static_argnums=(0, 1))

  def function(leaf: Leaf, guard: bool, x: Any, *rest: Any) -> tuple[Any, Any]:
    chosen = traced_once if guard and isinstance(x, jax.core.Tracer) else apply
    return chosen(leaf, guard, x, *rest)

  return function


def kinds_by_axes(rule: paths.SpatialAxes | None) -> traits.Kinds:
  """The axes that `rule` gives, for each place of a tree."""
  def kinds(params: Any) -> list[Any]:
    places, leaves, _ = paths.flatten(params)
    return [None if paths.is_absent(x) else paths.resolve_axes(rule, place.path, x)
            for place, x in zip(places, leaves)]

  return kinds


def _kinds_by_measure(measure: Any) -> tuple[traits.Kinds, ...]:
  return () if measure is None or measure.kinds is None else (measure.kinds,)


def begin(
  state_type: Any, params: Any, elements: Mapping[str, Any], numbers: Mapping[str, Start],
  axes: paths.SpatialAxes | None = no_axes,
) -> Any:
  """The first state of a part; fields that are not named are `None`."""
  paths.check_floating(params, "params")
  places, leaves, _ = paths.flatten(params)
  present = [(place.path, x) for place, x in zip(places, leaves) if not paths.is_absent(x)]
  found = [leaf_of(x, paths.resolve_axes(axes, path, x)) for path, x in present]
  fields: dict[str, Any] = dict.fromkeys(state_type._fields)
  if "count" in fields:
    fields["count"] = jnp.zeros([], jnp.int32)
  for name, start in elements.items():
    value, dtype = start if isinstance(start, tuple) else (start, None)
    fields[name] = paths.per_element_state(params, value, dtype)
  for name, first in numbers.items():
    starts = [first(leaf) if callable(first) else first for leaf in found]
    fields[name] = positions.leaf_numbers(
      [path for path, _ in present], jnp.asarray(starts, jnp.float32))
  return state_type(**fields)


def map_leaves(
  function: Callable[..., Any], updates: Any, state: Any, reads: Sequence[Any] = (), *,
  elements: tuple[str, ...] = (), numbers: tuple[str, ...] = (),
  axes: paths.SpatialAxes | None = no_axes, values: Mapping[int, Any] | None = None,
  guard: bool = True,
) -> tuple[Any, Any]:
  """`function` of each leaf of `updates`, of `reads` beside it, and of its own part of `state`.

  Absent leaves pass, with their state as it was. `values` has one value for each place of the tree.
  """
  if guard:
    paths.check_floating(updates, "updates")
  places, leaves, structure = paths.flatten(updates)
  columns = [structure.flatten_up_to(tree) for tree in reads]
  trees = {name: structure.flatten_up_to(getattr(state, name)) for name in elements}
  vectors = {name: getattr(state, name) for name in numbers}
  results = list(leaves)
  found: dict[str, list[Any]] = {name: [] for name in numbers}
  seen: list[str] = []
  hidden = dict.fromkeys(("inner_state",) if "inner_state" in state._fields else ())
  for i, (place, x) in enumerate(zip(places, leaves)):
    if paths.is_absent(x):
      continue
    leaf = leaf_of(x, paths.resolve_axes(axes, place.path, x) if axes is not no_axes else ())
    row = {name: array_of(column[i]) for name, column in trees.items()}
    row |= {name: vector[place.path] for name, vector in vectors.items()}
    own = jnp.asarray(array_of(x))
    others = [None if paths.is_absent(c[i]) else jnp.asarray(read(c[i], own)) for c in columns]
    more = () if values is None else (values[i],)
    new, after = function(
      leaf, guard, own, others, state._replace(**hidden, **row), *more)
    results[i] = like(new, x)
    for name in elements:
      trees[name][i] = like(getattr(after, name), trees[name][i])
    for name in numbers:
      found[name].append(getattr(after, name))
    seen.append(place.path)
  changed = {name: structure.unflatten(column) for name, column in trees.items()}
  changed |= {name: _with_numbers(vectors[name], seen, found[name]) for name in numbers}
  return structure.unflatten(results), state._replace(**changed)


def _apply(
  formula: Formula, raw: bool, leaf: Leaf, guard: bool, x: Any, others: Sequence[Any], old: Any,
  *values: Any,
) -> tuple[Any, Any]:
  """`formula` of one leaf, its numbers in at least fp32 and, with `guard`, finite."""
  dtype = numerics.compute_dtype(x.dtype)

  def seen(y: Any) -> Any:
    return None if y is None else (numerics.finite(y) if guard else y).astype(dtype)

  def wide(y: Any) -> Any:
    return y.astype(dtype) if y is not None and jnp.issubdtype(y.dtype, jnp.floating) else y

  inside = jax.tree.map(wide, old)
  more = {"raw": (x, others[-1])} if raw else {}
  new, after = formula(leaf, seen(x), *map(seen, others), inside, *values, **more)
  new = numerics.narrowed(new, x.dtype)
  if guard:
    new = jnp.where(jnp.isfinite(x), new, x)
  return new, jax.tree.map(lambda y, stored: y.astype(stored.dtype), after, old)


def _with_numbers(old: Any, seen: Sequence[str], found: Sequence[Any]) -> Any:
  """The vector `old` with new numbers for the leaves at these paths."""
  if not seen:
    return old
  new = jnp.stack([jnp.asarray(x).astype(old.numbers.dtype) for x in found])
  index = [old.names.index[path] for path in seen]
  rest = sorted(set(range(len(old.names.names))) - set(index))
  if rest:
    new = jnp.concatenate([new, old.numbers[jnp.asarray(rest)]])
  order = [*index, *rest]
  if order != sorted(order):
    new = new[jnp.asarray(sorted(range(len(order)), key=order.__getitem__))]
  return positions.LeafNumbers(old.names, new)


def _keeping_absent(update: Callable[..., Any]) -> Callable[..., Any]:
  """`update`, which leaves the state of leaves alone that the argument `present` calls absent."""
  def decorated(updates, state, params=None, **extra_args):
    results, new = update(updates, state, params, **extra_args)
    if extra_args.get(PRESENT) is None:
      return results, new
    return keep_absent(extra_args[PRESENT], updates, (results, new), state)

  return decorated


def keep_absent(present: Any, updates: Any, new: tuple[Any, Any], old: Any) -> tuple[Any, Any]:
  """The results of an update, with updates of 0 and the old state where a leaf is not `present`."""
  structure = positions.structure_of(updates)
  here = [None if paths.is_absent(x) else x for x in structure.flatten_up_to(present)]
  names = [place.path for place in paths.flatten(updates)[0]]
  is_tree = positions.is_tree_like(structure)
  results = structure.unflatten([
    x if flag is None or paths.is_absent(x) else jnp.where(flag, x, jnp.zeros_like(x))
    for flag, x in zip(here, structure.flatten_up_to(new[0]))])
  some = jnp.any(jnp.stack([x for x in here if x is not None])) if any(
    x is not None for x in here) else True

  def choose(after: Any, before: Any) -> Any:
    if isinstance(before, positions.LeafNumbers):
      known = dict(zip(names, here))
      flags = jnp.stack([jnp.asarray(known[n]) for n in before.names.names])
      return positions.LeafNumbers(before.names, jnp.where(flags, after.numbers, before.numbers))
    if is_tree(before):
      rows = zip(here, structure.flatten_up_to(after), structure.flatten_up_to(before))
      return structure.unflatten([
        jax.tree.map(lambda a, b, flag=flag: jnp.where(flag, a, b), a, b)
        if flag is not None else a for flag, a, b in rows])
    return jax.tree.map(lambda a, b: jnp.where(some, a, b), after, before)

  kept = jax.tree.map(choose, new[1], old,
                      is_leaf=lambda x: isinstance(x, positions.LeafNumbers) or is_tree(x))
  return results, kept
