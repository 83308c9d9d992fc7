"""The whole pipeline in order: latents, base model, comparison, LoRA, report."""

import argparse
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

from latent_diffusion import dataset, diffusion, latents, optimizers, report
from latent_diffusion.denoiser import Denoiser
from latent_diffusion.lora import add_lora
from latent_diffusion.probe import Probe
from latent_diffusion.training import Plan, Program, Row, TrainState, train
from latent_diffusion.workspace import Workspace

SAMPLES = 8
FINAL = 24
MEASURED = 128
DATA_SEED = 1000
AVERAGE = 0.998


class Setting(NamedTuple):
  """What all runs of the denoiser have in common."""

  args: argparse.Namespace
  space: Workspace
  data: dataset.Dataset
  process: diffusion.Process

  def loss(self, model: nnx.Module, clean: jax.Array, key: jax.Array) -> jax.Array:
    """The denoising loss of this setting's process."""
    return diffusion.denoising_loss(self.process, model, clean, key)


def run(args: argparse.Namespace) -> pathlib.Path:
  """Runs the whole pipeline, and returns the report's path."""
  space = Workspace(args)
  jax.config.update("jax_compilation_cache_dir", str((args.output / "compiled").absolute()))
  data = dataset.load(args, space)
  setting = Setting(args, space, data, diffusion.Process(args.prediction, args.min_snr))
  rate = optimizers.schedule(args.learning_rate, args.steps, args.schedule)
  base_program = program(setting, optimizers.chosen(args, rate, args.preset))
  base, base_rows = train_base(setting, base_program, rate)
  compared = compare(setting, base_program)
  loras, adapters = train_loras(setting, base_program.model(base.average))
  return report.write(args, space, data, {
    "base": base_rows, "mean_loss": mean_loss(setting), "compared": compared, "lora": loras,
    "final": data.decode(sampler(setting, base_program, data.base, FINAL)(base.average)),
    "memory": report.memory(base.params, adapters),
  })


def denoiser(setting: Setting, seed: int) -> Denoiser:
  """Makes a denoiser with new weights."""
  args = setting.args
  channels = next(iter(setting.data.base.train))[-1]
  return Denoiser(channels, args.width, args.depth, args.heads, nnx.Rngs(seed))


def program(setting: Setting, optimizer: optax.GradientTransformation) -> Program:
  """Makes the program that trains the denoiser with an optimizer."""
  return Program(denoiser(setting, setting.args.seed), setting.loss, optimizer,
                 decay=AVERAGE)


