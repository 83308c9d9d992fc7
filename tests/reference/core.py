"""Oracles of the core and of weight decay, and of the optax parts that modulators wrap."""

import numpy as np

from tests.reference import leaves


class Hina:
  """Adam's direction; with torque (`average`, `sum`) and ADOPT's normalisation if asked for."""

  def __init__(self, b1=0.9, b2=0.999, eps=1e-8, torque=None, torque_decay=0.9, stability=None):
    self.b1, self.b2, self.eps = b1, b2, eps
    self.form, self.torque_decay, self.adopt = torque, torque_decay, stability == "adopt"

  def init(self, params):
    self.count, self.mu, self.nu = 0, leaves.zeros(params), leaves.zeros(params)
    self.torque = dict.fromkeys(params, 0.0)

  def update(self, g, params):
    self.count += 1
    return {path: self.leaf(path, x) for path, x in g.items()}

  def leaf(self, path, g):
    t, old_nu, x = self.count, self.nu[path], g
    if self.adopt and t == 1:
      self.nu[path] = g * g
      return np.zeros(g.shape)
    self.nu[path] = self.b2 * old_nu + (1 - self.b2) * g * g
    if self.adopt:
      bound = (t - 1) ** 0.25
      x = np.clip(g / np.maximum(np.sqrt(old_nu), self.eps), -bound, bound)
    damping = 1.0
    if self.form:
      # The published cosine is with the gradient; ADOPT normalises what is averaged, not this.
      agreement = leaves.cosine(self.mu[path], g)
      self.torque[path] = (
        self.torque_decay * self.torque[path] + (1 - self.torque_decay) * agreement
      )
      damping = 1e-8 + (1 + self.torque[path]) / 2
    share = 1.0 if self.form == "sum" else 1 - self.b1
    self.mu[path] = self.b1 * self.mu[path] + share * damping * x
    if self.adopt:
      return self.mu[path]
    numerator = self.mu[path] if self.form == "sum" else self.mu[path] / (1 - self.b1**t)
    denominator = self.nu[path] if self.form == "sum" else self.nu[path] / (1 - self.b2**t)
    return numerator / (np.sqrt(denominator) + self.eps)

  def state(self):
    fields = {"count": self.count, "mu": self.mu, "nu": self.nu}
    if self.form:
      fields["torque"] = np.array(list(self.torque.values()))
    return fields


class AddScheduledWeightDecay:
  """`u + lambda_t p`, constant up to `T` and fading after it."""

  def __init__(self, weight_decay=0.01, transition_steps=None, factor=0.7, min_ratio=0.1):
    self.weight_decay, self.transition_steps = weight_decay, transition_steps
    self.factor, self.min_ratio = factor, min_ratio

  def init(self, params):
    self.count = 0

  def update(self, g, params):
    self.count += 1
    t, until, left = self.count, self.transition_steps, 1.0
    if until is not None and t > until:
      left = max(self.min_ratio, self.factor ** min((t - until) / until, 2))
    return {path: x + self.weight_decay * left * params[path] for path, x in g.items()}

  def state(self):
    return {"count": self.count}


class Trace:
  """`optax.trace`."""

  def __init__(self, decay=0.9):
    self.decay = decay

  def init(self, params):
    self.trace = leaves.zeros(params)

  def update(self, g, params):
    self.trace = {path: x + self.decay * self.trace[path] for path, x in g.items()}
    return dict(self.trace)

  def state(self):
    return {"trace": self.trace}


class Sgd(Trace):
  """`optax.sgd` with momentum: a trace, times minus the learning rate."""

  def __init__(self, learning_rate=0.1, momentum=0.9):
    super().__init__(momentum)
    self.learning_rate = learning_rate

  def update(self, g, params):
    return {path: -self.learning_rate * x for path, x in super().update(g, params).items()}

  def state(self):
    return {"0.trace": self.trace}
