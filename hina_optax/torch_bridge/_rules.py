"""What the bridge asks of an optimizer: how state begins, and one update with given numbers."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

Numbers = Mapping[str, Any]
# What torch's schedulers call it, and what optax does.
LEARNING_RATE = "learning_rate"
# The loss that a closure returned, among the numbers of an update: optax calls it so too.
VALUE = "value"


@dataclasses.dataclass(frozen=True)
class Rule:
  """An optimizer for one group of parameters.

  Attributes:
    init: the state of a tree of parameters.
    update: `update(updates, state, params, numbers)`, as optax's with the group's numbers.
    numbers: what can be changed from outside without compiling again, and where it begins; torch's
      schedulers change `lr`.
    takes_absent: whether updates that are `None` are known to leave their state alone.
    tree: the kind of mapping that parameters come in; JAX sorts the names of a dict.
    options: the `HinaOptions` that it was made from, if it was.
  """

  init: Callable[[Any], Any]
  update: Callable[[Any, Any, Any, Numbers], tuple[Any, Any]]
  numbers: dict[str, float]
  takes_absent: bool = False
  tree: type = dict
  options: Any = None


def rule_of(tx: optax.GradientTransformation, params: Any) -> Rule:
  """The rule of any transformation, for parameters of these shapes.

  Numbers are those that `optax.inject_hyperparams` lets out and that follow no schedule. Without an
  injected learning rate `lr` is a factor on the updates, 1 at first.
  """
  tx = optax.with_extra_args_support(tx)
  found = _injected_numbers(tx, params)
  scaled = LEARNING_RATE not in found
  numbers = {"lr": 1.0 if scaled else found.pop(LEARNING_RATE), **found}

  def update(updates: Any, state: Any, params: Any, numbers: Numbers) -> tuple[Any, Any]:
    extra = {VALUE: numbers[VALUE]} if VALUE in numbers else {}
    given = {name: x for name, x in numbers.items() if name not in ("lr", VALUE)}
    if not scaled:
      given[LEARNING_RATE] = numbers["lr"]
    updates, state = tx.update(updates, _inject(state, given), params, **extra)
    return (_scale(updates, numbers["lr"]) if scaled else updates), state

  return Rule(tx.init, update, numbers)


def _injected_numbers(tx: optax.GradientTransformation, params: Any) -> dict[str, float]:
  def of_zeros() -> dict[str, jax.Array]:
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params)
    numbers: dict[str, jax.Array] = {}
    for state in _injected(tx.init(zeros)):
      free = set(state.hyperparams) - set(state.hyperparams_states)
      numbers |= {name: state.hyperparams[name] for name in free}
    return {name: x for name, x in numbers.items() if jnp.ndim(x) == 0}

  # Compiled, the numbers are all that is left of it: no state is allocated.
  # By way of a string a number in 32 bits is again the one that was written.
  return {name: float(str(x)) for name, x in sorted(jax.jit(of_zeros)().items())}


def _is_injected(node: Any) -> bool:
  return isinstance(node, optax.schedules.InjectStatefulHyperparamsState)


def _injected(state: Any) -> list[Any]:
  found = [x for x in jax.tree.leaves(state, is_leaf=_is_injected) if _is_injected(x)]
  return found + [inner for x in found for inner in _injected(x.inner_state)]


def _inject(state: Any, numbers: Numbers) -> Any:
  def replaced(node: Any) -> Any:
    if not _is_injected(node):
      return node
    new = {
      name: jnp.asarray(numbers[name]).astype(x.dtype) if name in numbers else x
      for name, x in node.hyperparams.items()
    }
    return node._replace(hyperparams=new, inner_state=_inject(node.inner_state, numbers))

  return jax.tree.map(replaced, state, is_leaf=_is_injected)


def _scale(updates: Any, factor: Any) -> Any:
  def scaled(u: jax.Array) -> jax.Array:
    wide = u.dtype if u.dtype.itemsize >= 4 else jnp.float32
    return (u.astype(wide) * jnp.asarray(factor).astype(wide)).astype(u.dtype)

  return jax.tree.map(scaled, updates)


def with_missing(rule: Rule, missing: frozenset[str]) -> Rule:
  """`rule` for a step at which some gradients are `None`: their state stays as it is.

  Transformations that know absent updates get them; for others (Adam would lose its moments) the
  gradient is 0, and what belongs to the parameter is put back afterwards.
  """
  if not missing or rule.takes_absent:
    return rule

  def update(updates, state, params, numbers):
    if _keeps_its_state(rule, updates, state, params, numbers):
      return rule.update(updates, state, params, numbers)
    zeros = type(params)(
      (name, jnp.zeros_like(params[name]) if name in missing else g) for name, g in updates.items())
    updates, new = rule.update(zeros, state, params, numbers)
    return updates, _put_back(rule, params, missing, new, state)

  return dataclasses.replace(rule, update=update)


def _keeps_its_state(rule: Rule, updates: Any, state: Any, params: Any, numbers: Numbers) -> bool:
  try:
    _, new = jax.eval_shape(rule.update, updates, state, params, numbers)
  except (TypeError, ValueError):
    return False
  structure: Any = jax.tree.structure(new)
  return structure == jax.tree.structure(state)


def _put_back(rule: Rule, params: Any, missing: frozenset[str], new: Any, old: Any) -> Any:
  kept: list[Any] = []
  gone = type(params)((name, None if p is None else name in missing) for name, p in params.items())
  optax.tree.map_params(rule.init, lambda x, _: kept.append(x), old, gone)
  rest = iter(kept)

  def choose(x: Any, is_gone: bool) -> Any:
    before = next(rest)
    return before if is_gone else x

  return optax.tree.map_params(rule.init, choose, new, gone)
