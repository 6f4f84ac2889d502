"""What a person gets wrong at the command line, or has little of: one line, status 2, nothing half done."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from igpt_jax.config import saved as saved_lib
from igpt_jax.config.fields import Settings, base
from igpt_jax.config.job_fields import CompleteConfig
from igpt_jax.config.read import settings_of
from igpt_jax.config.run_fields import DataConfig
from igpt_jax.errors import NoSuchSplit, UserError
from igpt_jax.jobs import (
  evaluate,
  finetune,
  fit_palette,
  lowdata,
  pretrain,
  probe,
  quality,
  sample,
)
from igpt_jax.probing import sets
from igpt_jax.reporting import metrics
from igpt_jax.workspace import places, weights
from support import own_checkpoint
from support.images import make_images
from support.lives import Lives
from support.paths import ROOT
from support.quickstart import call, shrunk
from support.tiny import on_one_device

pytestmark = pytest.mark.usefixtures("quick_compile")


OWN = ["--config.checkpoint={run}"]
NO_VALIDATION = "data.validation: 0 holds nothing out, .* --config.data.validation=0.1"
MISTAKES = {
  "long seed": (["--config.seed=" + "9" * 400], "config.seed: a number of 1,329 bits; expected 0 to"),
  "endless seed": (["--config.seed=" + "9" * 5_000], "seed"),
  "hexadecimal seed": (["--config.seed=0x" + "f" * 5_000], "config.seed: a number of 20,000 bits"),
  "negative seed": (["--config.seed=-1"], "config.seed: -1; expected 0 to 4,294,967,295"),
  "seed beyond": (["--config.seed=4294967296"], "config.seed: 4294967296; expected 0 to"),
  "broken seed": (["--config.seed=0.5"], "seed.*0.5"),
  "no seed": (["--config.seed="], "seed"),
  "cold": (["--config.sample.temperature=1e-38"], "temperature: 1e-38; expected 0 .greedy., or"),
  "many steps": (["--config.train.steps=" + "9" * 400], "config.train.steps: a number of 1,329 bits"),
  "more processes than cores": (["--config.data.workers=1000"], "data.workers: 1000; expected 0 to"),
  "finetune": (["--config.job=finetune", "--config.data.validation=0", *OWN], NO_VALIDATION),
  "probe": (["--config.job=probe", "--config.data.validation=0", *OWN], NO_VALIDATION),
  "lowdata": (["--config.job=lowdata", "--config.data.validation=0", *OWN], NO_VALIDATION),
  "evaluate": (
    ["--config.job=evaluate", "--config.evaluate.split=validation", "--config.data.validation=0", *OWN],
    NO_VALIDATION,
  ),
  "one colour": (
    ["--config.data.name=folder", "--config.data.path={grey}", "--config.data.augment=none"],
    r"palette: folder .* has a single colour \(rgb 255, 255, 255\).* expected two or more",
  ),
  "one colour, fitted": (
    [
      "--config.job=fit_palette", "--config.data.name=folder", "--config.data.path={grey}",
      "--config.data.augment=none",
    ],
    "palette: folder .* has a single colour",
  ),
  "results as images": (
    ["--config.job=complete", "--config.complete.images={root}", *OWN],
    "--workdir: .* lies within config.complete.images .* fix: another --workdir",
  ),
  "results as training images": (
    ["--config.data.name=folder", "--config.data.path={root}", "--workdir={root}/train/cat/run"],
    "--workdir: .* lies within data.path .* as images of train; fix: another --workdir",
  ),
  "damaged settings": (["--config={damaged}"], "--config: .*damaged.json is damaged .*; expected JSON"),
  "settings of no run": (["--config={listed}"], "holds no settings; expected the config.json of a"),
  "no settings": (["--config={empty}"], "--config: .*empty.json is damaged: it holds no settings"),
  "a format alone": (["--config={bare}"], "--config: .*bare.json is damaged: it holds no settings"),
  "settings in no parts": (["--config={flat}"], "--config: .*flat.json is damaged; expected the config"),
  "settings of a newer format": (["--config={format}"], "--config: .*: written in format 99 by a newer"),
  "newer settings": (["--config={newer}"], "doesn't know: train.speed, x.y; fix: the version of"),
  "settings of another type": (["--config={typed}"], "train.steps is 'many'; expected as in 1000000"),
  "empty settings": (["--config={null}"], "train.steps is None; expected as in 1000000"),
  "settings nowhere": (["--config=nowhere.json"], "--config: nowhere.json: No such file"),
  "a config that is none": (["--config=README.md"], "--config: SyntaxError: .*expected a config file"),
  "a config that makes none": (["--config={made}"], r"--config: \S*made.py has no get_config\(\); expected"),
  "a config that fails": (["--config={failing}"], "--config: ZeroDivisionError: .*failing.py, line 2"),
}  # fmt: skip
for job in ("pretrain", "complete", "convert"):
  MISTAKES[f"{job} in a file"] = (
    [f"--config.job={job}", "--workdir={file}"], "--workdir: .*file isn't a folder; expected one"
  )  # fmt: skip
MISTAKES["in a file's folder"] = (
  ["--workdir={file}/a/b"],
  "--workdir: .*file isn't a folder; expected one",
)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
  """The files that mistakes are made with."""
  root = tmp_path_factory.mktemp("given")
  for name, text in (
    ("damaged.json", '{"seed": 1'),
    ("listed.json", "[1]"),
    ("empty.json", "{}"),
    ("bare.json", '{"format_version": 3}'),
    ("flat.json", '{"data": [1]}'),
    ("format.json", '{"format_version": 99}'),
    ("newer.json", '{"seed": 1, "train": {"speed": 2}, "x": {"y": 1}}'),
    ("typed.json", '{"train": {"steps": "many"}}'),
    ("null.json", '{"train": {"steps": null}}'),
    ("made.py", "x = 1\n"),
    ("failing.py", "def get_config():\n  return 1 / 0\n"),
    ("file", ""),
  ):
    (root / name).write_text(text)
  make_images(root / "grey" / "train", colours=1)
  found = {path.stem: str(path) for path in root.iterdir()}
  return found | {"run": own_checkpoint.write(root / "run", resolution=8)}


@pytest.fixture(scope="module")
def answers(given, tmp_path_factory):
  """What the command says to each mistake: its status, stdout, stderr, and what it has left."""
  root, found = tmp_path_factory.mktemp("first_mistakes"), {}
  make_images(root / "train" / "cat")
  lives = Lives(JAX_NUM_CPU_DEVICES="1")
  for name, (overrides, _) in MISTAKES.items():
    workdir = root / re.sub(r"\W", "_", name)
    said = [pathlib.Path(f"{workdir}{suffix}") for suffix in (".out", ".err")]
    overrides = [each.format(**given, root=root) for each in overrides]
    args = ["--config=configs/quickstart.py", f"--workdir={workdir}", *overrides]
    status = lives.status(lives.begin(args, *said), 120)
    left = [path for path in workdir.rglob("*") if path.is_file()]
    found[name] = (status, *(file.read_text() for file in said), left)
  lives.close()
  assert not (root / "train" / "cat" / "run").exists()
  return found


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_short_line(name, answers):
  status, out, err, left = answers[name]
  assert status == 2, out + err
  assert "Traceback" not in out + err
  assert err.count("\n") == 1 and len(err) < 900, err
  assert re.search(MISTAKES[name][1], err), err
  assert "compil" not in out
  assert [path.name for path in left if path.name != ".lock"] == []


@pytest.mark.parametrize("job", [evaluate, finetune, lowdata, probe, quality, sample])
@pytest.mark.parametrize("named", ["", "{here}/nowhere"])
def test_without_a_checkpoint_a_job_leaves_no_folder(tmp_path, job, named):
  settings = shrunk(job=job.__name__.rpartition(".")[2], checkpoint=named.format(here=tmp_path))
  with pytest.raises(UserError, match=r"no checkpoint in|nowhere"):
    job.run(settings, str(tmp_path / "new"))
  assert not (tmp_path / "new").exists()


def test_without_jax_platforms_it_takes_what_there_is(tmp_path):
  missing = ["--config.data.name=folder", f"--config.data.path={tmp_path}/missing"]
  run = call("configs/quickstart.py", tmp_path / "w", *missing, JAX_PLATFORMS="")
  assert run.returncode == 2
  assert run.stderr.startswith("igpt_jax: data.path ") and run.stderr.count("\n") == 1


@pytest.mark.parametrize("platforms", ["gpu", "cuda"])
def test_a_platform_that_is_not_here(given, tmp_path, platforms):
  """Not the checkpoint's fault. (jax reads the variable when it is imported.)"""
  if jax.default_backend() != "cpu":
    pytest.skip("there may be such a platform")
  override = ["--config.job=sample", f"--config.checkpoint={given['run']}"]
  run = call("configs/quickstart.py", tmp_path / "w", *override, JAX_PLATFORMS=platforms)
  assert run.returncode == 2, run.stderr
  assert run.stderr.count("\n") == 1, run.stderr
  assert run.stderr.startswith(f"igpt_jax: JAX_PLATFORMS: {platforms}: ")
  assert "unset JAX_PLATFORMS" in run.stderr and not (tmp_path / "w").exists()


