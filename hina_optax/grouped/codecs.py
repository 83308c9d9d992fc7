"""How the leaves of a state rest between steps: layers of storage, each with a codec.

A layer chooses leaves by path, shape and dtype, and keeps them in another form: in fewer bits, or
in host memory. The driver opens and closes them group by group.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hina_optax.base import paths, rounding
from hina_optax.base.positions import LeafNumbers

# Added to a layer's purpose: the noise with which state is read is not that of writing it.
_READING = 16
_PREFIX = "inner_state/"


class QuantizedLeaf(NamedTuple):
  """A leaf of a state in 8 bits; `dequantize_state` reads it.

  Attributes:
    codes: uint8, of the leaf's shape.
    scales: bf16, one number a block, with as many axes as the leaf: leading ones of the leaf, one
      that counts blocks, ones. Negative where the block has no negative number.
  """

  codes: jax.Array
  scales: jax.Array


@dataclasses.dataclass(frozen=True)
class Layer:
  """One form of storage around a state.

  Attributes:
    label: the stored form in words, for errors.
    state_type: the NamedTuple that holds the stored state: `inner_state`, and where the layer
      rounds `step` and `seed`.
    chosen: `(path, leaf) -> bool`, from shape and dtype alone.
    encode: `(leaf, key) -> stored`.
    decode: `(stored, like, key) -> leaf`, of the dtype of `like`.
    fits: `(stored, like) -> bool`: whether `encode` could have made `stored`.
    rounds: whether it keeps numbers in fewer bits; parameters and updates are then widened to fp32.
    seed: of the rounding noise.
    purpose: keeps layers with equal seeds apart.
  """

  label: str
  state_type: Any
  chosen: Callable[[str, Any], bool]
  encode: Callable[[Any, Any], Any]
  decode: Callable[[Any, Any, Any], Any]
  fits: Callable[[Any, Any], bool]
  rounds: bool = True
  seed: Any = 0
  purpose: int = 0


@dataclasses.dataclass(frozen=True)
class Stage:
  """What one layer does to one leaf.

  Attributes:
    layer: which layer, counted from the inside.
    likes: shape and dtype of what it is given: of one array, or of both of a `QuantizedLeaf`.
    moved: for each of these whether it is chosen.
  """

  layer: int
  likes: tuple[tuple[tuple[int, ...], str], ...]
  moved: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Form:
  """How one leaf of a state rests.

  Attributes:
    stages: what is done to it, from the inside out.
    index: of the leaf in the state, which tells its noise from that of others.
  """

  stages: tuple[Stage, ...] = ()
  index: int = dataclasses.field(default=0, compare=False)


Keys = list[tuple[rounding.Key, rounding.Key] | None]


def is_leaf(x: Any) -> bool:
  """True for what the layers take for one leaf of a state."""
  return isinstance(x, (QuantizedLeaf, LeafNumbers))


def flatten(state: Any) -> tuple[list[str], list[Any], Any]:
  """Paths (`"0/mu/dense/kernel"`), leaves and structure of a state."""
  pairs, structure = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_leaf)
  return [state_path(path) for path, _ in pairs], [leaf for _, leaf in pairs], structure


def state_path(keys: Any) -> str:
  """A key path of a state as a string."""
  # `flax.nnx` puts a `value` between a parameter and what stands in its place, at `init` alone.
  if len(keys) > 1 and getattr(keys[-1], "name", None) in QuantizedLeaf._fields:
    return f"{paths.path_string(keys[:-1])}/{keys[-1].name}"
  return paths.path_string(keys)


def restored(state: Any) -> Any:
  """`state` with every `QuantizedLeaf` that `flax.nnx` keeps as a mapping put together again."""
  def apart(x: Any) -> bool:
    named = not isinstance(x, tuple) and hasattr(x, "keys") and set(x.keys())
    return named == set(QuantizedLeaf._fields) and getattr(x["codes"], "dtype", None) == jnp.uint8

  return jax.tree.map(
    lambda x: QuantizedLeaf(x["codes"], x["scales"]) if apart(x) else x, state, is_leaf=apart)


def is_floating(leaf: Any) -> bool:
  """True for arrays of real floating numbers."""
  return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def widen(x: Any) -> Any:
  """A floating array of fewer than 32 bits in fp32, everything else as it is."""
  return x.astype(jnp.float32) if is_floating(x) and x.dtype.itemsize < 4 else x


def forms_of(layers: Sequence[Layer], likes: Any) -> Any:
  """The forms of a state that is opened, from its shapes, as a tree like it."""
  found_paths, leaves, structure = flatten(likes)
  forms = []
  for index, (path, leaf) in enumerate(zip(found_paths, leaves)):
    stages: list[Stage] = []
    now = leaf
    for number, layer in enumerate(layers):
      if isinstance(leaf, LeafNumbers) or (not hasattr(now, "dtype") and not is_leaf(now)):
        break
      stage = _stage(layer, number, _PREFIX * number + path, now)
      if stage is not None:
        stages.append(stage)
        now = jax.eval_shape(lambda x, layer=layer, stage=stage: _encoded(layer, stage, x, _NO_KEY),
                             now) if layer.rounds else now
    forms.append(Form(tuple(stages), index))
  return structure.unflatten(forms)


_NO_KEY: Any = rounding.Key(np.uint32(0), np.uint32(0))  # type: ignore[arg-type]


def _stage(layer: Layer, number: int, path: str, now: Any) -> Stage | None:
  arrays = jax.tree.leaves(now)
  if layer.rounds:
    moved: tuple[bool, ...] = (not isinstance(now, QuantizedLeaf) and layer.chosen(path, now),)
  elif isinstance(now, QuantizedLeaf):
    moved = tuple(layer.chosen(f"{path}/{name}", x) for name, x in zip(now._fields, now))
  else:
    moved = (layer.chosen(path, now),)
  if not any(moved):
    return None
  likes = tuple((tuple(x.shape), jnp.dtype(x.dtype).name) for x in arrays)
  return Stage(number, likes, moved)


def _encoded(layer: Layer, stage: Stage, x: Any, key: Any) -> Any:
  if layer.rounds:
    return layer.encode(x, key)
  arrays: list[Any]
  structure: Any
  arrays, structure = jax.tree.flatten(x)
  return structure.unflatten(
    [layer.encode(y, key) if moved else y for y, moved in zip(arrays, stage.moved)])


def _decoded(layer: Layer, stage: Stage, x: Any, key: Any) -> Any:
  if layer.rounds:
    shape, dtype = stage.likes[0]
    return layer.decode(x, jax.ShapeDtypeStruct(shape, dtype), key)
  arrays: list[Any]
  structure: Any
  arrays, structure = jax.tree.flatten(x)
  return structure.unflatten([
    layer.decode(y, y, key) if moved else y for y, moved in zip(arrays, stage.moved)])


def folded(forms: Any, keys: Keys) -> list[Any]:
  """For each leaf of a part of a state, and each of its stages, the keys of its own noise."""
  return [
    [None if keys[stage.layer] is None else tuple(k.fold(form.index) for k in keys[stage.layer])
     for stage in form.stages]
    for form in jax.tree.leaves(forms)
  ]


def opened(layers: Sequence[Layer], forms: Any, stored: Any, keys: Sequence[Any]) -> Any:
  """A part of a state as its transformation takes it; `keys` are `folded`."""
  flat: list[Any]
  structure: Any
  flat, structure = jax.tree.flatten(forms)
  made = []
  for form, x, own in zip(flat, structure.flatten_up_to(stored), keys):
    for stage, key in zip(reversed(form.stages), reversed(own)):
      x = _decoded(layers[stage.layer], stage, x, None if key is None else key[0])
    made.append(x)
  return structure.unflatten(made)


def closed(layers: Sequence[Layer], forms: Any, leaves: Any, keys: Sequence[Any]) -> Any:
  """Inverse of `opened`."""
  flat: list[Any]
  structure: Any
  flat, structure = jax.tree.flatten(forms)
  made = []
  for form, x, own in zip(flat, structure.flatten_up_to(leaves), keys):
    for stage, key in zip(form.stages, own):
      x = _encoded(layers[stage.layer], stage, x, None if key is None else key[1])
    made.append(x)
  return structure.unflatten(made)


def keys_of(layers: Sequence[Layer], counters: Sequence[Any]) -> Keys:
  """For each layer the key with which a step reads and the one with which it writes."""
  return [
    None if counter is None else (
      rounding.key_of(counter[1], counter[0], layer.purpose + _READING),
      rounding.key_of(counter[1], next_step(counter[0]), layer.purpose))
    for layer, counter in zip(layers, counters)
  ]


def next_step(step: Any) -> Any:
  """The count after one more update; it stays at the largest number."""
  most = jnp.iinfo(jnp.int32).max
  return jnp.where(step < most, step + 1, most).astype(jnp.int32)


def wrapped(layers: Sequence[Layer], state: Any, counters: Sequence[Any]) -> Any:
  """A stored state in the layers' NamedTuples."""
  for layer, counter in zip(layers, counters):
    state = layer.state_type(state) if counter is None else layer.state_type(state, *counter)
  return state


