"""LoRA pairs in a parameter tree: found by their names, and stored in one of several layouts."""

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
    rank_axis: the axis that both factors share, counted after the batch axes.
    batch_axes: the number of leading axes that stack independent layers.
  """

  rank_axis: int
  batch_axes: int


class Pair(NamedTuple):
  """Two leaves whose product is a low-rank change of one weight.

  Attributes:
    down: the index of the factor that is applied first.
    up: the index of the other factor.
    down_axes: how `down` is stored.
    up_axes: how `up` is stored.
    rank: the length of the axis that both share.
  """

  down: int
  up: int
  down_axes: FactorAxes
  up_axes: FactorAxes
  rank: int


def compile_pattern(pattern: str | None) -> re.Pattern[str]:
  """Compiles the regular expression that tells the factors apart, and checks it."""
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
  places: Sequence[paths.Place], leaves: Sequence[Any], pattern: re.Pattern[str],
  is_whole_tree: bool = True,
) -> list[Pair]:
  """LoRA pairs among the leaves of a tree, in the order of their first leaf.

  Args:
    places: the places of the leaves in the tree.
    leaves: arrays or shapes; some may be absent.
    pattern: the pattern of the factors' names.
    is_whole_tree: whether these are all leaves of the tree. If so, a factor without a partner is an
      error.

  Raises:
    ValueError: if a factor's partner is not in the tree, or if the two share no rank axis. A
      partner that is masked away counts as in the tree.
  """
  by_place = {place.index: leaf for place, leaf in zip(places, leaves)}
  factors: dict[tuple[str, str], dict[str, paths.Place]] = {}
  for place, leaf in zip(places, leaves):
    match = _last_match(pattern, place.path)
    if match and (paths.is_absent(leaf) or len(leaf.shape) >= 2):
      key = place.path[: match.start()], place.path[match.end():]
      factors.setdefault(key, {})["down" if match["down"] else "up"] = place
  pairs = []
  for (prefix, _), sides in factors.items():
    present = {k: v for k, v in sides.items() if not paths.is_absent(by_place[v.index])}
    if len(present) == 2:
      down, up = present["down"], present["up"]
      pairs.append(_make_pair(down, up, by_place[down.index], by_place[up.index]))
    elif (is_whole_tree and len(sides) == 1 and present
          and not _is_partner_masked(prefix, places, leaves, pattern)):
      _raise_unpaired(*present.items())
  return pairs


def _raise_unpaired(item: tuple[str, paths.Place]) -> None:
  side, place = item
  missing = "up" if side == "down" else "down"
  raise ValueError(
    f"Leaf '{place.path}' is named as the {side} factor of a LoRA pair, but the tree has no "
    f"{missing} factor beside it. Add it, rename the leaf, or give lora_pattern a regular "
    "expression with the groups 'down' and 'up' that fits your names."
  )


def _last_match(pattern: re.Pattern[str], path: str) -> re.Match[str] | None:
  matches = [m for m in pattern.finditer(path) if m["down"] or m["up"]]
  return matches[-1] if matches else None


def _is_partner_masked(prefix: str, places, leaves, pattern: re.Pattern[str]) -> bool:
  """Whether the partner, or a whole branch that would hold it, is masked away."""
  for place, leaf in zip(places, leaves):
    if paths.is_absent(leaf):
      match = _last_match(pattern, place.path)
      if prefix.startswith(place.path) or (match and place.path[: match.start()] == prefix):
        return True
  return False


def _make_pair(down_place, up_place, down: Any, up: Any) -> Pair:
  layouts = _flax_axes(down.shape, up.shape), _torch_axes(down.shape, up.shape)
  candidates = [(i, x, int(down.shape[_axis(x[0])])) for i, x in enumerate(layouts) if x]
  # Both layouts may be possible when sides are equal. The smaller side is then taken for the rank.
  # On a tie the spelling decides: down/up and A/B are PyTorch's, a/b is Flax's.
  is_torch_spelling = not re.search(r"lora_a(?![A-Za-z0-9_])", down_place.path)
  if not candidates:
    raise ValueError(
      f"LoRA factors '{down_place.path}' {tuple(down.shape)} and '{up_place.path}' "
      f"{tuple(up.shape)} share no rank: expected (..., in, rank) with (..., rank, out) as in "
      "Flax, or (rank, in, ...) with (out, rank, ...) as in PyTorch."
    )
  _, (down_axes, up_axes), rank = min(
    candidates, key=lambda c: (c[2], c[0] != int(is_torch_spelling)))
  return Pair(down_place.index, up_place.index, down_axes, up_axes, rank)


def _axis(axes: FactorAxes) -> int:
  return axes.rank_axis + axes.batch_axes


def _flax_axes(down: _Shape, up: _Shape) -> tuple[FactorAxes, FactorAxes] | None:
  if down[-1] != up[-2]:
    return None
  is_stacked = len(down) > 2 and down[:-2] == up[:-2]
  batch = len(down) - 2 if is_stacked else 0
  return FactorAxes(len(down) - 1 - batch, batch), FactorAxes(len(up) - 2 - batch, batch)


def _torch_axes(down: _Shape, up: _Shape) -> tuple[FactorAxes, FactorAxes] | None:
  return (FactorAxes(0, 0), FactorAxes(1, 0)) if down[0] == up[1] else None


def to_matrix(x: jax.Array, axes: FactorAxes) -> jax.Array:
  """Brings a factor to the shape `(layers, rank, rest)`."""
  front = jnp.moveaxis(x, _axis(axes), axes.batch_axes)
  layers = math.prod(x.shape[:axes.batch_axes])
  rank = x.shape[_axis(axes)]
  return front.reshape(layers, rank, x.size // max(layers * rank, 1))


def factor_gram(x: jax.Array, axes: FactorAxes) -> jax.Array:
  """The Gram matrices `x x^T` of a factor, as `(layers, rank, rank)` and in full precision.

  XLA need not copy the factor for it.
  """
  batch = tuple(range(axes.batch_axes))
  contracting = tuple(axis for axis in range(x.ndim) if axis not in (*batch, _axis(axes)))
  product = lax.dot_general(x, x, ((contracting, contracting), (batch, batch)),
                            precision=lax.Precision.HIGHEST)
  return product.reshape(math.prod(x.shape[:axes.batch_axes]), *product.shape[-2:])


def from_matrix(matrix: jax.Array, axes: FactorAxes, like: jax.Array) -> jax.Array:
  """Inverse of `to_matrix`."""
  front = jnp.moveaxis(like, _axis(axes), axes.batch_axes).shape
  return jnp.moveaxis(matrix.reshape(front), axes.batch_axes, _axis(axes))
