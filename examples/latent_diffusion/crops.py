"""Crops of photographs in aspect-ratio buckets; training and held-out crops do not overlap."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from latent_diffusion.photographs import Photograph

# The sides of crops are multiples of the factor by which the VAE and the patches shrink an image.
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
  """Returns heights and widths with about `resolution`**2 pixels for the usual aspect ratios."""
  found = set()
  for ratio in RATIOS:
    for r in (ratio, 1 / ratio):
      sides = (resolution / r**0.5, resolution * r**0.5)
      found.add(tuple(max(MULTIPLE, round(side / MULTIPLE) * MULTIPLE) for side in sides))
  return sorted(found)


def nearest_bucket(height: int, width: int, resolution: int, square: bool) -> tuple[int, int]:
  """Returns the bucket whose aspect ratio is closest to that of the photograph."""
  if square:
    side = max(MULTIPLE, round(resolution / MULTIPLE) * MULTIPLE)
    return side, side
  return min(
    buckets(resolution), key=lambda b: (abs(np.log(b[1] / b[0]) - np.log(width / height)), b))


def cut(
  photograph: Photograph, counts: tuple[int, int], resolution: int, square: bool, seed: int
) -> tuple[list[Crop], list[Crop]]:
  """Crops the left three quarters of a photograph for training, and the rest for holding out."""
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
  """Cuts a rectangle of the bucket's ratio from the columns of `part`, at a random scale."""
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