def first_counters(layers: Sequence[Layer]) -> list[Any]:
  """Step and seed of each layer that rounds, at `init`."""
  return [(jnp.zeros([], jnp.int32), rounding.seed_word(layer.seed)) if layer.rounds else None
          for layer in layers]


def unwrapped(layers: Sequence[Layer], state: Any) -> tuple[Any, list[Any]]:
  """The stored state, and step and seed of each layer.

  Raises:
    ValueError: if the state is not in these layers.
  """
  counters: list[Any] = []
  for layer in reversed(layers):
    if not isinstance(state, layer.state_type):
      raise ValueError(
        f"the state is a {type(state).__name__} where this optimizer has a "
        f"{layer.state_type.__name__}: it was made by another optimizer, by another plan, or for "
        "other parameters.")
    counters.append((state.step, state.seed) if layer.rounds else None)
    state = state.inner_state
  return state, counters[::-1]


def check_forms(layers: Sequence[Layer], likes: Any, forms: Any, stored: Any) -> None:
  """Refuses a stored state that these layers cannot have made.

  Raises:
    ValueError: naming the leaf, how it is stored, and how these options store it.
  """
  found_paths, leaves, structure = flatten(likes)
  rows = zip(found_paths, leaves, structure.flatten_up_to(forms), structure.flatten_up_to(stored))
  for path, like, form, x in rows:
    if isinstance(like, LeafNumbers):
      continue
    rounding_stages = [s for s in form.stages if layers[s.layer].rounds]
    last = rounding_stages[-1] if rounding_stages else None
    if last is None:
      fits, wanted = _same_form(x, like), _describe(like)
    else:
      layer, (shape, dtype) = layers[last.layer], last.likes[0]
      fits = layer.fits(x, jax.ShapeDtypeStruct(shape, dtype))
      wanted = f"{layer.label}, shape {list(shape)}"
    if not fits:
      raise ValueError(
        f"state leaf '{path}' is stored as {_describe(x)}, but these options store it as {wanted}: "
        "the state was made with other options or for other parameters. Use the options it was "
        "made with, or start again from init.")


