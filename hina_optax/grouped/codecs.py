"""Codecs: how the leaves of a state are stored between steps.

A codec selects leaves by path, shape and dtype, and stores them in fewer bits or in host memory.
The update loop decodes the state of one group, runs the transformation, and encodes it again.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hina_optax.base import paths, rounding
from hina_optax.base.positions import LeafNumbers

# Decoding draws other noise than encoding: this is added to the codec's purpose.
_DECODE_PURPOSE_OFFSET = 16
_PREFIX = "inner_state/"


class QuantizedLeaf(NamedTuple):
  """A leaf of a state in 8 bits; `dequantize_state` decodes it.

  Attributes:
    codes: uint8, in the leaf's shape.
    scales: bf16, one number per block, with as many axes as the leaf: the leading axes of the leaf,
      one axis that counts blocks, then axes of size 1. A scale is negative where all
      numbers of its block are finite and none is negative.
  """

  codes: jax.Array
  scales: jax.Array


@dataclasses.dataclass(frozen=True)
class Codec:
  """One way to store a state.

  Attributes:
    label: the stored format in words, for errors.
    state_type: the NamedTuple that holds the stored state: `inner_state`, and for a lossy codec
      also `step` and `seed`.
    selects: `(path, leaf) -> bool`, from shape and dtype alone.
    encode: `(leaf, key) -> stored`.
    decode: `(stored, like, key) -> leaf`, in the dtype of `like`.
    matches: `(stored, like) -> bool`: whether `encode` could have returned `stored`.
    is_lossy: whether it stores numbers in fewer bits. Parameters and updates are then widened to
      fp32.
    seed: seed of the rounding noise.
    purpose: gives codecs with equal seeds different noise.
  """

  label: str
  state_type: Any
  selects: Callable[[str, Any], bool]
  encode: Callable[[Any, Any], Any]
  decode: Callable[[Any, Any, Any], Any]
  matches: Callable[[Any, Any], bool]
  is_lossy: bool = True
  seed: Any = 0
  purpose: int = 0


@dataclasses.dataclass(frozen=True)
class EncodingStage:
  """What one codec does to one leaf.

  Attributes:
    codec_index: index of the codec, counted from the innermost.
    inputs: shape and dtype of each array that the codec gets: one array, or the two of a
      `QuantizedLeaf`.
    selected: for each of these arrays, whether the codec selects it.
  """

  codec_index: int
  inputs: tuple[tuple[tuple[int, ...], str], ...]
  selected: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class LeafEncoding:
  """How one leaf of a state is stored.

  Attributes:
    stages: one per codec that changes the leaf, from the inside out.
    leaf_index: index of the leaf in the state. Each leaf derives its own noise from it.
  """

  stages: tuple[EncodingStage, ...] = ()
  leaf_index: int = dataclasses.field(default=0, compare=False)


# For each codec the keys with which it decodes and encodes; `None` for a lossless codec.
CodecKeys = list[tuple[rounding.Key, rounding.Key] | None]


def is_leaf(x: Any) -> bool:
  """True for a node that codecs treat as one leaf of a state."""
  return isinstance(x, (QuantizedLeaf, LeafNumbers))


def flatten_state(state: Any) -> tuple[list[str], list[Any], Any]:
  """Returns the paths (`"0/mu/dense/kernel"`), the leaves and the structure of a state."""
  pairs, structure = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_leaf)
  return [state_path(path) for path, _ in pairs], [leaf for _, leaf in pairs], structure


def state_path(keys: Any) -> str:
  """Returns a key path of a state as a string."""
  # At `init`, `flax.nnx` puts a `value` between a parameter and what takes its place in the state.
  if len(keys) > 1 and getattr(keys[-1], "name", None) in QuantizedLeaf._fields:
    return f"{paths.path_string(keys[:-1])}/{keys[-1].name}"
  return paths.path_string(keys)


def restore_quantized_leaves(state: Any) -> Any:
  """Rebuilds every `QuantizedLeaf` that `flax.nnx` has turned into a mapping."""
  def is_mapping(x: Any) -> bool:
    names = not isinstance(x, tuple) and hasattr(x, "keys") and set(x.keys())
    return names == set(QuantizedLeaf._fields) and getattr(x["codes"], "dtype", None) == jnp.uint8

  return jax.tree.map(
    lambda x: QuantizedLeaf(x["codes"], x["scales"]) if is_mapping(x) else x,
    state, is_leaf=is_mapping)


def is_floating(leaf: Any) -> bool:
  """True for arrays of real floating-point numbers."""
  return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def widen(x: Any) -> Any:
  """Casts a floating-point array of fewer than 32 bits to fp32; returns anything else unchanged."""
  return x.astype(jnp.float32) if is_floating(x) and x.dtype.itemsize < 4 else x


def choose_encodings(codecs: Sequence[Codec], shapes: Any) -> Any:
  """Returns a tree of `LeafEncoding`s for a decoded state, given as a tree of shapes."""
  leaf_paths, leaves, structure = flatten_state(shapes)
  encodings = []
  for leaf_index, (path, leaf) in enumerate(zip(leaf_paths, leaves)):
    stages: list[EncodingStage] = []
    current = leaf
    for codec_index, codec in enumerate(codecs):
      if isinstance(leaf, LeafNumbers) or (not hasattr(current, "dtype") and not is_leaf(current)):
        break
      stage = _choose_stage(codec, codec_index, _PREFIX * codec_index + path, current)
      if stage is not None:
        stages.append(stage)
        if codec.is_lossy:
          current = jax.eval_shape(
            lambda x, codec=codec, stage=stage: _encode_stage(codec, stage, x, _PLACEHOLDER_KEY),
            current)
    encodings.append(LeafEncoding(tuple(stages), leaf_index))
  return structure.unflatten(encodings)


_PLACEHOLDER_KEY: Any = rounding.Key(np.uint32(0), np.uint32(0))  # type: ignore[arg-type]


def _choose_stage(codec: Codec, codec_index: int, path: str, leaf: Any) -> EncodingStage | None:
  arrays = jax.tree.leaves(leaf)
  if codec.is_lossy:
    selected: tuple[bool, ...] = (
      not isinstance(leaf, QuantizedLeaf) and codec.selects(path, leaf),)
  elif isinstance(leaf, QuantizedLeaf):
    selected = tuple(codec.selects(f"{path}/{name}", x) for name, x in zip(leaf._fields, leaf))
  else:
    selected = (codec.selects(path, leaf),)
  if not any(selected):
    return None
  inputs = tuple((tuple(x.shape), jnp.dtype(x.dtype).name) for x in arrays)
  return EncodingStage(codec_index, inputs, selected)


def _encode_stage(codec: Codec, stage: EncodingStage, x: Any, key: Any) -> Any:
  if codec.is_lossy:
    return codec.encode(x, key)
  arrays: list[Any]
  structure: Any
  arrays, structure = jax.tree.flatten(x)
  return structure.unflatten([
    codec.encode(y, key) if selected else y for y, selected in zip(arrays, stage.selected)])


def _decode_stage(codec: Codec, stage: EncodingStage, x: Any, key: Any) -> Any:
  if codec.is_lossy:
    shape, dtype = stage.inputs[0]
    return codec.decode(x, jax.ShapeDtypeStruct(shape, dtype), key)
  arrays: list[Any]
  structure: Any
  arrays, structure = jax.tree.flatten(x)
  return structure.unflatten([
    codec.decode(y, y, key) if selected else y for y, selected in zip(arrays, stage.selected)])


def derive_leaf_keys(encodings: Any, keys: CodecKeys) -> list[Any]:
  """Returns, for each leaf and each of its stages, the keys of the leaf's own noise."""
  leaf_keys = []
  for encoding in jax.tree.leaves(encodings):
    codec_keys = [keys[stage.codec_index] for stage in encoding.stages]
    leaf_keys.append([
      None if pair is None else tuple(key.fold(encoding.leaf_index) for key in pair)
      for pair in codec_keys])
  return leaf_keys


