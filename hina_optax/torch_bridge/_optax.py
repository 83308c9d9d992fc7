"""`OptaxOptimizer`: any optax transformation under torch's interface."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import optax

from hina_optax.torch_bridge import _rules, _tensors
from hina_optax.torch_bridge._optimizer import BridgedOptimizer


class OptaxOptimizer(BridgedOptimizer):
  r"""Any optax transformation as a `torch.optim.Optimizer`.

  Each step hands parameters and gradients to JAX where they are (DLPack, on a CPU NumPy's view of
  the same memory), runs one compiled update for each group, and copies the results into the
  parameters in place:

  .. math:: u, s \leftarrow \mathrm{tx.update}(g, s, p), \qquad p \leftarrow p + u

  Numbers that `optax.inject_hyperparams` lets out become numbers of the parameter groups, under
  their names, `learning_rate` as `lr`; groups may begin with values of their own, and torch's
  schedulers change them without compiling again. For a transformation without an injected learning
  rate `lr` is a factor on its updates and begins as 1. Numbers that follow an optax schedule stay
  with it.

  A parameter without a gradient keeps its value and its state. A frozen one has no state; it gets
  one when it is thawed. The first step compiles.

  Args:
    params: tensors, named tensors (`model.named_parameters()`), or groups of either as torch takes
      them: float32, float16 or bfloat16, those of one group on one device, CPU or CUDA. The
      transformation sees a dict by name; without names parameters are numbered, and neighbours of
      matching shapes are named as LoRA pairs.
    tx: the transformation. Give `optax.inject_hyperparams` `hyperparam_dtype=jnp.float32` where
      parameters are in 16 bits.
    **numbers: values for all groups, in place of those that `tx` begins with.

  State: what `tx` keeps, on the parameters' device, as JAX arrays; the bridge itself keeps nothing
  per parameter between steps. During a step the new parameters exist beside the old ones.

  Raises:
    ValueError: an unknown number, parameters on several devices in a group or on one that JAX does
      not know, `maximize`, sparse gradients (at the step), a state that does not fit (at
      `load_state_dict`).
    TypeError: if `tx` is no optax transformation, or a parameter is not floating.

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
    self, params: Iterable[Any], tx: optax.GradientTransformation, **numbers: float
  ) -> None:
    if not isinstance(tx, optax.GradientTransformation):
      raise TypeError(f"tx must be an optax transformation, got {type(tx).__name__}.")
    if numbers.pop("maximize", False):
      raise ValueError("maximize is not supported: negate the loss instead.")
    self._tx = tx
    self._rules: dict[int, _rules.Rule] = {}
    super().__init__(params, numbers)

  def _rule(self, index: int, group: Mapping[str, Any]) -> _rules.Rule:
    if index not in self._rules:
      self._rules[index] = self._new_rule(index, group)
    return self._rules[index]

  def _new_rule(self, index: int, group: Mapping[str, Any]) -> _rules.Rule:
    names = self._group_names[index]
    shapes = {
      name: jax.ShapeDtypeStruct(tuple(p.shape), _tensors.DTYPES[p.dtype])
      for name, p in zip(names, group["params"])
    }
    rule = _rules.rule_of(self._tx, shapes)
    for name in self._numbers:
      if name not in rule.numbers:
        raise ValueError(
          f"{name}={self._numbers[name]!r}: the transformation does not let '{name}' out; it has "
          f"{', '.join(sorted(rule.numbers))}. Wrap it in optax.inject_hyperparams.")
    return rule

  def _identity(self) -> dict[str, Any]:
    return {"optimizer": type(self).__name__}
