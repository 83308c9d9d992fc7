"""How large an update may be, as the docstrings of the parts say: `bound(step)` checks one leaf."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class LeafStep(NamedTuple):
  """One leaf in one step.

  Attributes:
    options: of the transformation, by name.
    number: of the step, counted from 1.
    g: the gradient.
    u: the update.
    p: the parameter.
    slack: a factor for rounding.
    least: the smallest number that the dtype tells from 0.
  """

  options: Mapping[str, Any]
  number: int
  g: Any
  u: Any
  p: Any
  slack: float
  least: float


def size(x: Any) -> float:
  """The largest magnitude."""
  return float(np.max(np.abs(np.asarray(x, np.float64)), initial=0.0))


def length(x: Any) -> float:
  """The Euclidean norm."""
  return float(np.sqrt(np.sum(np.square(np.asarray(x, np.float64)))))


def adam_bound(options: Mapping[str, Any], number: int) -> float:
  """The largest `m / sqrt(v)` that any gradients can give after as many steps (Cauchy, Schwarz)."""
  b1, b2 = options.get("b1", 0.9), options.get("b2", 0.999)
  ages = range(number)
  first, second = sum(b1**i for i in ages), sum(b2**i for i in ages)
  return math.sqrt(sum((b1**i / first) ** 2 / (b2**i / second) for i in ages))


def no_element_grows(s: LeafStep) -> None:
  """Each element of the update is at most that of the gradient."""
  assert (np.abs(np.asarray(s.u, np.float64))
          <= s.slack * np.abs(np.asarray(s.g, np.float64))).all()


def grows_by_a_fifth(s: LeafStep) -> None:
  """The largest element grows by a fifth at most."""
  assert size(s.u) <= s.slack * 1.2 * size(s.g) + s.least


def no_longer(s: LeafStep) -> None:
  """The norm does not grow."""
  assert length(s.u) <= s.slack * length(s.g) + s.least * math.sqrt(max(s.g.size, 1))


def adds_decay(s: LeafStep) -> None:
  """The update is the gradient and a share of the parameter."""
  assert size(s.u) <= s.slack * (size(s.g) + s.options["weight_decay"] * size(s.p)) + s.least


def adam(s: LeafStep) -> None:
  """Adam's bound."""
  assert size(s.u) <= s.slack * adam_bound(s.options, s.number)


def adopt(s: LeafStep) -> None:
  """ADOPT's clip."""
  assert size(s.u) <= s.slack * s.number**0.25


def adam_times_rate(s: LeafStep) -> None:
  """Adam's bound times the largest rate of an element."""
  assert size(s.u) <= s.slack * adam_bound(s.options, s.number) * s.options["max_scale"]


def adam_times_importance(s: LeafStep) -> None:
  """Adam's bound times the most that importance moves to one leaf."""
  assert size(s.u) <= s.slack * adam_bound(s.options, s.number) * 30