def _same_form(stored: Any, like: Any) -> bool:
  """Whether a leaf that stays as it is can be the one that `like` describes."""
  structure: Any = jax.tree.structure(stored)
  if structure != jax.tree.structure(like):
    return False
  # Only narrower numbers betray another storage; an inner may widen its own state as it runs.
  return all(
    not (is_floating(x) and is_floating(y))
    or (x.shape == y.shape and x.dtype.itemsize >= y.dtype.itemsize)
    for x, y in zip(jax.tree.leaves(stored), jax.tree.leaves(like)))


def _describe(stored: Any) -> str:
  parts = [
    f"{getattr(x, 'dtype', type(x).__name__)}{list(np.shape(x))}" for x in jax.tree.leaves(stored)
  ]
  return f"{type(stored).__name__}({', '.join(parts)})" if len(parts) != 1 else parts[0]


def refuse_host(path: str, leaf: Any) -> None:
  """Refuses to compute with an array in host memory.

  Raises:
    ValueError: naming the leaf.
  """
  for x in jax.tree.leaves(leaf):
    if hasattr(x, "dtype") and jax.typeof(x).memory_space == jax.memory.Space.Host:
      raise ValueError(
        f"state leaf '{path}' is in host memory, where nothing can be computed: put "
        "with_host_offload outside of the other storage wrappers, not inside.")


def committed(state: Any) -> Any:
  """`state` with the arrays on the device of its hosted ones bound to it, as these are."""
  # All results of a step with arrays on the host are bound to their device. State that is not, the
  # first time, would be another program: every step would be compiled twice.
  def is_array(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)

  found = [x.sharding.device_set for x in jax.tree.leaves(state)
           if is_array(x) and x.sharding.memory_kind == "pinned_host"]
  if not found:
    return state
  return jax.tree.map(
    lambda x: jax.device_put(x, x.sharding)
    if is_array(x) and x.sharding.device_set == found[0] and not x.committed else x, state)
