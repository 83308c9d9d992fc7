"""From photographs to latents: crops, the autoencoder, cached `.npz` files."""

import argparse
import dataclasses
import hashlib
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from latent_diffusion import crops, latents, optimizers, photographs, pictures
from latent_diffusion.errors import UserError
from latent_diffusion.training import Plan, Program, train
from latent_diffusion.vae import Vae, vae_loss
from latent_diffusion.workspace import Workspace

PARTS = ("base/train", "base/held_out", "subject/train", "subject/held_out")
CHUNK = 64


@dataclasses.dataclass
class Dataset:
  """Latents of the base and of the subject, and how to look at them.

  Attributes:
    base: what the denoiser is trained on.
    subject: what the LoRA is trained on.
    decode: latents to images in [-1, 1].
    decoded: whether these are images, or only colours for latents.
    facts: lines for the report.
    vae: its held-out photographs, their reconstructions, its records, and photographs of the
      subject; `None` without one.
  """

  base: latents.Split
  subject: latents.Split
  decode: Callable[[np.ndarray], np.ndarray]
  decoded: bool
  facts: list[str]
  vae: dict[str, Any] | None = None


def load(args: argparse.Namespace, space: Workspace) -> Dataset:
  """Reads latents from a folder, or makes them from photographs."""
  if args.latents is not None:
    base, subject = latents.read_folder(args.latents, space.skipped)
    data = Dataset(base, subject, pictures.preview, False, [])
  else:
    data = from_photographs(args, space)
  for line in space.skipped.lines():
    space.console.print(line, highlight=False, markup=False)
  for name in ("base", "subject"):
    split = getattr(data, name)
    counts = [sum(len(x) for x in part.values()) for part in split]
    shapes = ", ".join(" x ".join(map(str, shape)) for shape in split.train)
    data.facts.append(f"{name}: {counts[0]} latents to train on, {counts[1]} held out; "
                      f"shapes {shapes}")
  return data


def from_photographs(args: argparse.Namespace, space: Workspace) -> Dataset:
  """Crops photographs, trains the autoencoder unless it is trained already, and caches latents."""
  parts, subject, names = cut_all(args, space)
  mark = fingerprint(args, parts)
  vae, rows = train_vae(args, space, parts, space.folder / f"vae-{mark}")
  encode, decode = coders(vae)
  folder = space.folder / f"latents-{mark}"
  if not folder.exists():
    write_all(parts, encode, folder)
  read = {part: read_part(folder / part, space) for part in PARTS}
  with np.load(folder / "scale.npz") as scale:
    mean, deviation = scale["mean"], scale["deviation"]
  shown, subject_shown = some(parts["base/held_out"]), some(parts["subject/train"])
  base, learned = (
    latents.Split(read[f"{kind}/train"], read[f"{kind}/held_out"]) for kind in ("base", "subject"))
  facts = [f"photographs of the base: {', '.join(n for n in names if n != subject)}",
           f"photograph of the subject: {subject}",
           "held out: the right quarter of every photograph"]
  raw = {"photographs": shown, "rows": rows, "reconstructions": decode(encode(shown)),
         "subject": subject_shown}
  return Dataset(base, learned, lambda x: decode(x * deviation + mean), True, facts, raw)


