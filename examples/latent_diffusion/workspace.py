"""The output folder: where its files are, and whether a run may resume."""

import argparse
import json
import os
import pathlib
import shutil

import numpy as np
from rich.console import Console

from latent_diffusion import pictures
from latent_diffusion.errors import Skipped, UserError
from latent_diffusion.progress import Display

# Options that may differ between a call and the call that resumes it.
FREE = ("resume", "output", "save_every")


class Workspace:
  """The folders and the terminal of one call."""

  def __init__(self, args: argparse.Namespace):
    self.folder, self.runs = args.output, args.output / "runs"
    self.console, self.skipped = Console(stderr=True), Skipped()
    settings = {k: str(v) for k, v in sorted(vars(args).items()) if k not in FREE}
    self.folder.mkdir(parents=True, exist_ok=True)
    file = self.folder / "options.json"
    if args.resume:
      self._check_same(file, settings)
    else:
      self._set_aside()
      write_whole(file, json.dumps(settings, indent=1))

  def _check_same(self, file: pathlib.Path, settings: dict[str, str]) -> None:
    if not file.exists():
      raise UserError(f"--resume: nothing to go on with in {self.folder}.")
    before = json.loads(file.read_text())
    changed = [f"--{name.replace('_', '-')} was {before.get(name)}, is {value}"
               for name, value in settings.items() if before.get(name) != value]
    if changed:
      raise UserError("--resume: other options than before: " + "; ".join(changed) + ".")

  def _set_aside(self) -> None:
    """Moves the runs of the last call to `previous`, replacing those of the call before it."""
    for name in ("runs", "tensorboard", "samples"):
      folder, previous = self.folder / name, self.folder / "previous" / name
      if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        previous.parent.mkdir(exist_ok=True)
        os.replace(folder, previous)

  def display(self, name: str) -> Display:
    """Makes the bar and the log of one run."""
    return Display(name, self.console, self.folder / "tensorboard" / name.replace(", ", "/"))

  def keep(self, name: str, step: int, images: np.ndarray) -> None:
    """Writes a sheet of samples, images in [-1, 1]."""
    pixels = pictures.grid(pictures.to_bytes(images), columns=len(images))
    pictures.save(pixels, self.folder / "samples" / f"{name}-{step:06d}.png")

  def sheets(self, name: str) -> list[tuple[int, np.ndarray]]:
    """Reads the sheets of samples, by step."""
    found = sorted((self.folder / "samples").glob(f"{name}-*.png"))
    return [(int(path.stem.rpartition("-")[2]), pictures.load(path)) for path in found]


def write_whole(path: pathlib.Path, text: str) -> None:
  """Writes a file atomically: at any time the old or the new content is complete."""
  temporary = path.with_name(path.name + ".partial")
  temporary.write_text(text, encoding="utf-8")
  os.replace(temporary, path)
