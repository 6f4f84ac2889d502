"""A run of a size that was chosen: it trains, and goes on."""

import pytest

from igpt_jax.jobs import pretrain
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