def decode_leaves(codecs: Sequence[Codec], encodings: Any, stored: Any, keys: Sequence[Any]) -> Any:
  """Decodes a part of a state; `keys` come from `derive_leaf_keys`."""
  flat: list[Any]
  structure: Any
  flat, structure = jax.tree.flatten(encodings)
  decoded = []
  for encoding, x, stage_keys in zip(flat, structure.flatten_up_to(stored), keys):
    for stage, key in zip(reversed(encoding.stages), reversed(stage_keys)):
      x = _decode_stage(codecs[stage.codec_index], stage, x, None if key is None else key[0])
    decoded.append(x)
  return structure.unflatten(decoded)


def encode_leaves(codecs: Sequence[Codec], encodings: Any, leaves: Any, keys: Sequence[Any]) -> Any:
  """Encodes a part of a state: the inverse of `decode_leaves`."""
  flat: list[Any]
  structure: Any
  flat, structure = jax.tree.flatten(encodings)
  encoded = []
  for encoding, x, stage_keys in zip(flat, structure.flatten_up_to(leaves), keys):
    for stage, key in zip(encoding.stages, stage_keys):
      x = _encode_stage(codecs[stage.codec_index], stage, x, None if key is None else key[1])
    encoded.append(x)
  return structure.unflatten(encoded)


def derive_codec_keys(codecs: Sequence[Codec], counters: Sequence[Any]) -> CodecKeys:
  """Returns, for each codec, the keys with which one step decodes and encodes."""
  return [
    None if counter is None else (
      rounding.make_key(counter[1], counter[0], codec.purpose + _DECODE_PURPOSE_OFFSET),
      rounding.make_key(counter[1], increment_step(counter[0]), codec.purpose))
    for codec, counter in zip(codecs, counters)
  ]


