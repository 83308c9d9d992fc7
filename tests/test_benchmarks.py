"""The scripts of benchmarks/: what they count, and that they run."""

import functools
import importlib
import json
import pathlib
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hina_optax import registry

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"
NAMES = ("trees", "measure", "contenders", "report", "torch_rows", "speed", "growth")
HLO = """HloModule jit_step, is_scheduled=true

%called (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  %a = f32[2]{0} fusion(%p), kind=kLoop, calls=%f
  ROOT %b = f32[2]{0} copy(%a)
}

ENTRY %main (x: f32[2], y: f32[2]) -> (f32[2], f32[2]) {
  %x = f32[2]{0} parameter(0), metadata={op_name="x"}
  %y = f32[2]{0} parameter(1)
  %c = f32[2]{0} call(%x), to_apply=%called
  %w = (f32[2]{0}, /*index=1*/f32[2]{0}) while(%t), condition=%q, body=%r
  %g = f32[2]{0} get-tuple-element(%w), index=0
  %s = f32[2]{0} copy-start(%g)
  %d = f32[2]{0} copy-done(%s)
  ROOT %z = (f32[2]{0}, f32[2]{0}) tuple(%c, %d)
}
"""


@pytest.fixture(scope="module")
def scripts():
  """The scripts as modules, which import each other by name."""
  sys.path.insert(0, str(FOLDER))
  try:
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
  finally:
    sys.path.remove(str(FOLDER))


@pytest.fixture(autouse=True)
def ordinary_promotion():
  """As where the scripts are called: `optax.adamw` needs it."""
  with jax.numpy_dtype_promotion("standard"):
    yield


def sizes(tree):
  leaves = jax.tree.leaves(tree)
  return len(leaves), sum(x.size for x in leaves)


@pytest.mark.parametrize(("name", "leaves", "parameters", "tolerance"), [
  ("lora420", 420, 7.4e6, 0.01), ("lora_sdxl", 1444, 42.6e6, 0.01), ("dense17m", None, 17e6, 0.03),
  ("dit130m", None, 130e6, 0.03), ("sdxl", 1680, 2567463684, 0),
])
def test_trees_have_the_sizes_they_are_named_for(scripts, name, leaves, parameters, tolerance):
  count, total = sizes(scripts.speed.TREES[name]())
  assert leaves in (None, count)
  assert total == pytest.approx(parameters, rel=tolerance)


def test_materialised_trees_have_the_shapes_and_are_reproducible(scripts):
  shapes = scripts.trees.equal_leaves(3, (2, 5))
  first, again, other = (scripts.trees.materialise(shapes, seed) for seed in (0, 0, 1))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), first) == jax.tree.map(
    lambda x: (x.shape, x.dtype), shapes)
  np.testing.assert_array_equal(first["w2"], again["w2"])
  assert not np.array_equal(first["w2"], other["w2"])


def test_minimal_bytes_of_adamw(scripts):
  program = scripts.measure.compile_step(optax.adamw(1e-3), {"w": jnp.ones((4, 6))})
  moments, count = 2 * 24 * 4, 4
  assert program.state_bytes == moments + count
  # Gradients and parameters in, parameters out; state in and out.
  assert program.minimal_bytes == 3 * 24 * 4 + 2 * (moments + count)


def test_minimal_bytes_leave_out_what_is_handed_through(scripts):
  trace = jax.jit(lambda kept, changed: (kept, changed + 1)).trace(
    jnp.ones(5, jnp.float32), jnp.ones(3, jnp.float32))
  assert scripts.measure.minimal_bytes(trace.jaxpr) == (5 + 3 + 3) * 4


def test_kernels_are_what_the_entry_and_its_calls_do(scripts):
  # A fusion and a copy in the call, the loop, one asynchronous copy.
  assert scripts.measure.count_kernels(HLO) == 4


def test_each_part_switches_on_one_option_of_the_core(scripts):
  made = {name: make() for name, make in scripts.contenders.contenders().items()}
  core = made["core"].options
  switches = [x for x in registry.switches() if x not in scripts.contenders.SKIPPED_SWITCHES]
  assert len(switches) > 10
  for switch in switches:
    own = made[f"core + {switch}"].options
    assert {k for k in core if own[k] != core[k]} == {switch}
  assert all(made["everything"].options[switch] for switch in switches)


