"""Finds from which leaves an inner transformation computes each result, by tracing its program.

A transformation of another library does not say whether it treats each leaf by itself.
"""

import functools
import hashlib
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from hina_optax.base import paths, positions
from hina_optax.base.leafwise import PRESENT

# Marks a vector with one number per leaf (`LeafNumbers`), which belongs to no single leaf. Only
# `base/leafwise.py` makes and reads such vectors, and for each leaf it reads the leaf's own number.
_NUMBERS = -1
_VECTOR = "vector of "
# Primitives whose body can be traced result by result, and the names of the parameter that holds
# the body. Each result of any other primitive, loops included, counts as computed from all inputs.
_CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call",
          "custom_vjp_call", "custom_vmap_call")
_BODIES = "jaxpr", "call_jaxpr", "fun_jaxpr", "call"

# From which leaves a value is computed, as a bit mask, and how, as a hash of its program.
Provenance = tuple[int, str]


class Dependencies(NamedTuple):
  """What the program of one update shows.

  Attributes:
    cross_leaf: which result for one leaf is computed from other leaves, in words; `None` if there
      is none.
    programs: for each place of the tree what is computed for its leaf; `None` for an absent leaf.
  """

  cross_leaf: str | None
  programs: list[Any]


def trace_dependencies(
  inner: Any, params: Any, extra_args: dict[str, Any], with_params: bool = True
) -> Dependencies:
  """Traces one update of the whole tree, and finds from which leaves each result is computed.

  The last leaf is also traced without the others. A difference shows that its result depends on the
  number of leaves or on the leaf's place among them, as with one random key per leaf.

  Args:
    inner: the transformation.
    params: tree of arrays or shapes.
    extra_args: extra arguments of the update.
    with_params: whether the update gets parameters.
  """
  structure = positions.get_structure(params)
  leaves = structure.flatten_up_to(params)
  shapes = structure.unflatten([
    x if paths.is_absent(x) else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves])
  state = jax.eval_shape(inner.init, shapes)
  # The update loop itself keeps the state of absent leaves.
  extra_args = {name: x for name, x in extra_args.items() if name != PRESENT}

  def run(updates, state, params):
    return inner.update(updates, state, params if with_params else None, **extra_args)

  places = paths.flatten(params)[0]
  programs: list[Any] = [None if paths.is_absent(x) else [] for x in leaves]
  for owner, name, mask, program in _trace_results(run, structure, shapes, state):
    allowed = 0 if owner is None else 1 << owner
    if mask & ~allowed:
      return Dependencies(_describe_cross_leaf(places, owner, name, mask), programs)
    if owner is not None:
      programs[owner].append(program)
  programs = [None if p is None else tuple(p) for p in programs]
  present = [i for i, x in enumerate(leaves) if not paths.is_absent(x)]
  if len(present) <= 1:
    return Dependencies(None, programs)
  last = places[present[-1]]
  return Dependencies(
    _describe_order_dependence(inner.init, run, structure, shapes, state, programs, last), programs)


def _describe_order_dependence(
  init: Any, run: Any, structure: Any, shapes: Any, state: Any, programs: Sequence[Any],
  last: paths.Place,
) -> str | None:
  """Says what differs for the `last` leaf if it is the only one; `None` if nothing does."""
  is_tree = positions.is_tree_like(structure)
  leaves = [None] * structure.num_leaves
  leaves[last.index] = structure.flatten_up_to(shapes)[last.index]
  single = structure.unflatten(leaves)
  nodes: list[Any]
  state_structure: Any
  nodes, state_structure = jax.tree.flatten(
    state, is_leaf=lambda x: is_tree(x) or isinstance(x, positions.LeafNumbers))
  try:
    # Vectors of numbers keep all leaves, since a leaf finds its own number by path.
    single_nodes = state_structure.flatten_up_to(jax.eval_shape(init, single))
    merged = [x if isinstance(x, positions.LeafNumbers) else single_node
              for x, single_node in zip(nodes, single_nodes)]
    results = _trace_results(run, structure, single, state_structure.unflatten(merged))
  except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
    return f"this one does not run on leaf '{last.path}' without the others ({error})"
  program = tuple(program for owner, _, _, program in results if owner == last.index)
  if program == programs[last.index]:
    return None
  return (f"what this one computes for leaf '{last.path}' depends on how many leaves there are, or "
          "on its place among them")


def _trace_results(
  run: Any, structure: Any, shapes: Any, state: Any
) -> list[tuple[int | None, str, int, str]]:
  """Returns, for each result of an update, its owner, its path, and its provenance.

  Vectors of numbers of leaves are left out.
  """
  # Some of optax's transformations mix dtypes; which dtype they promote to does not matter here.
  with jax.numpy_dtype_promotion("standard"):
    closed, result_shapes = jax.make_jaxpr(run, return_shape=True)(shapes, state, shapes)
  owners = _find_owners((shapes, state, shapes), structure)
  results = _trace_program(getattr(closed, "jaxpr", closed), owners, list(closed.consts))
  return [
    (owner, name, mask, program)
    for (owner, name), (mask, program) in zip(_find_owners(result_shapes, structure), results)
    if owner != _NUMBERS]


