"""What the storage wrappers share: the choice of leaves, and one frame around the inner."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hina_optax import _checks, _layouts, _leaves, _rounding, _sealed

# Added to a wrapper's purpose: the noise with which state is read is not that of writing it.
_READING = 16

Include = str | re.Pattern[str] | Callable[[str, Any], bool] | None


class QuantizedLeaf(NamedTuple):
  """A leaf of a state in 8 bits; `dequantize_state` reads it.

  Attributes:
    codes: uint8, of the leaf's shape.
    scales: bf16, one number a block, with as many axes as the leaf: leading ones of the leaf, one
      that counts blocks, ones. Negative where the block has no negative number.
  """

  codes: jax.Array
  scales: jax.Array


class Codec(NamedTuple):
  """How one leaf of a state is kept.

  Attributes:
    label: the stored form in words, for errors.
    chosen: `(path, leaf) -> bool`, from shape and dtype alone.
    encode: `(leaf, key) -> stored`.
    decode: `(stored, like, key) -> leaf`, of the dtype of `like`.
    fits: `(stored, like) -> bool`: whether `encode` could have made `stored`.
  """

  label: str
  chosen: Callable[[str, Any], bool]
  encode: Callable[[jax.Array, _rounding.Key], Any]
  decode: Callable[[Any, Any, _rounding.Key], jax.Array]
  fits: Callable[[Any, Any], bool]


@dataclasses.dataclass(frozen=True)
class _Decode:
  """Of one codec, for leaves of one shape and dtype."""

  codec: Codec
  like: Any

  def __call__(self, stored: Any, key: _rounding.Key) -> jax.Array:
    return self.codec.decode(stored, self.like, key)


def stored_transformation(
  inner: Any, codec: Codec, make_state: Callable[..., Any], seed: Any, purpose: int
) -> optax.GradientTransformationExtraArgs:
  """`inner` in fp32, with the chosen leaves of its state kept as `codec` says.

  `make_state(inner_state, step, seed)` builds the state, a NamedTuple of these fields.
  """
  inner = transformation(inner)
  _checks.integer("seed", seed, 0)

  def init(params: Any) -> Any:
    step, word = jnp.zeros([], jnp.int32), _rounding.seed_word(seed)
    paths, leaves, structure = paths_and_leaves(inner.init(widen(params)), is_quantized)
    key = _rounding.key(word, step, purpose)
    kept = _encode(codec, paths, leaves, key)
    return make_state(structure.unflatten(kept), step, word)

  def update(updates, state, params=None, **extra_args):
    wide, wide_params = widen(updates), widen(params)
    # The stored leaf does not say in which dtype the inner keeps it; its `init` does.
    with _layouts.as_made(state):
      like = jax.eval_shape(lambda tree: inner.init(tree), wide if params is None else wide_params)
    paths, likes, structure = paths_and_leaves(like, is_quantized)
    kept = _flatten_like(structure, restored(state.inner_state))
    step = jnp.asarray(optax.safe_increment(state.step))
    keys = (_rounding.key(state.seed, state.step, purpose + _READING),
            _rounding.key(state.seed, step, purpose))
    given = structure.unflatten(_seal(codec, paths, likes, kept, keys))
    opens = _sealed.opens(inner)
    result, new = inner.update(
      wide, given if opens else _sealed.opened(given), wide_params, **extra_args)
    leaves = structure.flatten_up_to(new if opens else _sealed.sealed_as(given, new))
    kept = [x.stored if _sealed.is_sealed(x) else x for x in leaves]
    return cast_like(result, updates), make_state(structure.unflatten(kept), step, state.seed)

  return optax.GradientTransformationExtraArgs(init, update)


def transformation(inner: Any) -> optax.GradientTransformationExtraArgs:
  """`inner` with support for extra arguments; refuses what is no transformation."""
  if not (callable(getattr(inner, "init", None)) and callable(getattr(inner, "update", None))):
    raise TypeError(
      "inner must be an optax transformation, such as optax.adamw(1e-3), got "
      f"{inner!r} ({type(inner).__name__})."
    )
  return optax.with_extra_args_support(inner)


def structural_number(name: str, value: Any, default: int, low: int) -> int:
  """A whole number that shapes the program: `default` for `None`, never traced."""
  if value is None:
    return default
  _checks.structural(name, value)
  _checks.integer(name, value, low)
  return int(value)


def path_rule(include: Include) -> Callable[[str, Any], bool]:
  """`include` as a function of path and leaf; a regular expression is searched in the path."""
  _checks.structural("include", include)
  if include is None:
    return lambda path, leaf: True
  if isinstance(include, (str, re.Pattern)):
    try:
      pattern = re.compile(include)
    except re.error as error:
      raise ValueError(f"include is not a regular expression: {include!r} ({error}).") from error
    return lambda path, leaf: pattern.search(path) is not None
  if callable(include):
    return include
  raise TypeError(
    "include must be None, a regular expression searched in the path of a state leaf, or a "
    f"function of path and leaf that returns a bool; got {include!r} ({type(include).__name__})."
  )


def is_quantized(x: Any) -> bool:
  """True for a leaf in 8 bits: its parts mean nothing one by one, so no wrapper may narrow them."""
  return isinstance(x, QuantizedLeaf)


def paths_and_leaves(
  tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[str], list[Any], Any]:
  """Paths (`"0/mu/dense/kernel"`), leaves and structure of a state."""
  pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
  return [_path(path) for path, _ in pairs], [leaf for _, leaf in pairs], structure


def _path(keys: Any) -> str:
  # `flax.nnx` puts a `value` between a parameter and what stands in its place, at `init` alone.
  if len(keys) > 1 and getattr(keys[-1], "name", None) in QuantizedLeaf._fields:
    return f"{_leaves.path_string(keys[:-1])}/{keys[-1].name}"
  return _leaves.path_string(keys)


def restored(state: Any) -> Any:
  """`state` with every `QuantizedLeaf` that `flax.nnx` keeps as a mapping put together again."""
  def apart(x: Any) -> bool:
    named = not isinstance(x, tuple) and hasattr(x, "keys") and set(x.keys())
    return named == set(QuantizedLeaf._fields) and getattr(x["codes"], "dtype", None) == jnp.uint8

  return jax.tree.map(
    lambda x: QuantizedLeaf(x["codes"], x["scales"]) if apart(x) else x, state, is_leaf=apart
  )


def is_floating(leaf: Any) -> bool:
  """True for arrays of real floating numbers."""
  return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def widen(tree: Any) -> Any:
  """Floating leaves of fewer than 32 bits in fp32, everything else as it is."""
  return jax.tree.map(
    lambda x: x.astype(jnp.float32) if is_floating(x) and x.dtype.itemsize < 4 else x, tree
  )


def cast_like(tree: Any, like: Any) -> Any:
  """Floating leaves of `tree` in the dtypes of `like`."""
  def cast(x: Any, other: Any) -> Any:
    return x.astype(other.dtype) if is_floating(x) and is_floating(other) else x

  return jax.tree.map(cast, tree, like, is_leaf=_leaves.is_absent)


def _encode(codec: Codec, paths: list, leaves: list, key: _rounding.Key) -> list:
  kept = []
  for index, (path, leaf) in enumerate(zip(paths, leaves)):
    if not codec.chosen(path, leaf):
      kept.append(leaf)
      continue
    _refuse_host(path, leaf)
    kept.append(codec.encode(leaf, key.fold(index)))
  return kept


def _seal(codec: Codec, paths: list, likes: list, kept: list, keys: Any) -> list:
  """What is kept, of each leaf with the keys with which it is read and written."""
  leaves: list[Any] = []
  for index, (path, like, stored) in enumerate(zip(paths, likes, kept)):
    chosen = codec.chosen(path, like)
    if not (codec.fits if chosen else _same_form)(stored, like):
      wanted = f"{codec.label}, shape {list(like.shape)}" if chosen else _describe(like)
      raise ValueError(
        f"state leaf '{path}' is stored as {_describe(stored)}, but these options store it as "
        f"{wanted}: the state was made with other options or for other parameters. Use the options "
        "it was made with, or start again from init."
      )
    if not chosen:
      leaves.append(stored)
      continue
    _refuse_host(path, stored)
    decode = _Decode(codec, jax.ShapeDtypeStruct(like.shape, like.dtype))
    reading, writing = (key.fold(index) for key in keys)
    leaves.append(_sealed.Sealed(stored, reading, writing, decode, codec.encode))
  return leaves


def _same_form(stored: Any, like: Any) -> bool:
  """Whether a leaf that stays as it is can be the one that `like` describes."""
  structure: Any = jax.tree.structure(stored)
  if structure != jax.tree.structure(like):
    return False
  pairs = zip(jax.tree.leaves(stored), jax.tree.leaves(like))
  # Only narrower numbers betray another storage; an inner may widen its own state as it runs.
  return all(
    not (is_floating(x) and is_floating(y))
    or (x.shape == y.shape and x.dtype.itemsize >= y.dtype.itemsize)
    for x, y in pairs
  )


def _describe(stored: Any) -> str:
  parts = [
    f"{getattr(x, 'dtype', type(x).__name__)}{list(np.shape(x))}" for x in jax.tree.leaves(stored)
  ]
  return f"{type(stored).__name__}({', '.join(parts)})" if len(parts) != 1 else parts[0]


def _flatten_like(structure: Any, state: Any) -> list:
  try:
    return structure.flatten_up_to(state)
  except (TypeError, ValueError) as error:
    raise ValueError(
      "the state does not have the structure of this inner transformation's state: it was made by "
      f"another transformation or for other parameters ({error})."
    ) from error


def _refuse_host(path: str, stored: Any) -> None:
  for leaf in jax.tree.leaves(stored):
    if jax.typeof(leaf).memory_space == jax.memory.Space.Host:
      raise ValueError(
        f"state leaf '{path}' is in host memory, where nothing can be computed: put "
        "with_host_offload outside of the other storage wrappers, not inside."
      )
