"""The command as a user calls it."""

import html.parser
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from latent_diffusion import optimizers, options
from latent_diffusion.errors import UserError
from latent_diffusion.workspace import Workspace

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "train_latent_diffusion.py"


def command(*words):
  return [sys.executable, str(SCRIPT), "--smoke", *map(str, words)]


def call(*words):
  return subprocess.run(command(*words), capture_output=True, text=True, timeout=600)


def parameters(folder):
  """Every array of every final checkpoint, by file."""
  import orbax.checkpoint as ocp
  found = {}
  for state in sorted(folder.rglob("state")):
    restored = ocp.StandardCheckpointer().restore(state.absolute())
    found |= {f"{state.relative_to(folder)}/{k}": np.asarray(v) for k, v in restored.items()}
  return found


class Links(html.parser.HTMLParser):
  """Collects what a page would load, and the words it shows."""

  def __init__(self):
    super().__init__()
    self.loads, self.headings, self.inside = [], [], False

  def handle_starttag(self, tag, attributes):
    self.loads += [v for k, v in attributes if k in ("src", "href") and tag in ("img", "script",
                                                                                "link")]
    self.inside = tag == "h2"

  def handle_data(self, data):
    if self.inside:
      self.headings.append(data)
    self.inside = False


def test_help_explains_every_option():
  parser = options.parser()
  actions = [action for action in parser._actions if action.option_strings != ["-h", "--help"]]
  assert all(action.help for action in actions)
  names = {name for action in actions for name in action.option_strings}
  assert {"--images", "--latents", "--optimizer", "--preset", "--optimizer-arg", "--steps",
          "--seed", "--output", "--smoke", "--resume"} <= names


@pytest.mark.parametrize("words", [
  ["--steps", "0"], ["--learning-rate", "nan"], ["--learning-rate", "0"], ["--width", "30"],
  ["--images", "a", "--latents", "b"], ["--preset", "none"], ["--seed", "-1"]])
def test_impossible_options_are_refused(words, capsys):
  with pytest.raises(SystemExit):
    options.parse(words)
  assert "error" in capsys.readouterr().err


def test_optimizer_arguments_reach_the_optimizer():
  args = options.parse(["--optimizer-arg", "edge_penalty=0.2", "--optimizer-arg",
                        "background_regularization_mode=fast", "--optimizer-arg",
                        "betas=(0.8, 0.9)", "--preset", "large"])
  found = optimizers.chosen(args, 1e-3, args.preset).options
  assert found.edge_penalty == 0.2
  assert found.background_regularization_mode == "fast"
  assert found.betas == (0.8, 0.9)
  assert found.reduce_precision
  assert found.learning_rate == 1e-3


@pytest.mark.parametrize(("pair", "message"), [
  ("edge_penalti=1", "edge_penalty"), ("fourier_feature_loss=True", "removed"),
  ("edge_penalty", "key=value"), ("edge_penalty=-1", "edge_penalty"),
  ("learning_rate=1", "--learning-rate")])
def test_wrong_optimizer_arguments_are_explained(pair, message):
  args = options.parse(["--optimizer-arg", pair])
  with pytest.raises(UserError, match=message):
    optimizers.chosen(args, 1e-3, None)


def test_an_empty_folder_is_an_error_without_a_traceback(tmp_path):
  done = call("--images", tmp_path, "--output", tmp_path / "out")
  assert done.returncode == 1
  assert done.stderr.startswith("error: --images: no usable image")


def test_quickstart_runs():
  done = subprocess.run([sys.executable, str(EXAMPLES / "quickstart.py")], capture_output=True,
                        text=True, timeout=300)
  losses = [float(x) for x in re.findall(r"loss (\S+)", done.stdout)]
  assert len(losses) == 2
  assert max(losses) < 0.2


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """One whole smoke run."""
  folder = tmp_path_factory.mktemp("whole")
  return folder, call("--output", folder)


