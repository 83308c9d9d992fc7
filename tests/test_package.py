"""The package as a whole: public names, imports, docstrings, direction of dependencies."""

import ast
import graphlib
import inspect
import pathlib
import re
import subprocess
import sys

import jax
import pytest

import hina_optax as ho

ROOT = pathlib.Path(ho.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
FACTORIES = [
  n for n in ho.__all__
  if callable(getattr(ho, n)) and not n[0].isupper() and not n.endswith(("_preset", "_axes"))
]
# They compute nothing that a formula would say.
REPORTS = {
  "abstract_state", "get_optimization_info", "get_memory_stats", "optimize_for_vram", "pack_state",
  "packed_shapes", "unpack_state",
}
# Lower may not import higher.
LAYERS = [
  {"base"},
  {"grouped", "options"},
  {"regularizers", "core", "modulators", "memory"},
  {"compat"},
  {"alias"},
  {"info", "planning", "checkpoints"},
  {"cli", "torch_bridge"},
]
# The words by which a program asks for the platform, or is made for one.
PLATFORMS = ("platform_dependent", "default_backend", "inlineable")


def layer(module):
  name = module.split(".")[1]
  return next(i for i, names in enumerate(LAYERS) if name in names)


def imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom):
      yield from ([f"{node.module}.{a.name}" for a in node.names] if node.module == "hina_optax"
                  else [node.module])
    elif isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)


def name_of(path):
  """The name by which the module at this path is imported."""
  parts = ("hina_optax", *path.relative_to(ROOT).with_suffix("").parts)
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_public_names_are_all_and_nothing_else():
  bound = {n for n in vars(ho) if not n.startswith("_")}
  modules = {p.stem for p in ROOT.iterdir()}
  assert bound - modules == set(ho.__all__)
  assert list(ho.__all__) == sorted(ho.__all__)


def test_public_names_are_in_the_readme():
  readme = (ROOT.parent / "README.md").read_text()
  assert [n for n in ho.__all__ if f"`{n}" not in readme] == []


def test_the_readme_s_quick_start_runs():
  readme = (ROOT.parent / "README.md").read_text()
  start, chain = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[:2]
  with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix dtypes
    scope: dict = {}
    exec(start + chain, scope)
  assert scope["tx"].init(scope["params"])


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_bridge_knows_torch_and_none_knows_flax(path):
  known = {name.split(".")[0] for name in imports(path)} & {"torch", "flax"}
  assert known <= ({"torch"} if path.parent.name == "torch_bridge" else set())


def test_import_needs_neither_torch_nor_flax():
  code = "import sys, hina_optax; assert not {'torch', 'flax'} & set(sys.modules)"
  subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_dependencies_point_one_way_and_nothing_private_is_used(path):
  relative = path.relative_to(ROOT)
  for name in imports(path):
    assert "_src" not in name.split("."), f"{relative} imports {name}"
    if name.startswith("hina_optax.") and relative.stem != "__init__":
      own = relative.parts[0].removesuffix(".py")
      other = name.split(".")[1]
      mine, theirs = layer(f"hina_optax.{own}"), layer(name)
      assert own == other or theirs < mine, f"{relative} imports {name}"


def test_no_module_imports_itself_in_a_circle():
  modules = {name_of(path): path for path in SOURCES}
  graph = {}
  for name, path in modules.items():
    given = set()
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.ImportFrom) and node.module:
        below = [f"{node.module}.{a.name}" for a in node.names]
        given.update(x if x in modules else node.module for x in below)
      elif isinstance(node, ast.Import):
        given.update(a.name for a in node.names)
    graph[name] = given & set(modules)
  assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(modules)


def test_the_root_holds_nothing_private():
  assert [p.name for p in ROOT.glob("_*.py")] == ["__init__.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_are_small(path):
  assert len(path.read_text().splitlines()) <= 500


def test_one_file_names_a_platform():
  found = [str(p.relative_to(ROOT)) for p in SOURCES if any(w in p.read_text() for w in PLATFORMS)]
  assert found == ["grouped/xla_cpu.py"]


@pytest.mark.parametrize("name", FACTORIES)
def test_public_docstrings_are_complete(name):
  factory = getattr(ho, name)
  doc, arguments = factory.__doc__, inspect.signature(factory).parameters
  for part in ("Args:" if arguments else "", "Returns:", "Raises:", "Example:", ">>> "):
    assert part in doc, f"{name} lacks {part}"
  if name not in REPORTS:
    assert "References:" in doc
    assert "..math" in doc.replace(" ", "")
    assert "bytes" in doc or "without state" in doc or "nothing beside" in doc
