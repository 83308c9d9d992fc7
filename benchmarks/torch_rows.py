"""Rows of PyTorch optimizers on the CPU; needs torch only when one is made."""

import importlib.util
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

ADAMW = "torch.optim.AdamW(fused=True)"
REFERENCE = "HinaAdaptive (PyTorch), everything"
# Said in full: defaults of a user's copy may differ.
OPTIONS = {
  **dict.fromkeys((
    "edge_suppression", "spatial_awareness", "background_regularization", "lora_rank_penalty",
    "use_agr", "use_orthogonal_grad", "use_tam", "use_adopt_stability", "use_cautious",
    "use_lr_mask", "use_dynamic_adaptation", "use_spd", "dynamic_weight_decay",
  ), True),
  "use_grams": False, "reduce_precision": False, "cpu_offload_states": False,
}


def is_installed() -> bool:
  """Whether torch can be imported."""
  return importlib.util.find_spec("torch") is not None


class TorchTraining:
  """Steps of a PyTorch optimizer on a constant gradient, axes in PyTorch's order."""

  def __init__(self, make: Any, params: Any, gradients: Any):
    """Copies arrays: a kernel `(in, out)` becomes `(out, in)`, one `(h, w, in, out)` as well."""
    import torch
    self._params = [torch.nn.Parameter(_tensor(x)) for x in jax.tree.leaves(params)]
    for parameter, gradient in zip(self._params, jax.tree.leaves(gradients)):
      parameter.grad = _tensor(gradient)
    self.optimizer = make(self._params)

  def block(self, steps: int) -> float:
    """Runs steps; gives seconds a step."""
    start = time.perf_counter()
    for _ in range(steps):
      self.optimizer.step()
    return (time.perf_counter() - start) / steps

  def state_bytes(self) -> int:
    """Bytes of all tensors of state."""
    import torch
    held = [v for state in self.optimizer.state.values() for v in state.values()]
    return sum(v.numel() * v.element_size() for v in held if isinstance(v, torch.Tensor))


def rows(reference: pathlib.Path | None, rate: float) -> dict[str, Any]:
  """What makes each optimizer from a list of parameters, by name; empty without torch."""
  if not is_installed():
    return {}
  import torch
  found = {ADAMW: lambda params: torch.optim.AdamW(params, lr=rate, fused=True)}
  if reference:
    kind = load_reference(reference)
    found[REFERENCE] = lambda params: kind(params, lr=rate, **OPTIONS)
  return found


def versions() -> dict[str, Any]:
  """Torch's version and threads, where it is installed."""
  if not is_installed():
    return {}
  import torch
  return {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}


def load_reference(path: pathlib.Path) -> Any:
  """The class `HinaAdaptive` of a file."""
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
  # Allocated by torch, and so aligned as a model's tensors are.
  return torch.from_numpy(np.transpose(np.asarray(array)).copy()).clone()
