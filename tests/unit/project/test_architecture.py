"""The rules of the house, read from the source: who imports what, who names what, how long things are.

A rule is a function of the package's sources that returns what breaks it. `RULES` has each with sources
that do break it: a rule that found nothing in those would hold whatever was written.
"""

import ast
import collections
import functools
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping

import pytest

from support.paths import ROOT

PACKAGE = ROOT / "igpt_jax"

# Files and rooms from the ground up; of two that fit a file, the longer counts. What is on one floor
# imports each other without a circle, and from lower floors whatever it needs.
FLOORS = (
  (
    "bucket_errors.py",
    "buckets.py",
    "cpu_compiler.py",
    "errors.py",
    "extras.py",
    "files.py",
    "history.py",
    "scratch.py",
    "stopping.py",
    "tokens.py",
    "units.py",
    "watchdog.py",
    "config/",
  ),
  ("parallel/",),
  ("model/", "data/", "reporting/"),
  ("training/", "pretrained/"),
  ("checkpoint/", "prediction/", "timing/"),
  ("config/choices.py", "config/read.py"),
  ("workspace/",),
  ("runner/", "sampling/"),
  ("probing/",),
  ("ablation/", "isoflop/"),
  ("jobs/",),
  ("__main__.py", "api.py", "main.py", "demo/", "notebook.py"),
)
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}

# A library -> the only files or rooms that may import it.
ONLY_IN = {
  "orbax": ("checkpoint/",),
  "tensorflow_datasets": ("data/",),
  "grain": ("data/",),
  "ml_collections": ("main.py", "config/"),
  "tensorflow": ("data/tfds_prepare.py",),
  "torch": ("pretrained/",),
  "huggingface_hub": ("pretrained/hub.py",),
  "transformers": (),
  "pickle": (),
  "tensorboardX": ("reporting/metrics.py",),
  "wandb": ("reporting/metrics.py",),
  "starlette": ("demo/",),
  "uvicorn": ("demo/",),
  "IPython": ("notebook.py",),
  "onnxruntime": ("jobs/quality.py",),
  "gcsfs": ("buckets.py", "bucket_errors.py"),
  "fsspec": ("buckets.py",),
}

MESH_AXES = {"fsdp", "tensor"}
TOKEN_KINDS = {"palette", "channels", "subpixels"}

MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 100
# Kernels' bodies, one function each.
LONG_FUNCTIONS = {"model/attention/tpu_bodies.py": ("forward_body", "backward_body")}

# A docstring that begins with one of these leaves its subject to the reader.
FRAGMENTS = frozenset(
  "after also and as at because before between but by except for from if in into like of on or over "
  "since so than that then through to under unless until upon when while with within without".split()
)

ERRORS = {"UserError", "NoSuchSplit", "NewerFormat", "SaveFailed", "HostsDiffer", "Stopped"}

Sources = Mapping[str, str]

FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in zip(NAMES, FILES, strict=True)}


@functools.cache
def parsed(source: str) -> ast.Module:
  return ast.parse(source)


def imports_of(source: str, package: str = "") -> set[str]:
  """Dotted names of all that a module imports, lazily or not; `from a import b` is "a.b".

  Args:
    source: of the module.
    package: dotted name of the package it is in, to resolve relative imports.
  """
  imported = set()
  for node in ast.walk(parsed(source)):
    if isinstance(node, ast.Import):
      imported |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parents, base] if base else parents)
      imported |= {f"{base}.{alias.name}" for alias in node.names}
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
      called = (
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
      )
      if called in ("import_module", "__import__"):
        imported.add(str(node.args[0].value))
  return imported


@functools.cache
def libraries_of(name: str, source: str) -> frozenset[str]:
  """Dotted names of all that a module of the package imports."""
  package = ".".join(["igpt_jax", *pathlib.PurePath(name).parts[:-1]])
  return frozenset(imports_of(source, package))


