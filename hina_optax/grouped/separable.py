"""Whether a transformation of somebody else treats each leaf by itself: read from its program."""

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

# In place of a leaf's place: the owner of a vector with one number per leaf. The lift is all that
# makes and reads such vectors, and it reads a leaf's own number only.
_NUMBERS = -1
_VECTOR = "vector of "
# Programs within programs that give results one by one, and the names of their bodies. Of a loop
# each result is taken to depend on all that enters.
_CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call",
          "custom_vjp_call", "custom_vmap_call")
_BODIES = "jaxpr", "call_jaxpr", "fun_jaxpr", "call"

# The leaves that something is computed from, as bits, and how, as a text.
Source = tuple[int, str]


class Analysis(NamedTuple):
  """What the program of one update says.

  Attributes:
    mixing: what is computed for one leaf from others, in words; `None` where nothing is.
    programs: for each place of the tree what is computed for its leaf; `None` where it is absent.
  """

  mixing: str | None
  programs: list[Any]


def analyse(
  inner: Any, params: Any, extra_args: dict[str, Any], with_params: bool = True
) -> Analysis:
  """Traces one update of the whole tree, and reads what each result is computed from.

  The last leaf is also traced without the others. What differs then depends on their number, or on
  the leaf's place among them: a random key for each leaf, for instance.

  Args:
    inner: the transformation.
    params: arrays or shapes.
    extra_args: of the update.
    with_params: whether the update is given parameters.
  """
  structure = positions.structure_of(params)
  leaves = structure.flatten_up_to(params)
  shapes = structure.unflatten([
    x if paths.is_absent(x) else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves])
  state = jax.eval_shape(inner.init, shapes)
  # The driver itself keeps the state of absent leaves.
  extra_args = {name: x for name, x in extra_args.items() if name != PRESENT}

  def run(updates, state, params):
    return inner.update(updates, state, params if with_params else None, **extra_args)

  places = paths.flatten(params)[0]
  programs: list[Any] = [None if paths.is_absent(x) else [] for x in leaves]
  for owner, what, mask, text in _results(run, structure, shapes, state):
    allowed = 0 if owner is None else 1 << owner
    if mask & ~allowed:
      return Analysis(_mixing(places, owner, what, mask), programs)
    if owner is not None:
      programs[owner].append(text)
  programs = [None if p is None else tuple(p) for p in programs]
  there = [i for i, x in enumerate(leaves) if not paths.is_absent(x)]
  return Analysis(
    _numbering(inner.init, run, structure, shapes, state, programs, places[there[-1]])
    if len(there) > 1 else None, programs)


def _numbering(
  init: Any, run: Any, structure: Any, shapes: Any, state: Any, programs: Sequence[Any],
  last: paths.Leaf,
) -> str | None:
  """What is computed otherwise for the `last` leaf where it is the only one, in words."""
  is_tree = positions.is_tree_like(structure)
  leaves = [None] * structure.num_leaves
  leaves[last.index] = structure.flatten_up_to(shapes)[last.index]
  alone = structure.unflatten(leaves)
  nodes: list[Any]
  above: Any
  nodes, above = jax.tree.flatten(
    state, is_leaf=lambda x: is_tree(x) or isinstance(x, positions.LeafNumbers))
  try:
    # Numbers of leaves are found by path, whatever leaves there are.
    kept = [x if isinstance(x, positions.LeafNumbers) else own
            for x, own in zip(nodes, above.flatten_up_to(jax.eval_shape(init, alone)))]
    found = _results(run, structure, alone, above.unflatten(kept))
  except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
    return f"this one does not run on leaf '{last.path}' without the others ({error})"
  if tuple(text for owner, _, _, text in found if owner == last.index) == programs[last.index]:
    return None
  return (f"what this one computes for leaf '{last.path}' depends on how many leaves there are, or "
          "on its place among them")


def _results(
  run: Any, structure: Any, shapes: Any, state: Any
) -> list[tuple[int | None, str, int, str]]:
  """For each result of an update: its owner, its path, what it is computed from, and how.

  Vectors of numbers of leaves are left out.
  """
  # Some of optax's transformations mix dtypes; what they promote to does not matter here.
  with jax.numpy_dtype_promotion("standard"):
    closed, found = jax.make_jaxpr(run, return_shape=True)(shapes, state, shapes)
  owners = _owners((shapes, state, shapes), structure)
  masks, prints = _read(getattr(closed, "jaxpr", closed), owners, list(closed.consts))
  return [
    (owner, what, mask, text)
    for (owner, what), mask, text in zip(_owners(found, structure), masks, prints)
    if owner != _NUMBERS]


