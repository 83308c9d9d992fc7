"""Counts the state and the traffic of an optimizer step on many devices, from compiled programs.

Nothing is allocated. For each distinct shape of a tree the step of one leaf, sharded along its
longest axes, is compiled for a mesh of virtual devices. What the program holds and sends is counted
as often as the shape occurs. What the model's own passes gather is not included. Neither is
importance, which compares leaves once in a hundred steps by vectors of one number per leaf.
"""

import argparse
import collections
import json
import math
import os
import pathlib
import re
from typing import Any

os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=512 "
  "--xla_backend_optimization_level=0")

import jax
import trees
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hina_optax

_COLLECTIVE = re.compile(
  r"= (\(?[^=]*?\)?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
  r"(?:-start)?\(")
_ARRAY = re.compile(r"([a-z]+)(\d*)\[([\d,]*)\]")
_EVERYTHING = dict(edge_suppression=True, spatial_awareness=True, use_orthogonal_grad=True)
# Arrays with fewer elements are replicated: sharding them would save nothing.
_MIN_SHARDED_ELEMENTS = 1 << 16
MODELS = {"SDXL's U-Net": trees.sdxl_unet, "transformer of 12 B": trees.transformer_12b}


def parse_collectives(hlo: str) -> list[tuple[str, int, int]]:
  """Returns the kind, elements and bytes of the result of each collective in optimised HLO."""
  collectives = []
  for result, kind in _COLLECTIVE.findall(hlo):
    arrays = [(math.prod(int(n) for n in dims.split(",") if n), int(bits or 8) // 8)
              for _, bits, dims in _ARRAY.findall(result)]
    elements, bytes_per_element = max(arrays, default=(0, 0))
    collectives.append((kind, elements, elements * max(bytes_per_element, 1)))
  return collectives


def _make_mesh(devices: int) -> jax.sharding.Mesh:
  """Makes a mesh with at most 64 devices along the first axis, and the rest along the second."""
  first = math.gcd(devices, 64)
  return jax.make_mesh((first, devices // first), ("data", "model"),
                       axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:devices])


def _choose_sharding(shape: tuple[int, ...], mesh: Any) -> NamedSharding:
  """Shards the longest axis over the mesh's first axis, and the next over the second.

  An axis that is not divisible by the number of devices is passed over.
  """
  spec: list[str | None] = [None] * len(shape)
  axes = sorted(range(len(shape)), key=lambda i: -shape[i])
  for name in mesh.axis_names if math.prod(shape) >= _MIN_SHARDED_ELEMENTS else ():
    free = [i for i in axes if spec[i] is None and shape[i] % mesh.shape[name] == 0]
    if free:
      spec[free[0]] = name
  return NamedSharding(mesh, PartitionSpec(*spec))


def count_leaf(tx: Any, shape: tuple[int, ...], mesh: Any) -> dict[str, int]:
  """Counts what the step of one leaf holds and sends on each device."""
  leaf = jax.ShapeDtypeStruct(shape, "float32", sharding=_choose_sharding(shape, mesh))
  params = {"kernel": leaf}
  state = hina_optax.abstract_state(tx, params)
  parameter_bytes = 4 * math.prod(leaf.sharding.shard_shape(shape))
  state_bytes = sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
                    for x in jax.tree.leaves(state))
  compiled = jax.jit(tx.update).lower(params, state, params).compile()
  collectives = parse_collectives(compiled.as_text())
  return {
    "parameters": parameter_bytes, "state": state_bytes, "messages": len(collectives),
    "halo": sum(size for kind, _, size in collectives if kind == "collective-permute"),
    "sums": sum(size for kind, _, size in collectives if kind == "all-reduce"),
    "gathered": sum(size for kind, _, size in collectives
                    if kind not in ("collective-permute", "all-reduce")),
    "temporaries": compiled.memory_analysis().temp_size_in_bytes,
  }


def count_tree(tx: Any, tree: trees.Tree, devices: int) -> dict[str, Any]:
  """Sums the counts over the leaves of a tree; of the temporaries it takes the largest."""
  mesh = _make_mesh(devices)
  counts = collections.Counter(x.shape for x in jax.tree.leaves(tree))
  total: collections.Counter[str] = collections.Counter()
  largest = 0
  for shape, count in counts.items():
    figures = count_leaf(tx, shape, mesh)
    largest = max(largest, figures.pop("temporaries"))
    total.update({name: count * value for name, value in figures.items()})
  return {"devices": devices, "shapes": len(counts), "leaves": sum(counts.values()), **total,
          "temporaries": largest}


def format_row(model: str, figures: dict[str, Any]) -> str:
  """Formats one row of the printed table."""
  gb, mb = 1 << 30, 1e6
  cells = [model, str(figures["devices"]), f"{2 * figures['parameters'] / gb:.2f}",
           f"{figures['state'] / gb:.2f}", f"{figures['messages']:,}",
           f"{figures['halo'] / mb:.2f}", f"{figures['sums'] / 1e3:.1f}",
           f"{figures['gathered'] / mb:.2f}"]
  return f"| {' | '.join(cells)} |"


HEADER = ("| model | devices | parameters and gradients, GB a device | state, GB a device | "
          "collectives a step | halo, MB a device | sums, kB a device | gathered, MB |\n"
          + "|---" * 8 + "|")


def main(argv: list[str] | None = None) -> None:
  """Compiles, prints and writes."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64, 512])
  parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
  arguments = parser.parse_args(argv)
  tx = hina_optax.hina_adaptive(1e-4, **_EVERYTHING, use_dynamic_adaptation=False)
  print(HEADER)
  rows = []
  for model, make in MODELS.items():
    for devices in arguments.devices:
      figures = count_tree(tx, make(), devices)
      rows.append({"model": model, **figures})
      print(format_row(model, figures), flush=True)
      if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
  main()
