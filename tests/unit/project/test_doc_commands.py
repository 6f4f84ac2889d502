"""Commands of README.md, CONTRIBUTING.md and docs/: scripts, options, configs and settings are there."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from igpt_jax.config.read import settings_of
from igpt_jax.demo.__main__ import parse as parse_demo
from igpt_jax.errors import UserError
from support.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```bash\n(.*?)^```", re.M | re.S)


def commands(text):
  """Returns the commands of the bash blocks, as lists of words; comments and NAME=VALUE are left out."""
  found = []
  for block in FENCED.findall(text):
    for line in block.replace("\\\n", " ").splitlines():
      words: list[str] = []
      for word in [*shlex.split(line, comments=True), "&&"]:
        if word == "&&" and words:
          found.append(words)
          words = []
        elif word != "&&" and (words or not re.match(r"\w+=", word)):
          words.append(word)
  return found


def check(words, monkeypatch):
  """Raises if the command couldn't be run as it stands."""
  assert "…" not in " ".join(words), "can't be pasted"
  program, *rest = words
  program = os.path.basename(program)
  if program in ("bash", "run") or program.endswith(".sh"):
    check_script(*(rest if program == "bash" else words), monkeypatch=monkeypatch)
  elif program == "igpt_jax":
    check_main(rest, monkeypatch)
  elif program == "python" and rest[0] == "-m":
    check_module(rest[1], rest[2:], monkeypatch)
  elif program == "python":
    assert (ROOT / rest[0]).is_file(), rest[0]
  elif program == "pip":
    check_install(rest)
  else:
    assert words == [".", ".venv/bin/activate"], f"unknown: {words}"


def check_module(name, arguments, monkeypatch):
  if name == "igpt_jax.main":
    check_main(arguments, monkeypatch)
  elif name == "igpt_jax.demo":
    options = parse_demo(arguments)  # without a checkpoint it takes the packaged one
    assert bool(options.checkpoint) == any(word.startswith("--checkpoint") for word in arguments)
  else:
    assert importlib.util.find_spec(name)
    assert arguments[0] == ">" and (ROOT / arguments[1]).is_file()


def check_main(arguments, monkeypatch):
  """Reads the settings as `igpt_jax.main` does; a workdir's are taken for the quickstart's."""
  arguments = re.sub(r"(?m)^(--?(?:config|workdir))\n", r"\1=", "\n".join(arguments)).splitlines()
  named = [word.partition("=")[2] for word in arguments if word.startswith("--config=")]
  assert named or any(word.startswith("--workdir=") for word in arguments), "no settings"
  path = named[0] if named else "quickstart"
  path = ROOT / (path if path.endswith(".py") else f"configs/{path}.py")
  assert path.is_file(), path
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file("config", None, "", values, lock_config=True)
  flags.DEFINE_string("workdir", None, "", flag_values=values)
  others = [word for word in arguments if not word.startswith("--config=")]
  monkeypatch.setattr(sys, "argv", ["igpt_jax", f"--config={path}", *others])
  left = values(sys.argv)
  assert left == ["igpt_jax"], left
  settings_of(config.value)


def check_script(path, *arguments, monkeypatch):
  script = ROOT / path
  assert script.is_file(), path
  if path == "tests/run.sh":
    assert not [
      word for word in arguments if word not in ("fast", "slow") and not (ROOT / word).exists()
    ]
    return
  before = arguments[: arguments.index("--")] if "--" in arguments else arguments
  after = arguments[len(before) + 1 :]
  settings = [word for word in before if word.startswith("--config.")]
  options = {word.partition("=")[0] for word in before if word.startswith("--")} - {
    word.partition("=")[0] for word in settings
  }
  known = (
    subprocess.run(["bash", script, "--help"], capture_output=True, text=True).stdout
    if options
    else ""
  )
  assert all(re.search(rf"(?m)^ *{option}\b", known) for option in options), (options, known)
  configs = [word for word in before if word.endswith(".py")]
  assert all((ROOT / config).is_file() for config in configs), configs
  if settings or configs:
    check_main(
      [f"--config={config}" for config in configs] + ["--workdir=x", *settings], monkeypatch
    )
  if after:
    check_main(list(after), monkeypatch)


def check_install(words):
  assert words[0] == "install", words
  declared = "".join((ROOT / name).read_text() for name in ("setup.py", "pyproject.toml"))
  for extra in ",".join(re.findall(r"^\.\[(.+)\]$", "\n".join(words), re.M)).split(","):
    assert not extra or re.search(rf'(?m)^ *"?{extra}"? *[:=] *\[', declared), extra


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_can_be_run_as_they_stand(page, monkeypatch):
  for words in commands(page.read_text(encoding="utf-8")):
    check(words, monkeypatch)


def test_the_pages_have_commands():
  readme = commands((ROOT / "README.md").read_text(encoding="utf-8"))
  assert readme[:2] == [["bash", "launch/local.sh"], ["bash", "tests/run.sh"]]
  assert sum(len(commands(page.read_text(encoding="utf-8"))) for page in PAGES) > 25


@pytest.mark.parametrize(
  "line",
  [
    "bash launch/none.sh",
    "bash launch/reproduce.sh --size=small",
    "bash launch/local.sh configs/none.py",
    "bash launch/photos.sh DIR --config.sizing.hours=1",
    "bash launch/prepare_data.sh -- --config=configs/none.py",
    "bash tests/run.sh tests/none",
    "igpt_jax --config none",
    "python -m igpt_jax.main --config.job=sample",
    "python -m igpt_jax.main --config configs/quickstart.py --config.train.step=5",
    "python -m igpt_jax.main --config configs/quickstart.py --config.train.steps=0",
    "python -m igpt_jax.main --config configs/quickstart.py …",
    "python -m igpt_jax.demo --checkpoints=runs/a",
    "python -m igpt_jax.none > docs/settings.md",
    "python tests/none.py",
    "pip install -e '.[none]'",
    "make",
  ],
)
def test_a_wrong_command_is_found(line, monkeypatch):
  (words,) = commands(f"```bash\n{line}\n```\n")
  with pytest.raises((AssertionError, AttributeError, UserError, flags.Error, SystemExit)):
    check(words, monkeypatch)