def increment_step(step: Any) -> Any:
  """Returns `step + 1`, or the largest int32 once that is reached."""
  largest = jnp.iinfo(jnp.int32).max
  return jnp.where(step < largest, step + 1, largest).astype(jnp.int32)


def wrap_state(codecs: Sequence[Codec], state: Any, counters: Sequence[Any]) -> Any:
  """Puts a stored state into the codecs' NamedTuples."""
  for codec, counter in zip(codecs, counters):
    state = codec.state_type(state) if counter is None else codec.state_type(state, *counter)
  return state


def init_counters(codecs: Sequence[Codec]) -> list[Any]:
  """Returns the step and seed of each codec at `init`; `None` for a lossless codec."""
  return [(jnp.zeros([], jnp.int32), rounding.seed_word(codec.seed)) if codec.is_lossy else None
          for codec in codecs]


def unwrap_state(codecs: Sequence[Codec], state: Any) -> tuple[Any, list[Any]]:
  """Returns the stored state without its NamedTuples, and the step and seed of each codec.

  Raises:
    ValueError: if the state is not in the NamedTuples of these codecs.
  """
  counters: list[Any] = []
  for codec in reversed(codecs):
    if not isinstance(state, codec.state_type):
      raise ValueError(
        f"the state is a {type(state).__name__} where this optimizer has a "
        f"{codec.state_type.__name__}: it was made by another optimizer, by another plan, or for "
        "other parameters.")
    counters.append((state.step, state.seed) if codec.is_lossy else None)
    state = state.inner_state
  return state, counters[::-1]


def check_encodings(codecs: Sequence[Codec], shapes: Any, encodings: Any, stored: Any) -> None:
  """Refuses a stored state that these codecs cannot have encoded.

  Raises:
    ValueError: naming the leaf, how it is stored, and how these options store it.
  """
  leaf_paths, leaves, structure = flatten_state(shapes)
  entries = zip(
    leaf_paths, leaves, structure.flatten_up_to(encodings), structure.flatten_up_to(stored))
  for path, like, encoding, x in entries:
    if isinstance(like, LeafNumbers):
      continue
    lossy_stages = [stage for stage in encoding.stages if codecs[stage.codec_index].is_lossy]
    if not lossy_stages:
      matches, expected = _is_compatible(x, like), _describe(like)
    else:
      # The last lossy codec determines the stored shape and dtype.
      stage = lossy_stages[-1]
      codec, (shape, dtype) = codecs[stage.codec_index], stage.inputs[0]
      matches = codec.matches(x, jax.ShapeDtypeStruct(shape, dtype))
      expected = f"{codec.label}, shape {list(shape)}"
    if not matches:
      raise ValueError(
        f"state leaf '{path}' is stored as {_describe(x)}, but these options store it as "
        f"{expected}: the state was made with other options or for other parameters. Use the "
        "options it was made with, or start again from init.")


def _is_compatible(stored: Any, like: Any) -> bool:
  """Whether `stored`, a leaf that no lossy codec changes, can be the leaf that `like` describes."""
  structure: Any = jax.tree.structure(stored)
  if structure != jax.tree.structure(like):
    return False
  # A wider dtype is accepted, since a transformation may widen its own state while it runs. Only a
  # narrower dtype shows that the leaf was stored in another way.
  return all(
    not (is_floating(x) and is_floating(y))
    or (x.shape == y.shape and x.dtype.itemsize >= y.dtype.itemsize)
    for x, y in zip(jax.tree.leaves(stored), jax.tree.leaves(like)))


def _describe(stored: Any) -> str:
  parts = [
    f"{getattr(x, 'dtype', type(x).__name__)}{list(np.shape(x))}" for x in jax.tree.leaves(stored)
  ]
  return f"{type(stored).__name__}({', '.join(parts)})" if len(parts) != 1 else parts[0]


def reject_host_memory(path: str, leaf: Any) -> None:
  """Refuses to compute with an array in host memory.

  Raises:
    ValueError: naming the leaf.
  """
  for x in jax.tree.leaves(leaf):
    if hasattr(x, "dtype") and jax.typeof(x).memory_space == jax.memory.Space.Host:
      raise ValueError(
        f"state leaf '{path}' is in host memory, where nothing can be computed: put "
        "with_host_offload outside of the other storage wrappers, not inside.")


def commit_state(state: Any) -> Any:
  """Commits the device arrays of a state to the device of its offloaded arrays."""
  # A step with arrays in host memory returns committed arrays only. If the first state were not
  # committed, it would need another program, and every step would be compiled twice.
  def is_array(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)

  device_sets = [x.sharding.device_set for x in jax.tree.leaves(state)
                 if is_array(x) and x.sharding.memory_kind == "pinned_host"]
  if not device_sets:
    return state

  def commit(x: Any) -> Any:
    if is_array(x) and x.sharding.device_set == device_sets[0] and not x.committed:
      return jax.device_put(x, x.sharding)
    return x

  return jax.tree.map(commit, state)
