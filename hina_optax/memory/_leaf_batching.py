"""`with_leaf_batching`: stacks many small leaves into few large arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from hina_optax.base import checks, traits
from hina_optax.grouped import driver
from hina_optax.grouped.driver import Stacking
from hina_optax.memory import _arguments

# 4 MB in fp32: more than LoRA factors of any usual rank have, but less than the weights of a large
# model.
MAX_ELEMENTS = 1 << 20


def with_leaf_batching(
  inner: optax.GradientTransformation,
  max_elements: int = MAX_ELEMENTS,
  *,
  kind: Callable[[str, Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Stacks leaves of equal shape, dtype and kind, and runs any per-leaf transformation on stacks.

  A tree of 1,500 LoRA factors has some twenty shapes. If a transformation is traced leaf by leaf,
  its code is compiled 1,500 times. On stacks it is compiled twenty times, under `jax.vmap`:

  .. math:: (u_1, \ldots, u_n) = \operatorname{vmap}(f)(\operatorname{stack}(g_1, \ldots, g_n))

  Parameters and updates keep the user's tree. The state stays stacked from step to step, in the
  inner's own structure, but each tree like the parameters becomes one mapping of arrays. A key is
  the path of a leaf that is not stacked, or what the paths of a stack share and its shape, such as
  `"down/*/lora_a[640x16]"`; regular expressions on paths match both. The array of this stack is
  `(n, 640, 16)`. The layout is part of the state's structure, so every function that gets the state
  knows it. A state in which no two leaves are alike is not changed.

  Stacking copies parameters and gradients into stacks, and updates out of them, which takes memory
  and time. On large leaves that costs more than it saves, hence `max_elements`. A light inner such
  as `optax.adamw` compiles faster in it, but its steps take two to three times as long on a CPU.

  One stack is updated after the other, so the temporaries of only one stack are in memory at a
  time.

  A stack would gather leaves that are sharded over devices. Such leaves are not stacked and keep
  their own paths; only leaves that every device holds whole are stacked. `init` knows the sharding
  of arrays, and in explicit sharding mode. If a mesh of several devices is set, nothing is stacked.
  Inside of `jax.jit` without a mesh the sharding is unknown, and leaves count as whole. A tree with
  Flax's boxes (`LogicallyPartitioned`) keeps them in the state, and none of its leaves is stacked.

  A missing gradient (`None`) leaves its row of the state unchanged; `params` must then be given.
  The same holds for a leaf that is absent according to the extra argument `present`, a tree of
  boolean scalars; another choice of leaves does not need another program. Counters that all leaves
  share are incremented. Inside of `jax.vmap` (studies over rates and seeds) the results are
  correct, but rows leave a stack by gathers, and each stack is as large as all runs together.

  Args:
    inner: any optax transformation that treats each leaf by itself, or any part of this library,
      importance and rank penalty among them. Around `hina_adaptive` it switches `leaf_batching`
      on, which is on by default where it pays. Other storage wrappers around it or in it share one
      loop over leaves with it.
    max_elements: largest number of elements of a leaf that is stacked, >= 1.
    kind: `f(path, leaf) -> hashable`: only leaves of equal kind are stacked, for an inner that
      treats leaves by their path. With `None` the inner's program shows what it computes per leaf,
      and leaves that it treats differently (`optax.masked`, `optax.partition`) are stacked
      separately.

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
  checks.static_value("max_elements", max_elements)
  checks.integer("max_elements", max_elements, 1)
  checks.optional_function("kind", kind)
  inner = _arguments.check_inner(inner)
  rebuild = traits.get_traits(inner).rebuild
  if rebuild is not None and kind is None:
    return rebuild(leaf_batching=True, max_batched_elements=int(max_elements))
  stacking = Stacking(int(max_elements), kind)
  return driver.with_settings(
    inner, lambda settings: dataclasses.replace(settings, stacking=stacking))
