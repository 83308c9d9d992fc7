"""Many small leaves as few large arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from hina_optax.base import checks, traits
from hina_optax.grouped import driver
from hina_optax.grouped.driver import Stacking
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
  own structure: where it held a tree like the parameters it holds one mapping of arrays. Keys are
  the path of a leaf that stands alone, or what the paths of a stack share and its shape, such as
  `"down/*/lora_a[640x16]"`; regular expressions on paths find both. A stack is `(n, 640, 16)`. The
  layout is part of the state's structure: whatever is given a state knows it. A tree in which no
  two leaves are alike is handed on as it is.

  It costs a copy of the stacked parameters and gradients into stacks and of the updates out of
  them, in memory and in time: on large leaves that is more than it saves, hence `max_elements`.
  A light inner such as `optax.adamw` compiles faster in it, but its steps take two to three times
  as long on a CPU.

  One stack is updated after the other, so that what is computed on the way is in memory for one
  stack at a time.

  A stack would gather leaves that are sharded over devices, so they stand alone, under their own
  paths; only leaves that every device holds whole are stacked. `init` sees it on arrays and in
  explicit sharding mode; where a mesh of several devices is set, nothing is stacked. Inside of
  `jax.jit` without a mesh nothing shows, and leaves count as whole. A tree with
  Flax's boxes (`LogicallyPartitioned`) keeps them in the state, and nothing of it is stacked.

  A missing gradient (`None`) leaves its row of the state as it was; `params` must then be given. So
  does a leaf that the extra argument `present`, a tree of boolean scalars, calls absent, without
  another program for another choice; counters that all leaves share go on.
  Inside of `jax.vmap` (studies over rates and seeds) it is right, but rows leave a stack by
  gathers, and each stack is as large as all runs together.

  Args:
    inner: any optax transformation that treats each leaf by itself, or any part of this library,
      importance and rank penalty among them. In `hina_adaptive` it switches `leaf_batching` on,
      which is on by default where it pays. Other storage wrappers around it or in it make one loop
      over leaves with it.
    max_elements: elements of a leaf up to which it is stacked, >= 1.
    kind: `f(path, leaf) -> hashable`: only leaves of equal kind are stacked, for an inner that
      treats leaves by their path. `None`: what the inner computes for a leaf is read from its
      program, and leaves that it treats differently (`optax.masked`, `optax.partition`) are stacked
      apart.

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
  checks.structural("max_elements", max_elements)
  checks.integer("max_elements", max_elements, 1)
  checks.rule("kind", kind)
  inner = _storage.transformation(inner)
  rebuilt = traits.traits_of(inner).rebuilt
  if rebuilt is not None and kind is None:
    return rebuilt(leaf_batching=True, max_batched_elements=int(max_elements))
  stacking = Stacking(int(max_elements), kind)
  return driver.with_settings(
    inner, lambda settings: dataclasses.replace(settings, stacking=stacking))
