"""Grids of pictures, and pictures embedded in HTML."""

import base64
import io
import pathlib

import numpy as np
from PIL import Image

GAP = 2


def to_bytes(images: np.ndarray) -> np.ndarray:
  """Converts images in [-1, 1] to eight bits."""
  return np.round((np.clip(np.asarray(images), -1, 1) + 1) * 127.5).astype(np.uint8)


def to_floats(pixels: np.ndarray) -> np.ndarray:
  """Converts images of eight bits to [-1, 1]."""
  return pixels.astype(np.float32) / 127.5 - 1


def grid(pixels: np.ndarray, columns: int) -> np.ndarray:
  """Sets pictures (count, height, width, 3) of eight bits side by side on white."""
  count, height, width, _ = pixels.shape
  rows = -(-count // columns)
  sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
  for i, picture in enumerate(pixels):
    top, left = i // columns * (height + GAP), i % columns * (width + GAP)
    sheet[top:top + height, left:left + width] = picture
  return sheet


def save(pixels: np.ndarray, path: pathlib.Path, scale: int = 1) -> None:
  """Writes a PNG, enlarged by a whole number."""
  path.parent.mkdir(parents=True, exist_ok=True)
  enlarged(pixels, scale).save(path, optimize=True)


def enlarged(pixels: np.ndarray, scale: int) -> Image.Image:
  """Enlarges both sides of a picture by `scale`, with interpolation."""
  image = Image.fromarray(pixels)
  size = (image.width * scale, image.height * scale)
  return image.resize(size, Image.Resampling.BICUBIC) if scale > 1 else image


def data_uri(pixels: np.ndarray) -> str:
  """Encodes a picture as a data URI, which HTML shows without a file."""
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
  return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def load(path: pathlib.Path) -> np.ndarray:
  """Pixels of a saved picture."""
  with Image.open(path) as image:
    return np.asarray(image.convert("RGB"))


def preview(latents: np.ndarray) -> np.ndarray:
  """Shows latents without a decoder: their first three channels become colours."""
  x = np.asarray(latents)[..., :3]
  x = np.concatenate([x] * 3, -1)[..., :3] if x.shape[-1] < 3 else x
  return np.clip(x / 2.5, -1, 1)
