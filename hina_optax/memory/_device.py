"""Memory of the device: as it reports it, or counted if it does not."""

import os
from typing import NamedTuple

import jax


class DeviceMemory(NamedTuple):
  """Memory of the first local device.

  Attributes:
    used: bytes in use.
    peak: largest number of bytes in use so far; `None` if the device does not report it.
    limit: bytes in all.
    source: `"device"` if the device reported the numbers, `"live arrays"` if they were counted.
  """

  used: int
  peak: int | None
  limit: int
  source: str


def device_memory() -> DeviceMemory:
  """Returns what the device reports, or else the live arrays and the memory of the host."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() or {}
  if "bytes_in_use" in stats and stats.get("bytes_limit"):
    return DeviceMemory(
      stats["bytes_in_use"], stats.get("peak_bytes_in_use"), stats["bytes_limit"], "device")
  used = sum(_count_bytes_on(x, device) for x in jax.live_arrays() if not x.is_deleted())
  return DeviceMemory(used, None, _get_physical_memory(), "live arrays")


def reported_limit() -> int | None:
  """Returns the bytes that the device reports to have; `None` if it reports nothing (CPUs)."""
  return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def is_on_host(x: jax.Array) -> bool:
  """Whether an array is in host memory."""
  return getattr(x.sharding, "memory_kind", None) in ("pinned_host", "unpinned_host")


def _count_bytes_on(x: jax.Array, device: jax.Device) -> int:
  if is_on_host(x) or device not in x.sharding.device_set:
    return 0
  shape = x.sharding.shard_shape(x.shape)
  size = x.dtype.itemsize if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) else 0
  for side in shape:
    size *= side
  return size


def _get_physical_memory() -> int:
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