def cut_all(
  args: argparse.Namespace, space: Workspace
) -> tuple[dict[str, list[crops.Crop]], str, list[str]]:
  """Crops by part, the subject's name, and all names."""
  photos = photographs.load(args.images, space.skipped)
  names = [photo.name for photo in photos]
  if len(photos) < 2:
    raise UserError("--images: two photographs are needed, one of them for the LoRA.")
  subject = args.subject or ("chelsea" if "chelsea" in names else names[0])
  if subject not in names:
    raise UserError(f"--subject: no photograph is called {subject!r}; there are {names}.")
  count = max(4, args.crops // len(photos))
  parts: dict[str, list[crops.Crop]] = {part: [] for part in PARTS}
  for photo in photos:
    kind = "subject" if photo.name == subject else "base"
    train_crops, held_out = crops.cut(
      photo, (count, max(2, count // 5)), args.resolution, args.square, args.seed)
    parts[f"{kind}/train"] += train_crops
    parts[f"{kind}/held_out"] += held_out
  return parts, subject, names


def fingerprint(args: argparse.Namespace, parts: dict[str, list[crops.Crop]]) -> str:
  """Returns a fingerprint of an autoencoder's settings and training data."""
  names = ("vae_steps", "vae_width", "vae_learning_rate", "channels", "batch", "seed")
  digest = hashlib.sha256(repr([getattr(args, name) for name in names]).encode())
  for part in PARTS:
    for crop in parts[part]:
      digest.update(crop.pixels.tobytes())
  return digest.hexdigest()[:12]


def by_shape(cut: list[crops.Crop]) -> dict[latents.Shape, np.ndarray]:
  """Images in [-1, 1] by shape."""
  return latents.by_shape([[pictures.to_floats(crop.pixels)] for crop in cut])


def some(cut: list[crops.Crop]) -> np.ndarray:
  """Selects eight crops of the most frequent shape, spread over the list."""
  images = max(by_shape(cut).values(), key=len)
  return images[np.linspace(0, len(images) - 1, 8).round().astype(int)]


def train_vae(
  args: argparse.Namespace, space: Workspace, parts: dict[str, list[crops.Crop]],
  folder: pathlib.Path,
) -> tuple[Vae, list[dict[str, Any]]]:
  """Returns the autoencoder with averaged weights, trained once per set of crops and settings."""
  model = Vae(args.channels, args.vae_width, 1, nnx.Rngs(args.seed))
  rate = optimizers.schedule(args.vae_learning_rate, args.vae_steps, "cosine")
  program = Program(model, vae_loss, optimizers.hina(rate, optimizers.ALL))
  images, held_out = by_shape(parts["base/train"]), by_shape(parts["base/held_out"])
  few = {shape: x[:CHUNK] for shape, x in held_out.items()}
  plan = Plan(
    args.vae_steps, lambda step: flip(latents.batch(images, args.batch, args.seed, step), step),
    args.seed, rate, held_out=lambda params: mean_of(program, params, few),
    measured=-(-args.vae_steps // 8), saved=args.save_every)
  state, rows = train(program, program.start(model), plan, folder, space.display("autoencoder"))
  return program.model(state.average), rows


def flip(images: np.ndarray, step: int) -> np.ndarray:
  """Mirrors every second batch."""
  return images[:, :, ::-1] if step % 2 else images


def mean_of(program: Program, params: Any, stacks: dict[latents.Shape, np.ndarray]) -> float:
  """Returns the mean loss over all stacks, with the same noise at every call."""
  key = jax.random.key(0)
  losses = [float(program.measure(params, program.frozen, x, key)) for x in stacks.values()]
  return float(np.average(losses, weights=[len(x) for x in stacks.values()]))


def coders(vae: Vae) -> tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]:
  """Compiled encoder and decoder for any number of pictures."""
  graph, params = nnx.split(vae)
  encode = jax.jit(lambda params, x: nnx.merge(graph, params).encode(x)[0])
  decode = jax.jit(lambda params, x: nnx.merge(graph, params).decode(x))
  return (lambda x: in_chunks(encode, params, x)), (lambda x: in_chunks(decode, params, x))


def in_chunks(function: Callable[..., jax.Array], params: Any, x: np.ndarray) -> np.ndarray:
  """Applies a compiled function to batches of a single size."""
  size = min(CHUNK, len(x))
  padded = np.concatenate([x, np.repeat(x[-1:], -len(x) % size, axis=0)])
  pieces = [function(params, jnp.asarray(padded[i:i + size])) for i in range(0, len(x), size)]
  return np.concatenate([np.asarray(piece) for piece in pieces])[:len(x)]


def write_all(
  parts: dict[str, list[crops.Crop]], encode: Callable[..., np.ndarray], folder: pathlib.Path
) -> None:
  """Encodes every crop and its mirror image, scaled to unit variance, and caches them."""
  encoded = {part: [None] * len(cut) for part, cut in parts.items()}
  for part, cut in parts.items():
    for shape in {crop.pixels.shape for crop in cut}:
      where = [i for i, crop in enumerate(cut) if crop.pixels.shape == shape]
      images = pictures.to_floats(np.stack([cut[i].pixels for i in where]))
      for i, pair in zip(where, zip(encode(images), encode(images[:, :, ::-1]))):
        encoded[part][i] = pair
  mean, deviation = latents.statistics(latents.by_shape(encoded["base/train"]))
  partial = folder.with_name(folder.name + ".partial")
  shutil.rmtree(partial, ignore_errors=True)
  for part, pairs in encoded.items():
    (partial / part).mkdir(parents=True)
    for i, (pair, crop) in enumerate(zip(pairs, parts[part])):
      plain, mirrored = ((x - mean) / deviation for x in pair)
      path = partial / part / f"{i:05d}{latents.SUFFIX}"
      latents.write(path, plain, mirrored, crop.size, crop.box)
  np.savez(partial / "scale.npz", mean=mean, deviation=deviation)
  os.replace(partial, folder)


def read_part(folder: pathlib.Path, space: Workspace) -> dict[latents.Shape, np.ndarray]:
  """Reads the cached latents of one part."""
  return latents.by_shape(
    list(latents.read_files(sorted(folder.glob("*.npz")), space.skipped).values()))
