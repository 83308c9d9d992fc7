"""Photographs: those inside scikit-image and scikit-learn, or those of a folder."""

import importlib.resources
import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from latent_diffusion.errors import Skipped, UserError

# Colour photographs inside the installed packages; nothing is fetched.
BUNDLED = {
  "skimage.data": (
    "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "motorcycle_left.png",
    "rocket.jpg",
  ),
  "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
}
LEAST_SIDE = 16
# Pillow raises these for files that are broken, are no images, or are far too large.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


class Photograph(NamedTuple):
  """A name and pixels (height, width, 3) of eight bits."""

  name: str
  pixels: np.ndarray


def load(folder: pathlib.Path | None, skipped: Skipped) -> list[Photograph]:
  """Reads the photographs of `folder`, or the bundled ones."""
  if folder is None:
    return [
      Photograph(pathlib.Path(name).stem, read(pathlib.Path(str(file / name))))
      for package, names in BUNDLED.items()
      for file in [importlib.resources.files(package)] for name in names
    ]
  return load_folder(folder, skipped)


def load_folder(folder: pathlib.Path, skipped: Skipped) -> list[Photograph]:
  """Reads every image below `folder`; what cannot be read is skipped and named."""
  if not folder.is_dir():
    raise UserError(f"--images: {folder} is not a folder.")
  photographs = []
  for path in sorted(folder.rglob("*")):
    if not path.is_file() or path.suffix.lower() not in Image.registered_extensions():
      continue
    try:
      photographs.append(Photograph(path.stem, read(path)))
    except UNREADABLE as error:
      skipped.add(path, error)
  if not photographs:
    raise UserError("\n".join([f"--images: no usable image in {folder}.", *skipped.lines()]))
  return photographs


def read(path: pathlib.Path) -> np.ndarray:
  """Reads the pixels of an image in RGB, rotated as its metadata says."""
  with Image.open(path) as image:
    pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
  if min(pixels.shape[:2]) < LEAST_SIDE:
    raise ValueError(f"smaller than {LEAST_SIDE} pixels")
  return pixels