def test_the_whole_command_ends_with_the_report(finished):
  folder, done = finished
  assert done.returncode == 0, done.stderr
  assert "Traceback" not in done.stderr
  assert "Warning" not in done.stderr
  assert done.stdout.strip().splitlines()[-1] == str(folder / "report.html")
  page = Links()
  page.feed((folder / "report.html").read_text())
  assert all(target.startswith("data:") for target in page.loads)
  assert len(page.loads) > 5
  assert {"Samples", "Training the base", "Autoencoder", "Staged enabling, and AdamW",
          "LoRA on one subject", "What the optimizer did", "Memory of the optimizer", "Data",
          "The same again"} <= set(page.headings)
  assert list((folder / "tensorboard").rglob("events.out.tfevents*"))
  assert (folder / "samples.png").stat().st_size > 1000


def test_resuming_takes_the_same_options_alone(tmp_path):
  parse = lambda *words: options.parse(["--output", str(tmp_path), *words])  # noqa: E731
  with pytest.raises(UserError, match="nothing to go on with"):
    Workspace(parse("--resume"))
  Workspace(parse())
  Workspace(parse("--resume"))
  with pytest.raises(UserError, match="--seed was 0, is 3"):
    Workspace(parse("--resume", "--seed", "3"))


def test_starting_anew_sets_the_earlier_runs_aside(tmp_path):
  args = options.parse(["--output", str(tmp_path)])
  for number in range(3):
    space = Workspace(args)
    assert not space.runs.exists()
    space.runs.mkdir()
    (space.runs / "number").write_text(str(number))
  assert (tmp_path / "previous" / "runs" / "number").read_text() == "1"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_command_that_was_stopped_goes_on_to_the_same_bits(finished, tmp_path, number):
  whole, _ = finished
  process = subprocess.Popen(command("--output", tmp_path), stderr=subprocess.PIPE, text=True)
  deadline = time.monotonic() + 500
  while not (tmp_path / "runs" / "base" / "5").exists() and time.monotonic() < deadline:
    time.sleep(0.05)
  process.send_signal(number)
  _, messages = process.communicate()
  assert process.returncode == (-9 if number == signal.SIGKILL else 130)
  assert number == signal.SIGKILL or "--resume" in messages
  done = call("--output", tmp_path, "--resume")
  assert done.returncode == 0, done.stderr
  expected, found = parameters(whole / "runs"), parameters(tmp_path / "runs")
  last = {name for name in expected if f"base/{options.SMOKE['steps']}/" in name}
  assert last
  assert last <= set(found)
  common = set(expected) & set(found)
  assert all(np.array_equal(expected[name], found[name], equal_nan=True) for name in common)


@pytest.mark.slow
def test_cached_latents_of_mixed_shapes_train(tmp_path):
  folder = tmp_path / "latents"
  folder.mkdir()
  rng = np.random.default_rng(0)
  for i in range(24):
    side = (8, 6)[i % 2]
    key = ("latents", f"latents_8x{side}")[i % 3 == 0]
    np.savez(folder / f"{i}.npz", **{key: rng.normal(size=(4, 8, side)).astype(np.float32)})
  np.savez(folder / "other.npz", latents=np.zeros((16, 8, 8), np.float32))
  done = call("--latents", folder, "--output", tmp_path / "out", "--prediction", "eps",
              "--optimizer", "adamw", "--seeds", "1")
  assert done.returncode == 0, done.stderr
  assert "other.npz: 16 channels where the others have 4" in done.stderr


@pytest.mark.slow
def test_photographs_of_mixed_shapes_train_in_buckets(tmp_path):
  from PIL import Image
  folder = tmp_path / "photos"
  folder.mkdir()
  rng = np.random.default_rng(0)
  for i, size in enumerate([(90, 60), (60, 90), (80, 80)]):
    pixels = rng.integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"photo{i}.jpg")
  (folder / "broken.png").write_bytes(b"no image")
  done = call("--images", folder, "--output", tmp_path / "out", "--preset", "extreme",
              "--seeds", "1", "--schedule", "cosine")
  assert done.returncode == 0, done.stderr
  assert "broken.png" in done.stderr
  assert "broken.png" in (tmp_path / "out" / "report.html").read_text()
