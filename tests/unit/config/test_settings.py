"""Every setting is declared once; what lists them, checks them and tells of them follows from that."""

import dataclasses
import os
import subprocess
import sys
import typing

import pytest

from igpt_jax import history
from igpt_jax.config import base, choices, fields, help
from igpt_jax.config.declare import JOBS, Group
from igpt_jax.config.fields import FIELDS, Settings
from igpt_jax.config.run_fields import DataConfig, GuardConfig, TrainConfig
from igpt_jax.data import order, transforms
from igpt_jax.errors import UserError
from igpt_jax.jobs import benchmark
from igpt_jax.model.attention.dispatch import IMPLEMENTATIONS
from igpt_jax.model.decoding.cache import CACHE_DTYPES
from igpt_jax.model.model_config import PRESETS, REMAT_POLICIES, ImageGPTConfig
from igpt_jax.pretrained import formats, released
from igpt_jax.probing import sets
from igpt_jax.timing import contact_parts
from igpt_jax.training.objectives import OBJECTIVES
from igpt_jax.training.optimizer import DECAY_SHAPES, SCHEDULES
from support.paths import ROOT
from support.tiny import changed, settings_of


def test_every_setting_is_declared():
  """Every field of every group has a declaration, a meaning, and jobs that read it."""
  leaves = {
    f"{group.name}.{field.name}" if isinstance(group.default, Group) else group.name
    for group in dataclasses.fields(Settings)
    for field in (
      dataclasses.fields(group.default) if isinstance(group.default, Group) else (group,)
    )
  }
  assert leaves == FIELDS.keys()
  for name, declaration in FIELDS.items():
    assert declaration.meaning and set(declaration.jobs) <= JOBS.keys() and declaration.jobs, name
  files = {path.stem for path in (ROOT / "igpt_jax" / "jobs").glob("*.py")} - {"__init__"}
  assert files == JOBS.keys()


@pytest.mark.parametrize(
  ("name", "table"),
  [
    ("data.augment", transforms.AUGMENTATIONS), ("finetune.augment", transforms.AUGMENTATIONS),
    ("data.resample", transforms.RESAMPLINGS), ("model.size", PRESETS), ("objective", OBJECTIVES),
    ("model.remat", REMAT_POLICIES), ("model.attention", IMPLEMENTATIONS),
    ("sample.cache", CACHE_DTYPES), ("train.schedule", SCHEDULES),
    ("train.decay_shape", DECAY_SHAPES), ("convert.format", formats.FORMATS),
    ("features.baselines", sets.BASELINES), ("benchmark.parts", benchmark.PARTS),
    ("first_contact.parts", contact_parts.KINDS),
    ("download.model", (*released.MODELS, "")), ("download.step", released.STEPS),
    ("download.data", (*released.DATASETS, "")),
  ],
)  # fmt: skip
def test_choices_are_those_of_the_rooms(name, table):
  assert sorted(FIELDS[name].choices) == sorted(table)


def test_items_are_declared_as_they_are_annotated():
  for group in (field.default for field in dataclasses.fields(Settings)):
    for field in dataclasses.fields(group) if isinstance(group, Group) else ():
      if isinstance(field.default, tuple):
        declaration = FIELDS[f"{type(group).prefix}{field.name}"]
        assert typing.get_args(field.type) == (declaration.item, ...), field.name


def test_defaults_are_one():
  assert settings_of() == Settings()
  assert settings_of(base()) == changed(Settings(), {})
  assert fields.as_json(Settings()) == base().to_dict() | {
    group: {
      name: list(value) if isinstance(value, tuple) else value
      for name, value in base()[group].items()
    }
    for group in ("ablate", "isoflop", "features", "probe", "lowdata", "benchmark", "first_contact")
  }
  assert FIELDS["seed"].most == order.MAX_SEED


def test_what_decides_a_runs_numbers():
  """Who may differ when a run goes on, as the frozen workdirs and kept results have known it."""
  deciding = {
    kind: {name for name in FIELDS if fields.decides(name, kind)}
    for kind in ("pretraining", "finetuning")
  }
  both = deciding["pretraining"] & deciding["finetuning"]
  assert both == {
    "seed", "init_from", "objective", "mask_probability", "data.name", "data.resolution",
    "data.augment", "data.token_kind", "data.validation", "data.validation_split", "data.resample", "palette.size",
    "palette.images", "model.size", "model.n_layer", "model.n_head", "model.n_embd", "train.b1",
    "train.b2", "train.weight_decay", "train.clip_norm", "train.optimizer", "model.positions",
    "model.qk_norm", "model.value_embeddings", "model.x0_skip", "model.parametrisation",
    "model.base_embd", "model.base_layer",
  }  # fmt: skip
  assert deciding["pretraining"] - both == {
    "train.batch_size", "train.steps", "train.learning_rate", "train.warmup_steps", "train.schedule",
    "train.decay_steps", "train.decay_shape",
  }  # fmt: skip
  assert deciding["finetuning"] - both == {name for name in FIELDS if name.startswith("finetune.")}
  assert {name for name, declaration in FIELDS.items() if declaration.host} == {
    "init_from", "checkpoint", "convert.source", "complete.images", "palette.path", "features.cache",
    "data.path", "data.data_dir", "data.manual_dir", "data.threads", "data.workers", "data.cache_mb",
    "data.verify", "log.tensorboard", "log.wandb", "log.wandb_project", "compilation_cache",
    "scratch",
  }  # fmt: skip
  assert {name for name, declaration in FIELDS.items() if declaration.path} == {
    "init_from", "checkpoint", "convert.source", "convert.target", "complete.images", "data.path",
    "data.manual_dir", "palette.path", "features.cache", "quality.network", "download.directory",
    "compilation_cache", "scratch", "prepare.target",
  }  # fmt: skip
  # Of another version: a part that decides nothing is free whatever is in it.
  assert not fields.decides("probe.later", "pretraining")
  assert fields.decides("train.later", "pretraining") and fields.decides("later", "finetuning")


