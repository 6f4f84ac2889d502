"""A run of a size that was chosen: it trains, and goes on."""

import json
import math

import pytest

from igpt_jax.jobs import pretrain, sample
from igpt_jax.workspace import workdir
from support.sizing import asking, folder_of, record
from support.tiny import on_one_device

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  return folder_of(tmp_path_factory.mktemp("data"), 200)


def test_a_sized_run_trains_and_goes_on(photos, tmp_path):
  """A run by this machine's own times; config.json has what was chosen, by which other jobs go."""
  small = {
    "data.resolution": 4, "model.n_layer": 1, "model.n_head": 1, "model.n_embd": 8,
    "palette.size": 8, "train.batch_size": 8, "palette.images": 20,
  }  # fmt: skip
  settings = asking(photos, 0.001, **small)
  on_one_device(pretrain, settings, str(tmp_path))
  stored = workdir.read(str(tmp_path))
  assert stored["train.steps"] == record(tmp_path)["chosen"]["train.steps"] >= 20
  result = (tmp_path / "training.json").read_bytes()
  on_one_device(pretrain, settings, str(tmp_path))
  assert (tmp_path / "training.json").read_bytes() == result


def test_a_run_from_the_packaged_model_trains_goes_on_and_completes(photos, tmp_path, capsys):
  """The second start trains longer, from the run's own checkpoint."""
  small = {
    "data.resolution": 5,
    "train.batch_size": 8,
    "sizing.packaged": True,
    "model.positions": "rope2d",
  }
  flat = photos / "train" / "all"  # of which some are held out
  settings = asking(flat, 0.001, **small)
  on_one_device(pretrain, settings, str(tmp_path))
  assert "starting from" in (out := capsys.readouterr().out) and "cifar10_16.safetensors" in out
  stored = workdir.read(str(tmp_path))
  assert stored["init_from"] == "packaged"
  loss = json.loads((tmp_path / "training.json").read_text())["loss"]
  assert loss < math.log(512) - 1  # which random values take longer to reach
  longer = asking(flat, 0.001, **small, **{"train.steps": stored["train.steps"] + 2})
  on_one_device(pretrain, longer, str(tmp_path))
  assert "starting from" not in capsys.readouterr().out
  sample.run(longer, str(tmp_path))
  assert (tmp_path / "completions.png").exists()
