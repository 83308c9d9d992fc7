"""Oracles of the regularizers in their default form."""

import dataclasses

import numpy as np

from tests.reference import leaves


class SuppressEdges:
  """`g / (1 + s e [e > threshold])`, `e` the second difference over its peak."""

  def __init__(self, strength=0.1, threshold=0.6, axes=leaves.flax_axes):
    self.strength, self.threshold, self.axes = strength, threshold, axes

  def init(self, params):
    self.edge_share = None

  def update(self, g, params):
    updates, self.edge_share = {}, []
    for path, x in g.items():
      axes = self.axes(path, x)
      if not axes:
        updates[path] = x
        self.edge_share.append(-1.0)
        continue
      edge = np.zeros(x.shape)
      for index in np.ndindex(x.shape):
        around = leaves.replicated_neighbours(x, index, axes)
        edge[index] = abs(sum(value - x[index] for value in around))
      if edge.size and edge.max() > 0:
        edge = edge / edge.max()
      is_edge = edge > self.threshold
      updates[path] = x / (1 + self.strength * edge * is_edge)
      self.edge_share.append(leaves.mean(is_edge))
    return updates

  def state(self):
    return {"edge_share": np.array(self.edge_share)}


class SuppressHighFrequency(leaves.Stateless):
  """`g - s (g - mean of the neighbours)`."""

  def __init__(self, strength=0.05, axes=leaves.flax_axes):
    self.strength, self.axes = strength, axes

  def update(self, g, params):
    updates = {}
    for path, x in g.items():
      axes, new = self.axes(path, x), x.copy()
      for index in np.ndindex(x.shape) if axes else ():
        smooth = np.mean(leaves.replicated_neighbours(x, index, axes))
        new[index] = x[index] - self.strength * (x[index] - smooth)
      updates[path] = new
    return updates


class PreserveDetail:
  """`g (p + (1 - p) / (1 + R))`, `R` the local variance over its mean, averaged over steps."""

  def __init__(self, detail_preservation=0.8, decay=0.9, axes=leaves.flax_axes):
    self.floor, self.decay, self.axes = detail_preservation, decay, axes

  def init(self, params):
    self.count, self.average = 0, leaves.zeros(params)

  def update(self, g, params):
    self.count += 1
    updates = {}
    for path, x in g.items():
      axes = self.axes(path, x)
      if not axes:
        updates[path] = x
        continue
      variance = np.zeros(x.shape)
      for index in np.ndindex(x.shape):
        around = leaves.replicated_neighbours(x, index, axes)
        variance[index] = np.mean([(value - x[index]) ** 2 for value in around])
      if leaves.mean(variance) > 0:
        variance = variance / leaves.mean(variance)
      self.average[path] = self.decay * self.average[path] + (1 - self.decay) * variance
      relative = self.average[path] / (1 - self.decay**self.count)
      updates[path] = x * (self.floor + (1 - self.floor) / (1 + relative))
    return updates

  def state(self):
    return {"count": self.count, "local_variance": self.average}


