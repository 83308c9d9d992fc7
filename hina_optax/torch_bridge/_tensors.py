"""Memory that both frameworks see: tensors into arrays and back, without a copy."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

DTYPES = {
  torch.float32: jnp.float32, torch.float16: jnp.float16, torch.bfloat16: jnp.bfloat16,
  torch.float64: jnp.float64,
}
# NumPy has no bfloat16 of its own: it travels as the integers that it is made of.
_BITS = {torch.bfloat16: torch.int16}
# Elements that a second core would not copy any faster.
_ONE_CORE = 1 << 20


def check_parameters(names: Sequence[str], params: Sequence[torch.Tensor]) -> None:
  """Refuses parameters that JAX could not update.

  Raises:
    ValueError: on several devices in one group, or a device without JAX.
    TypeError: of a dtype that is not floating, or of 64 bits where JAX has 32.
  """
  for name, p in zip(names, params):
    if p.dtype not in DTYPES or p.layout != torch.strided:
      raise TypeError(
        f"Parameter '{name}' is {p.dtype}, {p.layout}: float32, float16 and bfloat16 in dense "
        "tensors can be trained. Leave it out of the optimizer.")
    if p.dtype == torch.float64 and not jax.config.read("jax_enable_x64"):
      raise TypeError(
        f"Parameter '{name}' is float64, which JAX would cut to 32 bits. Set "
        "jax.config.update('jax_enable_x64', True) first, or train in float32.")
  if len({p.device for p in params}) > 1:
    first = {str(p.device): name for name, p in reversed(list(zip(names, params)))}
    raise ValueError(
      "The parameters of one group lie on several devices: "
      f"{', '.join(f'{name!r} on {device}' for device, name in first.items())}. Give each device a "
      "group of its own.")


def jax_device(device: torch.device) -> jax.Device:
  """JAX's name for a device of torch.

  Raises:
    ValueError: if JAX does not know it.
  """
  try:
    if device.type not in ("cpu", "cuda"):
      raise RuntimeError(f"no way from '{device.type}' to JAX")
    return jax.devices(device.type)[device.index or 0]
  except (RuntimeError, IndexError) as error:
    raise ValueError(
      f"The parameters lie on '{device}', which JAX cannot use here ({error}). Move the model to "
      "the CPU or to a CUDA device, and for that install jax[cuda12]."
    ) from error


class Window:
  """A parameter as JAX sees it: the tensor's own memory, looked up again where it moved."""

  def __init__(self) -> None:
    self._array: Any = None
    self._pointer = 0

  def look(self, tensor: torch.Tensor) -> Any:
    """The array over the tensor's memory as it is now."""
    if self._array is None or tensor.data_ptr() != self._pointer:
      self._array, self._pointer = None, tensor.data_ptr()
      array = jax.dlpack.from_dlpack(tensor.detach().contiguous())
      if array.size and array.unsafe_buffer_pointer() != self._pointer:
        return array  # JAX copied what it could not share: true for this step only
      self._array = array
    return self._array


def view(tensor: torch.Tensor) -> Any:
  """A tensor as an argument of a compiled function; on a CPU by NumPy, which is ten times faster.

  It must not outlive the step: it keeps the tensor's memory.
  """
  tensor = tensor.detach().contiguous()
  if tensor.device.type != "cpu":
    return jax.dlpack.from_dlpack(tensor)
  bits = _BITS.get(tensor.dtype)
  if bits is None:
    return tensor.numpy()
  return tensor.view(bits).numpy().view(np.dtype(DTYPES[tensor.dtype]))


def write(tensors: Sequence[torch.Tensor], arrays: Sequence[jax.Array]) -> None:
  """Copies arrays into tensors, in place: their storage, views and hooks stay what they are."""
  pairs = list(zip(tensors, arrays))
  if arrays and all(device.platform == "cpu" for device in arrays[0].devices()):
    jax.block_until_ready(arrays)
    pairs = _write_small(pairs)
  for tensor, array in pairs:
    tensor.copy_(torch.from_dlpack(array))


def _write_small(pairs: Sequence[tuple[torch.Tensor, jax.Array]]) -> list[Any]:
  """Copies on one core what is small and in order; returns the rest.

  torch's copy wakes all its threads from 32768 elements on, which fight JAX's for the cores.
  """
  small = [p for p in pairs if p[0].numel() <= _ONE_CORE and p[0].is_contiguous()]
  for tensor, array in small:
    np.copyto(view(tensor), np.asarray(array))
  torch.autograd.graph.increment_version([tensor for tensor, _ in small])
  return [p for p in pairs if p[0].numel() > _ONE_CORE or not p[0].is_contiguous()]


def to_torch(array: Any) -> torch.Tensor:
  """A copy on the CPU, which any device can load."""
  values = np.array(array)
  if values.dtype == np.dtype(jnp.bfloat16):
    return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
  return torch.from_numpy(values)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
  """A copy of a saved tensor."""
  return np.array(view(tensor.cpu()))
