"""What an optimizer is doing, out of its options and its state."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hina_optax import memory, registry
from hina_optax.options import MEMORY_OPTIONS, HinaOptions
from hina_optax.registry import Figure

_MB = 1 << 20

def get_optimization_info(state: Any, optimizer: Any = None) -> dict[str, Any]:
  """Says which features are on, how state is kept, and how training stands.

  Everything is read from the state, wherever it lies in a chain or a wrapper; nothing is stored for
  it but a few numbers a leaf, and the training step is not compiled again. Reading the mean rate
  scale and the background share takes one pass over their state.

  Args:
    state: the optimizer's state, of `hina_adaptive` or of any chain of parts.
    optimizer: what `hina_adaptive` returned, its options as a dict, or `None`. Given, the options
      are reported as they were set.

  Returns:
    A dict with

    - `features`: names of the options that are on, sorted;
    - `memory_optimization`: `state_bytes`, `state_bytes_by_dtype`, and the memory options given;
    - `figures`: for the parts that are there: `step`; `edge_share` and `background_share` (of the
      elements of spatial leaves); `alignment` (share of elements that agree with the gradient);
      `torque` (mean cosine with the momentum); `mean_importance`; `mean_rate_scale` (over all
      elements);
    - `options`: the options given, else empty.

  Raises:
    TypeError: if `optimizer` is neither of the three, or the state is traced.

  Example:
    >>> import jax.numpy as jnp
    >>> import hina_optax
    >>> tx = hina_optax.hina_adaptive(1e-3, edge_suppression=True, use_lr_mask=False)
    >>> params = {"w": jnp.ones((4, 4))}
    >>> info = hina_optax.get_optimization_info(tx.init(params), tx)
    >>> "edge_suppression" in info["features"], "use_lr_mask" in info["features"]
    (True, False)
    >>> info["figures"]["step"]
    0
  """
  options = _options(optimizer)
  _refuse_traced(state, "get_optimization_info")
  parts = list(_find_parts(state))
  return {
    "features": sorted(_features(parts)),
    "memory_optimization": _memory(state) | {
      name: options[name] for name in MEMORY_OPTIONS if name in options
    },
    "figures": _figures(parts),
    "options": options,
  }


def get_memory_stats(state: Any = None, optimizer: Any = None) -> dict[str, Any]:
  """Says how much memory is in use, and how much of it is the optimizer's state.

  Where the device reports its memory (GPUs, TPUs) these are its figures; where it does not (CPUs)
  live arrays are counted, against the memory of the host.

  Args:
    state: the optimizer's state; `None` leaves `buffer_pool_stats` at 0.
    optimizer: what `hina_adaptive` returned, a dict of its options, or `None`. Its `vram_budget_gb`
      is the limit, if it has one.

  Returns:
    A dict with

    - `memory_pressure`: bytes in use over the limit;
    - `used_mb`, `limit_mb`, `peak_mb` (`None` where it is not reported), `source` (`"device"` or
      `"live arrays"`);
    - `buffer_pool_stats`: `current_memory_mb` (state on the device), `host_memory_mb` (state in
      host memory), `max_memory_mb` (the option `max_buffer_memory_mb`).

  Raises:
    TypeError: if `optimizer` is none of the three, or the state is traced.

  Example:
    >>> import jax.numpy as jnp
    >>> import hina_optax
    >>> tx = hina_optax.hina_adaptive(1e-3, vram_budget_gb=8.0)
    >>> stats = hina_optax.get_memory_stats(tx.init({"w": jnp.ones((64, 64))}), tx)
    >>> stats["limit_mb"], 0 < stats["memory_pressure"] < 1
    (8192.0, True)

  References:
    `get_memory_stats` of `HinaAdaptive`.
  """
  options = _options(optimizer)
  _refuse_traced(state, "get_memory_stats")
  now = memory.device_memory()
  budget = options.get("vram_budget_gb")
  limit = now.limit if budget is None else budget * memory.GB
  arrays = [x for x in jax.tree.leaves(state) if isinstance(x, jax.Array)]
  on_host = sum(x.nbytes for x in arrays if memory.is_on_host(x))
  return {
    "memory_pressure": now.used / limit,
    "used_mb": now.used / _MB,
    "limit_mb": limit / _MB,
    "peak_mb": None if now.peak is None else now.peak / _MB,
    "source": now.source,
    "buffer_pool_stats": {
      "current_memory_mb": (sum(x.nbytes for x in arrays) - on_host) / _MB,
      "host_memory_mb": on_host / _MB,
      "max_memory_mb": options.get("max_buffer_memory_mb"),
    },
  }


def _refuse_traced(state: Any, name: str) -> None:
  if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(state)):
    raise TypeError(f"{name} reads values: call it outside of jit, on a real state.")


def _options(optimizer: Any) -> dict[str, Any]:
  if optimizer is None:
    return {}
  found = getattr(optimizer, "options", optimizer)
  if isinstance(found, HinaOptions):
    return found.as_dict()
  if isinstance(found, Mapping):
    return dict(found)
  raise TypeError(
    "optimizer must be what hina_adaptive returned, a dict of its options, or None; got "
    f"{type(optimizer).__name__}. Of a transformation wrapped in another, pass the inner one."
  )


def _find_parts(state: Any) -> Iterator[Any]:
  """Every part's state inside of `state`, through chains, wrappers and dicts."""
  if type(state) in {part.state for part in registry.parts()}:
    yield state
  if isinstance(state, Mapping):
    children: Any = state.values()
  elif isinstance(state, (tuple, list)):
    children = state
  else:
    return
  for child in children:
    yield from _find_parts(child)


def _features(states: list[Any]) -> set[str]:
  """The switches of the parts whose states these are."""
  return {
    name for part in registry.parts() for state in states if type(state) is part.state
    for name in part.switches if part.shows.get(name, lambda state: True)(state)}


def _memory(state: Any) -> dict[str, Any]:
  by_dtype: dict[str, int] = {}
  for leaf in jax.tree.leaves(state):
    if hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
      by_dtype[str(leaf.dtype)] = by_dtype.get(str(leaf.dtype), 0) + leaf.size * leaf.dtype.itemsize
  return {"state_bytes": sum(by_dtype.values()), "state_bytes_by_dtype": by_dtype}


def _figures(states: list[Any]) -> dict[str, float]:
  collected: dict[str, list[float]] = {}
  for part in registry.parts():
    for state in states:
      if type(state) is part.state:
        for name, figure in part.figures.items():
          value = _read(figure, state)
          if value is not None:
            collected.setdefault(name, []).append(float(value))
  figures = {name: float(np.mean(values)) for name, values in collected.items()}
  steps = [int(np.max(state.count)) for state in states if "count" in state._fields]
  return ({"step": max(steps)} if steps else {}) | figures


def _read(figure: Figure, state: Any) -> Any:
  if figure.read is not None:
    return jax.jit(figure.read)(_readable(state))
  numbers = getattr(state, figure.field)
  return None if numbers is None else _mean(numbers, figure.least)


def _mean(vector: Any, least: float = -1.0) -> float | None:
  """Mean of the entries above `least`, which marks leaves that a part leaves alone."""
  # One vector, or in a chain inside of with_leaf_batching a dict of them.
  parts = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(_readable(vector))]
  values = np.concatenate(parts) if parts else np.zeros(0)
  values = values[values > least]
  return float(values.mean()) if values.size else None


def _readable(tree: Any) -> Any:
  """State out of host memory and out of 8 bits."""
  return memory.dequantize_state(jax.device_put(tree, jax.memory.Space.Device))

