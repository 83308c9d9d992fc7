"""State that rests in host memory and visits the device in windows."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax
from jax import lax
from jax.extend import core

from hina_optax import _checks
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

  With `max_buffer_memory_mb` the leaves come in windows. The inner is traced once, and the trace is
  cut into groups of leaves that the inner combines with each other: for Adam the two moments of one
  parameter. The groups run in order. Each is copied when enough earlier groups have been computed
  and sent back to keep what is on the device within the window (`lax.optimization_barrier` makes
  it wait). The result is the inner's own whatever the inner does; the bound depends on it:

  - A group larger than the window comes whole. `optax.flatten`, `optax.apply_if_finite` and
    `optax.MultiSteps` make all leaves one group: inside, they need room for the whole state.
  - What a later step over all leaves still needs (the directions, before a
    `optax.clip_by_global_norm` that follows Adam) waits on the device until then.
  - A window counts the bytes brought; their new values need as much again until they are sent.

  The state that can be on the device at a time, in groups :math:`G_i` of :math:`b_i` bytes, is

  .. math::
    \sum_{i=k}^{n} b_i \le \max(\text{window}, b_n),

  where group `k` is the first that may still be there when group `n` is brought.

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
    ValueError: if the backend has no `pinned_host` memory, if the window is smaller than a leaf, or
      if an argument is out of range or traced where it shapes the program.
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

  def chosen(paths: Sequence[str], leaves: Sequence[Any]) -> list[int]:
    places = [
      i for i, (path, leaf) in enumerate(zip(paths, leaves))
      if 0 < _nbytes(leaf) >= least and leaf.ndim > 0 and bool(included(path, leaf))
    ]
    for i in places:
      check_window(paths[i], _nbytes(leaves[i]), window)
    return places

  def init(params: Any) -> WithHostOffloadState:
    paths, leaves, structure = _storage.paths_and_leaves(inner.init(params))
    places = chosen(paths, leaves)
    _require_pinned_host([leaves[i] for i in places])
    for i in places:
      leaves[i] = jax.device_put(leaves[i], _HOST)
    return WithHostOffloadState(structure.unflatten(_commit_beside(leaves, places)))

  def update(updates, state, params=None, **extra_args):
    paths, leaves, structure = _storage.paths_and_leaves(_storage.restored(state.inner_state))
    places = chosen(paths, leaves)

    def step(hosted: list[jax.Array]) -> tuple[list[jax.Array], Any]:
      opened = list(leaves)
      for i, leaf in zip(places, hosted):
        opened[i] = jax.device_put(leaf, _DEVICE)
      result, new = inner.update(updates, structure.unflatten(opened), params, **extra_args)
      kept = structure.flatten_up_to(new)
      sent = [jax.device_put(kept[i], _HOST) for i in places]
      for i in places:
        kept[i] = None
      return sent, (result, kept)

    hosted = [leaves[i] for i in places]
    sent, (result, kept) = step(hosted) if window is None else _in_windows(step, hosted, window)
    for i, leaf in zip(places, sent):
      kept[i] = leaf
    return result, WithHostOffloadState(structure.unflatten(kept))

  return optax.GradientTransformationExtraArgs(init, update)


def _commit_beside(leaves: list[Any], places: Sequence[int]) -> list[Any]:
  """`leaves`, those on the device of the hosted ones bound to it as these are."""
  # All results of a step with arrays on the host are bound to their device. State that is not, the
  # first time, would be another program: every step would be compiled twice.
  found = [_devices(leaves[i]) for i in places]
  if not found or found[0] is None:
    return leaves
  return [
    jax.device_put(x, x.sharding) if _devices(x) == found[0] and not x.committed else x
    for x in leaves
  ]


def _devices(leaf: Any) -> set[Any] | None:
  """The devices of an array; `None` for what is traced or no array."""
  if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
    return None
  return leaf.sharding.device_set


def _window_bytes(megabytes: Any) -> int | None:
  if megabytes is None:
    return None
  _checks.structural("max_buffer_memory_mb", megabytes)
  _checks.number("max_buffer_memory_mb", megabytes, open_low=True)
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


def _require_pinned_host(leaves: Sequence[Any]) -> None:
  devices = next((d for d in map(_devices, leaves) if d is not None), None)
  device = next(iter(devices or jax.local_devices()[:1]))
  kinds = [memory.kind for memory in device.addressable_memories()]
  if "pinned_host" not in kinds:
    raise ValueError(
      f"with_host_offload needs 'pinned_host' memory, which the {device.platform} backend does not "
      f"have (it has {', '.join(kinds) or 'none'}). Leave the wrapper out; with_state_dtype and "
      "with_quantized_state make the state smaller where it is."
    )


def _in_windows(step: Callable[..., Any], hosted: list[jax.Array], window: int) -> Any:
  """`step(hosted)`, evaluated group by group within `window` bytes."""
  closed, shape = jax.make_jaxpr(step, return_shape=True)(hosted)
  jaxpr = closed.jaxpr
  values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *hosted)))
  phases, members = _phases(jaxpr)
  wanted = _shared(phases, jaxpr.outvars)
  sizes = [sum(_nbytes(hosted[i]) for i in group) for group in members]
  # tokens[n] is ready when the first n groups have been computed and sent.
  tokens = [jnp.zeros([], jnp.int32)]
  _run(jaxpr, phases[0], values, wanted)
  for n, group in enumerate(members):
    first = n
    while first > 0 and sum(sizes[first - 1:n + 1]) <= window:
      first -= 1
    for variable in (jaxpr.invars[i] for i in group) if first else ():
      values[variable], _ = lax.optimization_barrier((values[variable], tokens[first]))
    made = _run(jaxpr, phases[n + 1], values, wanted)
    done = lax.optimization_barrier((tokens[n], *(values[v] for v in made)))
    tokens.append(done[0])
    values.update(zip(made, done[1:]))
  _run(jaxpr, phases[-1], values, wanted)
  flat = [v.val if isinstance(v, core.Literal) else values[v] for v in jaxpr.outvars]
  return jax.tree.unflatten(jax.tree.structure(shape), flat)


def _phases(jaxpr: Any) -> tuple[list[list[Any]], list[list[int]]]:
  """Equations before all groups, of each group and after them; and each group's inputs.

  Inputs are in one group if some equation combines values made from them that are as large as an
  input. Sums and other small values are cheap to keep and bind nothing.
  """
  parent = list(range(len(jaxpr.invars)))

  def root(i: int) -> int:
    while parent[i] != i:
      parent[i] = i = parent[parent[i]]
    return i

  large = min((v.aval.size for v in jaxpr.invars), default=0)
  origin = {v: i for i, v in enumerate(jaxpr.invars)}
  for equation in jaxpr.eqns:
    found = [origin[v] for v in _variables(equation.invars) if v in origin]
    for i in found[1:]:
      parent[root(i)] = root(found[0])
    if found:
      origin.update((v, found[0]) for v in equation.outvars if v.aval.size >= large)
  groups: dict[int, list[int]] = {}
  for i in range(len(jaxpr.invars)):
    groups.setdefault(root(i), []).append(i)
  number = {i: n for n, group in enumerate(groups.values()) for i in group}
  phases: list[list[Any]] = [[] for _ in range(len(groups) + 2)]
  reach = {v: frozenset({number[i]}) for i, v in enumerate(jaxpr.invars)}
  for equation in jaxpr.eqns:
    needs = frozenset().union(*(reach.get(v, ()) for v in _variables(equation.invars)))
    reach.update((v, needs) for v in equation.outvars)
    phases[0 if not needs else min(needs) + 1 if len(needs) == 1 else -1].append(equation)
  return phases, list(groups.values())


def _variables(atoms: Sequence[Any]) -> list[Any]:
  return [v for v in atoms if not isinstance(v, core.Literal)]


def _shared(phases: list[list[Any]], results: Sequence[Any]) -> set[Any]:
  """Variables that are results, or used in another phase than the one that makes them."""
  maker = {v: n for n, phase in enumerate(phases) for e in phase for v in e.outvars}
  shared = set(_variables(results))
  for n, phase in enumerate(phases):
    for equation in phase:
      shared.update(v for v in _variables(equation.invars) if maker.get(v, n) != n)
  return shared


def _run(jaxpr: Any, phase: list[Any], values: dict[Any, Any], wanted: set[Any]) -> list[Any]:
  """Evaluates `phase`, adds what others want to `values`, and says which variables these are."""
  made = [v for equation in phase for v in equation.outvars]
  inside = set(made)
  needs = [v for equation in phase for v in _variables(equation.invars) if v not in inside]
  needs, gives = list(dict.fromkeys(needs)), [v for v in made if v in wanted]
  part = jaxpr.replace(constvars=[], invars=needs, outvars=gives, eqns=phase)
  results = core.jaxpr_as_fun(core.ClosedJaxpr(part, []))(*(values[v] for v in needs))
  values.update(zip(gives, results))
  return gives
