"""Tests whether compact state harms training: the example's LoRA with each storage, over seeds.

    python benchmarks/storage_training.py --output FILE.json

Prints the held-out loss of each seed, and the mean relative to that of fp32 state.
"""

import argparse
import json
import pathlib
import sys
import tempfile
from typing import Any

import jax
import numpy as np
from flax import nnx

import hina_optax

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
from latent_diffusion import dataset, diffusion, optimizers, options, pipeline
from latent_diffusion.lora import add_lora
from latent_diffusion.training import Program, train
from latent_diffusion.workspace import Workspace


def storages() -> dict[str, Any]:
  """Returns the storage wrappers by name. They convert small arrays too, unlike the defaults."""
  return {
    "fp32": lambda tx: tx,
    "bf16": lambda tx: hina_optax.with_state_dtype(tx, min_size=0),
    "8-bit": lambda tx: hina_optax.with_quantized_state(tx, min_size=1),
    "bf16 on the host": lambda tx: hina_optax.with_host_offload(
      hina_optax.with_state_dtype(tx, min_size=0), min_bytes=0),
  }


def train_base(argv: list[str]) -> tuple[pipeline.Setting, nnx.Module]:
  """Loads the example's data, and trains its base model."""
  args = options.parse(argv)
  space = Workspace(args)
  data = dataset.load(args, space)
  setting = pipeline.Setting(
    args, space, data, diffusion.Process(args.prediction, args.min_snr))
  rate = optimizers.schedule(args.learning_rate, args.steps, args.schedule)
  program = pipeline.program(setting, optimizers.adamw(rate))
  state, _ = pipeline.train_base(setting, program, rate)
  return setting, program.model(state.average)


def train_loras(setting: pipeline.Setting, base: nnx.Module, name: str, wrap: Any) -> list[float]:
  """Trains a LoRA for each seed, and returns the final held-out losses."""
  args = setting.args
  rate = optimizers.schedule(args.lora_learning_rate, args.lora_steps, args.schedule)
  # Without the preset's own memory options, so that the wrapper alone decides the storage.
  hina_options = optimizers.chosen_options(args, "lora") | {
    "memory_efficient": False, "vram_budget_gb": None}
  model = add_lora(base, args.rank, nnx.Rngs(args.seed))
  tx = wrap(optimizers.hina(rate, hina_options))
  program = Program(model, setting.loss, tx, wrt=nnx.LoRAParam)
  losses = []
  for seed in range(args.seeds):
    plan = pipeline.plan(setting, program, setting.data.subject, args.lora_steps, seed, rate)
    folder = setting.space.runs / "storage" / name.replace(" ", "_") / str(seed)
    state = program.start(add_lora(base, args.rank, nnx.Rngs(seed)))
    _, rows = train(program, state, plan, folder, setting.space.display(f"{name}, seed {seed}"))
    losses.append(next(row["held_out"] for row in reversed(rows) if "held_out" in row))
  return losses


def main() -> None:
  """Trains with every storage, and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
  parser.add_argument("--steps", type=int, default=600,
                      help="steps of the base model (default: 600)")
  parser.add_argument("--lora-steps", type=int, default=200,
                      help="steps of each LoRA (default: 200)")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    setting, base = train_base([
      "--steps", str(args.steps), "--lora-steps", str(args.lora_steps), "--rank", "16",
      "--no-staged", "--output", folder])
    losses = {name: train_loras(setting, base, name, wrap) for name, wrap in storages().items()}
  baseline = np.mean(losses["fp32"])
  print("| state | held-out loss, seeds | mean over fp32's |\n|---|---|---|")
  for name, values in losses.items():
    ratio = np.mean(values) / baseline
    print(f"| {name} | {', '.join(f'{x:.4f}' for x in values)} | {ratio:.4f} |")
  if args.output:
    args.output.write_text(json.dumps({
      "device": jax.devices()[0].device_kind, "jax": jax.__version__, "steps": args.steps,
      "lora_steps": args.lora_steps, "held_out": losses}, indent=1))


if __name__ == "__main__":
  main()
