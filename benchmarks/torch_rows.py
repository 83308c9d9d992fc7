"""PyTorch optimizers on the CPU for comparison. torch is imported only when one is made."""

import importlib.util
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

ADAMW = "torch.optim.AdamW(fused=True)"
REFERENCE = "HinaAdaptive (PyTorch), everything"
# All options are listed, since the defaults of a user's copy may differ.
OPTIONS = {
  **dict.fromkeys((
    "edge_suppression", "spatial_awareness", "background_regularization", "lora_rank_penalty",
    "use_agr", "use_orthogonal_grad", "use_tam", "use_adopt_stability", "use_cautious",
    "use_lr_mask", "use_dynamic_adaptation", "use_spd", "dynamic_weight_decay",
  ), True),
  "use_grams": False, "reduce_precision": False, "cpu_offload_states": False,
}


def is_installed() -> bool:
  """Returns whether torch can be imported."""
  return importlib.util.find_spec("torch") is not None


class TorchTraining:
  """Consecutive steps of a PyTorch optimizer on a constant gradient."""

  def __init__(self, make: Any, params: Any, gradients: Any):
    """Copies the arrays with their axes reversed: a kernel `(in, out)` becomes `(out, in)`."""
    import torch
    self._params = [torch.nn.Parameter(_tensor(x)) for x in jax.tree.leaves(params)]
    for parameter, gradient in zip(self._params, jax.tree.leaves(gradients)):
      parameter.grad = _tensor(gradient)
    self.optimizer = make(self._params)

  def run_steps(self, steps: int) -> float:
    """Runs a number of steps, and returns the seconds per step."""
    start = time.perf_counter()
    for _ in range(steps):
      self.optimizer.step()
    return (time.perf_counter() - start) / steps

  def state_bytes(self) -> int:
    """Counts the bytes of all tensors of the state."""
    import torch
    values = [v for state in self.optimizer.state.values() for v in state.values()]
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))


def contenders(reference: pathlib.Path | None, rate: float) -> dict[str, Any]:
  """Returns, by name, functions that make an optimizer of a list of parameters.

  The dict is empty if torch is not installed.
  """
  if not is_installed():
    return {}
  import torch
  makers = {ADAMW: lambda params: torch.optim.AdamW(params, lr=rate, fused=True)}
  if reference:
    reference_class = load_reference(reference)
    makers[REFERENCE] = lambda params: reference_class(params, lr=rate, **OPTIONS)
  return makers


def versions() -> dict[str, Any]:
  """Returns torch's version and number of threads; the dict is empty if it is not installed."""
  if not is_installed():
    return {}
  import torch
  return {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}


def load_reference(path: pathlib.Path) -> Any:
  """Imports the class `HinaAdaptive` from a file."""
  spec = importlib.util.spec_from_file_location("reference_hina_adaptive", path)
  if spec is None or spec.loader is None:
    raise ValueError(f"{path} is no Python file.")
  module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "HinaAdaptive"):
    raise ValueError(f"{path} has no class HinaAdaptive.")
  return module.HinaAdaptive


def _tensor(array: Any) -> Any:
  import torch
  # The clone is allocated by torch, and so aligned like a model's tensors.
  return torch.from_numpy(np.transpose(np.asarray(array)).copy()).clone()