def _owners(tree: Any, structure: Any) -> list[tuple[int | None, str]]:
  """For each array of a tree the place of the leaf it belongs to, and its path."""
  is_tree = positions.is_tree_like(structure)
  found: list[tuple[int | None, str]] = []
  nodes = jax.tree_util.tree_flatten_with_path(
    tree, is_leaf=lambda x: is_tree(x) or isinstance(x, positions.LeafNumbers))[0]
  for path, node in nodes:
    name = paths.path_string(path[1:])
    if is_tree(node):
      for place, x in enumerate(structure.flatten_up_to(node)):
        found += [(place, name)] * len(jax.tree.leaves(x))
    elif isinstance(node, positions.LeafNumbers):
      found.append((_NUMBERS, name))
    else:
      found.append((None, name))
  return found


def _read(
  jaxpr: Any, owners: Sequence[tuple[int | None, str]], consts: Sequence[Any]
) -> tuple[list[int], list[str]]:
  """For each result of a program: the leaves it is computed from, as bits, and how, as a text.

  Inputs of a leaf are called alike whatever the leaf, so that equal texts are equal programs.
  """
  count: dict[int | None, int] = {}
  known: dict[Any, Source] = {}
  for variable, (owner, what) in zip(jaxpr.invars, owners):
    number = count.get(owner, 0)
    count[owner] = number + 1
    if owner == _NUMBERS:
      known[variable] = 0, f"{_VECTOR}{what}"
      continue
    mask = 0 if owner is None else 1 << owner
    shared = f"{what}:" if owner is None else ""
    known[variable] = mask, _digest(f"{shared}{number}:{variable.aval}")
  for variable, value in zip(jaxpr.constvars, consts):
    known[variable] = 0, _digest(f"{variable.aval}:{_content(value)}")

  return _evaluate(jaxpr, known)


def _evaluate(jaxpr: Any, known: dict[Any, Source]) -> tuple[list[int], list[str]]:
  """Masks and texts of the results of a program, of whose inputs they are `known`."""
  def of(atom: Any) -> Source:
    return (0, _digest(f"{atom.aval}:{_content(atom.val)}")) if isinstance(
      atom, core.Literal) else known[atom]

  for equation in jaxpr.eqns:
    inputs = [of(v) for v in equation.invars]
    vectors = [text for _, text in inputs if text.startswith(_VECTOR)]
    mask = functools.reduce(operator.or_, (part for part, _ in inputs), 0)
    results: list[Source]
    if equation.primitive.name == "cond":
      (which, choice), *operands = inputs
      branches = [_called(branch, operands) for branch in equation.params["branches"]]
      results = [
        (functools.reduce(operator.or_, (part for part, _ in column), which),
         _digest(f"{choice}?{'|'.join(text for _, text in column)}"))
        for column in zip(*branches)]
    elif equation.primitive.name in _CALLS:
      inside = next(equation.params[name] for name in _BODIES if name in equation.params)
      results = _called(inside, inputs)
    elif vectors:
      # Where in the vector a leaf's number stands is no difference between leaves.
      results = [(mask, vectors[0] + "'" if v.aval.shape == equation.invars[0].aval.shape else
                  _digest(vectors[0])) for v in equation.outvars]
    else:
      text = "|".join(part for _, part in inputs)
      options = ",".join(f"{k}={v}" for k, v in sorted(equation.params.items()) if not callable(v))
      results = [
        (mask, _digest(f"{equation.primitive.name}[{options}]({text})#{i}"))
        for i in range(len(equation.outvars))]
    known.update(zip(equation.outvars, results))
  found = [of(v) for v in jaxpr.outvars]
  return [mask for mask, _ in found], [text for _, text in found]


def _called(inside: Any, inputs: Sequence[Source]) -> list[Source]:
  """The results of a program within a program."""
  body = getattr(inside, "jaxpr", inside)
  known = dict(zip(body.invars, inputs))
  known.update({v: (0, _digest(f"{v.aval}:{_content(c)}"))
                for v, c in zip(body.constvars, getattr(inside, "consts", ()))})
  return list(zip(*_evaluate(body, known)))


def _digest(text: str) -> str:
  return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _content(value: Any) -> str:
  if isinstance(value, jax.core.Tracer):
    return f"traced {id(value)}"
  try:
    return _digest(np.asarray(value).tobytes().hex())
  except (TypeError, ValueError):
    return repr(value)


def _mixing(places: Sequence[Any], owner: int | None, what: str, mask: int) -> str:
  names = [repr(place.path) for place in places if mask >> place.index & 1]
  target = f"'{what}' of its state" if owner is None else f"leaf '{places[owner].path}'"
  more = " and others" if len(names) > 4 else ""
  return f"what this one computes for {target} depends on {', '.join(names[:4])}{more}"
