"""What an installed package is made of, one version, and the releases that it is tested with."""

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml

import igpt_jax
from igpt_jax import extras
from igpt_jax.config import named
from igpt_jax.errors import UserError
from support.paths import ROOT

SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
CONSTRAINTS = sorted((ROOT / "constraints").glob("*.txt"))
PYTHONS = re.findall(r"Programming Language :: Python :: (3\.\d+)", SETUP)
SOURCES = ("igpt_jax", "configs", "launch")

BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """A wheel of this tree."""
  there = [each.version for each in importlib.metadata.distributions(name="setuptools")]
  if not there or int(there[0].split(".")[0]) < 77:
    pytest.skip(
      "THE WHEEL IS NOT BUILT, setuptools is missing or too old; fix: pip install -e '.[test]'"
    )
  folder = tmp_path_factory.mktemp("wheel")
  tree = folder / "tree"
  tree.mkdir()
  for name in SOURCES:
    shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
  for path in ROOT.iterdir():
    if path.is_file() and path.name != ".git":
      shutil.copy(path, tree)
  command = [sys.executable, "-c", BUILD, str(folder)]
  done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  (path,) = folder.glob("*.whl")
  return path


@pytest.fixture(scope="module")
def installed(wheel):
  """The folder that the wheel is unpacked into, as a package is in site-packages."""
  folder = wheel.parent / "site packages"
  with zipfile.ZipFile(wheel) as file:
    file.extractall(folder)
  return folder


@pytest.fixture
def call(installed, tmp_path):
  """Runs the installed command, in an empty folder."""
  program = "from igpt_jax.__main__ import run; run()"  # as the script in bin/ does

  def run(*arguments, program=program):
    return subprocess.run(
      [sys.executable, "-c", program, *arguments],
      cwd=tmp_path,
      env=os.environ | {"PYTHONPATH": str(installed)},
      capture_output=True,
      text=True,
      check=False,
    )

  return run


def test_a_wheel_has_all_that_a_checkout_has(wheel):
  """Every file of the package, the configs and the launch scripts, and nothing else."""
  wanted = set()
  for name in SOURCES:
    base = ROOT if name == "igpt_jax" else ROOT / name
    for path in (ROOT / name).rglob("*"):
      if path.is_file() and "__pycache__" not in path.parts and path.parent.name != "results":
        where = path.relative_to(base)
        wanted.add(str(where if name == "igpt_jax" else pathlib.Path("igpt_jax", name, where)))
  there = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
  assert there == wanted


def test_what_a_package_page_shows(installed):
  (folder,) = installed.glob("*.dist-info")
  text = (folder / "METADATA").read_text(encoding="utf-8")
  fields, _, description = text.partition("\n\n")
  assert "License-Expression: Apache-2.0" in fields and "Requires-Python: >=3.11" in fields
  assert description.strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
  assert "igpt_jax = igpt_jax.__main__:run" in (folder / "entry_points.txt").read_text()


@pytest.mark.parametrize("flag", ["--help", "-h", "--version"])
def test_help_and_version_end_well(call, flag):
  done = call(flag)
  assert (done.returncode, done.stderr) == (0, ""), done.stderr
  if flag == "--version":
    assert done.stdout == f"igpt_jax {igpt_jax.__version__}\n"
  else:
    assert done.stdout.startswith("igpt_jax ") and "quickstart" in done.stdout


def test_a_name_is_looked_up_in_the_package(call, tmp_path):
  """The quickstart's own settings are there to be changed; of those, one is refused."""
  done = call("--config", "quickstart", "--config.data.resolution=0")
  assert done.returncode == 2 and done.stderr.startswith("igpt_jax: config.data.resolution: 0")
  done = call("--config=quickstrat")
  assert done.returncode == 2 and done.stderr.count("\n") == 1
  assert "--config: 'quickstrat': no such file; expected" in done.stderr
  assert all(name in done.stderr for name in named.names())
  (tmp_path / "quickstart").write_text("raise OSError('of one\\'s own')")  # a file goes first
  assert "of one's own" in call("--config=quickstart").stderr


@pytest.mark.slow
def test_the_installed_quickstart_runs_in_an_empty_folder(call, tmp_path):
  few = ("--config.train.steps=2", "--config.train.warmup_steps=1", "--config.train.eval_images=32")
  done = call("--config=quickstart", *few, "--config.train.progress_images=0")
  assert done.returncode == 0, done.stderr
  assert [path.name for path in tmp_path.iterdir()] == ["runs"]
  assert (tmp_path / "runs" / "quickstart" / "checkpoints" / "2").is_dir()


