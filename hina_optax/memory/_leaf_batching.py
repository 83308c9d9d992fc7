"""Many small leaves as few large arrays."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from hina_optax import _checks, _in_turn, _layouts, _leaves, _parts, _rows, _sealed, _stacks
from hina_optax.memory import _storage

# 4 MB in fp32: LoRA factors of any usual rank, but not the weights of a large model.
MAX_ELEMENTS = 1 << 20


def with_leaf_batching(
  inner: optax.GradientTransformation,
  max_elements: int = MAX_ELEMENTS,
  *,
  kind: Callable[[str, Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Stacks leaves of equal shape, dtype and kind, and runs any per-leaf transformation on stacks.

  A tree of 1,500 LoRA factors has some twenty shapes. A transformation that is traced leaf by leaf
  is compiled 1,500 times; stacked, twenty times, under `jax.vmap`:

  .. math:: (u_1, \ldots, u_n) = \operatorname{vmap}(f)(\operatorname{stack}(g_1, \ldots, g_n))

  Parameters and updates keep the user's tree. State stays stacked from step to step, in the inner's
  own structure: where it held a tree like the parameters it holds one dict of arrays. Keys are the
  path of a leaf that stands alone, or what the paths of a stack share and its shape, such as
  `"down/*/lora_a[640x16]"`; regular expressions on paths find both. Parts of this library keep one
  row a leaf, flat (`(n, 10240)`), others `(n, 640, 16)`. Leaves of more than 1.2 million
  elements together become several stacks, each of at most as many or of a few leaves. A tree in
  which no two leaves are alike is handed on as it is.

  It costs a copy of the stacked parameters and gradients into stacks and of the updates out of
  them, in memory and in time: on large leaves that is more than it saves, hence `max_elements`.
  A light inner such as `optax.adamw` compiles faster in it, but its steps take two to three times
  as long on a CPU.

  On CPUs a step of many parameters and parts of this library takes one stack after the other, in
  half the memory beside its state.

  A stack would gather leaves that are sharded over devices, so they stand alone, under their own
  paths; only leaves that every device holds whole are stacked. What is sharded is seen when `init`
  is called on arrays, or in explicit sharding mode, and later read from the keys of the state.
  Inside of `jax.jit` in automatic mode `init` cannot see it and stacks: call it outside, where
  state is made on its devices at once. Parts without state like the parameters have no such keys:
  do not batch them alone where parameters are sharded.

  A missing gradient (`None`) leaves its row of the state as it was; `params` must then be given.
  Masks and labels of the user's tree belong outside: `optax.masked(with_leaf_batching(tx), mask)`.
  Inside of `jax.vmap` stacks are taken apart by gathers, which is slow.

  Args:
    inner: any optax transformation that treats each leaf by itself, or any part of this library,
      importance and rank penalty among them. In `hina_adaptive` it switches `leaf_batching` on,
      which is on by default where it pays.
    max_elements: elements of a leaf up to which it is stacked, >= 1.
    kind: `f(path, leaf) -> hashable`: only leaves of equal kind are stacked, for an inner that
      treats leaves by their path. `None`: shape and dtype alone.

  Returns:
    An `optax.GradientTransformationExtraArgs` with the state of `inner`: as many bytes as before.

  Raises:
    ValueError: if `inner` looks across leaves (it names them), if `max_elements` is below 1 or
      traced, or if a state was made for other leaves.
    TypeError: if `inner` is no transformation.

  Example:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import hina_optax.memory as memory
    >>> tx = memory.with_leaf_batching(optax.rmsprop(1e-3))
    >>> params = {f"layer{i}": {"lora_a": jnp.ones((8, 2))} for i in range(3)}
    >>> state = tx.init(params)
    >>> {name: x.shape for name, x in optax.tree.get(state, "nu").items()}
    {'*/lora_a[8x2]': (3, 8, 2)}
    >>> updates, state = tx.update(params, state, params)
    >>> updates["layer0"]["lora_a"].shape
    (8, 2)

  References:
    PyTorch's foreach and apex's multi-tensor optimizers do the same with lists of pointers.
  """
  _checks.structural("max_elements", max_elements)
  _checks.integer("max_elements", max_elements, 1)
  _checks.rule("kind", kind)
  rebatched = getattr(inner, "rebatched", None)
  if rebatched is not None:
    return rebatched(int(max_elements))
  part = inner if isinstance(inner, _parts.Part) else _rows.aware(_storage.transformation(inner))
  return batched(part, int(max_elements), None if kind is None else _stacks.by_path(kind))


def batched(
  part: _parts.Part, max_elements: int, kinds: _stacks.Kinds | None = None, *,
  apart: frozenset[str] | None = None, careful: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """`part`, which takes `Stacks`, for trees of the user.

  `kinds(params)` gives one hashable value a place: only leaves of equal value are stacked. Leaves
  whose paths are in `apart` stand alone; `None`: those that are seen to be sharded, with `careful`
  all where it cannot be seen.
  """

  def layout_for(tree: Any, state: Any = None) -> _stacks.Layout | None:
    alone = _layouts.standing_alone(tree, careful) if apart is None else apart
    return _layouts.layout_for(tree, state, max_elements, kinds, alone)

  def init(params: Any) -> Any:
    layout = layout_for(params)
    if layout is None:
      return part.init(params)
    leaves = jax.tree.leaves(params, is_leaf=_leaves.is_absent)
    return _stacks.as_dicts(part.init(_stacks.stack(layout, leaves)))

  def update(updates, state, params=None, **extra_args):
    tree = updates if params is None else params
    layout, (leaves, structure) = layout_for(tree, state), _leaves.flat(updates)
    if layout is None:
      layout = _stacks.without(_stacks.each_alone(tree, kinds), leaves)
      if _in_turn.pays(part, layout, leaves):
        return _in_turn.update_tree(part, layout, updates, state, params, extra_args)
      result, new = part.update(updates, _sealed.opened(state), params, **extra_args)
      return result, _sealed.sealed_as(state, new)
    old, param_leaves = _stacks.as_stacks(layout, state), None
    if params is not None:
      param_leaves = structure.flatten_up_to(params)
      layout = _stacks.without(layout, leaves)
    if _in_turn.pays(part, layout, leaves):
      found, new = _in_turn.update(part, layout, leaves, old, param_leaves, extra_args)
      return structure.unflatten(found), _stacks.as_dicts(new)
    if param_leaves is not None:
      params = _stacks.stack(layout, param_leaves)
    wide = _sealed.opened(old)
    result, new = part.update(_stacks.stack(layout, leaves), wide, params, **extra_args)
    new = _sealed.sealed_as(old, _stacks.with_old_rows(layout, new, wide))
    return structure.unflatten(_stacks.unstack(result, leaves)), _stacks.as_dicts(new)

  return _sealed.Opening(init, update)