def modules_of(name: str, sources: Sources) -> Iterator[str]:
  """Files of the package that a file imports; "" where there is no such file."""
  for dotted in libraries_of(name, sources[name]):
    root, *parts = dotted.split(".")
    if root != "igpt_jax" or parts in ([], ["__version__"]):
      continue
    places = ["/".join(parts), "/".join(parts[:-1])]  # a module, or a name in one
    tried = [place for path in places for place in (f"{path}.py", f"{path}/__init__.py")]
    yield next((place for place in tried if place in sources), "")


def unit_of(name: str) -> str:
  """Entry of `FLOORS` that a file belongs to; "" where nothing fits."""
  return max((unit for unit in FLOOR_OF if name.startswith(unit)), key=len, default="")


def nodes_of(sources: Sources, *kinds: type) -> Iterator[tuple[str, ast.AST]]:
  """Nodes of these kinds in all sources, each with its file's name."""
  for name, source in sources.items():
    yield from ((name, node) for node in ast.walk(parsed(source)) if isinstance(node, kinds))


def importers(sources: Sources, imported: str) -> set[str]:
  """Files that import something of a file or room, other than its own files."""
  return {
    name
    for name in sources
    if not name.startswith(imported)
    and any(module.startswith(imported) for module in modules_of(name, sources))
  }


def message_of(node: ast.expr) -> str | None:
  """The text of a literal or of f-strings, with "{}" for what is filled in; None: it is neither."""
  if isinstance(node, ast.Constant) and isinstance(node.value, str):
    return node.value
  if isinstance(node, ast.JoinedStr):
    return "".join(
      str(getattr(part, "value", "")) if isinstance(part, ast.Constant) else "{}"
      for part in node.values
    )
  if isinstance(node, ast.BinOp):
    return (message_of(node.left) or "{}") + (message_of(node.right) or "{}")
  return None


# --- the rules -------------------------------------------------------------------------------------


def imports_point_down(sources: Sources) -> list[str]:
  """A file imports from its own floor and from lower ones; all that it imports exists."""
  broken = [
    f"{name} has no floor" for name in sources if name != "__init__.py" and not unit_of(name)
  ]
  for name in sources:
    for module in modules_of(name, sources):
      if not module:
        broken.append(f"{name} imports from igpt_jax what isn't there")
      elif name != "__init__.py" and unit_of(module) and unit_of(name):
        if FLOOR_OF[unit_of(module)] > FLOOR_OF[unit_of(name)]:
          broken.append(f"{name} imports {module}, which is above it")
  return broken


def floors_have_no_circle(sources: Sources) -> list[str]:
  """Files and rooms import each other without a circle."""
  left = {unit: set() for unit in FLOOR_OF}
  for name in sources:
    if unit := unit_of(name):
      left[unit] |= {unit_of(module) for module in modules_of(name, sources)} - {unit, ""}
  while free := [unit for unit, imported in left.items() if not imported & left.keys()]:
    for unit in free:
      del left[unit]
  return [f"a circle of imports among {sorted(left)}"] if left else []


def jobs_are_commands(sources: Sources) -> list[str]:
  """No job imports another, and nothing but main and the notebook imports any."""
  others = importers(sources, "jobs/") - {"main.py", "notebook.py"}
  among = [
    f"{name} imports {module}"
    for name in sources
    if name.startswith("jobs/")
    for module in modules_of(name, sources)
    if module.startswith("jobs/") and module not in (name, "jobs/__init__.py")
  ]
  return [f"{name} imports a job" for name in others] + among


def demo_needs_workspace_and_sampling_alone(sources: Sources) -> list[str]:
  """The page takes nothing of the upper floors but what draws: no job, no run, no probe."""
  upper = {unit for unit, floor in FLOOR_OF.items() if floor >= FLOOR_OF["workspace/"]}
  strange = upper - {"demo/", "workspace/", "sampling/"}
  return [
    f"{name} imports {module}"
    for name in sources
    if name.startswith("demo/")
    for module in modules_of(name, sources)
    if unit_of(module) in strange
  ]


def probing_and_sampling_are_strangers(sources: Sources) -> list[str]:
  pairs = (("probing/", "sampling/"), ("sampling/", "probing/"))
  return [
    f"{name} imports from {of}"
    for room, of in pairs
    for name in importers(sources, of)
    if name.startswith(room)
  ]


