"""Oracles of the modulators in their default form, around the oracle of what they wrap."""

import numpy as np

from tests.reference import leaves


class Modulator:
  """Base: runs the inner oracle and reports its state beside its own."""

  def __init__(self, inner):
    self.inner = inner

  def init(self, params):
    self.inner.init(params)
    self.start(params)

  def start(self, params):
    """Own state."""

  def update(self, g, params):
    self.direction = self.inner.update(g, params)
    return self.modulate(self.direction, g, params)

  def state(self):
    inner = {f"inner_state.{name}": value for name, value in self.inner.state().items()}
    return {**inner, **self.own()}

  def own(self):
    return {}


class Cautious(Modulator):
  """Keeps `u` where `u g > 0`, over the share that is kept."""

  def modulate(self, u, g, params):
    updates, self.alignment = {}, []
    for path, x in u.items():
      agrees = x * g[path] > 0
      self.alignment.append(leaves.mean(agrees))
      updates[path] = np.where(agrees, x, 0.0) / max(leaves.mean(agrees), 1e-3)
    return updates

  def own(self):
    return {"alignment": np.array(self.alignment)}


class Grams(Modulator):
  """`sign(g) |u|`."""

  def modulate(self, u, g, params):
    return {path: np.sign(g[path]) * np.abs(x) for path, x in u.items()}


class SignAgreement(Modulator):
  """A rate an element: `clip(r +/- b)` by whether the sign of `u` repeats."""

  def __init__(self, inner, bump=0.03, min_scale=0.001, max_scale=10.0, warmup_steps=500):
    super().__init__(inner)
    self.bump, self.bounds, self.warmup_steps = bump, (min_scale, max_scale), warmup_steps

  def start(self, params):
    self.count = 0
    self.scale = {path: np.ones(p.shape) for path, p in params.items()}
    self.positive = {path: np.zeros(p.shape, bool) for path, p in params.items()}

  def modulate(self, u, g, params):
    self.count += 1
    if self.count < self.warmup_steps:
      for path, x in u.items():
        for index in np.ndindex(x.shape):
          repeats = (x[index] > 0) == self.positive[path][index]
          moved = self.scale[path][index] + (self.bump if repeats else -self.bump)
          self.scale[path][index] = min(max(moved, self.bounds[0]), self.bounds[1])
          self.positive[path][index] = x[index] > 0
    return {path: self.scale[path] * x for path, x in u.items()}

  def own(self):
    return {"rules.0.count": self.count}


class Importance(Modulator):
  """A factor a leaf, by its importance relative to the mean over the leaves."""

  def __init__(
    self, inner, strength=1.0, interval=100, decay=0.95, compatibility_threshold=0.3,
    intrinsic_importance="full",
  ):
    super().__init__(inner)
    self.strength, self.interval, self.decay = strength, interval, decay
    self.threshold, self.intrinsic = compatibility_threshold, intrinsic_importance

  def start(self, params):
    self.count = 0
    self.importance = np.ones(len(params))
    self.initial_norm = np.full(len(params), -1.0)
    self.relation = np.zeros(len(params))

  def modulate(self, u, g, params):
    self.count += 1
    if self.count % self.interval == 0:
      self.visit(list(g.values()), list(params.values()))
    related = self.importance * (1 + 0.2 * self.relation)
    factors = np.clip(1 + self.strength * (related / np.mean(related) - 1), 0.1, 3)
    factors = factors / np.mean(factors)
    return {path: f * x for f, (path, x) in zip(factors, u.items())}

  def visit(self, g, params):
    if self.initial_norm[0] < 0:
      self.initial_norm = np.array([leaves.norm(p) for p in params])
    size = [np.sqrt(leaves.mean(x * x)) for x in g]
    change = [
      abs(leaves.norm(p) - start) / start if start > 0 else 0.0
      for p, start in zip(params, self.initial_norm)
    ]
    intrinsic = [0.5] * len(params)
    if self.intrinsic == "full":
      intrinsic = [
        leaves.standard_deviation(p) ** 2 * leaves.mean(np.abs(p) > 1e-6) for p in params
      ]
    terms = [over_mean(x) for x in (size, change, intrinsic)]
    contribution = np.maximum(0.01, 0.4 * terms[0] + 0.3 * terms[1] + 0.3 * terms[2])
    self.importance = self.decay * self.importance + (1 - self.decay) * contribution
    self.relation = np.zeros(len(params))
    for i, p in enumerate(params):
      for j, q in enumerate(params):
        if i != j and p.ndim == q.ndim == 2:
          found = compatibility(p, q)
          if found > self.threshold:
            self.relation[i] = max(self.relation[i], found)

  def own(self):
    return {
      "rules.0.count": self.count,
      "rules.0.importance": self.importance,
      "rules.0.initial_norm": self.initial_norm,
      "rules.0.relation": self.relation,
    }


def over_mean(x):
  """`x` over its mean; ones where that is 0."""
  x = np.asarray(x, np.float64)
  return x / np.mean(x) if np.mean(x) > 0 else np.ones(x.shape)


def compatibility(p, q):
  """0.7 times the share of equal sides plus 0.3 times the correlation; 0 without an equal side."""
  (rows, columns), (other_rows, other_columns) = p.shape, q.shape
  equal = [
    columns == other_rows, rows == other_columns, columns == other_columns, rows == other_rows
  ]
  if not any(equal):
    return 0.0
  n, correlation = min(1000, p.size, q.size), 0.0
  if n > 1:
    x, y = p.ravel()[:n], q.ravel()[:n]
    correlation = abs(leaves.cosine(x - np.mean(x), y - np.mean(y)))
  return 0.7 * sum(equal) / 4 + 0.3 * correlation


class ProjectToInit(Modulator):
  """Pulls a leaf back to its start where it moves away against the gradient's wish."""

  def __init__(self, inner, strength=0.06):
    super().__init__(inner)
    self.strength = strength

  def start(self, params):
    self.count, self.origin = 0, {path: p.copy() for path, p in params.items()}
    self.displacement = leaves.zeros(params)

  def modulate(self, u, g, params):
    self.count += 1
    updates = {}
    for path, step in u.items():
      origin, x = self.origin[path], params[path]
      y = x + step
      before, after = leaves.norm(x - origin), leaves.norm(y - origin)
      if np.sum(g[path] * (x - origin)) > 0 and after > 0:
        y = y - self.strength * np.clip((after - before) / after, 0, 1) * (y - origin)
      updates[path] = y - x
      self.displacement[path] = y - origin
    return updates

  def own(self):
    return {"count": self.count, "displacement": self.displacement}
