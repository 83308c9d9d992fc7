"""The loop: going on exactly, stopping, refusing what is not finite."""

import os
import signal

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from latent_diffusion import denoiser, diffusion, optimizers
from latent_diffusion.checkpoints import Checkpoints
from latent_diffusion.errors import Interrupted, UserError
from latent_diffusion.probe import Probe
from latent_diffusion.progress import Display
from latent_diffusion.training import Plan, Program, train
from rich.console import Console

STEPS = 12


@pytest.fixture(scope="module")
def program():
  """A denoiser trained by every part of the optimizer."""
  model = denoiser.Denoiser(4, 16, 1, 4, nnx.Rngs(0))
  loss = lambda model, clean, key: diffusion.denoising_loss(  # noqa: E731
    diffusion.Process(), model, clean, key)
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield Program(model, loss, optimizers.hina(1e-3, optimizers.ALL))


@pytest.fixture
def display(tmp_path):
  return Display("test", Console(stderr=True, quiet=True), tmp_path / "log")


def batch(step):
  return np.random.default_rng(step).normal(size=(4, 4, 4, 4)).astype(np.float32)


def make_plan(batch=batch, steps=STEPS, saved=5, **changed):
  return Plan(steps, batch, 0, lambda step: 1e-3, measured=6, logged=2, saved=saved, **changed)


def run(program, plan, folder, display):
  start = program.start(denoiser.Denoiser(4, 16, 1, 4, nnx.Rngs(0)))
  return train(program, start, plan, folder, display)


def assert_same(first, second):
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


class KilledError(Exception):
  """Stands for the end of the process."""


def failing(at, error):
  def broken(step):
    if step == at:
      raise error
    return batch(step)
  return broken


def interrupting(at):
  def pressing(step):
    if step == at:
      os.kill(os.getpid(), signal.SIGINT)
    return batch(step)
  return pressing


def test_going_on_after_a_kill_gives_the_same_bits(program, display, tmp_path):
  whole, rows = run(program, make_plan(), tmp_path / "whole", display)
  with pytest.raises(KilledError):
    run(program, make_plan(failing(8, KilledError)), tmp_path / "parts", display)
  parts, again = run(program, make_plan(), tmp_path / "parts", display)
  assert_same(whole, parts)
  assert [row["step"] for row in again] == [row["step"] for row in rows]
  assert int(whole.step) == STEPS


def test_control_c_saves_and_training_goes_on_exactly(program, display, tmp_path):
  whole, _ = run(program, make_plan(), tmp_path / "whole", display)
  before = signal.getsignal(signal.SIGINT)
  with pytest.raises(Interrupted, match="saved at step 7"):
    run(program, make_plan(interrupting(7)), tmp_path / "parts", display)
  assert signal.getsignal(signal.SIGINT) is before
  parts, _ = run(program, make_plan(failing(7, KilledError)), tmp_path / "parts", display)
  assert_same(whole, parts)


def test_training_for_twice_as_long_goes_on_exactly(program, display, tmp_path):
  whole, _ = run(program, make_plan(), tmp_path / "whole", display)
  run(program, make_plan(steps=STEPS // 2), tmp_path / "parts", display)
  assert_same(whole, run(program, make_plan(), tmp_path / "parts", display)[0])


def test_a_finished_run_is_read_and_not_repeated(program, display, tmp_path):
  whole, rows = run(program, make_plan(), tmp_path / "run", display)
  again, read = run(program, make_plan(failing(1, KilledError)), tmp_path / "run", display)
  assert_same(whole, again)
  assert read == rows


def test_a_loss_that_is_not_finite_is_an_error_and_the_checkpoint_stays(
    program, display, tmp_path):
  poisoned = lambda step: batch(step) * (np.nan if step == 7 else 1)  # noqa: E731
  with pytest.raises(UserError, match=r"loss of step 7 is nan.*last good checkpoint"):
    run(program, make_plan(poisoned), tmp_path / "run", display)
  checkpoints = Checkpoints(tmp_path / "run")
  start = program.start(denoiser.Denoiser(4, 16, 1, 4, nnx.Rngs(0)))
  state, _ = checkpoints.restore(start)
  checkpoints.close()
  assert int(state.step) == 5
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_a_half_written_checkpoint_is_passed_over(program, display, tmp_path):
  state, _ = run(program, make_plan(), tmp_path / "run", display)
  newer = tmp_path / "run" / f"{STEPS + 5}.orbax-checkpoint-tmp"
  newer.mkdir()
  (newer / "state").write_text("half")
  assert_same(state, run(program, make_plan(), tmp_path / "run", display)[0])


def test_a_checkpoint_of_another_model_is_refused(program, display, tmp_path):
  run(program, make_plan(), tmp_path / "run", display)
  other = denoiser.Denoiser(4, 32, 1, 4, nnx.Rngs(0))
  wider = Program(other, program.loss, optax.sgd(1e-3))
  with pytest.raises(UserError, match="another model or optimizer"):
    train(wider, wider.start(other), make_plan(), tmp_path / "run", display)


def test_averaged_weights_follow_and_lag(program, display, tmp_path):
  state, _ = run(program, make_plan(), tmp_path / "run", display)
  start = program.start(denoiser.Denoiser(4, 16, 1, 4, nnx.Rngs(0)))
  distance = lambda a, b: float(optax.tree.norm(jax.tree.map(lambda x, y: x - y, a, b)))  # noqa: E731
  way = distance(state.params, start.params)
  assert 0 < distance(state.average, state.params) < way


def test_the_probe_sees_every_regularizer(program, display, tmp_path):
  state, _ = run(program, make_plan(), tmp_path / "run", display)
  row = Probe(program)(state, batch(1), jax.random.key(0))
  for name in ("adaptive gradient", "edges", "high frequency", "detail", "background"):
    assert 0 <= row[f"touched {name}"] <= 1
    assert 0 <= row[f"change {name}"] < 1
  assert row["touched detail"] > 0.5
  assert 0 < row["alignment"] <= 1