def test_rounds_alternate_and_warm_up(scripts):
  calls = []

  def run(name):
    return SimpleNamespace(run_steps=lambda steps: calls.append((name, steps)) or 0.04)

  first, second = scripts.measure.alternate([run("a"), run("b")], seconds=0, block_s=0.1)
  assert len(first) == len(second) == 5
  assert calls[-4:] == [("a", 2), ("b", 2)] * 2
  assert calls[0] == ("a", 3)


def test_report_has_a_row_for_each_result(scripts):
  row = {"name": "first", "trace_s": 1.0, "compile_s": 2.0, "state_bytes": 80, "kernels": 7,
         "minimal_bytes": 2_000_000, "gb_s": 3.0, "temporary_bytes": None, "ratio": 1.25,
         "step_ms": {"median": 4.0, "q1": 3.0, "q3": 5.0},
         "adamw_ms": {"median": 3.2, "q1": 3.0, "q3": 3.5}}
  rows = [row, {"name": "second", "skipped": "too slow"}, {"name": "third", "trace_s": 9.0}]
  tree = {"tree": "lora420", "leaves": 420, "parameters": 10, "rows": rows}
  text = scripts.report.render({"environment": scripts.measure.environment(), "trees": [tree]})
  lines = [x for x in text.splitlines() if x.startswith("| ")]
  assert [x.split(" | ")[0] for x in lines] == ["| optimizer", "| first", "| second", "| third"]
  assert lines[1].split(" | ")[1:8] == [
    "1.00", "2.00", "4.00", "3.00 to 5.00", "3.20", "1.25", "8.00"]
  assert "skipped: too slow" in lines[2]
  assert {x.count("|") for x in lines} == {len(scripts.report.COLUMNS) + 1}
  assert jax.__version__ in text


def test_speed_measures_adamw(scripts, tmp_path, monkeypatch, capsys):
  few = functools.partial(scripts.measure.copy_bandwidth, 1 << 10)
  monkeypatch.setattr(scripts.measure, "copy_bandwidth", few)
  output = tmp_path / "new" / "speed.json"
  scripts.speed.main(["--tree", "tiny", "--only", "^nothing", "--seconds", "0", "--output",
                      str(output)])
  result = json.loads(output.read_text())
  [tree] = result["trees"]
  assert (tree["leaves"], tree["parameters"]) == (3, 96)
  assert [r["name"] for r in tree["rows"]] == ["optax.adamw", "optax.adamw, again"]
  for row in tree["rows"]:
    assert row["state_bytes"] == 2 * 96 * 4 + 4
    assert row["kernels"] > 0
    assert row["step_ms"]["q1"] <= row["step_ms"]["median"] <= row["step_ms"]["q3"]
  assert result["copy_gb_s"] > 0
  table = output.with_suffix(".md").read_text()
  assert table == scripts.report.render(result)
  assert "optax.adamw, again" in capsys.readouterr().out


def test_large_trees_skip_rows_without_batching_and_say_so(scripts, monkeypatch, capsys):
  monkeypatch.setattr(scripts.measure, "copy_bandwidth", lambda: 1.0)
  scripts.speed.main(["--tree", "tiny", "--only", "everything, without", "--compile-only",
                      "--most-unbatched", "2"])
  assert "| everything, without batching | skipped: more than 2 leaves |" in capsys.readouterr().out


def test_speed_refuses_a_reference_without_torch(scripts, monkeypatch, capsys):
  monkeypatch.setattr(scripts.torch_rows, "is_installed", lambda: False)
  with pytest.raises(SystemExit):
    scripts.speed.main(["--reference", "hina_adaptive.py"])
  assert "pip install torch" in capsys.readouterr().err


def test_growth_skips_what_comes_after_a_slow_row(scripts, monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(scripts.growth, "NAMES", ("optax.adamw",))
  scripts.growth.main(["--leaves", "2", "1", "--parameters", "--seconds", "0", "--limit-s", "0",
                       "--output", str(tmp_path / "g.json"), "--plot", str(tmp_path / "g.png")])
  rows = json.loads((tmp_path / "g.json").read_text())["rows"]
  assert [(r["size"], "skipped" in r) for r in rows] == [(1, False), (2, True)]
  assert "skipped: 1 took" in capsys.readouterr().out
  assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
