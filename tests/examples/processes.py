"""Runs `examples/distributed.py` in processes of its own, and kills some of them."""

import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
# A short program: what is tested is not the optimizer's parts.
OPTIONS = [
  word for name in (
    "edge_suppression", "spatial_awareness", "background_regularization", "use_agr", "use_spd",
    "use_dynamic_adaptation", "use_adopt_stability")
  for word in ("--optimizer-arg", f"{name}=False")
]


def command(folder: pathlib.Path, *words: object) -> list[str]:
  return [sys.executable, str(ROOT / "examples" / "distributed.py"), "--output", str(folder),
          "--depth", "1", "--width", "32", *OPTIONS, *map(str, words)]


def environment(cache: pathlib.Path) -> dict[str, str]:
  return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore",
          "XLA_FLAGS": "--xla_backend_optimization_level=0", "TF_CPP_MIN_LOG_LEVEL": "3",
          "JAX_COMPILATION_CACHE_DIR": str(cache),
          "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def finish(folder: pathlib.Path, cache: pathlib.Path, *words: object) -> str:
  """Runs to the end; returns what was printed."""
  done = subprocess.run(command(folder, *words), env=environment(cache), text=True,
                        capture_output=True, timeout=500)
  assert done.returncode == 0, done.stderr
  return done.stdout


def result(folder: pathlib.Path) -> dict[str, np.ndarray]:
  return dict(np.load(folder / "final.npz"))


def started_from(text: str) -> int:
  return int(re.findall(r"from step (\d+)", text)[-1])


class Tally(NamedTuple):
  """What became of kills: those survived lost no step that had been saved."""

  tried: int
  in_a_save: int
  survived: int
  lost: int


def kill_again_and_again(folder: pathlib.Path, cache: pathlib.Path, count: int, *words: object,
                         seed: int = 0) -> Tally:
  """Starts, kills after a random while, `count` times; each second time in the middle of a save."""
  rng, survived, in_a_save = random.Random(seed), 0, 0
  for i in range(count):
    before = last_whole(folder)
    process = subprocess.Popen(command(folder, *words), env=environment(cache), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    line = process.stdout.readline()
    survived += bool(line) and started_from(line) == before
    if i % 2:
      in_a_save += wait_for_a_save(folder, rng.random() * 0.02)
    else:
      time.sleep(rng.random() * 2.0)
    assert process.poll() is None, "it ended before it was killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
  return Tally(count, in_a_save, survived, count - survived)


def last_whole(folder: pathlib.Path) -> int:
  """The step of the last checkpoint that has its final name; 0 if there is none."""
  names = [p.name for p in (folder / "checkpoints").glob("*")]
  return max((int(name) for name in names if name.isdigit()), default=0)


def wait_for_a_save(folder: pathlib.Path, longer: float) -> bool:
  """Waits until there is a checkpoint and another is being written, and a little longer."""
  end = time.monotonic() + 30
  while time.monotonic() < end:
    if not last_whole(folder):
      continue
    if any("tmp" in p.name for p in (folder / "checkpoints").glob("*")):
      time.sleep(longer)
      return any("tmp" in p.name for p in (folder / "checkpoints").glob("*"))
    time.sleep(0.002)
  return False