@pytest.mark.parametrize(
  ("name", "value", "expected"),
  [
    ("train.steps", True, "expected a whole number"),
    ("profile.start", 1.5, "expected a whole number"),
    ("watch", 1, "expected True or False"),
    ("checkpoint", None, "expected text"),
    ("features.layers", 3, "expected a tuple of whole numbers"),
    (
      "features.layers",
      ("four",),
      r"\('four',\); expected a tuple of whole numbers; fix: one such as \(0, 1\)",
    ),
    ("probe.concatenate", (0, 1.5), "expected a tuple of whole numbers"),
    ("lowdata.labels_per_class", (True,), "expected a tuple of whole numbers, 1 or more"),
    ("isoflop.budgets", ("much",), "expected a tuple of numbers"),
    ("ablate.workdirs", (2024,), "expected a tuple of texts; fix: each in quotes"),
    ("lowdata.labels_per_class", (), r"expected 1 or more, such as \(1, 4"),
    ("lowdata.labels_per_class", (4, 0), "0; expected 1 or more"),
    ("probe.learning_rates", (1.0, -1.0), r"-1\.0; expected more than 0"),
    ("features.baselines", ("pixels", "resnet"), "'resnet'; expected some of pixels, pca, random"),
    ("benchmark.parts", (), "expected some of training"),
    ("quality.images", 1, "1; expected 2 or more"),
    ("palette.size", 1, "1; expected 2 or more"),
    ("guard.then", "pray", "'pray'; expected one of rollback, stop, warn"),
    ("data.validation", 1.0, r"1\.0; expected 0 to below 1"),
    ("sample.keep", 1.0, r"1\.0; expected within \(0, 1\)"),
    ("host_seconds", 10**7, "10000000; expected 1 to 1,000,000"),
    ("scratch", "gs://bucket/x", "expected a local path"),
  ],
)
def test_a_value_is_checked_as_declared(name, value, expected):
  config = base()
  group, _, field = name.rpartition(".")
  with config.ignore_type():
    setattr(config[group] if group else config, field, value)
  with pytest.raises(UserError, match=rf"config\.{name}: .*{expected}"):
    settings_of(config)


def test_a_group_can_have_no_value_that_it_may_not_have():
  for make in (
    lambda: GuardConfig(in_row=0),
    lambda: dataclasses.replace(TrainConfig(), b1=1.0),
    lambda: DataConfig(name="folder"),
    lambda: DataConfig(workers=10**6),
  ):
    with pytest.raises(UserError, match=r"config\.(guard|train|data)\.\w+: "):
      make()
  with pytest.raises(dataclasses.FrozenInstanceError):
    TrainConfig().steps = 3


@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    ({"job": "finetune", "finetune.generative": 0.0, "finetune.classification": 0.0}, "both 0"),
    ({"job": "finetune", "finetune.warmup_steps": 20_000}, "at most finetune.steps 10000"),
    ({"job": "sample", "sample.samples": 0}, r"config\.sample\.samples: 0; expected 1 or more"),
    ({"compile.topology": "v5e:2x2"}, "is for job compile; config.job is 'pretrain'"),
    ({"job": "compile", "compile.topology": "v5e:2x3"}, "has no slice"),
    ({"profile.steps": 1, "profile.start": 10**6}, "less than the run's 1000000 steps"),
    ({"data.augment": "paper", "data.resolution": 300}, "data.resolution: 300; expected 1 to 224"),
  ],
)
def test_settings_that_do_not_go_together(changes, expected):
  with pytest.raises(UserError, match=expected):
    settings_of(changes=changes)
  assert settings_of(changes={"job": "compile", "sample.samples": 0}).sample.samples == 0


def test_a_config_with_a_setting_that_there_is_not():
  config = base()
  config.images = "my/*.jpg"
  with pytest.raises(UserError, match=r"config\.images: .*did you mean config\.complete\.images"):
    settings_of(config)


