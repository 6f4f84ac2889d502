"""Pretraining on two slices: the numbers of one device, and checkpoints that go from one to the other."""

import jax
import numpy as np
import pytest

from igpt_jax import checkpoint
from igpt_jax.errors import UserError
from igpt_jax.jobs import evaluate, pretrain
from igpt_jax.reporting import metrics
from support import tiny
from support.quickstart import params_of, shrunk, stop_at

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(autouse=True)
def two_slices():
  tiny.mesh_of((8, 1, 1))
  with tiny.in_slices(*jax.devices()[:8]):
    yield


def losses(workdir):
  return {
    (record["step"], name): record[name]
    for record in metrics.read_jsonl(workdir / "metrics.jsonl")
    for name in ("loss", "validation_loss")
    if name in record
  }


def train(workdir, stop=None, **mesh):
  """Pretrains on two slices of four devices, or on one device."""
  settings = shrunk(**{f"mesh__{axis}": size for axis, size in mesh.items()})
  with pytest.MonkeyPatch.context() as patch:
    if stop:
      stop_at(patch, stop)
    if mesh:
      pretrain.run(settings, str(workdir))
    else:
      tiny.on_one_device(pretrain, settings, str(workdir))
  return settings


def assert_same_run(workdir, one_device):
  found, expected = losses(workdir), losses(one_device)
  assert list(found) == list(expected)
  np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
  trained, alone = params_of(workdir), params_of(one_device)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), trained, alone)


def test_two_slices_have_the_losses_of_one_device(tiny_run, tmp_path):
  settings = train(tmp_path, slices=-1, fsdp=2)
  assert_same_run(tmp_path, tiny_run)
  evaluate.run(settings, str(tmp_path))
  assert (tmp_path / "evaluation.json").exists()


@pytest.mark.parametrize(
  "first, then",
  [
    ({"slices": 2, "fsdp": 4}, {}),
    pytest.param({}, {"slices": 2}, marks=pytest.mark.slow),
  ],
)
def test_a_checkpoint_goes_from_two_slices_to_one_device_and_back(tiny_run, tmp_path, first, then):
  train(tmp_path, stop=6, **first)
  assert checkpoint.find(str(tmp_path))[1] == 6
  train(tmp_path, **then)
  assert_same_run(tmp_path, tiny_run)


def test_slices_that_are_not_there_are_said_before_anything_is_written(tmp_path):
  workdir = tmp_path / "run"
  with pytest.raises(UserError, match=r"mesh.slices: 3; the 8 devices .* in 2 slices"):
    pretrain.run(shrunk(mesh__slices=3), str(workdir))
  assert not list(workdir.glob("checkpoints/*"))
