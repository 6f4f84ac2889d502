"""The rules of the house, read from the source: who may import what, who may name what."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "igpt_jax"

# Rooms by floor: a room imports from lower floors, and from its own floor only without a circle.
FLOORS = {
  "cpu_compiler": 0,
  "errors": 0,
  "files": 0,
  "history": 0,
  "watchdog": 0,
  "config": 1,
  "parallel": 1,
  "model": 2,
  "data": 2,
  "reporting": 2,
  "training": 3,
  "pretrained": 3,
  "checkpoint": 4,
  "prediction": 4,
  "timing": 4,
  "config.read": 5,
  "workspace": 6,
  "runner": 7,
  "sampling": 7,
  "probing": 8,
  "jobs": 9,
  "main": 10,
  "demo": 10,
  "notebook": 10,
}

# A library -> the only files or folders that may import it.
ONLY_IN = {
  "orbax": ["checkpoint/"],
  "tensorflow_datasets": ["data/"],
  "grain": ["data/"],
  "ml_collections": ["main.py", "config/"],
  "tensorflow": ["data/tfds_prepare.py"],
  "torch": ["pretrained/"],
  "transformers": [],
  "pickle": [],
  "tensorboardX": ["reporting/metrics.py"],
  "wandb": ["reporting/metrics.py"],
  "starlette": ["demo/"],
  "uvicorn": ["demo/"],
  "IPython": ["notebook.py"],
  "onnxruntime": ["jobs/quality.py"],
}

# Modules that stand above the rest of their room: what settings are declared as is ground floor, reading
# them knows the rooms.
UPSTAIRS = {"config.read": "config.read", "config.choices": "config.read"}

MESH_AXES = {"fsdp", "tensor"}

FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in zip(NAMES, FILES, strict=True)}


def imports_of(source: str, package: str = "") -> set[str]:
  """Dotted names of all that a module imports, lazily or not; `from a import b` is "a.b".

  Args:
    source: of the module.
    package: dotted name of the package it is in, to resolve relative imports.
  """
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parents, base] if base else parents)
      found |= {f"{base}.{alias.name}" for alias in node.names}
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
      called = (
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
      )
      if called in ("import_module", "__import__"):
        found.add(str(node.args[0].value))
  return found


def package_of(name: str) -> str:
  return ".".join(["igpt_jax", *pathlib.PurePath(name).parts[:-1]])


def room_of(name: str) -> str:
  parts = pathlib.PurePath(name.removesuffix(".py")).parts
  return UPSTAIRS.get(".".join(parts[:2]), parts[0])


def rooms_imported(name: str, source: str) -> set[str]:
  """The rooms of igpt_jax that a module imports, other than its own."""
  modules = {each for each in imports_of(source, package_of(name)) if each.startswith("igpt_jax.")}
  rooms = {room_of(module.removeprefix("igpt_jax.").replace(".", "/")) for module in modules}
  rooms -= {"__version__"}
  return rooms - {room_of(name)}


def string_constants(source: str) -> set[str]:
  return {
    node.value
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
  }


def test_every_room_has_its_floor():
  assert {room_of(name) for name in NAMES} - {"__init__"} <= FLOORS.keys()
  assert rooms_imported("__init__.py", SOURCES["__init__.py"]) == {"cpu_compiler"}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "__init__.py"])
def test_imports_point_down(name):
  for room in rooms_imported(name, SOURCES[name]):
    assert FLOORS[room] <= FLOORS[room_of(name)], f"{name} imports {room}, which is above it"


def test_rooms_of_one_floor_import_without_a_circle():
  edges = {room: set() for room in FLOORS}
  for name in NAMES:
    if name != "__init__.py":
      edges[room_of(name)] |= rooms_imported(name, SOURCES[name])
  left = dict(edges)
  while left:
    free = [room for room, imported in left.items() if not imported & left.keys()]
    assert free, f"a circle of imports among {sorted(left)}"
    for room in free:
      del left[room]


def test_settings_are_read_by_main_alone():
  """Everyone else is handed them."""
  reading = {
    name for name in NAMES if any("config.read" in each for each in imports_of(SOURCES[name]))
  }
  assert reading == {"main.py"}


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_are_kept_in_their_room(library):
  allowed = tuple(ONLY_IN[library])
  for name in NAMES:
    roots = {module.split(".")[0] for module in imports_of(SOURCES[name], package_of(name))}
    if library in roots:
      assert name.startswith(allowed) if allowed else False, f"{name} imports {library}"


def test_only_main_reads_flags():
  for name in NAMES:
    if name in ("main.py", "data/pipeline.py"):  # grain wants absl's flags parsed, whoever runs it
      continue
    assert "absl.flags" not in imports_of(SOURCES[name], package_of(name)), name


def test_only_the_sharding_table_names_mesh_axes():
  assert string_constants(SOURCES["parallel/sharding.py"]) >= MESH_AXES
  for name in NAMES:
    if name != "parallel/sharding.py":
      assert not string_constants(SOURCES[name]) & MESH_AXES, name


def test_nothing_loads_pickles():
  for name in NAMES:
    for node in ast.walk(ast.parse(SOURCES[name])):
      if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "numpy.load"):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert keywords.get("allow_pickle") == "False", f"{name}:{node.lineno}"


@pytest.mark.parametrize(
  "path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.name
)
def test_configs_import_the_config_alone(path):
  """So that they load from any working directory, and say everything themselves."""
  ours = {
    module for module in imports_of(path.read_text()) if not module.startswith("ml_collections")
  }
  assert {module.rpartition(".")[0] for module in ours} == {"igpt_jax.config"}


def test_every_module_says_what_it_is_for():
  for name in NAMES:
    if SOURCES[name].strip():
      assert ast.get_docstring(ast.parse(SOURCES[name])), name


def test_the_rules_can_be_broken():
  """What the tests above read is found where it hides: in functions, aliases, relative imports."""
  source = """
def f():
  import grain.python as g
  from igpt_jax import checkpoint, errors
  from ..jobs import pretrain
  from . import image_gpt
  importlib.import_module("tensorflow.io")
  return mesh.shape["fsdp"]
"""
  assert imports_of(source, "igpt_jax.model") == {
    "grain.python",
    "igpt_jax.checkpoint",
    "igpt_jax.errors",
    "igpt_jax.jobs.pretrain",
    "igpt_jax.model.image_gpt",
    "tensorflow.io",
  }
  assert rooms_imported("model/decoding.py", source) == {"checkpoint", "errors", "jobs"}
  assert "fsdp" in string_constants(source)


def test_importing_touches_no_device():
  """Nor does it import what is optional, or what only one job needs."""
  modules = [
    ".".join(["igpt_jax", *pathlib.PurePath(name.removesuffix(".py")).parts])
    for name in NAMES
    if not name.endswith("__init__.py")
  ]
  program = f"""
import importlib, sys
for name in {modules}:
  importlib.import_module(name)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "importing initialised a backend"
heavy = {{"tensorflow", "torch", "wandb", "tensorboardX", "transformers", "starlette", "uvicorn", "onnxruntime"}} & sys.modules.keys()
assert not heavy, heavy
import jax
jax.devices()
assert xla_bridge.backends_are_initialized()
print(len(sys.modules))
"""
  done = subprocess.run(
    [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
