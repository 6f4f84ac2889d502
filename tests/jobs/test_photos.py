"""Jobs on folders of photos, as they come."""

import json

import numpy as np
import pytest
from PIL import Image

from igpt_jax import errors
from igpt_jax.jobs import evaluate, finetune, lowdata, pretrain, probe, quality, sample
from support.quickstart import call, shrunk
from support.tiny import on_one_device

pytestmark = pytest.mark.usefixtures("old_files")


def make_photos(root, names):
  """Photos that a small model can tell apart: warm ones and cold ones."""
  rng = np.random.default_rng(0)
  for i, name in enumerate(names):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    pixels = np.array(((220, 120, 30), (30, 90, 210))[i % 2]) + rng.integers(-30, 30, (20, 16, 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name)
  return str(root)


JOBS = {
  "flat": ([f"{'album/' * (i % 2)}{i}.png" for i in range(24)], (evaluate, sample)),
  "classes": (
    [f"{'cold' if i % 2 else 'warm'}/{i}.png" for i in range(40)],
    (evaluate, sample, quality, probe, lowdata, finetune),
  ),
  "train alone": ([f"train/{i}.png" for i in range(40)], (evaluate, sample)),
}


@pytest.mark.parametrize("layout", JOBS)
def test_jobs_work_after_training(tmp_path, layout):
  names, jobs = JOBS[layout]
  root, workdir = make_photos(tmp_path / "my", names), tmp_path / "run"
  settings = shrunk(**{
    "data.name": "folder", "data.path": root, "palette.size": 12, "lowdata.labels_per_class": (1,),
    "lowdata.trials": 1, "features.baselines": (), "finetune.steps": 2, "finetune.eval_every": 2,
    "finetune.warmup_steps": 1, "quality.images": 2,
  })  # fmt: skip
  on_one_device(pretrain, settings, str(workdir))
  for job in jobs:
    job.run(settings, str(workdir))
  held_out = "validation[4 of 40]" if layout == "train alone" else " test["
  assert held_out in json.loads((workdir / "evaluation.json").read_text())["data"]
  assert held_out in json.loads((workdir / "sample.json").read_text())["completed_from"]
  for job in {probe, lowdata, finetune}.difference(jobs):
    with pytest.raises(errors.UserError, match="has no labels; a classifier needs"):
      job.run(settings, str(workdir))


def test_the_command_on_a_folder_with_damaged_photos(album, tmp_path):
  """And again, from its checkpoint."""
  overrides = [
    "--config.data.name=folder", f"--config.data.path={album}", "--config.train.steps=4",
    "--config.train.warmup_steps=1", "--config.model.n_layer=1", "--config.model.n_embd=16",
    "--config.train.batch_size=8", "--config.train.checkpoint_every=2",
  ]  # fmt: skip
  for _ in range(2):
    done = call("configs/quickstart.py", tmp_path / "run", *overrides)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("left out 5 files") == 1 and "Traceback" not in done.stderr
  assert "resuming at step 4 of 4" in done.stdout