def test_every_former_name_leads_to_todays():
  for names in history.RENAMED.values():
    for old, new in names.items():
      assert old not in FIELDS and new in FIELDS
      assert fields.no_such(old).endswith(f"did you mean config.{new}?")
  for wrong, right in (
    ("trian.steps", "train.steps"),
    ("batch_size", "batch_size"),
    ("train.batch_sise", "train.batch_size"),
    ("fintune.steps", "finetune.steps"),
    ("train.watch", "watch"),
    ("probe.layers", "features.layers"),
  ):
    assert fields.no_such(wrong).endswith(f"{right}?")
  assert fields.no_such("xyzzy") == "config.xyzzy: there is no such setting"


def test_open_choices_are_made_once():
  settings = settings_of(changes={"train.steps": 7})
  settled = choices.settle(settings)
  assert (settled.model.size, settled.objective, settled.palette.size) == ("s", "autoregressive", 0)
  assert choices.settle(settled) == settled and settings.model.size == ""
  bert = ImageGPTConfig(n_layer=36, n_head=8, n_embd=1024, n_vocab=17, causal=False)
  started = choices.settle(settings, bert)
  assert (started.model.size, started.objective, started.palette.size) == ("m", "masked", 17)
  assert choices.optimizer_config(started).learning_rate == PRESETS["m"].learning_rate_masked
  model = choices.model_config(started, n_vocab=17)
  assert (model.n_layer, model.causal) == (36, False)
  rate = choices.finetuning_optimizer_config(settled).learning_rate
  assert rate == choices.optimizer_config(settled).learning_rate / 10


# --- what is told ----------------------------------------------------------------------------------


def call(*arguments):
  command = [sys.executable, "-m", "igpt_jax.main", *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_help_may_be_read_in_part():
  """By `head`, say, which is gone before all of it is written."""
  read, write = os.pipe()
  os.close(read)
  with os.fdopen(write, "wb") as closed:
    done = subprocess.run(
      [sys.executable, "-m", "igpt_jax.main", "--help"],
      cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
  assert (done.returncode, done.stderr) == (0, "")


def test_help_lists_the_jobs():
  done = call("--help")
  assert done.returncode == 0 and not done.stderr
  for job, line in JOBS.items():
    assert f"  {job} " in done.stdout and line in done.stdout


def test_help_lists_what_a_job_reads():
  done = call("--config", "configs/complete.py", "--config.job=complete", "--help")
  assert done.returncode == 0 and not done.stderr
  assert "--config.complete.n=8\n      samples per image (1 to 65,536)\n" in done.stdout
  assert "--config.sample.cache=''" in done.stdout and "config.train" not in done.stdout
  assert call("--config.job=fly", "--help").returncode == 2
  for job in JOBS:
    own = {name for name, declaration in FIELDS.items() if job in declaration.jobs}
    told = help.of_job(job)
    assert all((f"--config.{name}=" in told) == (name in own - {"job"}) for name in FIELDS)


@pytest.mark.parametrize(
  ("flag", "expected"),
  [
    ("--config.images=x", "there is no such setting; did you mean config.complete.images?"),
    ("--config.train.keep=2", "there is no such setting; did you mean config.train.max_to_keep?"),
    ("--config.trian.steps=2", "there is no such setting; did you mean config.train.steps?"),
    ("--config.job=fly", "config.job: 'fly'; expected one of pretrain"),
    (
      "--train.steps=3",
      "--train.steps: there is no such option; did you mean --config.train.steps?",
    ),
    ("--images=x", "--images: there is no such option; did you mean --config.complete.images?"),
    ("--nothing=x", "Unknown command line flag 'nothing'"),
    (
      "--config.train.steps=1e3",
      "config.train.steps: '1e3'; expected a whole number, 1 or more; fix: digits alone, such as 1000",
    ),
    (
      "--config.train.learning_rate=fast",
      "config.train.learning_rate: 'fast'; expected a number, more than 0; fix: one such as 0.5 or 1e-3",
    ),
    ("--config.sizing.packaged=yes", "config.sizing.packaged: 'yes'; expected True or False"),
    (
      "--config.features.layers=(4",
      "config.features.layers: ('(4',); expected a tuple of whole numbers",
    ),
    (
      "--config.features.layers=(4, 5",
      "config.features.layers: '(4, 5'; expected a tuple of whole",
    ),
  ],
)
def test_a_mistaken_flag_is_one_line(flag, expected):
  done = call("--config", "configs/quickstart.py", flag)
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and expected in done.stderr


@pytest.mark.parametrize(
  ("program", "absent"),
  [
    ("import igpt_jax", ("jax", "ml_collections", "absl")),
    ("from igpt_jax.config import base; base()", ("jax", "igpt_jax.config.read")),
    ("import igpt_jax.main", ("jax",)),
    (
      "import igpt_jax.config.read",
      tuple(f"igpt_jax.{room}" for room in ("checkpoint", "sampling", "probing", "workspace")),
    ),
  ],
)
def test_what_is_light_stays_light(program, absent):
  program += f"; import sys; print(sorted({set(absent)} & sys.modules.keys()))"
  done = subprocess.run(
    [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert done.stdout == "[]\n"
