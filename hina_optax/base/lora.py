"""LoRA pairs in a parameter tree: found by name, brought to one shape, matched by rank."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hina_optax.base import paths

DEFAULT_PATTERN = (
  r"(?:(?P<down>lora_(?:embedding_)?(?:a|A|down))|(?P<up>lora_(?:embedding_)?(?:b|B|up)))"
  r"(?![A-Za-z0-9_])"
)


_Shape = tuple[int, ...]


class FactorAxes(NamedTuple):
  """How a factor is stored.

  Attributes:
    rank_axis: the axis both factors share, counted after the batch axes.
    batch_axes: how many leading axes stack independent layers.
  """

  rank_axis: int
  batch_axes: int


class Pair(NamedTuple):
  """Two leaves whose product is one low-rank change of a weight: `down` is applied first."""

  down: int
  up: int
  down_axes: FactorAxes
  up_axes: FactorAxes
  rank: int


def compile_pattern(pattern: str | None) -> re.Pattern[str]:
  """The regular expression that tells the factors apart, checked."""
  try:
    compiled = re.compile(DEFAULT_PATTERN if pattern is None else pattern)
  except (re.error, TypeError) as error:
    raise ValueError(f"lora_pattern {pattern!r} is not a regular expression: {error}.") from error
  if not {"down", "up"} <= set(compiled.groupindex):
    raise ValueError(
      f"lora_pattern {pattern!r} must have the named groups (?P<down>...) and (?P<up>...), one for "
      "each spelling of a factor, for example r'(?P<down>reduce)|(?P<up>expand)'."
    )
  return compiled


def find_pairs(
  places: Sequence[paths.Leaf], leaves: Sequence[Any], pattern: re.Pattern[str], whole: bool = True
) -> list[Pair]:
  """LoRA pairs among the leaves of a tree, in the order of their first leaf.

  Args:
    places: paths, and places in the tree.
    leaves: arrays or shapes, absent ones among them.
    pattern: of the factors' names.
    whole: whether these are all leaves of the tree; a factor without a partner is then an error.

  Raises:
    ValueError: if a factor's partner is not in the tree (one that is masked away is in it), or the
      two share no rank axis.
  """
  by_place = {place.index: leaf for place, leaf in zip(places, leaves)}
  factors: dict[tuple[str, str], dict[str, paths.Leaf]] = {}
  for place, leaf in zip(places, leaves):
    match = _last_match(pattern, place.path)
    if match and (paths.is_absent(leaf) or len(leaf.shape) >= 2):
      key = place.path[: match.start()], place.path[match.end():]
      factors.setdefault(key, {})["down" if match["down"] else "up"] = place
  pairs = []
  for (head, _), found in factors.items():
    present = {k: v for k, v in found.items() if not paths.is_absent(by_place[v.index])}
    if len(present) == 2:
      down, up = present["down"], present["up"]
      pairs.append(_make_pair(down, up, by_place[down.index], by_place[up.index]))
    elif whole and len(found) == 1 and present and not _masked_away(head, places, leaves, pattern):
      _raise_unpaired(*present.items())
  return pairs


def _raise_unpaired(item: tuple[str, paths.Leaf]) -> None:
  kind, place = item
  other = "up" if kind == "down" else "down"
  raise ValueError(
    f"Leaf '{place.path}' is named as the {kind} factor of a LoRA pair, but the tree has no "
    f"{other} factor beside it. Add it, rename the leaf, or give lora_pattern a regular expression "
    "with the groups 'down' and 'up' that fits your names."
  )


def _last_match(pattern: re.Pattern[str], path: str) -> re.Match[str] | None:
  matches = [m for m in pattern.finditer(path) if m["down"] or m["up"]]
  return matches[-1] if matches else None


def _masked_away(head: str, places, leaves, pattern: re.Pattern[str]) -> bool:
  """Whether an absent node stands where the partner, or a whole branch with it, would be."""
  for place, leaf in zip(places, leaves):
    if paths.is_absent(leaf):
      match = _last_match(pattern, place.path)
      if head.startswith(place.path) or (match and place.path[: match.start()] == head):
        return True
  return False


def _make_pair(down_place, up_place, down: Any, up: Any) -> Pair:
  readings = _flax_axes(down.shape, up.shape), _torch_axes(down.shape, up.shape)
  fitting = [(i, x, int(down.shape[_axis(x[0])])) for i, x in enumerate(readings) if x]
  # Both may fit when sides are equal: a rank is the smaller one, and on a tie down/up and A/B are
  # PyTorch's spellings, a/b Flax's.
  torch_spelling = not re.search(r"lora_a(?![A-Za-z0-9_])", down_place.path)
  if not fitting:
    raise ValueError(
      f"LoRA factors '{down_place.path}' {tuple(down.shape)} and '{up_place.path}' "
      f"{tuple(up.shape)} share no rank: expected (..., in, rank) with (..., rank, out) as in "
      "Flax, or (rank, in, ...) with (out, rank, ...) as in PyTorch."
    )
  _, (first, second), rank = min(fitting, key=lambda f: (f[2], f[0] != int(torch_spelling)))
  return Pair(down_place.index, up_place.index, first, second, rank)


def _axis(axes: FactorAxes) -> int:
  return axes.rank_axis + axes.batch_axes


def _flax_axes(down: _Shape, up: _Shape) -> tuple[FactorAxes, FactorAxes] | None:
  if down[-1] != up[-2]:
    return None
  stacked = len(down) > 2 and down[:-2] == up[:-2]
  batch = len(down) - 2 if stacked else 0
  return FactorAxes(len(down) - 1 - batch, batch), FactorAxes(len(up) - 2 - batch, batch)


def _torch_axes(down: _Shape, up: _Shape) -> tuple[FactorAxes, FactorAxes] | None:
  return (FactorAxes(0, 0), FactorAxes(1, 0)) if down[0] == up[1] else None


def to_matrix(x: jax.Array, axes: FactorAxes) -> jax.Array:
  """A factor as `(layers, rank, rest)`."""
  front = jnp.moveaxis(x, _axis(axes), axes.batch_axes)
  layers = math.prod(x.shape[:axes.batch_axes])
  rank = x.shape[_axis(axes)]
  return front.reshape(layers, rank, x.size // max(layers * rank, 1))


def gram(x: jax.Array, axes: FactorAxes) -> jax.Array:
  """`x x^T` of a factor as `(layers, rank, rank)`, in full precision; XLA copies nothing for it."""
  layers, kept = tuple(range(axes.batch_axes)), _axis(axes)
  summed = tuple(axis for axis in range(x.ndim) if axis not in (*layers, kept))
  product = lax.dot_general(x, x, ((summed, summed), (layers, layers)),
                            precision=lax.Precision.HIGHEST)
  return product.reshape(math.prod(x.shape[:axes.batch_axes]), *product.shape[-2:])


def from_matrix(matrix: jax.Array, axes: FactorAxes, like: jax.Array) -> jax.Array:
  """Inverse of `to_matrix`."""
  front = jnp.moveaxis(like, _axis(axes), axes.batch_axes).shape
  return jnp.moveaxis(matrix.reshape(front), axes.batch_axes, _axis(axes))