# --- where results go ------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("images", "workdir", "refused"),
  [
    ("my", "my", True),
    ("my", "my/out", True),
    ("my", "my/../my/out", True),
    ("my", "mine", False),
    ("my", ".", False),  # my images in the folder of the results
    ("my/a.jpg", "my", False),
    ("my/*.jpg", "my/out", False),
    ("my/*.jpg", "my", False),
    ("my/*", "my", True),  # grid.png is one of them the next time
    ("my/*.png", "my", True),
    ("my/*/*.jpg", "my/out", True),
    ("my/**", "my/out", True),
    ("**/*.png", "out", True),
    ("link", "my/out", True),
  ],
)
def test_results_are_no_images_to_complete(tmp_path, monkeypatch, images, workdir, refused):
  make_images(tmp_path / "my", 1, name="a.jpg")
  os.symlink("my", tmp_path / "link")
  monkeypatch.chdir(tmp_path)
  config = Settings(job="complete", complete=CompleteConfig(images=images))
  workdir = os.path.abspath(workdir)
  if refused:
    with pytest.raises(UserError, match=r"lies within config.complete.images"):
      places.check(config, workdir)
  else:
    places.check(config, workdir)
  # Which reads no images.
  places.check(dataclasses.replace(config, job="evaluate"), workdir)


