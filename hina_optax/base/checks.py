"""Checks of arguments, shared by every factory.

A traced value passes every check of its range, since its number is not known yet.
"""

import math
from typing import Any

import jax
import numpy as np


def number(name: str, value: Any, low: float = 0.0, high: float = math.inf, *,
           open_low: bool = False, open_high: bool = False) -> None:
  """Refuses what is not a real number between `low` and `high`."""
  if isinstance(value, jax.core.Tracer):
    return
  if isinstance(value, (bool, np.bool_, str, bytes)) or not _is_real_scalar(value):
    raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__}).")
  real = float(value)
  too_low = real <= low if open_low else real < low
  too_high = real >= high if open_high else real > high
  if math.isnan(real) or math.isinf(real) or too_low or too_high:
    left, right = "(" if open_low else "[", ")" if open_high or math.isinf(high) else "]"
    raise ValueError(f"{name} must lie in {left}{low:g}, {high:g}{right}, got {real:g}.")


def unit_interval(name: str, value: Any) -> None:
  """Refuses what is not a number in [0, 1]."""
  number(name, value, 0.0, 1.0)


def decay(name: str, value: Any) -> None:
  """Refuses what is not a number in [0, 1), and an array of fewer than 32 bits."""
  number(name, value, 0.0, 1.0, open_high=True)
  dtype = getattr(value, "dtype", None)
  if dtype is not None and np.dtype(dtype).itemsize < 4:
    raise ValueError(
      f"{name} arrives as {np.dtype(dtype).name}, in which 0.999 reads as 1. With "
      "optax.inject_hyperparams on low-precision parameters pass hyperparam_dtype=jnp.float32."
    )


def integer(name: str, value: Any, low: int) -> None:
  """Refuses what is not a whole number of at least `low`."""
  if isinstance(value, jax.core.Tracer):
    return
  number(name, value, low)
  if float(value) != int(value):
    raise ValueError(f"{name} must be a whole number, got {value!r}.")


def order(low_name: str, low: Any, high_name: str, high: Any) -> None:
  """Refuses a lower bound above its upper bound."""
  if isinstance(low, jax.core.Tracer) or isinstance(high, jax.core.Tracer):
    return
  if float(low) > float(high):
    raise ValueError(f"{low_name} must not exceed {high_name}, got {low!r} and {high!r}.")


def choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
  """Refuses what is not one of `allowed`."""
  if isinstance(value, jax.Array) or value not in allowed:
    options = ", ".join(repr(a) for a in allowed)
    raise ValueError(f"{name} must be one of {options}; got {value!r}.")


def flag(name: str, value: Any) -> None:
  """Refuses what is not `True` or `False`."""
  if not isinstance(value, (bool, np.bool_)):
    raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__}).")


def static_value(name: str, value: Any) -> None:
  """Refuses a traced value where the structure of the program depends on it."""
  if isinstance(value, jax.Array):
    raise ValueError(
      f"{name} decides the structure of the program and cannot be traced. With "
      f"optax.inject_hyperparams name it in static_args=('{name}',)."
    )


def optional_function(name: str, value: Any) -> None:
  """Refuses what is neither `None` nor callable."""
  static_value(name, value)
  if value is not None and not callable(value):
    raise TypeError(
      f"{name} must be None or a function, got {value!r}. optax.inject_hyperparams takes functions "
      f"for schedules and calls them: there, name it in static_args=('{name}',)."
    )


def _is_real_scalar(value: Any) -> bool:
  try:
    array = np.asarray(value)
  except (TypeError, ValueError):
    return False
  return array.ndim == 0 and (
    np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)
    or array.dtype.name in ("bfloat16",)  # NumPy does not count bf16 as floating.
  )