def prediction_is_for_job_compile(sources: Sources) -> list[str]:
  """Job compile predicts; reading settings checks a topology's name, and preflight tells forecasts."""
  allowed = {"jobs/compile.py", "config/read.py", "workspace/preflight.py"}
  return [f"{name} imports prediction" for name in importers(sources, "prediction/") - allowed]


def settings_are_read_by_main_alone(sources: Sources) -> list[str]:
  """Everything else is handed them."""
  return [f"{name} reads settings" for name in importers(sources, "config/read.py") - {"main.py"}]


def libraries_stay_in_their_room(sources: Sources) -> list[str]:
  return [
    f"{name} imports {dotted}"
    for name, source in sources.items()
    for dotted in libraries_of(name, source)
    if not name.startswith(ONLY_IN.get(dotted.split(".")[0], ("",)))
  ]


def main_alone_reads_flags(sources: Sources) -> list[str]:
  """Grain, too, wants absl's flags parsed, whoever runs it."""
  return [
    name
    for name, source in sources.items()
    if "absl.flags" in libraries_of(name, source) and name not in ("main.py", "data/pipeline.py")
  ]


def the_sharding_table_alone_names_mesh_axes(sources: Sources) -> list[str]:
  return [
    f"{name}:{node.lineno}"
    for name, node in nodes_of(sources, ast.Constant)
    if node.value in MESH_AXES and name not in ("parallel/sharding.py", "parallel/sizes.py")
  ]


def kinds_of_tokens_are_asked_not_compared(sources: Sources) -> list[str]:
  """Rooms ask a TokenSpec what they need to know: a further kind is a matter of tokens.py alone."""
  broken = []
  for name, node in nodes_of(sources, ast.Compare, ast.match_case):
    if isinstance(node, ast.match_case):
      compared = list(ast.walk(node.pattern))
    else:
      # `"palette" in items` looks for a name, not for a kind.
      one = [node.left] if isinstance(node.ops[0], ast.In | ast.NotIn) else []
      compared = [part for side in [node.left, *node.comparators] for part in ast.walk(side)]
      compared = [part for part in compared if part not in one]
    if name != "tokens.py" and any(_is_kind(part) for part in compared):
      broken.append(f"{name}:{getattr(node, 'lineno', '')}: {ast.unparse(node)}")
  return broken


def _is_kind(node: ast.AST) -> bool:
  if isinstance(node, ast.Constant):
    return isinstance(node.value, str) and node.value in TOKEN_KINDS
  return getattr(node, "attr", getattr(node, "id", "")) == "PALETTE"


def nothing_loads_pickles(sources: Sources) -> list[str]:
  broken = []
  for name, node in nodes_of(sources, ast.Call):
    if ast.unparse(node.func) in ("np.load", "numpy.load"):
      keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
      if keywords.get("allow_pickle") != "False":
        broken.append(f"{name}:{node.lineno}")
  return broken


def names_are_given_once(sources: Sources) -> list[str]:
  """No two files of one name in two rooms, and no names that say nothing or nearly the same."""
  paths = [pathlib.PurePath(name) for name in sources if not name.endswith("__.py")]
  counted = collections.Counter(path.stem for path in paths)
  words = counted.keys() | {part for path in paths for part in path.parts[:-1]}
  nameless = words & {"common", "utils", "util", "helpers", "misc"}
  alike = [{"training", "trainer"}] if {"training", "trainer"} <= words else []
  return [stem for stem, count in counted.items() if count > 1] + [*nameless, *map(str, alike)]


def modules_say_what_they_are_for(sources: Sources) -> list[str]:
  return [
    name
    for name, source in sources.items()
    if source.strip() and not ast.get_docstring(parsed(source))
  ]


