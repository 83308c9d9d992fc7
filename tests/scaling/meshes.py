"""Parameters on a mesh of virtual devices, and what a compiled program sends between them."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hina_optax.base import paths

SHAPES: dict[str, Any] = {
  "attn": {"lora_a": (256, 8), "lora_b": (8, 320)},
  "bias": (2048,),
  "conv": {"kernel": (3, 3, 16, 24)},
  "dense": (64, 48),
  "empty": (0, 3),
  "latents": (16, 24, 8),
  "other": (64, 48),
  "scale": (),
  "whole": (40, 56),
}
SPECS: dict[str, Any] = {
  "attn": {"lora_a": ("data", None), "lora_b": (None, ("data", "model"))},
  "bias": (("data", "model"),),
  "conv": {"kernel": (None, None, "model", "data")},
  "dense": ("data", "model"),
  "empty": (),
  "latents": ("data", "model", None),
  "other": ("data", "model"),
  "scale": (),
  "whole": (),
}


def axes(path: str, leaf: Any) -> tuple[int, ...]:
  """Spatial axes that are sharded: both of a matrix and of latents, the window of a kernel."""
  del path
  return tuple(range(min(leaf.ndim, 2))) if leaf.ndim > 1 else ()


def mesh(rows: int, columns: int, kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
  return jax.make_mesh((rows, columns), ("data", "model"), axis_types=(kind, kind))


def shardings(on: jax.sharding.Mesh) -> Any:
  return jax.tree.map(lambda spec: NamedSharding(on, PartitionSpec(*spec)), SPECS,
                      is_leaf=lambda x: isinstance(x, tuple))


def parameters(seed: int = 0, dtype: Any = jnp.float32) -> Any:
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: jnp.asarray(0.1 * rng.normal(size=s), dtype), SHAPES,
                      is_leaf=lambda x: isinstance(x, tuple))


_TRAFFIC = re.compile(
  r"= (\(?[^=]*?\)?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
  r"(?:-start)?\(")
_ARRAY = re.compile(r"[a-z]+\d*(?:e\dm\d\w*)?\[([\d,]*)\]")


def traffic(compiled: Any) -> list[tuple[str, int]]:
  """Each collective of a compiled program, and the elements of its largest result."""
  found = []
  for result, kind in _TRAFFIC.findall(compiled.as_text()):
    sizes = [math.prod(map(int, filter(None, dims.split(",")))) for dims in _ARRAY.findall(result)]
    found.append((kind, max(sizes, default=0)))
  return found


def by_path(tree: Any) -> dict[str, Any]:
  """Leaves by their paths, as the library writes them."""
  return {paths.path_string(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


# Elements of the smallest leaf that is sharded.
SMALLEST = 2048