def plan(setting: Setting, trainer: Program, split: latents.Split, steps: int, seed: int,
         rate: optax.Schedule, visit: Any = None) -> Plan:
  """Plans a run on `split`, measured eight times on its held-out latents by default."""
  args = setting.args
  few = {shape: x[:MEASURED] for shape, x in split.held_out.items()}
  return Plan(
    steps, lambda step: latents.batch(split.train, args.batch, DATA_SEED + seed, step), seed, rate,
    held_out=lambda params: dataset.mean_of(trainer, params, few),
    measured=args.measure_every or -(-steps // 8), logged=max(1, min(10, steps // 20)),
    saved=args.save_every, visit=visit)


def train_base(
  setting: Setting, trainer: Program, rate: optax.Schedule
) -> tuple[TrainState, list[Row]]:
  """Trains the base model, with samples and figures during training."""
  args, space = setting.args, setting.space
  display = space.display("base")
  visit = visitor(setting, trainer, setting.data.base, "base", display)
  state = trainer.start(denoiser(setting, args.seed))
  base = plan(setting, trainer, setting.data.base, args.steps, args.seed, rate, visit)
  return train(trainer, state, base, space.runs / "base", display)


def visitor(setting: Setting, trainer: Program, split: latents.Split, name: str, display: Any):
  """Makes the function for every measurement: it samples, from the same noise, and probes."""
  probe, sample = Probe(trainer), sampler(setting, trainer, split)
  clean = next(iter(split.train.values()))[:setting.args.batch]

  def visit(step: int, state: TrainState) -> Row:
    images = setting.data.decode(sample(state.average))
    setting.space.keep(name, step, images)
    display.picture("samples", np.uint8(np.clip(127.5 * (np.concatenate(images, 1) + 1), 0, 255)),
                    step)
    return probe(state, clean, jax.random.key(1))

  return visit


def sampler(setting: Setting, trainer: Program, split: latents.Split, count: int = SAMPLES):
  """Makes the function `sample(params)`, which samples latents from the same noise at each call."""
  shape = max(split.train, key=lambda shape: len(split.train[shape]))
  noise = jax.random.normal(jax.random.key(setting.args.seed), (count, *shape))

  @jax.jit
  def sample(params, frozen, noise):
    model = nnx.merge(trainer.graph, params, frozen)
    return diffusion.ddim(setting.process, model, noise, setting.args.sampling_steps)

  return lambda params: np.asarray(sample(params, trainer.frozen, noise))


def compare(setting: Setting, base_program: Program) -> dict[str, list[list[Row]]]:
  """Trains with AdamW and the staged optimizers over seeds, and returns the records.

  Everything else is the same in all runs. If the schedule does not depend on the number of steps,
  the compiled step of the base is used again.
  """
  args, space = setting.args, setting.space
  rate = optimizers.schedule(args.learning_rate, args.compare_steps, args.schedule)
  results = {}
  stages = optimizers.stages(args, rate)
  ready = list(stages)[0 if args.optimizer == "adamw" else -1]
  for name, optimizer in stages.items():
    shared = name == ready and args.schedule == "constant"
    trainer = base_program if shared else program(setting, optimizer)
    results[name] = []
    for seed in range(args.seed, args.seed + args.seeds):
      one = plan(setting, trainer, setting.data.base, args.compare_steps, seed, rate)
      state = trainer.start(denoiser(setting, seed))
      folder = space.runs / "compare" / name.replace(" ", "_") / str(seed)
      _, rows = train(trainer, state, one, folder, space.display(f"{name}, seed {seed}"))
      results[name].append(rows)
  return results


def train_loras(setting: Setting, base: Denoiser) -> tuple[dict[str, list[list[Row]]], Any]:
  """Trains LoRAs with both optimizers over seeds; returns the records, and parameters of one."""
  args = setting.args
  rate = optimizers.schedule(args.lora_learning_rate, args.lora_steps, args.schedule)
  both = {"optax.adamw": optimizers.adamw(rate),
          "lora_preset()": optimizers.hina(rate, optimizers.chosen_options(args, "lora"))}
  results = {name: [] for name in both}
  for name, optimizer in both.items():
    model = add_lora(base, args.rank, nnx.Rngs(args.seed))
    trainer = Program(model, setting.loss, optimizer, wrt=nnx.LoRAParam, decay=AVERAGE)
    for seed in range(args.seed, args.seed + args.seeds):
      results[name].append(train_lora(setting, trainer, base, name, seed, rate))
  return results, nnx.state(model, nnx.LoRAParam)


def train_lora(
  setting: Setting, trainer: Program, base: Denoiser, name: str, seed: int, rate: optax.Schedule
) -> list[Row]:
  """Trains one LoRA. Its initial weights, batches and noise depend only on the seed."""
  args, space, split = setting.args, setting.space, setting.data.subject
  short = report.LORA_FILES[name]
  display = space.display(f"LoRA with {short}, seed {seed}")
  first = seed == args.seed
  visit = visitor(setting, trainer, split, f"lora-{short}", display) if first else None
  state = trainer.start(add_lora(base, args.rank, nnx.Rngs(seed)))
  one = plan(setting, trainer, split, args.lora_steps, seed, rate, visit)
  _, rows = train(trainer, state, one, space.runs / "lora" / short / str(seed), display)
  return rows


def mean_loss(setting: Setting) -> float:
  """Returns the held-out loss of predicting the mean, with the noise of all other measurements."""
  few = {shape: x[:MEASURED] for shape, x in setting.data.base.held_out.items()}
  measure = jax.jit(diffusion.mean_loss, static_argnums=0)
  losses = [float(measure(setting.process, x, jax.random.key(0))) for x in few.values()]
  return float(np.average(losses, weights=[len(x) for x in few.values()]))
