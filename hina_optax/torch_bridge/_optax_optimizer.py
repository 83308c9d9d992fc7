"""`OptaxOptimizer`: any optax transformation behind torch's optimizer interface."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import optax

from hina_optax.torch_bridge import _rules, _tensors
from hina_optax.torch_bridge._bridged_optimizer import BridgedOptimizer


class OptaxOptimizer(BridgedOptimizer):
  r"""Any optax transformation as a `torch.optim.Optimizer`.

  Each step passes the parameters and gradients to JAX without a copy (by DLPack; on a CPU the
  gradients as NumPy views of the same memory), runs one compiled update for each group, and copies
  the results into the parameters in place:

  .. math:: u, s \leftarrow \mathrm{tx.update}(g, s, p), \qquad p \leftarrow p + u

  Hyperparameters that `optax.inject_hyperparams` exposes become entries of the parameter groups
  under their names, except that `learning_rate` is `lr`. Groups may start with values of their own,
  and torch's schedulers change them without compiling again. For a transformation without an
  injected learning rate, `lr` is a factor on its updates and starts at 1. Hyperparameters that
  follow an optax schedule keep following it.

  A parameter without a gradient keeps its value and its state. A frozen parameter has no state; it
  gets one when it is unfrozen. The first step compiles.

  Args:
    params: tensors, named tensors (`model.named_parameters()`), or groups of either in torch's
      format. Tensors are float32, float16 or bfloat16. Those of one group are on one device, CPU or
      CUDA. The transformation sees a dict by name. Without names the parameters are numbered, and
      neighbours of matching shapes are named as LoRA pairs.
    tx: the transformation. If parameters have 16 bits, call `optax.inject_hyperparams` with
      `hyperparam_dtype=jnp.float32`.
    **hyperparams: values for all groups, in place of the initial values in `tx`.

  State: the state of `tx`, in JAX arrays on the device of the parameters. The bridge itself stores
  nothing per parameter between steps. During a step the new parameters exist beside the old ones.

  Raises:
    ValueError: if a hyperparameter is unknown, if the parameters of a group are on several devices
      or on one that JAX cannot use, for `maximize`, for sparse gradients (at the step), and for a
      state that does not fit (at `load_state_dict`).
    TypeError: if `tx` is not an optax transformation, or a parameter is not floating.

  Example:
    >>> import optax, torch
    >>> from hina_optax.torch_bridge import OptaxOptimizer
    >>> weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    >>> tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    >>> optimizer = OptaxOptimizer([weight], tx)
    >>> scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    >>> for _ in range(60):
    ...   optimizer.zero_grad()
    ...   (weight**2).sum().backward()
    ...   optimizer.step()
    ...   scheduler.step()
    >>> bool((weight.abs() < 0.5).all()), optimizer.compilations()
    (True, 1)

  References:
    `torch.optim.Optimizer`; the DLPack protocol.
  """

  def __init__(
    self, params: Iterable[Any], tx: optax.GradientTransformation, **hyperparams: float
  ) -> None:
    if not isinstance(tx, optax.GradientTransformation):
      raise TypeError(f"tx must be an optax transformation, got {type(tx).__name__}.")
    if hyperparams.pop("maximize", False):
      raise ValueError("maximize is not supported: negate the loss instead.")
    self._tx = tx
    self._rules: dict[int, _rules.UpdateRule] = {}
    super().__init__(params, hyperparams)

  def _make_rule(self, index: int, group: Mapping[str, Any]) -> _rules.UpdateRule:
    # Making a rule compiles `tx.init`, so each is made only once.
    if index not in self._rules:
      self._rules[index] = self._make_new_rule(index, group)
    return self._rules[index]

  def _make_new_rule(self, index: int, group: Mapping[str, Any]) -> _rules.UpdateRule:
    names = self._group_names[index]
    shapes = {
      name: jax.ShapeDtypeStruct(tuple(p.shape), _tensors.DTYPES[p.dtype])
      for name, p in zip(names, group["params"])
    }
    rule = _rules.make_rule(self._tx, shapes)
    for name in self._hyperparams:
      if name not in rule.hyperparams:
        raise ValueError(
          f"{name}={self._hyperparams[name]!r}: the transformation does not expose '{name}'; it "
          f"has {', '.join(sorted(rule.hyperparams))}. Wrap it in optax.inject_hyperparams.")
    return rule

  def _identity(self) -> dict[str, Any]:
    return {"optimizer": type(self).__name__}
