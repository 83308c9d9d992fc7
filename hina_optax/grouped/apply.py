"""`apply`: one update and its addition to the parameters."""

from typing import Any

import optax

from hina_optax.base import paths
from hina_optax.grouped import driver


def apply(
  tx: optax.GradientTransformation, grads: Any, state: Any, params: Any, **extra_args: Any
) -> tuple[Any, Any]:
  r"""Takes one step; returns the new parameters and the new state.

  .. math:: u, s \leftarrow \mathrm{tx.update}(g, s, p), \qquad p \leftarrow p + u

  The result equals that of `tx.update` and `optax.apply_updates`. If `tx` runs in this library's
  loop over leaves (`hina_adaptive`, `with_host_offload`, `with_leaf_batching`, `with_state_dtype`,
  `with_quantized_state`), the updates of a group are added to its parameters before the next group
  begins, and no update outlives its group. Use it if memory is tight and a compiler keeps all
  updates until the end, as it does on TPUs when state in bf16 is offloaded to the host. For any
  other transformation it only makes these two calls.

  Args:
    tx: any optax transformation whose updates are added to the parameters.
    grads: tree of gradients.
    state: state of `tx`.
    params: tree of parameters.
    **extra_args: extra arguments of `tx.update`.

  Returns:
    Parameters and state. `apply` keeps nothing beside the state of `tx`.

  Raises:
    ValueError: if parameters are missing. Errors of `tx.update` are passed on.

  Example:
    >>> import jax.numpy as jnp, optax
    >>> import hina_optax
    >>> tx = hina_optax.with_host_offload(optax.sgd(0.5, momentum=0.9))
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> params, state = hina_optax.apply(tx, params, tx.init(params), params)
    >>> params["w"].tolist()
    [0.5, 1.0]

  References:
    `optax.apply_updates`.
  """
  paths.require_params(params, "hina_optax.apply")
  tx = optax.with_extra_args_support(tx)
  fused_apply = driver.get_apply(tx)
  if fused_apply is not None:
    return fused_apply(grads, state, params, **extra_args)
  updates, state = tx.update(grads, state, params, **extra_args)
  return optax.apply_updates(params, updates), state
