"""What the device says about its memory, or what can be counted where it says nothing."""

import os
from typing import NamedTuple

import jax


class DeviceMemory(NamedTuple):
  """Memory of the first local device.

  Attributes:
    used: bytes in use.
    peak: most bytes in use so far; `None` where the device does not report it.
    limit: bytes there are.
    source: `"device"` if it reported them, `"live arrays"` if they were counted.
  """

  used: int
  peak: int | None
  limit: int
  source: str


def device_memory() -> DeviceMemory:
  """Reported by the device; where it is not, live arrays against the memory of the host."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() or {}
  if "bytes_in_use" in stats and stats.get("bytes_limit"):
    return DeviceMemory(
      stats["bytes_in_use"], stats.get("peak_bytes_in_use"), stats["bytes_limit"], "device")
  used = sum(_bytes_on(x, device) for x in jax.live_arrays() if not x.is_deleted())
  return DeviceMemory(used, None, _physical_memory(), "live arrays")


def reported_limit() -> int | None:
  """Bytes that the device reports to have; `None` where it reports nothing (CPUs)."""
  return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def is_on_host(x: jax.Array) -> bool:
  """Whether an array rests in host memory."""
  return getattr(x.sharding, "memory_kind", None) in ("pinned_host", "unpinned_host")


def _bytes_on(x: jax.Array, device: jax.Device) -> int:
  if is_on_host(x) or device not in x.sharding.device_set:
    return 0
  shape = x.sharding.shard_shape(x.shape)
  size = x.dtype.itemsize if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) else 0
  for side in shape:
    size *= side
  return size


def _physical_memory() -> int:
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
