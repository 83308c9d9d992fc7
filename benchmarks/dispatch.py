"""Measures the overhead of Python: how long it takes to call a jitted step that computes nothing.

    python benchmarks/dispatch.py --output FILE.json

The step takes gradients, state and parameters, and returns state and parameters unchanged, in
place. The measured time is what Python, JAX and the runtime need to flatten the trees, to compare
their structures with those of the last call, to pass the arrays and to build the trees again. A
step that takes less than that on its device waits for it. The tree is the LoRA of SDXL's U-Net,
with 1,444 leaves, of rank 1 and with sides divided by 64, so that the arrays are tiny. The
optimizers are called in turns.
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

STEPS, WARM_UP_STEPS = 200, 5


def optimizers() -> dict[str, Any]:
  """Returns the optimizers to call."""
  return {
    "optax.adamw": optax.adamw(1e-3),
    "with_leaf_batching(optax.adamw)": hina_optax.memory.with_leaf_batching(optax.adamw(1e-3)),
    "defaults": hina_optax.hina_adaptive(1e-3),
    "everything": hina_optax.hina_adaptive(1e-3, **EVERYTHING),
  }


def make_tiny(leaf: Any) -> Any:
  """Makes an array whose sides are those of `leaf`, divided by 64."""
  return jnp.ones([max(1, side // 64) for side in leaf.shape])


class EmptySteps:
  """Steps without computation, with the parameters and the state of one optimizer."""

  def __init__(self, tx: optax.GradientTransformation, params: Any):
    def step(gradients: Any, state: Any, params: Any) -> Any:
      # Without the barrier JAX would return the arguments without running a program.
      return jax.lax.optimization_barrier((state, params))

    self.gradients = params
    self.params = jax.tree.map(jnp.copy, params)
    self.state = jax.tree.map(jnp.copy, tx.init(params))
    self.leaves = len(jax.tree.leaves((self.state, self.params, params)))
    self.step = jax.jit(step, donate_argnums=(1, 2), keep_unused=True)

  def call(self) -> float:
    """Calls one step, and returns the seconds until the call returned."""
    start = time.perf_counter()
    self.state, self.params = self.step(self.gradients, self.state, self.params)
    seconds = time.perf_counter() - start
    jax.block_until_ready((self.state, self.params))
    return seconds


def main() -> None:
  """Prints a table, and writes it if there is an output file."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
  arguments = parser.parse_args()
  params = jax.tree.map(make_tiny, trees.lora_factors(trees.sdxl_unet(), 1))
  steps = {name: EmptySteps(tx, params) for name, tx in optimizers().items()}
  times: dict[str, list[float]] = {name: [] for name in steps}
  for round_number in range(STEPS + WARM_UP_STEPS):
    for name, steps_of_optimizer in steps.items():
      seconds = steps_of_optimizer.call()
      if round_number >= WARM_UP_STEPS:
        times[name].append(seconds)
  rows = []
  baseline = float(np.median(times["optax.adamw"]))
  print("| optimizer | arrays in | ms a step | x adamw |\n|---|---|---|---|")
  for name, steps_of_optimizer in steps.items():
    median, leaves = float(np.median(times[name])), steps_of_optimizer.leaves
    rows.append({"optimizer": name, "leaves": leaves, **measure.quartiles_ms(
      np.asarray(times[name])), "ratio": median / baseline})
    print(f"| {name} | {leaves:,} | {1e3 * median:.2f} | {median / baseline:.2f} |", flush=True)
  if arguments.output:
    measure.write_json(arguments.output, {
      **measure.environment(), "leaves": len(jax.tree.leaves(params)), "rows": rows})


if __name__ == "__main__":
  main()