def _find_owners(tree: Any, structure: Any) -> list[tuple[int | None, str]]:
  """Returns, for each array of a tree, the place of the leaf it belongs to, and its path."""
  is_tree = positions.is_tree_like(structure)
  owners: list[tuple[int | None, str]] = []
  nodes = jax.tree_util.tree_flatten_with_path(
    tree, is_leaf=lambda x: is_tree(x) or isinstance(x, positions.LeafNumbers))[0]
  for path, node in nodes:
    name = paths.path_string(path[1:])
    if is_tree(node):
      for place, x in enumerate(structure.flatten_up_to(node)):
        owners += [(place, name)] * len(jax.tree.leaves(x))
    elif isinstance(node, positions.LeafNumbers):
      owners.append((_NUMBERS, name))
    else:
      owners.append((None, name))
  return owners


def _trace_program(
  jaxpr: Any, owners: Sequence[tuple[int | None, str]], consts: Sequence[Any]
) -> list[Provenance]:
  """Returns the provenance of each result of a program.

  The name of an input does not tell which leaf owns it, so that equal hashes are equal programs.
  """
  counts: dict[int | None, int] = {}
  provenance: dict[Any, Provenance] = {}
  for variable, (owner, name) in zip(jaxpr.invars, owners):
    number = counts.get(owner, 0)
    counts[owner] = number + 1
    if owner == _NUMBERS:
      provenance[variable] = 0, f"{_VECTOR}{name}"
      continue
    mask = 0 if owner is None else 1 << owner
    shared_name = f"{name}:" if owner is None else ""
    provenance[variable] = mask, _hash_text(f"{shared_name}{number}:{variable.aval}")
  for variable, value in zip(jaxpr.constvars, consts):
    provenance[variable] = 0, _hash_text(f"{variable.aval}:{_hash_value(value)}")
  return _propagate(jaxpr, provenance)


def _propagate(jaxpr: Any, provenance: dict[Any, Provenance]) -> list[Provenance]:
  """Returns the provenance of a program's results, given that of its inputs."""
  def find(atom: Any) -> Provenance:
    if isinstance(atom, core.Literal):
      return 0, _hash_text(f"{atom.aval}:{_hash_value(atom.val)}")
    return provenance[atom]

  for equation in jaxpr.eqns:
    inputs = [find(v) for v in equation.invars]
    vectors = [program for _, program in inputs if program.startswith(_VECTOR)]
    mask = functools.reduce(operator.or_, (input_mask for input_mask, _ in inputs), 0)
    results: list[Provenance]
    if equation.primitive.name == "cond":
      (index_mask, index_program), *operands = inputs
      branches = [_propagate_call(branch, operands) for branch in equation.params["branches"]]
      results = [
        (functools.reduce(operator.or_, (result_mask for result_mask, _ in column), index_mask),
         _hash_text(f"{index_program}?{'|'.join(program for _, program in column)}"))
        for column in zip(*branches)]
    elif equation.primitive.name in _CALLS:
      body = next(equation.params[name] for name in _BODIES if name in equation.params)
      results = _propagate_call(body, inputs)
    elif vectors:
      # Two leaves do not differ because their numbers stand at different places of a vector.
      shape = equation.invars[0].aval.shape
      results = [(mask, vectors[0] + "'" if v.aval.shape == shape else _hash_text(vectors[0]))
                 for v in equation.outvars]
    else:
      text = "|".join(program for _, program in inputs)
      options = ",".join(f"{k}={v}" for k, v in sorted(equation.params.items()) if not callable(v))
      results = [
        (mask, _hash_text(f"{equation.primitive.name}[{options}]({text})#{i}"))
        for i in range(len(equation.outvars))]
    provenance.update(zip(equation.outvars, results))
  return [find(v) for v in jaxpr.outvars]


def _propagate_call(function: Any, inputs: Sequence[Provenance]) -> list[Provenance]:
  """Returns the provenance of the results of a program within a program."""
  jaxpr = getattr(function, "jaxpr", function)
  provenance = dict(zip(jaxpr.invars, inputs))
  provenance.update({v: (0, _hash_text(f"{v.aval}:{_hash_value(c)}"))
                     for v, c in zip(jaxpr.constvars, getattr(function, "consts", ()))})
  return _propagate(jaxpr, provenance)


def _hash_text(text: str) -> str:
  return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _hash_value(value: Any) -> str:
  if isinstance(value, jax.core.Tracer):
    return f"traced {id(value)}"
  try:
    return _hash_text(np.asarray(value).tobytes().hex())
  except (TypeError, ValueError):
    return repr(value)


def _describe_cross_leaf(places: Sequence[Any], owner: int | None, name: str, mask: int) -> str:
  names = [repr(place.path) for place in places if mask >> place.index & 1]
  target = f"'{name}' of its state" if owner is None else f"leaf '{places[owner].path}'"
  more = " and others" if len(names) > 4 else ""
  return f"what this one computes for {target} depends on {', '.join(names[:4])}{more}"
