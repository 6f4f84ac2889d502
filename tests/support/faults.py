"""Runs that are killed or stopped again and again: their command, and what of them is compared."""

import contextlib
import os

from igpt_jax import checkpoint
from igpt_jax.reporting import metrics
from support.lives import Lives

LONG = os.environ.get("IGPT_JAX_FAULTS") == "long"


SEED = int(os.environ.get("IGPT_JAX_FAULTS_SEED", "0"))


SECONDS = 180  # that a life may take


TINY = {
  "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 16, "train.batch_size": 16, "train.steps": 24,
  "train.warmup_steps": 2, "train.log_every": 1, "train.eval_every": 6, "train.eval_images": 32,
  "train.checkpoint_every": 2, "train.max_to_keep": 2, "train.keep_period": 10,
}  # fmt: skip


@contextlib.contextmanager
def lives(tmp_path, **environment):
  started = Lives(
    JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    JAX_COMPILATION_CACHE_DIR=str(tmp_path / "compiled"),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    **environment,
  )
  try:
    yield started
  finally:
    started.close()


def args_of(workdir, **overrides):
  settings = {**TINY, **overrides}
  return [
    "--config=configs/quickstart.py",
    f"--workdir={workdir}",
    *(f"--config.{name}={value}" for name, value in settings.items()),
  ]


def told(workdir):
  """All records without what is of the clock."""
  return [
    {
      name: record[name]
      for name in ("step", "loss", "validation_loss", "grad_norm")
      if name in record
    }
    for record in metrics.read_jsonl(os.path.join(workdir, "metrics.jsonl"))
  ]


def result(workdir):
  """Records; and checksums of parameters, moments and RNG of every checkpoint, by their step, those of
  parameters compared with what is on the disk."""
  sums = {}
  for step in checkpoint.whole_steps(str(workdir)):
    found = checkpoint.describe(checkpoint.path_of(str(workdir), step))
    checkpoint.load_host_params(found)
    sums[step] = dict(found.sums)
  return told(workdir), sums
