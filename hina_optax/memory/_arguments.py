"""Checks of the arguments that storage wrappers share."""

import re
from collections.abc import Callable
from typing import Any

import optax

from hina_optax.base import checks

Include = str | re.Pattern[str] | Callable[[str, Any], bool] | None


def check_inner(inner: Any) -> optax.GradientTransformationExtraArgs:
  """Returns `inner` with support for extra arguments; raises if it is not a transformation."""
  if not (callable(getattr(inner, "init", None)) and callable(getattr(inner, "update", None))):
    raise TypeError(
      "inner must be an optax transformation, such as optax.adamw(1e-3), got "
      f"{inner!r} ({type(inner).__name__})."
    )
  return optax.with_extra_args_support(inner)


def check_static_integer(name: str, value: Any, default: int, low: int) -> int:
  """Returns a whole number that must not be traced, since it shapes the program.

  `None` stands for `default`.
  """
  if value is None:
    return default
  checks.static_value(name, value)
  checks.integer(name, value, low)
  return int(value)


def compile_include(include: Include) -> Callable[[str, Any], bool]:
  """Returns `include` as `(path, leaf) -> bool`; a regular expression is searched in the path."""
  checks.static_value("include", include)
  if include is None:
    return lambda path, leaf: True
  if isinstance(include, (str, re.Pattern)):
    try:
      pattern = re.compile(include)
    except re.error as error:
      raise ValueError(f"include is not a regular expression: {include!r} ({error}).") from error
    return lambda path, leaf: pattern.search(path) is not None
  if callable(include):
    return include
  raise TypeError(
    "include must be None, a regular expression searched in the path of a state leaf, or a "
    f"function of path and leaf that returns a bool; got {include!r} ({type(include).__name__})."
  )
