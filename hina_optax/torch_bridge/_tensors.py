"""Conversions between torch tensors and JAX arrays, without a copy where that is possible."""

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
# torch cannot give NumPy a bfloat16 tensor. It is passed as integers of the same width.
_INTEGER_DTYPES = {torch.bfloat16: torch.int16}
# Up to so many elements a second core does not make a copy faster.
_MAX_ELEMENTS_ON_ONE_CORE = 1 << 20


def check_parameters(names: Sequence[str], params: Sequence[torch.Tensor]) -> None:
  """Refuses parameters that JAX could not update.

  Raises:
    ValueError: if the parameters are on several devices.
    TypeError: if a parameter is sparse or not floating, or has 64 bits while JAX is limited to 32.
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
  """Returns the JAX device that is the given device of torch.

  Raises:
    ValueError: if JAX cannot use that device.
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


class CachedArray:
  """The JAX array that shares the memory of one parameter, made again only if the memory moves."""

  def __init__(self) -> None:
    self._array: Any = None
    self._pointer = 0

  def get(self, tensor: torch.Tensor) -> Any:
    """Returns an array with the present values of the tensor."""
    if self._array is None or tensor.data_ptr() != self._pointer:
      self._array, self._pointer = None, tensor.data_ptr()
      array = jax.dlpack.from_dlpack(tensor.detach().contiguous())
      if array.size and array.unsafe_buffer_pointer() != self._pointer:
        # JAX could not share the memory and made a copy, which is outdated after this step.
        return array
      self._array = array
    return self._array


def view(tensor: torch.Tensor) -> Any:
  """Returns a view of a tensor that a compiled function takes as an argument.

  On a CPU it is a NumPy array, which is ten times faster to make than a JAX array. The view must
  not outlive the step, since it keeps the tensor's memory alive.
  """
  tensor = tensor.detach().contiguous()
  if tensor.device.type != "cpu":
    return jax.dlpack.from_dlpack(tensor)
  integer_dtype = _INTEGER_DTYPES.get(tensor.dtype)
  if integer_dtype is None:
    return tensor.numpy()
  return tensor.view(integer_dtype).numpy().view(np.dtype(DTYPES[tensor.dtype]))


def write_tensors(tensors: Sequence[torch.Tensor], arrays: Sequence[jax.Array]) -> None:
  """Copies arrays into tensors in place, so that their storage, views and hooks stay the same."""
  pairs = list(zip(tensors, arrays))
  if arrays and all(device.platform == "cpu" for device in arrays[0].devices()):
    jax.block_until_ready(arrays)
    pairs = _write_small_tensors(pairs)
  for tensor, array in pairs:
    tensor.copy_(torch.from_dlpack(array))


def _write_small_tensors(pairs: Sequence[tuple[torch.Tensor, jax.Array]]) -> list[Any]:
  """Copies the pairs with small, contiguous tensors on one core, and returns the other pairs.

  From 32768 elements on torch's copy wakes all its threads, which compete with those of JAX for the
  cores.
  """
  def is_small(tensor: torch.Tensor) -> bool:
    return tensor.numel() <= _MAX_ELEMENTS_ON_ONE_CORE and tensor.is_contiguous()

  small = [pair for pair in pairs if is_small(pair[0])]
  for tensor, array in small:
    np.copyto(view(tensor), np.asarray(array))
  # Autograd does not see NumPy's writes, but has to notice that the parameters have changed.
  torch.autograd.graph.increment_version([tensor for tensor, _ in small])
  return [pair for pair in pairs if not is_small(pair[0])]


def to_torch(array: Any) -> torch.Tensor:
  """Copies an array into a tensor on the CPU, from where torch can load it to any device."""
  values = np.array(array)
  if values.dtype == np.dtype(jnp.bfloat16):
    return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
  return torch.from_numpy(values)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
  """Copies a saved tensor into a NumPy array."""
  return np.array(view(tensor.cpu()))
