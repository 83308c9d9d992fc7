"""Does storage harm training? The example's LoRA with its state kept in each form, over seeds.

    python benchmarks/storage_training.py --output FILE.json

Prints the held-out loss of each seed, and its mean relative to that of fp32 state.
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
  """Wrappers by name. Every array is packed, also those that are too small by default."""
  return {
    "fp32": lambda tx: tx,
    "bf16": lambda tx: hina_optax.with_state_dtype(tx, min_size=0),
    "8-bit": lambda tx: hina_optax.with_quantized_state(tx, min_size=1),
    "bf16 on the host": lambda tx: hina_optax.with_host_offload(
      hina_optax.with_state_dtype(tx, min_size=0), min_bytes=0),
  }


def prepare(words: list[str]) -> tuple[pipeline.Setting, nnx.Module]:
  """The example's data and its trained base."""
  args = options.parse(words)
  space = Workspace(args)
  data = dataset.load(args, space)
  setting = pipeline.Setting(
    args, space, data, diffusion.Process(args.prediction, args.min_snr))
  rate = optimizers.schedule(args.learning_rate, args.steps, args.schedule)
  program = pipeline.program(setting, optimizers.adamw(rate))
  state, _ = pipeline.train_base(setting, program, rate)
  return setting, program.model(state.average)


def losses(setting: pipeline.Setting, base: nnx.Module, name: str, wrap: Any) -> list[float]:
  """Final held-out loss of a LoRA for each seed."""
  args = setting.args
  rate = optimizers.schedule(args.lora_learning_rate, args.lora_steps, args.schedule)
  chosen = optimizers.chosen_options(args, "lora") | {
    "memory_efficient": False, "vram_budget_gb": None}
  model = add_lora(base, args.rank, nnx.Rngs(args.seed))
  program = Program(model, setting.loss, wrap(optimizers.hina(rate, chosen)), wrt=nnx.LoRAParam)
  found = []
  for seed in range(args.seeds):
    plan = pipeline.plan(setting, program, setting.data.subject, args.lora_steps, seed, rate)
    folder = setting.space.runs / "storage" / name.replace(" ", "_") / str(seed)
    state = program.start(add_lora(base, args.rank, nnx.Rngs(seed)))
    _, rows = train(program, state, plan, folder, setting.space.display(f"{name}, seed {seed}"))
    found.append(next(row["held_out"] for row in reversed(rows) if "held_out" in row))
  return found


def main() -> None:
  """Trains all and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
  parser.add_argument("--steps", type=int, default=600, help="of the base (default: 600)")
  parser.add_argument("--lora-steps", type=int, default=200, help="of each LoRA (default: 200)")
  given = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    setting, base = prepare([
      "--steps", str(given.steps), "--lora-steps", str(given.lora_steps), "--rank", "16",
      "--no-staged", "--output", folder])
    found = {name: losses(setting, base, name, wrap) for name, wrap in storages().items()}
  first = np.mean(found["fp32"])
  print("| state | held-out loss, seeds | mean over fp32's |\n|---|---|---|")
  for name, values in found.items():
    print(f"| {name} | {', '.join(f'{x:.4f}' for x in values)} | {np.mean(values) / first:.4f} |")
  if given.output:
    given.output.write_text(json.dumps({
      "device": jax.devices()[0].device_kind, "jax": jax.__version__, "steps": given.steps,
      "lora_steps": given.lora_steps, "held_out": found}, indent=1))


if __name__ == "__main__":
  main()
