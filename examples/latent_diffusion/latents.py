"""Latents on disk, in the layout of kohya's sd-scripts, and in memory, by shape.

A file holds `latents_{height}x{width}` (channels first), or `latents` in older files, beside
`original_size` (width, height) and `crop_ltrb` with the same ending, and optionally
`latents_flipped` with it.
"""

import collections
import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from latent_diffusion.errors import Skipped, UserError

KEY = re.compile(r"latents(?:_flipped)?(?:_\d+x\d+)?")
SUFFIX = "_hina.npz"
HELD_OUT_EVERY = 5
Shape = tuple[int, int, int]


class Split(NamedTuple):
  """Latents for training and held out, each by shape: (count, height, width, channels)."""

  train: dict[Shape, np.ndarray]
  held_out: dict[Shape, np.ndarray]


def write(
  path: pathlib.Path, latents: np.ndarray, flipped: np.ndarray, size: tuple[int, int],
  box: tuple[int, int, int, int],
) -> None:
  """Writes latents (height, width, channels) of one crop and of its mirror image."""
  ending = f"_{latents.shape[0]}x{latents.shape[1]}"
  np.savez(path, **{
    f"latents{ending}": latents.transpose(2, 0, 1).astype(np.float32),
    f"latents_flipped{ending}": flipped.transpose(2, 0, 1).astype(np.float32),
    f"original_size{ending}": np.array(size),
    f"crop_ltrb{ending}": np.array(box),
  })


def read(path: pathlib.Path) -> list[np.ndarray]:
  """Reads all latents of a file, each (height, width, channels)."""
  with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
    found = [np.asarray(file[key], np.float32) for key in file.files if KEY.fullmatch(key)]
  if not found:
    raise ValueError("holds no latents")
  for array in found:
    if array.ndim != 3 or not array.size or any(side % 2 for side in array.shape[1:]):
      raise ValueError(f"latents of shape {array.shape}, not (channels, even, even)")
    if not np.isfinite(array).all():
      raise ValueError("latents that are not finite")
  return [array.transpose(1, 2, 0) for array in found]


def read_files(paths: list[pathlib.Path], skipped: Skipped) -> dict[pathlib.Path, list[np.ndarray]]:
  """Reads the files with the most frequent number of channels; others are skipped and named."""
  found = {}
  for path in paths:
    try:
      found[path] = read(path)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
      skipped.add(path, error)
  counts = collections.Counter(x.shape[2] for arrays in found.values() for x in arrays)
  if not counts:
    return {}
  channels = counts.most_common(1)[0][0]
  for path in list(found):
    others = {x.shape[2] for x in found[path]} - {channels}
    if others:
      skipped.add(path, f"{others.pop()} channels where the others have {channels}")
      del found[path]
  return found


def read_folder(folder: pathlib.Path, skipped: Skipped) -> tuple[Split, Split]:
  """Reads the latents of `folder`: the last fifth for the subject, the rest for the base.

  Of either every fifth file is held out.
  """
  if not folder.is_dir():
    raise UserError(f"--latents: {folder} is not a folder.")
  found = read_files(sorted(folder.rglob("*.npz")), skipped)
  if len(found) < 4:
    lines = [f"--latents: {folder} has {len(found)} usable .npz files; 4 are needed."]
    raise UserError("\n".join([*lines, *skipped.lines()]))
  files = list(found.values())
  first = len(files) - max(2, len(files) // 5)
  base, subject = standardize(split(files[:first]), split(files[first:]))
  return base, subject


def split(files: list[list[np.ndarray]]) -> Split:
  """Holds out every fifth file, the last one at least."""
  held_out = [x for i, x in enumerate(reversed(files)) if i % HELD_OUT_EVERY == 0]
  train = [x for i, x in enumerate(reversed(files)) if i % HELD_OUT_EVERY]
  return Split(by_shape(train), by_shape(held_out))


def by_shape(files: list[list[np.ndarray]]) -> dict[Shape, np.ndarray]:
  """Stacks latents of the same shape."""
  stacks = collections.defaultdict(list)
  for array in (array for arrays in files for array in arrays):
    stacks[array.shape].append(array)
  return {shape: np.stack(stacks[shape]) for shape in sorted(stacks)}


def statistics(stacks: Mapping[Shape, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Mean and deviation of each channel."""
  rows = np.concatenate([stack.reshape(-1, stack.shape[-1]) for stack in stacks.values()])
  return rows.mean(0), np.maximum(rows.std(0), 1e-6)


def standardize(base: Split, subject: Split) -> tuple[Split, Split]:
  """Gives each channel of the base's training latents mean 0 and variance 1."""
  mean, deviation = statistics(base.train)
  scale = lambda stacks: {k: (x - mean) / deviation for k, x in stacks.items()}  # noqa: E731
  return tuple(Split(scale(s.train), scale(s.held_out)) for s in (base, subject))


def batch(stacks: Mapping[Shape, np.ndarray], size: int, seed: int, step: int) -> np.ndarray:
  """Draws a batch of one shape. It depends only on seed and step, so that training can resume."""
  rng = np.random.default_rng([seed, step])
  counts = np.array([len(stack) for stack in stacks.values()], float)
  stack = list(stacks.values())[rng.choice(len(counts), p=counts / counts.sum())]
  return stack[rng.integers(0, len(stack), size)]
