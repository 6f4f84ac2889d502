"""A run whose model has every option the paper's hasn't, by CompleteP: trained, resumed, read by other jobs."""

import json

import numpy as np
import pytest

from igpt_jax import checkpoint
from igpt_jax.config import choices
from igpt_jax.errors import UserError
from igpt_jax.jobs import convert, evaluate, finetune, pretrain, probe, sample
from igpt_jax.model.parametrisation import Scale
from igpt_jax.reporting import metrics
from support import tiny
from support.quickstart import assert_same, params_of, shrunk, stop_at
from support.tiny import on_one_device

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile", "one_device")]

STANDARD = {f"model.{name}": value for name, value in tiny.ALL_OPTIONS.items()}
OPTIONS = STANDARD | {
  "model.parametrisation": "complete_p", "model.base_embd": 4, "model.base_layer": 1
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("options") / "run"
  on_one_device(pretrain, shrunk(**OPTIONS), str(workdir))
  return workdir


def test_it_is_recorded_and_resumed_bit_for_bit(run, tmp_path, monkeypatch):
  config = checkpoint.describe(str(run)).config
  assert config.options == tiny.ALL_OPTIONS and config.scale == Scale(width=4.0, depth=2.0)
  with monkeypatch.context() as patch:
    stop_at(patch, 7)
    on_one_device(pretrain, shrunk(**OPTIONS), str(tmp_path))
  with pytest.raises(UserError, match=r"model\.qk_norm: True there, False here"):
    on_one_device(pretrain, shrunk(**{**OPTIONS, "model.qk_norm": False}), str(tmp_path))
  with pytest.raises(UserError, match=r"model\.parametrisation: complete_p there, standard here"):
    on_one_device(pretrain, shrunk(**STANDARD), str(tmp_path))
  on_one_device(pretrain, shrunk(**OPTIONS), str(tmp_path))
  assert_same(params_of(tmp_path), params_of(run))
  losses = [
    [r["loss"] for r in metrics.read_jsonl(w / "metrics.jsonl") if "loss" in r]
    for w in (run, tmp_path)
  ]
  assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]


def test_other_jobs_take_it(run, tmp_path):
  at = {"checkpoint": str(run), "evaluate.images": 32, "train.eval_images": 32}
  # Their settings name no option: the checkpoint does.
  evaluate.run(shrunk(**at), str(tmp_path))
  exact = json.loads((tmp_path / "evaluation.json").read_text())
  sample.run(shrunk(**at), str(tmp_path))
  assert (tmp_path / "samples.png").exists()
  probe.run(shrunk(**at, **{"features.layers": (1,)}), str(tmp_path))
  probed = json.loads((tmp_path / "probe.json").read_text())
  assert any(row["layer"] == 1 for row in probed["rows"])
  # As likely as in training, of the same images.
  measured = metrics.read_jsonl(run / "metrics.jsonl")
  nats = [r["validation_loss"] for r in measured if "validation_loss" in r]
  assert probed["validation_nats_per_token"] == pytest.approx(nats[-1], abs=1e-5)
  assert 0 < exact["nats_per_token"] < np.log(17) + 0.5
  tuned = tmp_path / "tuned"
  few = {"finetune.steps": 2, "finetune.eval_every": 2, "finetune.images": 32}
  finetune.run(shrunk(**at, **few), str(tuned))
  made = checkpoint.describe(str(tuned / "finetune")).config
  assert made.options == tiny.ALL_OPTIONS and made.scale == Scale(width=4.0, depth=2.0)


def test_rotary_positions_are_evaluated_and_sampled_at_another_size(
  run, tmp_path, tiny_run, capsys
):
  at = {"checkpoint": str(run), "evaluate.images": 16, "data.resolution": 12}
  evaluate.run(shrunk(**at), str(tmp_path))
  assert "was trained at 8×8 pixels, and is used at 12×12" in capsys.readouterr().out
  larger = json.loads((tmp_path / "evaluation.json").read_text())
  assert 0 < larger["nats_per_token"] < 2 * np.log(17)
  sample.run(shrunk(**at, **{"sample.samples": 1, "sample.completions": 1}), str(tmp_path))
  with pytest.raises(
    UserError, match=r"data.resolution: 12; .* trained at 8, and has no positions"
  ):
    evaluate.run(shrunk(**{**at, "checkpoint": str(tiny_run)}), str(tmp_path))
  # Fine-tuning does, and goes on.
  for steps in (2, 4):
    tuned = {"finetune.steps": steps, "finetune.eval_every": 2, "finetune.images": 32}
    finetune.run(shrunk(**at, **tuned), str(tmp_path / "tuned"))
  assert checkpoint.describe(str(tmp_path / "tuned" / "finetune")).config.n_positions == 144
  # Training goes on from it there.
  start = {**OPTIONS, "init_from": str(run), "data.resolution": 12, "train.steps": 2}
  on_one_device(pretrain, shrunk(**start), str(tmp_path / "larger"))
  made = checkpoint.describe(str(tmp_path / "larger"))
  assert made.run["resolution"] == 12 and made.config.n_positions == 144


def test_a_start_keeps_its_checkpoints_options_and_refuses_others(run, tiny_run, tmp_path):
  settings = shrunk(init_from=str(run))
  settled = choices.settle(settings, checkpoint.describe(str(run)).config)
  assert choices.model_config(settled, n_vocab=17).options == tiny.ALL_OPTIONS
  with pytest.raises(
    UserError, match=r"model\.x0_skip: True in the config, False in the checkpoint"
  ):
    on_one_device(
      pretrain, shrunk(**{"init_from": str(tiny_run), "model.x0_skip": True}), str(tmp_path)
    )
  target = {"convert.source": str(run), "convert.target": str(tmp_path / "out")}
  with pytest.raises(
    UserError, match=r"format: openai, but the model was made with model.positions="
  ):
    convert.run(shrunk(**target, **{"convert.format": "openai"}), "")
  convert.run(shrunk(**target, **{"convert.format": "orbax"}), "")
  assert_same(params_of(tmp_path / "out"), params_of(run))