def test_a_path_goes_before_a_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert named.path_of("quickstart") == str(ROOT / "configs" / "quickstart.py")
  (tmp_path / "quickstart").mkdir()  # a run's workdir, say
  assert named.path_of("quickstart") == str(ROOT / "configs" / "quickstart.py")
  (tmp_path / "own.py").touch()
  assert named.path_of("own.py") == "own.py"
  assert named.path_of("own.py:argument") == "own.py:argument"
  for wrong in ("own", "quickstart.py", "../configs/quickstart", "a\nb" + 9_999 * "x"):
    with pytest.raises(UserError, match=r"^--config: .*: no such file; expected the path"):
      named.path_of(wrong)
  for wrong in ("quickstrat", "quickstart.py", "configs/quickstart"):
    with pytest.raises(UserError, match=r"; fix: quickstart$"):
      named.path_of(wrong)


# --- Extras ---------------------------------------------------------------------------------------


def test_an_extra_is_installed_as_it_can_be(call, tmp_path, monkeypatch):
  """By the checkout from anywhere, and beside a wheel by the names that an index knows."""
  monkeypatch.chdir(ROOT)
  assert extras.install("demo") == "pip install -e '.[demo]'"
  monkeypatch.chdir(tmp_path)
  assert extras.install("demo") == f"pip install -e '{ROOT}[demo]'"
  done = call(program="from igpt_jax import extras; print(extras.install('demo'))")
  assert done.stdout == "pip install 'starlette<2,>=0.46' 'uvicorn<1,>=0.34'\n", done.stderr
  monkeypatch.setattr(
    extras, "CHECKOUT", tmp_path
  )  # of a package that was copied, nothing is known
  monkeypatch.setattr(extras, "_requirements", importlib.metadata.requires)
  assert extras.install("demo") == "install what the extra demo of igpt_jax's setup.py lists"
  program = (
    "from igpt_jax.data import tfds_source; print(tfds_source.prepare_command('mnist', '/d'))"
  )
  told = call(program=program).stdout
  assert told.startswith("pip install 'tensorflow-cpu<3,>=2.20' && igpt_jax --config.job=prepare ")


def test_no_message_names_an_extra_otherwise():
  named_extra = re.compile(r"pip install[^\n]*(?:igpt_jax|\.)\[|extra `\w+`\)|igpt_jax\[")
  for path in sorted((ROOT / "igpt_jax").rglob("*.py")):
    if path.name != "extras.py":
      assert not named_extra.search(path.read_text(encoding="utf-8")), path
  for name in set(re.findall(r"extras\.install\('(\w+)'\)", _all_sources())):
    assert f'    "{name}": [' in SETUP, name


def _all_sources() -> str:
  return "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "igpt_jax").rglob("*.py"))


# --- Versions -------------------------------------------------------------------------------------


def test_the_version_stands_in_one_place(installed):
  (folder,) = installed.glob("*.dist-info")
  assert folder.name == f"igpt_jax-{igpt_jax.__version__}.dist-info"
  assert igpt_jax.__version__ not in SETUP


def test_the_citation_has_the_version():
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
  assert str(citation["version"]) == igpt_jax.__version__


def test_every_python_has_its_constraints():
  names = [f"py{version.replace('.', '')}.txt" for version in PYTHONS]
  assert PYTHONS and [path.name for path in CONSTRAINTS] == names


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_constraints_are_releases_that_setup_allows(path, installed):
  """One release of every package that the tests' environment has, and nothing else."""
  requirements = pytest.importorskip("packaging.requirements")
  lines = path.read_text().splitlines()
  assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
  pins = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower(): line for line in lines}
  assert len(pins) == len(lines)
  (folder,) = installed.glob("*.dist-info")
  metadata = (folder / "METADATA").read_text(encoding="utf-8").partition("\n\n")[0]
  seen = 0
  for text in re.findall(r"^Requires-Dist: (.+)$", metadata, re.M):
    wanted = requirements.Requirement(text)
    if wanted.marker is None or wanted.marker.evaluate({"extra": "test"}):
      pin = pins[re.sub(r"[-_.]+", "-", wanted.name).lower()]
      assert wanted.specifier.contains(pin.partition("==")[2]), (text, pin)
      seen += 1
  assert seen > 25


# --- What runs elsewhere --------------------------------------------------------------------------


def test_the_workflow_runs_what_ci_runs():
  workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
  (job,) = workflow["jobs"].values()
  assert job["strategy"]["matrix"]["python"] == PYTHONS
  assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
  assert set(workflow[True]) == {"push", "pull_request"}  # YAML reads `on` as true


def test_hooks_use_the_ruff_of_the_tests():
  hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
  (wanted,) = re.findall(r'"(ruff[^"]+)"', SETUP)
  (repository,) = hooks["repos"]
  assert [hook["entry"] for hook in repository["hooks"]] == ["ruff check", "ruff format"]
  assert all(hook["additional_dependencies"] == [wanted] for hook in repository["hooks"])
