"""State and traffic of one optimizer step against devices, from compiled programs alone.

Nothing is allocated: for each distinct shape of a tree the step of one leaf is compiled for a mesh
of virtual devices, sharded along its longest axes, and what the program holds and sends is counted
as often as the shape occurs. What the model's own passes gather is not in it; nor is
importance, which compares leaves once in a hundred steps by vectors of one number a leaf.
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
# Below as many elements an array stays whole: nothing to save.
_SMALL = 1 << 16
MODELS = {"SDXL's U-Net": trees.sdxl_unet, "transformer of 12 B": trees.transformer_12b}


def collectives(text: str) -> list[tuple[str, int, int]]:
  """Kind, elements and bytes of the result of each collective in optimised HLO."""
  found = []
  for result, kind in _COLLECTIVE.findall(text):
    arrays = [(math.prod(int(n) for n in dims.split(",") if n), int(bits or 8) // 8)
              for _, bits, dims in _ARRAY.findall(result)]
    size, each = max(arrays, default=(0, 0))
    found.append((kind, size, size * max(each, 1)))
  return found


def _mesh(devices: int) -> jax.sharding.Mesh:
  """At most 64 devices along the first axis, what remains along the second."""
  first = math.gcd(devices, 64)
  return jax.make_mesh((first, devices // first), ("data", "model"),
                       axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:devices])


def _place(shape: tuple[int, ...], mesh: Any) -> NamedSharding:
  """The longest axis over the first of the mesh, the next over the second, where they divide."""
  spec: list[str | None] = [None] * len(shape)
  axes = sorted(range(len(shape)), key=lambda i: -shape[i])
  for name in mesh.axis_names if math.prod(shape) >= _SMALL else ():
    free = [i for i in axes if spec[i] is None and shape[i] % mesh.shape[name] == 0]
    if free:
      spec[free[0]] = name
  return NamedSharding(mesh, PartitionSpec(*spec))


def one_leaf(tx: Any, shape: tuple[int, ...], mesh: Any) -> dict[str, int]:
  """What the step of one leaf holds and sends on each device."""
  leaf = jax.ShapeDtypeStruct(shape, "float32", sharding=_place(shape, mesh))
  params = {"kernel": leaf}
  state = hina_optax.abstract_state(tx, params)
  shard = 4 * math.prod(leaf.sharding.shard_shape(shape))
  held = sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
             for x in jax.tree.leaves(state))
  compiled = jax.jit(tx.update).lower(params, state, params).compile()
  sent = collectives(compiled.as_text())
  return {
    "parameters": shard, "state": held, "messages": len(sent),
    "halo": sum(size for kind, _, size in sent if kind == "collective-permute"),
    "sums": sum(size for kind, _, size in sent if kind == "all-reduce"),
    "gathered": sum(size for kind, _, size in sent
                    if kind not in ("collective-permute", "all-reduce")),
    "temporaries": compiled.memory_analysis().temp_size_in_bytes,
  }


def row(tx: Any, tree: trees.Tree, devices: int) -> dict[str, Any]:
  """One tree on so many devices: sums over its leaves, and the temporaries of the largest."""
  mesh = _mesh(devices)
  counts = collections.Counter(x.shape for x in jax.tree.leaves(tree))
  total: collections.Counter[str] = collections.Counter()
  largest = 0
  for shape, count in counts.items():
    found = one_leaf(tx, shape, mesh)
    largest = max(largest, found.pop("temporaries"))
    total.update({name: count * value for name, value in found.items()})
  return {"devices": devices, "shapes": len(counts), "leaves": sum(counts.values()), **total,
          "temporaries": largest}


def line(model: str, found: dict[str, Any]) -> str:
  """One row of the printed table."""
  gb, mb = 1 << 30, 1e6
  cells = [model, str(found["devices"]), f"{2 * found['parameters'] / gb:.2f}",
           f"{found['state'] / gb:.2f}", f"{found['messages']:,}", f"{found['halo'] / mb:.2f}",
           f"{found['sums'] / 1e3:.1f}", f"{found['gathered'] / mb:.2f}"]
  return f"| {' | '.join(cells)} |"


HEAD = ("| model | devices | parameters and gradients, GB a device | state, GB a device | "
        "collectives a step | halo, MB a device | sums, kB a device | gathered, MB |\n" + "|---" * 8
        + "|")


def main(words: list[str] | None = None) -> None:
  """Compiles, prints and writes."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64, 512])
  parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
  arguments = parser.parse_args(words)
  tx = hina_optax.hina_adaptive(1e-4, **_EVERYTHING, use_dynamic_adaptation=False)
  print(HEAD)
  rows = []
  for model, make in MODELS.items():
    for devices in arguments.devices:
      found = row(tx, make(), devices)
      rows.append({"model": model, **found})
      print(line(model, found), flush=True)
      if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
  main()
