"""The example is a package of its own, beside the library."""

import pathlib
import sys

import jax
import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture(autouse=True)
def standard_promotion():
  """Flax itself mixes dtypes and ranks implicitly."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield
