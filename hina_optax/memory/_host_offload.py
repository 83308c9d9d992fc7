"""`with_host_offload`: state in host memory, which is copied to the device in windows."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hina_optax.base import checks
from hina_optax.grouped import driver
from hina_optax.grouped.codecs import Codec
from hina_optax.memory import _arguments

_DEFAULT_MIN_BYTES = 1 << 14
_MB = 1 << 20
_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


class WithHostOffloadState(NamedTuple):
  """State of `with_host_offload`.

  Attributes:
    inner_state: the inner's state, with its offloaded leaves in `pinned_host` memory.
  """

  inner_state: Any


def with_host_offload(
  inner: optax.GradientTransformation,
  include: _arguments.Include = None,
  min_bytes: int | None = None,
  max_buffer_memory_mb: float | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Keeps the state of any transformation in host memory between steps.

  `init` puts the selected leaves of the inner's state into `pinned_host` memory, with their
  sharding. `update` copies them to the device, calls the inner and copies the new values back, with
  and without `jit`. Counters and small leaves stay on the device.

  With `max_buffer_memory_mb` the leaves are copied in windows. A window is several groups of leaves
  whose decoded state takes at most half of that memory. A window is copied to the device after the
  one before has been updated and copied back (`lax.optimization_barrier` makes it wait). So there
  is room for one window on its way in and one on its way out. Gradients wait with the state.
  Updates do not wait, so that `p + u` needs no memory of its own:

  .. math::
    \text{on the device} \le 2 \max(\text{window}/2,\ \text{state of the largest group})

  The inner must then treat each leaf by itself. A transformation that looks across leaves
  (`optax.clip_by_global_norm`) is refused by name: put it outside, in a chain before the wrapper.
  If a compiler still keeps all updates until the end, `hina_optax.apply` adds them within the loop.

  If `jax.jit` donates the state, return the donated trees in the same order, and nothing of a
  parameter's shape before them: `(params, state)` in, `(params, state)` out, both donated, as a
  Flax `TrainState` does. JAX pairs donated arrays with results by shape alone, in order. A result
  on the device that is paired with a leaf in host memory ends the program. For the same reason do
  not donate the state alone to a bare `jax.jit(tx.update)`: donate the gradients with it.

  Put it outermost. Nothing computes with arrays on the host, so a transformation that reads the
  inner's state (`with_state_dtype`, `with_quantized_state`, `optax.MultiSteps`) cannot stand
  outside. `with_rounded_updates` can.

  Before the first step of a jitted train step, commit the parameters to their device
  (`jax.device_put(params, device)`). Otherwise the step is compiled twice, since JAX returns
  committed arrays from a program with arrays on the host.

  Each step copies the state over the bus twice, which often takes as long as the step itself. For
  LoRA the state is small and so is the gain. GPUs limit pinned memory to 64 GB unless
  `XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB` is set. Eager `init` creates the state on the device and moves
  it leaf by leaf; if it does not fit there, use `jax.jit(tx.init, out_shardings=...)`.

  Args:
    inner: any optax transformation.
    include: which leaves of the state are offloaded: a regular expression searched in the leaf's
      path (such as `"0/mu/dense/kernel"`), a function `(path, leaf) -> bool`, or `None` for all.
    min_bytes: smallest size in bytes of a leaf that is offloaded; `None` is 16,384.
    max_buffer_memory_mb: window in MB (2^20 bytes) of whole leaves, over all devices together;
      `None` copies all leaves, in no particular order.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `WithHostOffloadState`: between steps an
    offloaded leaf takes 0 bytes on the device, and its own bytes on the host.

  Raises:
    ValueError: if the backend has no `pinned_host` memory, if the window is smaller than a leaf, if
      the inner looks across leaves and there is a window, or if an argument is out of range or
      traced where it shapes the program.
    TypeError: if `inner` is no transformation or `include` no rule.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import hina_optax.memory as memory
    >>> tx = memory.with_host_offload(optax.rmsprop(1e-3), max_buffer_memory_mb=64)
    >>> params = {"kernel": jnp.ones((256, 256))}
    >>> state = tx.init(params)
    >>> updates, state = jax.jit(tx.update)(params, state, params)
    >>> nu = optax.tree.get(state, "nu")
    >>> print(nu["kernel"].sharding.memory_kind, updates["kernel"].sharding.memory_kind)
    pinned_host device

  References:
    Ren et al., ZeRO-Offload, arXiv 2101.06840 (which also computes on the host; this does not).
    `cpu_offload_states` and `max_buffer_memory_mb` of `HinaAdaptive`.
  """
  inner = _arguments.check_inner(inner)
  is_included = _arguments.compile_include(include)
  threshold = _arguments.check_static_integer("min_bytes", min_bytes, _DEFAULT_MIN_BYTES, 0)
  window = _check_window_size(max_buffer_memory_mb)

  def selects(path: str, leaf: Any) -> bool:
    size = _count_bytes(leaf)
    if not 0 < size >= threshold or leaf.ndim == 0 or not is_included(path, leaf):
      return False
    check_window(path, size, window)
    return True

  def encode(leaf: Any, key: Any) -> Any:
    del key
    _require_pinned_host(leaf)
    return jax.device_put(leaf, _HOST)

  codec = Codec(
    "host memory", WithHostOffloadState, selects, encode,
    lambda stored, like, key: jax.device_put(stored, _DEVICE), lambda stored, like: True,
    is_lossy=False)
  return driver.with_codec(inner, codec, window)


def _check_window_size(megabytes: Any) -> int | None:
  if megabytes is None:
    return None
  checks.static_value("max_buffer_memory_mb", megabytes)
  checks.number("max_buffer_memory_mb", megabytes, open_low=True)
  return int(megabytes * _MB)


def _count_bytes(leaf: Any) -> int:
  """Returns the bytes of an array of numbers; 0 for anything else (random keys, scalars)."""
  dtype = getattr(leaf, "dtype", None)
  if dtype is None or jnp.issubdtype(dtype, jax.dtypes.extended):
    return 0
  return leaf.size * dtype.itemsize


def check_window(path: str, size: int, window: int | None) -> None:
  """Refuses a leaf that is larger than the window, in bytes."""
  if window is not None and size > window:
    raise ValueError(
      f"max_buffer_memory_mb is {window / _MB:g}, but state leaf '{path}' alone has "
      f"{size / _MB:.3g} MB, and a leaf is brought to the device whole. Raise it to at least "
      f"{size / _MB:.3g} (better: the state of one parameter), pass None to bring all leaves "
      "together, or leave the leaf out by include."
    )


def _require_pinned_host(leaf: Any) -> None:
  traced = isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array)
  device = next(iter(jax.local_devices()[:1] if traced else leaf.sharding.device_set))
  kinds = [memory.kind for memory in device.addressable_memories()]
  if "pinned_host" not in kinds:
    raise ValueError(
      f"with_host_offload needs 'pinned_host' memory, which the {device.platform} backend does not "
      f"have (it has {', '.join(kinds) or 'none'}). Leave the wrapper out; with_state_dtype and "
      "with_quantized_state make the state smaller where it is."
    )