class AttenuateBackground:
  """Damps what has been among the quiet elements of its leaf, in both modes."""

  def __init__(self, strength=1.0, mode="simple", axes=leaves.flax_axes):
    self.strength, self.mode, self.axes = strength, mode, axes
    self.decay = 0.95 if mode == "simple" else 0.9

  def init(self, params):
    self.count, self.average = 0, leaves.zeros(params)
    self.share = dict.fromkeys(params, 0.0)

  def update(self, g, params):
    self.count += 1
    updates = {}
    for path, x in g.items():
      axes = self.axes(path, x)
      if not axes or not x.size:
        updates[path] = x
        continue
      quiet = self.simple(x) if self.mode == "simple" else self.fast(x, axes)
      self.average[path] = self.decay * self.average[path] + (1 - self.decay) * quiet
      b = self.average[path] / (1 - self.decay**self.count)
      if self.mode == "simple":
        updates[path] = x * (1 - 0.5 * self.strength * b)
        continue
      self.share[path] = 0.95 * self.share[path] + 0.05 * leaves.mean(b)
      share = self.share[path] / (1 - 0.95**self.count)
      back, front = (0.2, 1.2) if share > 0.7 else (0.5, 1.05) if share < 0.2 else (0.3, 1.1)
      updates[path] = x * (1 + self.strength * (b * back + (1 - b) * front - 1))
    return updates

  def simple(self, x):
    size = np.abs(x)
    return size < leaves.mean(size) - 0.5 * leaves.standard_deviation(size)

  def fast(self, x, axes):
    activity = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
      activity[index] = np.mean(np.abs(leaves.box(x, index, axes)))
    return activity < np.sort(activity, axis=None)[int(0.3 * x.size)]

  def state(self):
    fields = {"count": self.count, "background": self.average}
    if self.mode == "fast":
      fields["background_share"] = np.array(list(self.share.values()))
    return fields


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two factors by path, and how they are stored.

  Attributes:
    down: path of A.
    up: path of B.
    torch: `(rank, in, ...)`, `(out, rank, ...)` in place of `(..., in, rank)`, `(..., rank, out)`.
    layers: how many leading axes stack layers.
  """

  down: str
  up: str
  torch: bool = False
  layers: int = 0


class AddRankPenalty(leaves.Stateless):
  """`g + s` times the gradient of `sum(w sigma)`, by the SVD of the whole product."""

  def __init__(self, pairs, strength=0.01, emphasis=1.2, unpaired="ignore"):
    self.pairs, self.strength, self.emphasis = pairs, strength, emphasis
    self.unpaired = unpaired

  def update(self, g, params):
    updates, paired = dict(g), set()
    for pair in self.pairs:
      down, up = params[pair.down], params[pair.up]
      down_gradient, up_gradient = np.zeros(down.shape), np.zeros(up.shape)
      for layer in np.ndindex(down.shape[: pair.layers]):
        a, b = self.matrices(down[layer], up[layer], pair.torch)
        inner = self.gradient_of_product(b @ a)
        self.store(down_gradient, up_gradient, layer, b.T @ inner, inner @ a.T, pair.torch)
      updates[pair.down] = g[pair.down] + self.strength * down_gradient
      updates[pair.up] = g[pair.up] + self.strength * up_gradient
      paired |= {pair.down, pair.up}
    if self.unpaired == "nuclear":
      for path, p in params.items():
        if path not in paired and p.ndim == 2 and p.size:
          u, sigma, vt = np.linalg.svd(p, full_matrices=False)
          kept = sigma > 1e-6 * sigma[0]
          updates[path] = g[path] + self.strength * (u * kept) @ vt
    return updates

  def matrices(self, down, up, torch):
    """A as (rank, inputs) and B as (outputs, rank)."""
    if torch:
      b = np.moveaxis(up, 1, -1)
      return down.reshape(down.shape[0], -1), b.reshape(-1, b.shape[-1])
    b = np.moveaxis(up, -2, -1)
    return down.reshape(-1, down.shape[-1]).T, b.reshape(-1, b.shape[-1])

  def store(self, down, up, layer, a, b, torch):
    """Puts gradients of A and B where the factors of this layer stand."""
    if torch:
      down[layer] = a.reshape(down[layer].shape)
      rest = np.moveaxis(up[layer], 1, -1).shape
      up[layer] = np.moveaxis(b.reshape(rest), -1, 1)
    else:
      down[layer] = a.T.reshape(down[layer].shape)
      rest = np.moveaxis(up[layer], -2, -1).shape
      up[layer] = np.moveaxis(b.reshape(rest), -1, -2)

  def gradient_of_product(self, product):
    """`U w V^T` over the singular values above 1e-3 of the largest; 0 for a zero product."""
    u, sigma, vt = np.linalg.svd(product, full_matrices=False)
    if not sigma.size or sigma[0] == 0:
      return np.zeros(product.shape)
    weights = ((1 + 1e-3) * sigma[0] / (sigma + 1e-3 * sigma[0])) ** (self.emphasis - 1)
    return (u * np.where(sigma >= 1e-3 * sigma[0], weights, 0.0)) @ vt


class AdaptiveGradientRegularization(leaves.Stateless):
  """`g (1 - min(|g| / sum|g|, limit))`, but for leaves of one element."""

  def __init__(self, limit=0.1):
    self.limit = limit

  def update(self, g, params):
    updates = {}
    for path, x in g.items():
      whole = np.sum(np.abs(x))
      shrinks = whole > 0 and x.size > 1
      updates[path] = x * (1 - np.minimum(np.abs(x) / whole, self.limit)) if shrinks else x
    return updates


class OrthogonalizeToParams(leaves.Stateless):
  """The part of `g` orthogonal to the parameters, at the norm of `g`."""

  def __init__(self, include_vectors=False):
    self.least_axes = 0 if include_vectors else 2

  def update(self, g, params):
    updates = {}
    for path, x in g.items():
      w = params[path]
      if x.ndim < self.least_axes or leaves.norm(w) == 0 or leaves.norm(x) == 0:
        updates[path] = x
        continue
      rest = x - np.sum(w * x) / np.sum(w * w) * w
      parallel = leaves.norm(rest) < 1e-6 * leaves.norm(x)
      updates[path] = rest * 0 if parallel else rest * leaves.norm(x) / leaves.norm(rest)
    return updates
