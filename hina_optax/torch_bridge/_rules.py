"""Update rules: what the bridge needs of an optax transformation, with changeable hyperparameters.

torch's schedulers change the hyperparameters of a parameter group. A rule takes them as arguments
of its update, so that a change does not compile again.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

Hyperparams = Mapping[str, Any]
# optax's name for what torch and its schedulers call `lr`.
LEARNING_RATE = "learning_rate"
# The loss that a closure returned is passed among the hyperparameters, under optax's name for it.
VALUE = "value"


@dataclasses.dataclass(frozen=True)
class UpdateRule:
  """An optimizer for one parameter group.

  Attributes:
    init: `init(params)` returns the state for a tree of parameters.
    update: `update(updates, state, params, hyperparams)` is optax's update with the hyperparameters
      of the group.
    hyperparams: initial values of what can be changed from outside without compiling again; torch's
      schedulers change `lr`.
    handles_none: whether the transformation is known to leave the state of a parameter as it is if
      its update is `None`.
    tree_type: the type of mapping that holds the parameters. JAX sorts the names of a dict, so an
      `OrderedDict` is needed where their order matters.
    options: the `HinaOptions` that the rule was made from; `None` for other transformations.
  """

  init: Callable[[Any], Any]
  update: Callable[[Any, Any, Any, Hyperparams], tuple[Any, Any]]
  hyperparams: dict[str, float]
  handles_none: bool = False
  tree_type: type = dict
  options: Any = None


def make_rule(tx: optax.GradientTransformation, params: Any) -> UpdateRule:
  """Makes the rule of any optax transformation for parameters of the given shapes.

  The hyperparameters are those that `optax.inject_hyperparams` exposes and that do not follow a
  schedule. If no learning rate is injected, `lr` is a factor on the updates, initially 1.
  """
  tx = optax.with_extra_args_support(tx)
  injected = _injected_hyperparams(tx, params)
  lr_is_factor = LEARNING_RATE not in injected
  initial = {"lr": 1.0 if lr_is_factor else injected.pop(LEARNING_RATE), **injected}

  def update(updates: Any, state: Any, params: Any, hyperparams: Hyperparams) -> tuple[Any, Any]:
    extra_args = {VALUE: hyperparams[VALUE]} if VALUE in hyperparams else {}
    new = {name: x for name, x in hyperparams.items() if name not in ("lr", VALUE)}
    if not lr_is_factor:
      new[LEARNING_RATE] = hyperparams["lr"]
    updates, state = tx.update(updates, _inject(state, new), params, **extra_args)
    return (_scale(updates, hyperparams["lr"]) if lr_is_factor else updates), state

  return UpdateRule(tx.init, update, initial)


def _injected_hyperparams(tx: optax.GradientTransformation, params: Any) -> dict[str, float]:
  """Returns the initial values of the injected scalars that do not follow a schedule."""
  def init_hyperparams() -> dict[str, jax.Array]:
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params)
    hyperparams: dict[str, jax.Array] = {}
    for state in _find_injected(tx.init(zeros)):
      unscheduled = set(state.hyperparams) - set(state.hyperparams_states)
      hyperparams |= {name: state.hyperparams[name] for name in unscheduled}
    return {name: x for name, x in hyperparams.items() if jnp.ndim(x) == 0}

  # Under jit only these scalars are computed: no state is allocated. The conversion through a
  # string turns float32(0.1) back into 0.1, the number that the user wrote.
  return {name: float(str(x)) for name, x in sorted(jax.jit(init_hyperparams)().items())}


def _is_injected(node: Any) -> bool:
  return isinstance(node, optax.schedules.InjectStatefulHyperparamsState)


def _find_injected(state: Any) -> list[Any]:
  """Finds the states of `optax.inject_hyperparams`, also those inside of each other."""
  outer = [x for x in jax.tree.leaves(state, is_leaf=_is_injected) if _is_injected(x)]
  return outer + [inner for x in outer for inner in _find_injected(x.inner_state)]


def _inject(state: Any, hyperparams: Hyperparams) -> Any:
  """Replaces the injected hyperparameters in a state."""
  def inject_node(node: Any) -> Any:
    if not _is_injected(node):
      return node
    new = {
      name: jnp.asarray(hyperparams[name]).astype(x.dtype) if name in hyperparams else x
      for name, x in node.hyperparams.items()
    }
    return node._replace(hyperparams=new, inner_state=_inject(node.inner_state, hyperparams))

  return jax.tree.map(inject_node, state, is_leaf=_is_injected)


def _scale(updates: Any, factor: Any) -> Any:
  def scale_leaf(u: jax.Array) -> jax.Array:
    dtype = u.dtype if u.dtype.itemsize >= 4 else jnp.float32
    return (u.astype(dtype) * jnp.asarray(factor).astype(dtype)).astype(u.dtype)

  return jax.tree.map(scale_leaf, updates)


def handle_missing(rule: UpdateRule, missing: frozenset[str]) -> UpdateRule:
  """Adapts a rule to a step without some gradients, so that these parameters keep their state.

  A transformation that handles updates of `None` gets them. Other transformations, such as Adam,
  would lose the parameter's state: they get a gradient of 0, and the parameter's state is restored
  afterwards.
  """
  if not missing or rule.handles_none:
    return rule

  def update(updates, state, params, hyperparams):
    if _keeps_structure(rule, updates, state, params, hyperparams):
      return rule.update(updates, state, params, hyperparams)
    filled = type(params)(
      (name, jnp.zeros_like(params[name]) if name in missing else g) for name, g in updates.items())
    updates, new_state = rule.update(filled, state, params, hyperparams)
    return updates, _restore_missing(rule, params, missing, new_state, state)

  return dataclasses.replace(rule, update=update)


def _keeps_structure(
  rule: UpdateRule, updates: Any, state: Any, params: Any, hyperparams: Hyperparams
) -> bool:
  """Returns whether an update with `None` for missing gradients keeps the state's structure."""
  try:
    _, new_state = jax.eval_shape(rule.update, updates, state, params, hyperparams)
  except (TypeError, ValueError):
    return False
  structure: Any = jax.tree.structure(new_state)
  return structure == jax.tree.structure(state)


def _restore_missing(
  rule: UpdateRule, params: Any, missing: frozenset[str], new_state: Any, old_state: Any
) -> Any:
  """Replaces the state of missing parameters in `new_state` by that in `old_state`."""
  is_missing = type(params)(
    (name, None if p is None else name in missing) for name, p in params.items())
  # `map_params` takes a single state: the old leaves are collected in its order first.
  collected: list[Any] = []
  optax.tree.map_params(rule.init, lambda x, _: collected.append(x), old_state, is_missing)
  old_leaves = iter(collected)

  def select(new: Any, missing: bool) -> Any:
    old = next(old_leaves)
    return old if missing else new

  return optax.tree.map_params(rule.init, select, new_state, is_missing)
