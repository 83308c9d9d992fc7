"""An update and its addition in one."""

from typing import Any

import optax

from hina_optax.base import paths
from hina_optax.grouped import driver


def apply(
  tx: optax.GradientTransformation, grads: Any, state: Any, params: Any, **extra_args: Any
) -> tuple[Any, Any]:
  r"""Takes one step: the new parameters and the new state.

  .. math:: u, s \leftarrow \mathrm{tx.update}(g, s, p), \qquad p \leftarrow p + u

  It gives the numbers of `tx.update` and `optax.apply_updates`. Where `tx` runs in this library's
  loop over leaves (`hina_adaptive`, `with_host_offload`, `with_leaf_batching`, `with_state_dtype`,
  `with_quantized_state`), the parameters of a group are added to before the next group begins, and
  no update outlives its group. Use it where memory is tight and a compiler keeps all updates until
  the end, as for host offload of state in bf16 on TPUs. For any other transformation it is nothing
  but the two calls.

  Args:
    tx: any optax transformation whose updates are to be added.
    grads: tree of gradients.
    state: of `tx`.
    params: tree of parameters.
    **extra_args: of `tx.update`.

  Returns:
    Parameters and state. It keeps nothing beside the state of `tx`.

  Raises:
    ValueError: if parameters are missing, and whatever `tx.update` raises.

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
  fused = driver.apply_of(tx)
  if fused is not None:
    return fused(grads, state, params, **extra_args)
  updates, state = tx.update(grads, state, params, **extra_args)
  return optax.apply_updates(params, updates), state
