"""`hina-optax plan`: reads headers of real files, plans, and says what is wrong in one line."""

import json

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from hina_optax import cli
from hina_optax.checkpoints import headers

WEIGHTS = {
  "block.attn.to_q.weight": np.zeros((64, 32), np.float32),
  "block.attn.to_out.weight": np.zeros((32, 64), np.float16),
  "block.conv.weight": np.zeros((16, 8, 3, 3), np.float32),
  "block.position": np.zeros((4,), np.int64),
}
TRAINED = 64 * 32 + 32 * 64 + 16 * 8 * 9


@pytest.fixture(params=["safetensors", "npz", "orbax"])
def checkpoint(request, tmp_path):
  path = tmp_path / f"model.{request.param}"
  if request.param == "safetensors":
    safetensors.numpy.save_file(WEIGHTS, path)
  elif request.param == "npz":
    np.savez(path, **WEIGHTS)
  else:
    with ocp.StandardCheckpointer() as checkpointer:
      arrays = {k: jnp.asarray(v) for k, v in WEIGHTS.items() if v.dtype != np.int64}
      checkpointer.save(path, arrays)
  return path


def run(capsys, *arguments):
  status = cli.main(["plan", *map(str, arguments)])
  captured = capsys.readouterr()
  return status, captured.out, captured.err


@pytest.mark.filterwarnings("ignore")  # orbax's own
def test_reads_every_kind_of_file(checkpoint):
  shapes = headers.read_shapes(checkpoint)
  assert {k: (x.shape, x.dtype.name) for k, x in shapes.items()} == {
    k: (v.shape, v.dtype.name) for k, v in WEIGHTS.items() if v.dtype != np.int64
  }


@pytest.fixture
def model(tmp_path):
  safetensors.numpy.save_file(WEIGHTS, tmp_path / "model.safetensors")
  return tmp_path / "model.safetensors"


def test_plans_full_training(capsys, model):
  status, out, _ = run(capsys, model, "--json")
  plan = json.loads(out)
  rows = {row["group"]: row["bytes"] for row in plan["rows"]}
  assert status == 0
  assert rows["parameters"] == rows["gradients"] == rows["mu"] == 4 * TRAINED


def test_plans_a_lora_beside_the_frozen_model(capsys, model):
  status, out, _ = run(capsys, model, "--lora-rank", 4, "--preset", "lora", "--json",
                       "--vram-budget-gb", 1)
  plan = json.loads(out)
  rows = {row["group"]: row["bytes"] for row in plan["rows"]}
  assert status == 0
  assert rows["parameters"] == 4 * 2 * 4 * (64 + 32)
  assert plan["reserve_bytes"] == 4 * (64 * 32 + 16 * 8 * 9) + 2 * 32 * 64
  _, out, _ = run(capsys, model, "--lora-rank", 4, "--target", "conv", "--json")
  rows = {row["group"]: row["bytes"] for row in json.loads(out)["rows"]}
  assert rows["parameters"] == 4 * (4 * 8 * 9 + 16 * 4)


def test_options_reach_the_plan(capsys, model):
  _, out, _ = run(capsys, model, "--json", "--optimizer-arg", "reduce_precision=True",
                  "--optimizer-arg", "background_regularization_mode=fast")
  rows = {(row["group"], row["dtype"]) for row in json.loads(out)["rows"]}
  assert ("mu", "bfloat16") in rows


def test_a_budget_that_is_too_small_says_so_and_fails(capsys, model):
  status, out, _ = run(capsys, model, "--vram-budget-gb", 1e-5)
  assert status == 1
  assert "does not fit" in out


@pytest.mark.parametrize(
  ("arguments", "words"),
  [(["--vram-budget-gb", "0"], "vram_budget_gb"),
   (["--lora-rank", "0"], "--lora-rank"),
   (["--lora-rank", "4", "--target", "nothing"], "block.attn"),
   (["--optimizer-arg", "use_tam"], "KEY=VALUE"),
   (["--optimizer-arg", "use_tan=True"], "use_tam")],
)
def test_wrong_arguments_are_one_line(capsys, model, arguments, words):
  status, out, err = run(capsys, model, *arguments)
  assert (status, out) == (2, "")
  assert words in err
  assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["model.safetensors", "model.npz", "folder"])
def test_what_is_no_checkpoint_is_named(capsys, tmp_path, name):
  path = tmp_path / name
  status, _, err = run(capsys, path)
  assert (status, "no checkpoint at" in err) == (2, True)
  if name == "folder":
    path.mkdir()
  else:
    path.write_bytes(b"this is not a checkpoint")
  status, _, err = run(capsys, path)
  assert status == 2
  assert str(path) in err
  assert "is not a checkpoint that can be read" in err