def docstrings_have_a_subject(sources: Sources) -> list[str]:
  """A docstring begins with a noun phrase or a verb."""
  kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  return [
    f"{name}:{getattr(node, 'lineno', 1)}: {docstring.splitlines()[0]}"
    for name, node in nodes_of(sources, *kinds)
    if (docstring := ast.get_docstring(node))
    and docstring.split()[0].strip(".,:;").lower() in FRAGMENTS
  ]


def files_are_short(sources: Sources) -> list[str]:
  return [
    f"{name}: {len(source.splitlines())} lines"
    for name, source in sources.items()
    if len(source.splitlines()) > MAX_FILE_LINES
  ]


def functions_are_short(sources: Sources) -> list[str]:
  return [
    f"{name}: {node.name} has {lines} lines"
    for name, node in nodes_of(sources, ast.FunctionDef, ast.AsyncFunctionDef)
    if (lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES
    and node.name not in LONG_FUNCTIONS.get(name, ())
  ]


def errors_say_what_to_do(sources: Sources) -> list[str]:
  """A UserError's message begins with a name, and says what was expected or the fix."""
  broken = []
  for name, node in nodes_of(sources, ast.Call):
    if node.args and ast.unparse(node.func).split(".")[-1] in ERRORS:
      message = message_of(node.args[0])
      if message is None:
        broken.append(f"{name}:{node.lineno}: no literal")
      elif not (": " in message.split("\n")[0] and ("expected" in message or "fix:" in message)):
        broken.append(f"{name}:{node.lineno}: {message}")
  return broken


def of_lines(count: int) -> str:
  return "def f():\n" + "  x = 1\n" * (count - 1)


# A rule -> sources that break it, each of them alone.
RULES = {
  imports_point_down: [
    {"model/new.py": "def f():\n  from igpt_jax import checkpoint, errors"},
    {"model/new.py": "from ..jobs import pretrain"},
    {"data/datasets/new.py": "importlib.import_module('igpt_jax.training.step')"},
    {"new/new.py": ""},
    {"jobs/new.py": "from igpt_jax.training.no_such_module import step"},
  ],
  floors_have_no_circle: [
    {"model/new.py": "from igpt_jax import data", "data/new.py": "import igpt_jax.model.layers"}
  ],
  jobs_are_commands: [
    {"jobs/new.py": "from igpt_jax.jobs import pretrain"},
    {"jobs/new.py": "from igpt_jax.jobs.pretrain import run"},
    {"runner/new.py": "import igpt_jax.jobs.pretrain"},
    {"demo/new.py": "from igpt_jax import jobs"},
  ],
  demo_needs_workspace_and_sampling_alone: [
    {"demo/new.py": "from igpt_jax.runner import loop"},
    {"demo/new.py": "from igpt_jax import probing"},
  ],
  probing_and_sampling_are_strangers: [
    {"probing/new.py": "from igpt_jax.sampling import frechet"},
    {"sampling/new.py": "from igpt_jax.probing.features import FeatureRows"},
  ],
  prediction_is_for_job_compile: [{"jobs/new.py": "from igpt_jax.prediction import hlo"}],
  settings_are_read_by_main_alone: [{"demo/new.py": "from igpt_jax.config import read"}],
  libraries_stay_in_their_room: [
    {"model/new.py": "def f():\n  import grain.python as g"},
    {"jobs/new.py": "from orbax.checkpoint import v1"},
    {"model/new.py": "importlib.import_module('tensorflow.io')"},
    {"data/new.py": "import pickle"},
    {"model/new.py": "from ml_collections import ConfigDict"},
  ],
  main_alone_reads_flags: [{"jobs/new.py": "from absl import flags"}],
  the_sharding_table_alone_names_mesh_axes: [{"model/new.py": "size = mesh.shape['fsdp']"}],
  kinds_of_tokens_are_asked_not_compared: [
    {"model/new.py": "if config.token_kind == 'channels': pass"},
    {"jobs/new.py": "found = [x for x in y if spec.kind in ('channels', 'subpixels')]"},
    {"data/new.py": "same = spec.kind != tokens.PALETTE"},
    {"data/new.py": "match spec.kind:\n  case 'subpixels': pass"},
  ],
  nothing_loads_pickles: [
    {"data/new.py": "np.load(path)"},
    {"data/new.py": "np.load(path, allow_pickle=True)"},
  ],
  names_are_given_once: [
    {"jobs/loop.py": ""},
    {"model/utils.py": ""},
    {"trainer/new.py": ""},
  ],
  modules_say_what_they_are_for: [{"model/new.py": "x = 1"}],
  docstrings_have_a_subject: [
    {"model/new.py": '"""Of what a figure depends on."""'},
    {"model/new.py": 'def f():\n  """That programs can use."""'},
    {"model/new.py": 'class A:\n  def f(self):\n    """As `g`, without its checks."""'},
  ],
  errors_say_what_to_do: [
    {"jobs/new.py": 'raise UserError("it broke")'},
    {"jobs/new.py": 'raise errors.NoSuchSplit(f"split: {name} isn\'t there")'},
    {"jobs/new.py": 'raise UserError(f"nothing of {name}; expected something")'},
    {"jobs/new.py": "raise UserError(text_of(name))"},
  ],
  files_are_short: [{"model/new.py": "x = 1\n" * 401}],
  functions_are_short: [
    {"model/new.py": of_lines(101)},
    {"model/new.py": "class A:\n" + of_lines(101).replace("\n", "\n  ").replace("def", "  def")},
  ],
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_its_rules(rule):
  assert not rule(SOURCES), "\n".join([rule.__name__, *rule(SOURCES)])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_can_be_broken(rule):
  kept = set(rule(SOURCES))
  for broken in RULES[rule]:
    assert set(rule({**SOURCES, **broken})) - kept, f"{rule.__name__} allows {broken}"


def test_long_functions_are_still_long():
  """An exception goes with what it was made for."""
  for name, functions in LONG_FUNCTIONS.items():
    for node in ast.walk(parsed(SOURCES[name])):
      if isinstance(node, ast.FunctionDef) and node.name in functions:
        assert node.end_lineno - node.lineno >= MAX_FUNCTION_LINES, f"{name}: {node.name} is short"


def test_imports_are_found_where_they_hide():
  """They are found in functions, under other names, relative, and by name."""
  source = """
def f():
  import grain.python as g
  from igpt_jax import checkpoint, errors
  from ..jobs import pretrain
  from . import image_gpt
  importlib.import_module("tensorflow.io")
"""
  assert imports_of(source, "igpt_jax.model") == {
    "grain.python",
    "igpt_jax.checkpoint",
    "igpt_jax.errors",
    "igpt_jax.jobs.pretrain",
    "igpt_jax.model.image_gpt",
    "tensorflow.io",
  }


@pytest.mark.parametrize(
  "path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.name
)
def test_configs_import_the_config_alone(path):
  """Configs load from any working directory, and say everything themselves."""
  ours = {
    module for module in imports_of(path.read_text()) if not module.startswith("ml_collections")
  }
  assert {module.rpartition(".")[0] for module in ours} == {"igpt_jax.config"}


def run(program: str) -> subprocess.CompletedProcess:
  command = [sys.executable, "-c", program]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


LIGHT = """
import sys
import igpt_jax
from igpt_jax.config import base
{more}
heavy = [name for name in ("api", "checkpoint", "sampling", "probing") if f"igpt_jax.{{name}}" in sys.modules]
assert not heavy, heavy
bridge = sys.modules.get("jax._src.xla_bridge")
assert bridge is None or not bridge.backends_are_initialized(), "importing initialised a backend"
"""


def test_a_config_is_light():
  """A config file loads without jax' backends, and without what reads checkpoints, draws or probes."""
  done = run(LIGHT.format(more="base()"))
  assert done.returncode == 0, done.stderr
  for more in ("igpt_jax.load", "import igpt_jax.sampling.completer", "import jax; jax.devices()"):
    assert "AssertionError" in run(LIGHT.format(more=more)).stderr, more


def test_importing_touches_no_device():
  """Importing every module initialises no backend, and imports nothing optional."""
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
"""
  done = run(program)
  assert done.returncode == 0, done.stderr
