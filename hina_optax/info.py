"""Figures about an optimizer and its memory, read from its options and its state."""

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
  """Reports which features are on, how the state is stored, and how training is going.

  Everything is read from the state, wherever it is inside a chain or a wrapper. The state holds
  only a few numbers per leaf for this purpose, and the training step is not compiled again. Reading
  the mean rate scale and the background share takes one pass over their state.

  Args:
    state: the state of `hina_adaptive`, or of any chain of the library's transformations.
    optimizer: the result of `hina_adaptive`, its options as a dict, or `None`. If it is not `None`,
      the options are reported as they were set.

  Returns:
    A dict with

    - `features`: the sorted names of the options that are on;
    - `memory_optimization`: `state_bytes`, `state_bytes_by_dtype`, and the memory options if
      `optimizer` was given;
    - `figures`: for the parts in the state: `step`; `edge_share` and `background_share` (of the
      elements of spatial leaves); `alignment` (share of elements that agree with the gradient);
      `torque` (mean cosine with the momentum); `mean_importance`; `mean_rate_scale` (over all
      elements);
    - `options`: the options if `optimizer` was given, otherwise empty.

  Raises:
    TypeError: if `optimizer` is none of the three, or if the state is traced.

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
  options = _read_options(optimizer)
  _refuse_traced(state, "get_optimization_info")
  part_states = list(_find_part_states(state))
  return {
    "features": sorted(_enabled_features(part_states)),
    "memory_optimization": _count_bytes(state) | {
      name: options[name] for name in MEMORY_OPTIONS if name in options
    },
    "figures": _read_figures(part_states),
    "options": options,
  }


def get_memory_stats(state: Any = None, optimizer: Any = None) -> dict[str, Any]:
  """Reports how much memory is in use, and how much of it is the optimizer's state.

  On devices that report their memory (GPUs, TPUs) these are the device's figures. On devices that
  do not (CPUs) live arrays are counted, and the limit is the memory of the host.

  Args:
    state: the optimizer's state; `None` leaves `buffer_pool_stats` at 0.
    optimizer: the result of `hina_adaptive`, a dict of its options, or `None`. Its `vram_budget_gb`
      is the limit, if it is set.

  Returns:
    A dict with

    - `memory_pressure`: bytes in use over the limit;
    - `used_mb`, `limit_mb`, `peak_mb` (`None` if it is not reported), `source` (`"device"` or
      `"live arrays"`);
    - `buffer_pool_stats`: `current_memory_mb` (state on the device), `host_memory_mb` (state in
      host memory), `max_memory_mb` (the option `max_buffer_memory_mb`).

  Raises:
    TypeError: if `optimizer` is none of the three, or if the state is traced.

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
  options = _read_options(optimizer)
  _refuse_traced(state, "get_memory_stats")
  usage = memory.device_memory()
  budget_gb = options.get("vram_budget_gb")
  limit = usage.limit if budget_gb is None else budget_gb * memory.GB
  arrays = [x for x in jax.tree.leaves(state) if isinstance(x, jax.Array)]
  host_bytes = sum(x.nbytes for x in arrays if memory.is_on_host(x))
  return {
    "memory_pressure": usage.used / limit,
    "used_mb": usage.used / _MB,
    "limit_mb": limit / _MB,
    "peak_mb": None if usage.peak is None else usage.peak / _MB,
    "source": usage.source,
    "buffer_pool_stats": {
      "current_memory_mb": (sum(x.nbytes for x in arrays) - host_bytes) / _MB,
      "host_memory_mb": host_bytes / _MB,
      "max_memory_mb": options.get("max_buffer_memory_mb"),
    },
  }


def _refuse_traced(state: Any, caller: str) -> None:
  if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(state)):
    raise TypeError(f"{caller} reads values: call it outside of jit, on a real state.")


def _read_options(optimizer: Any) -> dict[str, Any]:
  if optimizer is None:
    return {}
  options = getattr(optimizer, "options", optimizer)
  if isinstance(options, HinaOptions):
    return options.as_dict()
  if isinstance(options, Mapping):
    return dict(options)
  raise TypeError(
    "optimizer must be what hina_adaptive returned, a dict of its options, or None; got "
    f"{type(optimizer).__name__}. If the transformation is wrapped in another, pass the inner one."
  )


def _find_part_states(state: Any) -> Iterator[Any]:
  """Yields the state of every registered part, found through chains, wrappers and dicts."""
  if type(state) in {part.state for part in registry.parts()}:
    yield state
  if isinstance(state, Mapping):
    children: Any = state.values()
  elif isinstance(state, (tuple, list)):
    children = state
  else:
    return
  for child in children:
    yield from _find_part_states(child)


def _enabled_features(states: list[Any]) -> set[str]:
  """Returns the names of the options that switch on the parts with these states."""
  return {
    name for part in registry.parts() for state in states if type(state) is part.state
    for name in part.switches if part.shows.get(name, lambda state: True)(state)}


def _count_bytes(state: Any) -> dict[str, Any]:
  by_dtype: dict[str, int] = {}
  for leaf in jax.tree.leaves(state):
    if hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
      by_dtype[str(leaf.dtype)] = by_dtype.get(str(leaf.dtype), 0) + leaf.size * leaf.dtype.itemsize
  return {"state_bytes": sum(by_dtype.values()), "state_bytes_by_dtype": by_dtype}


def _read_figures(states: list[Any]) -> dict[str, float]:
  """Reads the figures that the parts declare; a part that occurs several times gives the mean."""
  collected: dict[str, list[float]] = {}
  for part in registry.parts():
    for state in states:
      if type(state) is part.state:
        for name, figure in part.figures.items():
          value = _read_figure(figure, state)
          if value is not None:
            collected.setdefault(name, []).append(float(value))
  figures = {name: float(np.mean(values)) for name, values in collected.items()}
  steps = [int(np.max(state.count)) for state in states if "count" in state._fields]
  return ({"step": max(steps)} if steps else {}) | figures


def _read_figure(figure: Figure, state: Any) -> Any:
  if figure.read is not None:
    return jax.jit(figure.read)(_fetch(state))
  numbers = getattr(state, figure.field)
  return None if numbers is None else _mean_above(numbers, figure.skip_up_to)


def _mean_above(numbers: Any, least: float = -1.0) -> float | None:
  """Averages the numbers above `least`, a value that marks leaves which a part does not change."""
  # A single vector, or a dict of vectors for a chain inside of with_leaf_batching.
  vectors = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(_fetch(numbers))]
  values = np.concatenate(vectors) if vectors else np.zeros(0)
  values = values[values > least]
  return float(values.mean()) if values.size else None


def _fetch(tree: Any) -> Any:
  """Moves state from host memory to the device, and converts 8-bit state to fp32."""
  return memory.dequantize_state(jax.device_put(tree, jax.memory.Space.Device))
