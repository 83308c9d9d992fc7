"""Python's part of a step: how long it takes to call a jitted step that computes nothing.

    python benchmarks/dispatch.py --output FILE.json

The step takes gradients, state and parameters, and gives back state and parameters as they came,
in place. What is left is what Python, JAX and the runtime need to flatten the trees, to compare
their structures with those of the last call, to hand over the arrays and to build the trees again.
A step that takes less than that on its device waits for it. The tree is the LoRA of SDXL's U-Net,
with 1,444 leaves, of rank 1 and with sides divided by 64: next to no numbers. The contenders take
turns.
"""

import argparse
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax
import trees
from contenders import EVERYTHING

import hina_optax

STEPS = 200


def optimizers() -> dict[str, Any]:
  """What is called."""
  return {
    "optax.adamw": optax.adamw(1e-3),
    "with_leaf_batching(optax.adamw)": hina_optax.memory.with_leaf_batching(optax.adamw(1e-3)),
    "defaults": hina_optax.hina_adaptive(1e-3),
    "everything": hina_optax.hina_adaptive(1e-3, **EVERYTHING),
  }


def tiny(leaf: Any) -> Any:
  """An array as long as `leaf` over 64 on each axis."""
  return jnp.ones([max(1, side // 64) for side in leaf.shape])


class Calls:
  """Steps of one optimizer on one tree."""

  def __init__(self, tx: optax.GradientTransformation, params: Any):
    def step(gradients: Any, state: Any, params: Any) -> Any:
      # Without the barrier JAX would hand the arguments back by itself.
      return jax.lax.optimization_barrier((state, params))

    self.gradients = params
    self.params = jax.tree.map(jnp.copy, params)
    self.state = jax.tree.map(jnp.copy, tx.init(params))
    self.leaves = len(jax.tree.leaves((self.state, self.params, params)))
    self.step = jax.jit(step, donate_argnums=(1, 2), keep_unused=True)

  def call(self) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    self.state, self.params = self.step(self.gradients, self.state, self.params)
    taken = time.perf_counter() - start
    jax.block_until_ready((self.state, self.params))
    return taken


def main() -> None:
  """Prints a table, and writes it if asked."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
  arguments = parser.parse_args()
  params = jax.tree.map(tiny, trees.lora_of(trees.sdxl_unet(), 1))
  calls = {name: Calls(tx, params) for name, tx in optimizers().items()}
  times: dict[str, list[float]] = {name: [] for name in calls}
  for turn in range(STEPS + 5):
    for name, one in calls.items():
      taken = one.call()
      if turn >= 5:
        times[name].append(taken)
  found = []
  least = float(np.median(times["optax.adamw"]))
  print("| optimizer | arrays in | ms a step | x adamw |\n|---|---|---|---|")
  for name, one in calls.items():
    middle = float(np.median(times[name]))
    found.append({"optimizer": name, "leaves": one.leaves, **measure.quartiles_ms(
      np.asarray(times[name])), "ratio": middle / least})
    print(f"| {name} | {one.leaves:,} | {1e3 * middle:.2f} | {middle / least:.2f} |", flush=True)
  if arguments.output:
    measure.write_json(arguments.output, {
      **measure.environment(), "leaves": len(jax.tree.leaves(params)), "rows": found})


if __name__ == "__main__":
  main()
