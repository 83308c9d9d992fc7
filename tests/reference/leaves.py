"""What every oracle shares: spatial axes and neighbours, spelled out.

A tree is a flat dictionary from path to float64 array, in the order of the flattened tree; a vector
with one number a leaf follows the same order. An oracle has `init(params)`, `update(g, params)` and
`state()`; the last gives a dictionary from the dotted name of a field of the library's state to its
value.
"""

import itertools

import numpy as np


def flax_axes(path, x):
  """Both axes of a matrix, all but the last two of a kernel."""
  if x.ndim == 2:
    return (0, 1)
  return tuple(range(x.ndim - 2)) if x.ndim > 2 else ()


def torch_axes(path, x):
  """Both axes of a matrix, all but the first two of a kernel."""
  if x.ndim == 2:
    return (0, 1)
  return tuple(range(2, x.ndim)) if x.ndim > 2 else ()


def moved(index, axis, step):
  return (*index[:axis], index[axis] + step, *index[axis + 1 :])


def existing_neighbours(x, index, axes):
  """Values of the elements beside `index` along `axes`; a missing one is not among them."""
  found = []
  for axis in axes:
    for step in (-1, 1):
      if 0 <= index[axis] + step < x.shape[axis]:
        found.append(x[moved(index, axis, step)])
  return found


def replicated_neighbours(x, index, axes):
  """Values of the `2 len(axes)` elements beside `index`; a missing one equals the element."""
  found = existing_neighbours(x, index, axes)
  return found + [x[index]] * (2 * len(axes) - len(found))


def box(x, index, axes):
  """Values of the `3 ** len(axes)` elements around `index`, indices clamped to the leaf."""
  found = []
  for steps in itertools.product((-1, 0, 1), repeat=len(axes)):
    place = list(index)
    for axis, step in zip(axes, steps):
      place[axis] = min(max(index[axis] + step, 0), x.shape[axis] - 1)
    found.append(x[tuple(place)])
  return found


def zeros(params):
  return {path: np.zeros(p.shape) for path, p in params.items()}


def norm(x):
  return float(np.sqrt(np.sum(x * x)))


def cosine(x, y):
  lengths = norm(x) * norm(y)
  return float(np.sum(x * y)) / lengths if lengths > 0 else 0.0


def mean(x):
  return float(np.mean(x)) if x.size else 0.0


def standard_deviation(x):
  """With n - 1; 0 for fewer than two elements."""
  return float(np.std(x, ddof=1)) if x.size > 1 else 0.0


class Stateless:
  """Base of the oracles that remember nothing."""

  def init(self, params):
    pass

  def state(self):
    return {}
