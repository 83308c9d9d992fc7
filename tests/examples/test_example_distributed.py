"""examples/distributed.py: one process and two, other meshes, and what a kill does."""

import numpy as np
import pytest

from tests.examples import processes


def check_same(first, second, tolerance):
  assert first.keys() == second.keys()
  for name, x in first.items():
    np.testing.assert_allclose(second[name], x, 0, tolerance, err_msg=name)


def test_two_processes_and_a_killed_run_end_as_one_process(tmp_path):
  """The second kill comes in the middle of a save."""
  cache, words = tmp_path / "cache", ("--steps", 12, "--save-every", 2)
  one, two, killed = (tmp_path / name for name in ("one", "two", "killed"))
  processes.finish(one, cache, *words)
  whole = processes.result(one)
  assert min(np.abs(x).max() for x in whole.values()) > 1e-3
  text = processes.finish(two, cache, *words, "--num-processes", 2)
  assert "2 processes, mesh {'data': 8, 'model': 1}, from step 0" in text
  check_same(whole, processes.result(two), 1e-5)
  tally = processes.kill_again_and_again(killed, cache, 2, *words)
  assert tally == (2, 1, 2, 0)
  assert processes.started_from(processes.finish(killed, cache, *words)) > 0
  check_same(whole, processes.result(killed), 0.0)


@pytest.mark.slow
def test_twenty_kills(tmp_path):
  cache, words = tmp_path / "cache", ("--steps", 150, "--save-every", 2)
  processes.finish(tmp_path / "whole", cache, *words)
  tally = processes.kill_again_and_again(tmp_path / "killed", cache, 20, *words)
  print(tally)
  processes.finish(tmp_path / "killed", cache, *words)
  assert tally.lost == 0
  assert tally.in_a_save >= 5
  check_same(processes.result(tmp_path / "whole"), processes.result(tmp_path / "killed"), 0.0)


@pytest.mark.slow
def test_from_two_processes_to_one_and_back_on_other_meshes(tmp_path):
  cache = tmp_path / "cache"
  processes.finish(tmp_path / "one", cache, "--steps", 12, "--save-every", 2)
  processes.finish(tmp_path / "two", cache, "--steps", 6, "--save-every", 2, "--num-processes", 2)
  text = processes.finish(tmp_path / "two", cache, "--steps", 9, "--save-every", 3, "--mesh", "4x2")
  assert "1 processes, mesh {'data': 4, 'model': 2}, from step 6" in text
  text = processes.finish(tmp_path / "two", cache, "--steps", 12, "--save-every", 2,
                          "--num-processes", 2, "--mesh", "2x4")
  assert "from step 9" in text
  check_same(processes.result(tmp_path / "one"), processes.result(tmp_path / "two"), 1e-5)


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(tmp_path):
  processes.finish(tmp_path / "a", tmp_path / "cache", "--steps", 2, "--save-every", 2)
  with pytest.raises(AssertionError, match=r"does not fit(?s:.*)leaves of another shape: .*embed"):
    processes.finish(tmp_path / "a", tmp_path / "cache", "--steps", 4, "--width", 64)