@pytest.mark.parametrize(
  ("workdir", "refused"),
  [("data/train/run", True), ("data/test", True), ("data/val/x/y", True), ("data/held/x", True),
   ("data/runs/a", False), ("data", False), ("data/training", False), ("elsewhere", False)],
)  # fmt: skip
def test_results_are_no_images_to_train_on(tmp_path, workdir, refused):
  (tmp_path / "data" / "train").mkdir(parents=True)
  data = DataConfig(name="folder", path=str(tmp_path / "data"), validation_split="held")
  config = Settings(data=data)
  if not refused:
    places.check(config, str(tmp_path / workdir))
    return
  with pytest.raises(UserError, match=r"lies within data.path"):
    places.check(config, str(tmp_path / workdir))


def test_a_workdir_whose_name_is_not_utf8(tmp_path):
  """Orbax can't write there: told now, not after ten minutes of trying to save."""
  with pytest.raises(UserError, match=r"run\\xff isn't UTF-8"):
    places.check(Settings(), str(tmp_path / "run\udcff"))
  places.check(Settings(), str(tmp_path / "Läufe 🙂"))


# --- a run's own config.json -----------------------------------------------------------------------


def test_a_run_goes_on_from_its_own_config_json(tmp_path):
  """Whose workdir is where it lies; with overrides, or into another workdir."""
  workdir = tmp_path / "a:b" / "run"
  own = {"finetune.layer": 1, "features.layers": (0, 1), "data.augment": "shift"}
  on_one_device(pretrain, shrunk(**own, **{"train.steps": 4}), str(workdir))
  saved = str(workdir / "config.json")
  assert settings_of(saved_lib.get_config(saved)) == shrunk(**own, **{"train.steps": 4})
  first = (workdir / "metrics.jsonl").read_text()
  command = [sys.executable, "-m", "igpt_jax.main", "--config", saved]
  run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
  assert run.returncode == 0, run.stderr
  assert f"resuming at step 4 of 4 from {workdir}" in run.stdout
  assert (workdir / "metrics.jsonl").read_text() == first
  run = call(saved, tmp_path / "other", "--config.train.steps=2", "--config.seed=7")
  assert run.returncode == 0, run.stderr
  theirs = json.loads((tmp_path / "other" / "config.json").read_text())
  assert (theirs["train"]["steps"], theirs["seed"]) == (2, 7)
  assert theirs["features"]["layers"] == [0, 1]


