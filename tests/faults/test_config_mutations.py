"""Random settings: a run is refused in words before it compiles anything, or it works.

  IGPT_JAX_FAULTS=long bash tests/run.sh tests/faults/test_config_mutations.py

tries a thousand, and runs to its end whatever isn't refused; the short form tries fewer, and goes to
the first compilation.
"""

import contextlib
import io
import os
import random
import shutil
import signal
import sys
import unittest.mock

import jax
import pytest
from absl import flags
from ml_collections import config_flags

from igpt_jax import main
from igpt_jax.config.fields import base
from igpt_jax.config.read import settings_of
from igpt_jax.errors import UserError
from igpt_jax.jobs import complete, evaluate, finetune, pretrain, sample
from igpt_jax.training import compilation
from igpt_jax.workspace import devices, weights
from support.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]


LONG = os.environ.get("IGPT_JAX_FAULTS") == "long"
COUNT = 1_000 if LONG else 100
SECONDS = 60  # that a refusal may take; what is accepted may take them to compile, too
JOBS = {
  "pretrain": pretrain, "finetune": finetune, "evaluate": evaluate, "sample": sample,
  "complete": complete,
}  # fmt: skip

SMALL = {
  "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 16, "train.batch_size": 16,
  "train.steps": 2, "train.warmup_steps": 1, "train.log_every": 1, "train.eval_every": 0,
  "train.checkpoint_every": 4, "train.eval_images": 16, "evaluate.images": 32,
  "evaluate.baseline_images": 32, "sample.samples": 2, "sample.completions": 2,
  "sample.per_image": 1, "complete.n": 2, "finetune.scratch": True, "finetune.steps": 2,
  "finetune.batch_size": 16, "finetune.eval_every": 2,
}  # fmt: skip
# What would do what it says to this process or machine, or needs a network.
LEFT_ALONE = {
  "hang_seconds", "host_seconds", "data.data_dir", "data.manual_dir", "log.wandb", "watch", "job",
}  # fmt: skip

WHOLE = (
  "-1", "0", "1", "2", "3", "7", "64", "1000000000", "1099511627776", "-2147483649", "9" * 400,
)  # fmt: skip
NUMBERS = (*WHOLE, "0.5", "1.5", "-0.1", "1e-38", "1e-300", "1e30", "1e400", "nan", "inf", "-inf")
WORDS = (
  "", "x", "none", "None", "True", "False", "s", "xl", "full", "names", "bfloat16", "float64",
  "autoregressive", "masked", "warn", "stop", "test", "train", "cosine", "int8", "digits", "cifar10",
  "folder", "tokens", "paper", "../..", "/dev/null", "*", "ä\u0000b", "a" * 5_000, "default",
  "[1, 2", "(1,)", "()", "('x',)", "{}", "__import__('os').getcwd()",
)  # fmt: skip


class Reached(BaseException):
  """A run has got as far as compiling."""


def mesh_of(settings):
  return devices.mesh_of(settings, devices=jax.devices()[:2])


def flat(tree, prefix=""):
  for name, value in tree.items():
    if hasattr(value, "items"):
      yield from flat(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", value


FIELDS = {name: value for name, value in flat(base()) if name not in LEFT_ALONE}


def mutate(rng):
  """One to three settings of a job, as flags would have them."""
  job = rng.choice(["pretrain"] * 5 + list(JOBS))
  chosen = {}
  for name in rng.sample(sorted(FIELDS), rng.randint(1, 3)):
    kind = type(FIELDS[name])
    pool = {int: WHOLE, float: NUMBERS, str: WORDS}.get(kind, NUMBERS + WORDS)
    if rng.random() < 0.1:
      pool = NUMBERS + WORDS
    if rng.random() < 0.03:
      name = name[:-1]  # a typo
    chosen[name] = rng.choice(pool)
  return job, chosen


def parse(job, settings, workdir, checkpoint):
  own = {"job": job} | SMALL | ({} if job == "pretrain" else {"checkpoint": str(checkpoint)})
  argv = ["main", f"--config={ROOT}/configs/quickstart.py", f"--workdir={workdir}"]
  argv += [f"--config.{name}={value}" for name, value in (own | settings).items()]
  values = flags.FlagValues()  # the command's own are defined once
  config = config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
  flags.DEFINE_string("workdir", None, "", flag_values=values)
  patch = unittest.mock.patch.object
  with patch(sys, "argv", argv), patch(flags, "FLAGS", values):  # ml_collections looks at argv
    main._parse_flags(argv)
  return config.value


@contextlib.contextmanager
def bounded(seconds):
  def late(*unused):
    raise TimeoutError(f"still at it after {seconds} s")

  before = signal.signal(signal.SIGALRM, late)
  signal.alarm(seconds)
  try:
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def outcome(job, settings, workdir, checkpoint, compiled):
  """ "refused: …", or "ran"; anything else is raised."""
  compiled.clear()
  said = io.StringIO()
  try:
    with bounded(SECONDS), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
      config = parse(job, settings, workdir, checkpoint)
      if config.job not in JOBS:
        raise UserError(f"config.job: {config.job}")
      settings = settings_of(config)
      if config.job in ("sample", "complete"):
        JOBS[config.job].run(settings, str(workdir))
      else:
        JOBS[config.job].run(settings, str(workdir), mesh=mesh_of(settings))
  except Reached:
    return "ran"
  except UserError as error:
    assert not compiled, f"refused after compiling: {error}"
    return f"refused: {error}"
  except SystemExit as error:
    assert error.code == 2, error
    return f"refused: {said.getvalue()}"
  return "ran"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("trained")
  config = parse("pretrain", {}, workdir, None)
  settings = settings_of(config)
  pretrain.run(settings, str(workdir), mesh=mesh_of(settings))
  return workdir


def test_mutations(trained, tmp_path, monkeypatch):
  rng = random.Random(0)
  compiled = []
  compile_step, read_model = compilation.compile_step, weights.read_model

  def compiling(*arguments, **settings):
    compiled.append("a step")
    if not LONG:
      raise Reached
    return compile_step(*arguments, **settings)

  def reading(*arguments, **settings):
    if not LONG:
      raise Reached
    return read_model(*arguments, **settings)

  monkeypatch.setattr(compilation, "compile_step", compiling)
  monkeypatch.setattr(weights, "read_model", reading)
  found = {"refused": 0, "ran": 0}
  wrong = []
  for i in range(COUNT):
    job, settings = mutate(rng)
    workdir = tmp_path / str(i)
    try:
      said = outcome(job, settings, workdir, trained, compiled)
    except BaseException as error:
      if isinstance(error, KeyboardInterrupt):
        raise
      shown = {name: value[:60] for name, value in settings.items()}
      wrong.append(f"{job} {shown}: {type(error).__name__}: {str(error)[:300]}")
    else:
      found[said.partition(":")[0]] += 1
      if said.startswith("refused"):
        assert len(said) > len("refused: ") + 10, said
    shutil.rmtree(workdir, ignore_errors=True)
  print(found)
  assert not wrong, f"{len(wrong)} of {COUNT}:\n" + "\n".join(wrong)
  assert min(found.values()) > COUNT // 20  # it is no test of one of them
