"""What hina_optax 0.1.0 saved by `torch.save` (tests/frozen/make.py) goes on where it was."""

import jax
import pytest
import torch

from tests.frozen import make

torch.set_num_threads(1)

# Another draw may round the other way: largest distance of all steps, relative to their norm.
ROUNDED = {"bf16": 0.1}


@pytest.fixture(autouse=True)
def standard_promotion():
  with jax.numpy_dtype_promotion("standard"):
    yield


def resumed(name):
  """What was saved, and the parameters now after the same further steps."""
  case = make.TORCH_CASES[name]
  saved = torch.load(make.FOLDER / f"torch_{name}.pt", weights_only=True)
  params = {n: torch.nn.Parameter(saved["before"][n].clone()) for n in case.shapes}
  optimizer = case.make(params)
  optimizer.load_state_dict(saved["state_dict"])
  make.torch_steps(optimizer, params, saved["gradients"])
  return saved, {n: p.detach() for n, p in params.items()}


@pytest.mark.parametrize("name", [name for name in make.TORCH_CASES if name not in ROUNDED])
def test_takes_the_same_further_steps(name):
  saved, params = resumed(name)
  for n, p in params.items():
    torch.testing.assert_close(
      p, saved["after"][n], rtol=2e-5, atol=2e-7, msg=lambda text, n=n: f"{n}: {text}")


@pytest.mark.parametrize("name", ROUNDED)
def test_takes_much_the_same_further_steps_in_fewer_bits(name):
  saved, params = resumed(name)
  moved, old = (
    torch.cat([(x[n] - saved["before"][n]).reshape(-1) for n in params])
    for x in (params, saved["after"]))
  assert (moved - old).norm() <= ROUNDED[name] * old.norm()