def test_a_config_json_of_an_older_version_has_todays_defaults_where_it_is_silent(tmp_path):
  (tmp_path / "config.json").write_text('{"seed": 3, "train": {"clip_norm": 1}}')
  config = saved_lib.get_config(str(tmp_path / "config.json"))
  expected = base()
  expected.seed, expected.train.clip_norm = 3, 1.0
  assert config.to_dict() == expected.to_dict()
  assert isinstance(config.train.clip_norm, float)


# --- little data -----------------------------------------------------------------------------------


def test_nothing_held_out_trains_on_all_of_train(tmp_path, capsys):
  """And goes on so; what is left is evaluated on test, and by nothing that training saw."""
  settings = {"data.validation": 0.0, "train.steps": 4, "train.eval_every": 2}
  on_one_device(pretrain, shrunk(**settings), str(tmp_path / "run"))
  said = capsys.readouterr().out
  assert "nothing is held out" in said and "train[1497 of 1497]" in said
  on_one_device(pretrain, shrunk(**settings), str(tmp_path / "run"))
  assert "resuming at step 4 of 4" in capsys.readouterr().out
  records = metrics.read_jsonl(tmp_path / "run" / "metrics.jsonl")
  assert [r["step"] for r in records if "loss" in r] == [2, 4]
  assert not any("validation_loss" in record for record in records)
  assert "validation_loss" not in json.loads((tmp_path / "run" / "training.json").read_text())
  evaluate.run(shrunk(**settings), str(tmp_path / "run"))
  values = json.loads((tmp_path / "run" / "evaluation.json").read_text())
  assert "test[300 of 300]" in values["data"]
  assert "train[1497 of 1497]" in values["baselines_counted_on"]
  fit_palette.run(shrunk(**settings), str(tmp_path / "palette"))
  fitted = json.loads((tmp_path / "palette" / "palette.json").read_text())
  assert fitted["measured_on"] == fitted["fitted_to"]
  for refuses in (
    lambda: sets.open_source(shrunk(**settings), str(tmp_path / "run")),
    lambda: finetune.run(shrunk(**settings), str(tmp_path / "run")),
  ):
    with pytest.raises(NoSuchSplit, match=NO_VALIDATION):
      refuses()


def test_a_folder_of_test_images_alone_is_evaluated(tmp_path, monkeypatch, capsys):
  """Unigrams are then counted on what is evaluated, and it is said before the pass."""
  make_images(tmp_path / "data" / "test")
  run = own_checkpoint.write(tmp_path / "run", resolution=8)
  folder = {"data.name": "folder", "data.path": str(tmp_path / "data"), "checkpoint": run}
  load = weights.load_model
  order = []

  def loading(*arguments, **settings):
    order.append(capsys.readouterr().out)
    return load(*arguments, **settings)

  monkeypatch.setattr(weights, "load_model", loading)
  evaluate.run(shrunk(**folder), str(tmp_path / "out"))
  assert "baselines: counted on the evaluated images themselves, which flatters them" in order[0]
  values = json.loads((tmp_path / "out" / "evaluation.json").read_text())
  assert values["images"] == 8
  assert values["baselines_counted_on"] == "the evaluated tokens themselves"
  # With training images there, on those.
  make_images(tmp_path / "data" / "train")
  evaluate.run(shrunk(**folder), str(tmp_path / "out"))
  values = json.loads((tmp_path / "out" / "evaluation.json").read_text())
  assert "train[7 of 8]" in values["baselines_counted_on"]
  # What is there and wrong isn't passed over.
  (tmp_path / "data" / "train" / "cat").mkdir()
  with pytest.raises(UserError, match="loose images"):
    evaluate.run(shrunk(**folder), str(tmp_path / "out"))
