"""Crops of photographs in aspect-ratio buckets, apart for training and for holding out."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from latent_diffusion.photographs import Photograph

# Sides of crops are multiples of what the VAE and the denoiser's patches shrink by together.
MULTIPLE = 8
HELD_OUT_SHARE = 0.25
RATIOS = (1.0, 4 / 3, 3 / 2, 16 / 9)


class Crop(NamedTuple):
  """A resized rectangle of a photograph: pixels (height, width, 3) of eight bits.

  Attributes:
    size: width and height of the photograph.
    box: left, top, right and bottom of the rectangle in it.
  """

  pixels: np.ndarray
  size: tuple[int, int]
  box: tuple[int, int, int, int]


def buckets(resolution: int) -> list[tuple[int, int]]:
  """Heights and widths of about `resolution` squared pixels, for each of the usual ratios."""
  found = set()
  for ratio in RATIOS:
    for r in (ratio, 1 / ratio):
      sides = (resolution / r**0.5, resolution * r**0.5)
      found.add(tuple(max(MULTIPLE, round(side / MULTIPLE) * MULTIPLE) for side in sides))
  return sorted(found)


def nearest_bucket(height: int, width: int, resolution: int, square: bool) -> tuple[int, int]:
  """The bucket whose ratio is closest to that of the photograph."""
  if square:
    side = max(MULTIPLE, round(resolution / MULTIPLE) * MULTIPLE)
    return side, side
  return min(
    buckets(resolution), key=lambda b: (abs(np.log(b[1] / b[0]) - np.log(width / height)), b))


def cut(
  photograph: Photograph, counts: tuple[int, int], resolution: int, square: bool, seed: int
) -> tuple[list[Crop], list[Crop]]:
  """Crops of the left three quarters of a photograph for training, of the rest for holding out."""
  height, width = photograph.pixels.shape[:2]
  bucket = nearest_bucket(height, width, resolution, square)
  border = round(width * (1 - HELD_OUT_SHARE))
  parts = (0, border), (border, width)
  rng = np.random.default_rng([seed, *photograph.name.encode()])
  train, held_out = (
    [_random_crop(photograph.pixels, part, bucket, rng) for _ in range(count)]
    for part, count in zip(parts, counts)
  )
  return train, held_out


def _random_crop(
  pixels: np.ndarray, part: tuple[int, int], bucket: tuple[int, int], rng: np.random.Generator
) -> Crop:
  """A rectangle of the bucket's ratio inside of the columns of `part`, at a random scale."""
  height, width, (start, stop) = *pixels.shape[:2], part
  largest = min(height / bucket[0], (stop - start) / bucket[1])
  smallest = min(largest, 1.0)
  scale = smallest * (largest / smallest) ** rng.uniform(0.4, 1.0)
  rows, columns = (max(1, int(side * scale)) for side in bucket)
  top = int(rng.integers(0, height - rows + 1))
  left = start + int(rng.integers(0, stop - start - columns + 1))
  box = (left, top, left + columns, top + rows)
  image = Image.fromarray(pixels[top:top + rows, left:left + columns])
  resized = image.resize((bucket[1], bucket[0]), Image.Resampling.LANCZOS)
  return Crop(np.asarray(resized), (width, height), box)
