"""State that rests in host memory and visits the device in windows."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hina_optax.base import checks
from hina_optax.grouped import driver
from hina_optax.grouped.codecs import Layer
from hina_optax.memory import _storage

_MIN_BYTES = 1 << 14
_MB = 1 << 20
_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


class WithHostOffloadState(NamedTuple):
  """State of `with_host_offload`.

  Attributes:
    inner_state: the inner's state, its offloaded leaves in `pinned_host` memory.
  """

  inner_state: Any


def with_host_offload(
  inner: optax.GradientTransformation,
  include: _storage.Include = None,
  min_bytes: int | None = None,
  max_buffer_memory_mb: float | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Keeps the state of any transformation in host memory between steps.

  `init` places the chosen leaves of the inner's state in `pinned_host` memory at once, with their
  sharding. `update` copies them to the device, calls the inner and sends the new values back, with
  and without `jit`. Counters and small leaves stay on the device.

  With `max_buffer_memory_mb` the leaves come in windows: groups of leaves whose state takes at most
  half of it, opened. Each window is brought when the one before has been updated and sent back
  (`lax.optimization_barrier` makes it wait), so that a window on its way in and one on its way out
  fit. Gradients wait with the state; updates do not, so that `p + u` needs no memory of its own:

  .. math::
    \text{on the device} \le 2 \max(\text{window}/2,\ \text{state of the largest group})

  The inner must then treat each leaf by itself. What looks across leaves
  (`optax.clip_by_global_norm`) is refused by name: put it outside, in a chain before the wrapper.
  Where a compiler still lets updates pile up, `hina_optax.apply` adds them within the loop.

  When `jax.jit` donates the state, let it return what it was given in the same order and nothing of
  a parameter's shape before: `(params, state)` in, `(params, state)` out, both donated, as a Flax
  `TrainState` does. JAX pairs donated arrays with results by shape alone, in order, and a result on
  the device that is paired with a leaf in host memory ends the program. For the same reason do not
  donate the state alone to a bare `jax.jit(tx.update)`: donate the gradients with it.

  Put it outermost: nothing computes with arrays on the host, so what reads the inner's state
  (`with_state_dtype`, `with_quantized_state`, `optax.MultiSteps`) cannot stand outside.
  `with_rounded_updates` can.

  Before the first step of a jitted train step commit the parameters to their device
  (`jax.device_put(params, device)`), or it is compiled twice: beside arrays on the host JAX returns
  committed ones.

  It costs two copies of the state a step over the bus, often as long as the step itself. For LoRA
  the state is small and so is the gain. GPUs cap pinned memory at 64 GB unless
  `XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB` says otherwise. Eager `init` makes the state on the device and
  moves it leaf by leaf; where it does not fit, use `jax.jit(tx.init, out_shardings=...)`.

  Args:
    inner: any optax transformation.
    include: which leaves of the state are offloaded: a regular expression searched in the leaf's
      path (such as `"0/mu/dense/kernel"`), a function `(path, leaf) -> bool`, or `None` for all.
    min_bytes: size in bytes from which a leaf is offloaded; `None` is 16,384.
    max_buffer_memory_mb: window in MB (2^20 bytes) of whole leaves, over all devices together;
      `None` brings all leaves without an order.

  Returns:
    An `optax.GradientTransformationExtraArgs` with a `WithHostOffloadState`: between steps 0 bytes
    on the device for each offloaded leaf, as many as before on the host.

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
  inner = _storage.transformation(inner)
  included = _storage.path_rule(include)
  least = _storage.structural_number("min_bytes", min_bytes, _MIN_BYTES, 0)
  window = _window_bytes(max_buffer_memory_mb)

  def chosen(path: str, leaf: Any) -> bool:
    size = _nbytes(leaf)
    if not 0 < size >= least or leaf.ndim == 0 or not included(path, leaf):
      return False
    check_window(path, size, window)
    return True

  def encode(leaf: Any, key: Any) -> Any:
    del key
    _require_pinned_host(leaf)
    return jax.device_put(leaf, _HOST)

  layer = Layer(
    "host memory", WithHostOffloadState, chosen, encode,
    lambda stored, like, key: jax.device_put(stored, _DEVICE), lambda stored, like: True,
    rounds=False)
  return driver.with_layer(inner, layer, window)


def _window_bytes(megabytes: Any) -> int | None:
  if megabytes is None:
    return None
  checks.structural("max_buffer_memory_mb", megabytes)
  checks.number("max_buffer_memory_mb", megabytes, open_low=True)
  return int(megabytes * _MB)


def _nbytes(leaf: Any) -> int:
  """Bytes of an array of numbers; 0 for what is none (random keys, Python scalars)."""
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
