"""Jobs of a run that has been begun: its config.json says what a config file or a command line doesn't."""

import json
import re
import subprocess
import sys

import pytest

from igpt_jax.config import base, saved
from igpt_jax.errors import UserError
from igpt_jax.jobs import pretrain
from support import own_checkpoint
from support.images import make_images
from support.lives import Lives
from support.paths import ROOT
from support.quickstart import shrunk
from support.tiny import on_one_device

pytestmark = pytest.mark.usefixtures("quick_compile")

QUICKSTART = "--config=configs/quickstart.py"
EVALUATE = ["--config.job=evaluate", "--config.evaluate.images=8"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """A run of a person's own images, begun with the digits' config and overrides."""
  root = tmp_path_factory.mktemp("photos")
  for split in ("train", "test"):
    make_images(root / "data" / split, 24)
  own = {"data.name": "folder", "data.path": str(root / "data"), "data.augment": "none"}
  on_one_device(pretrain, shrunk(**own, **{"train.steps": 2}), str(root / "run"))
  return root


@pytest.fixture(scope="module")
def answer():
  """Runs the command; returns its status, stdout and stderr."""
  lives = Lives(JAX_NUM_CPU_DEVICES="1")

  def run(tmp_path, *args: str) -> tuple[int, str, str]:
    out, err = tmp_path / "out.txt", tmp_path / "err.txt"
    for file in (out, err):
      file.unlink(missing_ok=True)  # they are appended to
    status = lives.status(lives.begin(args, out, err), 300)
    return status, out.read_text(), err.read_text()

  yield run
  lives.close()


def test_the_workdir_alone_is_enough(photos, tmp_path, answer):
  """To evaluate, with overrides given again, and to go on training."""
  workdir, again = f"--workdir={photos}/run", f"--config.data.path={photos}/data"
  for arguments in (
    [*EVALUATE, workdir],
    [*EVALUATE, "--config=", "--workdir", f"{photos}/run", again],
    [*EVALUATE, again, "--config", f"{photos}/run/config.json"],  # whose fields come before it
  ):
    status, out, err = answer(tmp_path, *arguments)
    assert status == 0, err
    assert "config:" not in out
    values = json.loads((photos / "run" / "evaluation.json").read_text())
    assert values["data"].startswith("folder test[24 of 24]")
  status, out, err = answer(tmp_path, workdir)
  assert status == 0 and f"resuming at step 2 of 2 from {photos}/run" in out, err
  status, out, err = answer(tmp_path, workdir, "--config.data.augment=shift")
  assert status == 2 and "data.augment: none there, shift here" in err


def test_the_run_goes_before_a_config_file(photos, tmp_path, answer):
  """Or its images would silently be the digits, which the config file has."""
  status, out, err = answer(tmp_path, QUICKSTART, f"--workdir={photos}/run", *EVALUATE)
  assert status == 0, err
  (line,) = re.findall("^config: .*$", out, re.MULTILINE)
  assert line.startswith(f"config: the run's settings are used, from {photos}/run/config.json: ")
  assert "data.name: 'digits' here, 'folder' in the run" in line
  assert f"data.path: '' here, '{photos}/data' in the run" in line
  values = json.loads((photos / "run" / "evaluation.json").read_text())
  assert values["data"].startswith("folder test[24 of 24]")


def test_the_command_line_goes_before_the_run(photos, tmp_path, answer):
  """Another data set is a person's wish; how it is read is said by the config, not by the run."""
  digits = "--config.data.name=digits"
  for config in ([], [QUICKSTART]):
    status, out, err = answer(tmp_path, *config, f"--workdir={photos}/run", *EVALUATE, digits)
    assert status == 0, err
    lines = re.findall("^config: .*$", out, re.MULTILINE)
    assert lines[-1] == (
      "config: as the command line says, unlike the run's: data.name: 'digits' here, 'folder' in the run"
    )
    assert not any("data.path" in line for line in lines)
    values = json.loads((photos / "run" / "evaluation.json").read_text())
    assert values["data"].startswith("digits/1.0.0 test[300 of 300]")


@pytest.mark.parametrize(
  "arguments", [[], ["--workdir={empty}"], ["--config.seed=1", "--workdir={empty}"]]
)
def test_without_a_config_it_says_what_to_do(tmp_path, answer, arguments):
  arguments = [each.format(empty=tmp_path) for each in arguments]
  for more in ([], ["--config.job=sample"], ["--config.job", "sample"]):
    status, _, err = answer(tmp_path, *arguments, *more)
    assert status == 2 and err.count("\n") == 1
    assert err.startswith("igpt_jax: --config: missing")
    assert "--config quickstart, or the --workdir of a run" in err
    assert ("there is no" in err) == any("workdir" in each for each in arguments)


# Of a run whose checkpoint isn't the one that is read, or that a job doesn't read: nothing is taken.
@pytest.mark.parametrize(
  ("changes", "taken"),
  [
    ({"job": "evaluate"}, True),
    ({"job": "finetune"}, True),
    ({"job": "evaluate", "checkpoint": "{run}/checkpoints/2"}, True),
    ({"job": "evaluate", "checkpoint": "{root}/another"}, False),
    ({"job": "pretrain"}, False),
    ({"job": "benchmark"}, False),
  ],
)
def test_which_jobs_take_a_runs_settings(tmp_path, changes, taken):
  own_checkpoint.write(tmp_path / "run", resolution=8)
  write(tmp_path / "run", {"data": {"resolution": 4}, "seed": 7, "train": {"steps": 3}})
  config = base()
  config.update_from_flattened_dict(
    {name: value.format(run=tmp_path / "run", root=tmp_path) for name, value in changes.items()}
  )
  before = config.copy_and_resolve_references()
  messages = saved.take_from_run(config, str(tmp_path / "run"), ())
  assert bool(messages) == taken
  before.data.resolution = 4 if taken else 8
  assert config.to_dict() == before.to_dict()  # the seed is this job's


@pytest.mark.parametrize(
  ("given", "name"), [((), "cifar10"), (("job",), "folder"), (("job", "data.name"), "cifar10")]
)
def test_a_config_file_of_the_job_itself_names_its_data(tmp_path, given, name):
  """One of pretraining, whose job the command line changes, names what the run may have had otherwise."""
  write(tmp_path, {"data": {"name": "folder", "path": "photos", "validation": 0.3}})
  config = base()
  config.job, config.data.name, config.data.validation = "finetune", "cifar10", 0.2
  messages = saved.take_from_run(config, str(tmp_path), given)
  assert (config.data.name, config.data.validation) == (name, 0.3 if name == "folder" else 0.2)
  who = {(): "config file", ("job", "data.name"): "command line"}.get(given)
  assert who is None or messages == [
    f"config: as the {who} says, unlike the run's: data.name: 'cifar10' here, 'folder' in the run"
  ]


def test_what_a_fine_tuning_began_from_is_not_what_it_has_made(tmp_path):
  write(tmp_path, {"job": "finetune", "checkpoint": "/pretrained"})
  for job, given, read in (
    ("evaluate", (), ""),
    ("evaluate", ("checkpoint",), "/pretrained"),
    ("finetune", (), "/pretrained"),
  ):
    config = saved.get_config(str(tmp_path / "config.json"))
    config.job = job
    saved.take_from_run(config, str(tmp_path), given)
    assert config.checkpoint == read


def write(workdir, settings) -> None:
  workdir.mkdir(exist_ok=True)
  (workdir / "config.json").write_text(json.dumps(settings))


def test_a_run_is_laid_over_a_config_except_what_is_given(tmp_path):
  """Any settings: lists are as tuples, whole numbers as others; a run without a setting keeps the config's."""
  write(
    tmp_path, {"model": {"n_layer": 6}, "features": {"layers": [1, 2]}, "data": {"validation": 0}}
  )
  config = base()
  config.data.validation, config.model.n_embd = 0.0, 32
  names = ["model.n_layer", "model.n_embd", "features.layers", "data.validation", "seed"]
  assert saved.overlay(config, str(tmp_path), names, {"features.layers"}) == (
    ["model.n_layer: 0 here, 6 in the run"],
    ["features.layers: () here, [1, 2] in the run"],
  )
  assert (config.model.n_layer, config.model.n_embd, config.features.layers) == (6, 32, ())
  assert saved.overlay(config, str(tmp_path / "none"), names, ()) == ([], [])
  write(tmp_path, {"model": {"n_layer": "six"}})
  with pytest.raises(UserError, match=r"config\.json: model\.n_layer is 'six'; expected as in 0"):
    saved.overlay(config, str(tmp_path), names, ())


def test_a_workdir_does_not_choose_whose_programs_run(tmp_path):
  """It may be another person's, and cached programs are run as they are."""
  for theirs, used in (("workdir", "user"), ("/tmp/theirs", "user"), ("off", "off")):
    write(tmp_path, {"compilation_cache": theirs})
    assert saved.get_config(str(tmp_path / "config.json")).compilation_cache == used


LOOK = """
import sys
from absl import app
from igpt_jax import main
try:
  app.run(main.main, flags_parser=main._parse_flags)
finally:
  print([name for name in ("jax", "numpy", "flax") if name in sys.modules])
"""


@pytest.mark.parametrize(
  "mistake",
  [
    [QUICKSTART, "--config.train.batch=8"],
    [QUICKSTART, "--config.train.batch_size=abc"],
    [QUICKSTART, "--config.train.batch_size=-4"],
    [QUICKSTART, "--config.model.attention=foo"],
    [QUICKSTART, "--config.job=trian"],
    [QUICKSTART, "--config.data.name=folder"],
    [QUICKSTART, "more"],
    ["--config=configs/none.py"],
    ["--config.job=sample"],
    ["--config.job=sample", "--config"],
    ["--config.job=trian", QUICKSTART],
    ["--confg=configs/quickstart.py"],
    [QUICKSTART, "--workdir=gs:///run"],
  ],
  ids=str,
)
def test_a_mistake_is_told_before_jax_is_imported(mistake):
  """Which takes a second or more."""
  run = subprocess.run(
    [sys.executable, "-c", LOOK, *mistake], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
  assert run.stdout == "[]\n"
