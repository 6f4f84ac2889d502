"""Training with programs that were read, compiled and kept, or neither."""

import pytest

from igpt_jax.jobs import pretrain
from igpt_jax.reporting import metrics
from support.compiled import kept_in, own_cache, start
from support.quickstart import assert_same, params_of, shrunk
from support.tiny import on_one_device


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
  """A process as a person has it: the tests' own cache comes back at the end."""
  yield from own_cache(monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_training_is_the_same_to_the_bit(tmp_path, capsys):
  """Donated arrays, the evaluation, and the run's parameters: compiled, kept, read, and without a cache."""
  steps = {"train.steps": 8, "train.checkpoint_every": 8}
  for name, setting in (("off", "off"), ("cold", tmp_path / "c"), ("warm", tmp_path / "c")):
    start(setting)
    on_one_device(pretrain, shrunk(**steps), str(tmp_path / name))
    if name == "cold":
      kept = kept_in(tmp_path / "c")
      assert any("train_step" in path for path in kept) and any("eval" in path for path in kept)
  assert kept_in(tmp_path / "c") == kept  # nothing was compiled
  records = [
    metrics.read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("off", "cold", "warm")
  ]
  numbers = [
    [{key: record.get(key) for key in ("step", "loss", "validation_loss")} for record in run]
    for run in records
  ]
  assert numbers[0] == numbers[1] == numbers[2]
  for name in ("cold", "warm"):
    assert_same(params_of(tmp_path / "off"), params_of(tmp_path / name))
