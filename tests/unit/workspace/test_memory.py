"""What a training takes of a device's memory, and what is said where there isn't as much."""

import types

import pytest

from igpt_jax.errors import DoesNotFit
from igpt_jax.model.image_gpt import count_params
from igpt_jax.parallel import hardware
from igpt_jax.training.optimizer import OptimizerConfig, make_optimizer
from igpt_jax.workspace import memory
from support import tiny


@pytest.mark.parametrize(("optimizer", "moments"), [("adam", 2.0), ("muon", 1.0)])
def test_a_state_has_a_value_a_gradient_and_the_optimizers_moments(optimizer, moments):
  """Muon has one moment, but for tables and gains, which are Adam's."""
  config = tiny.make_config(n_layer=8, n_embd=128, n_vocab=4)
  tx = make_optimizer(OptimizerConfig(learning_rate=1e-3, steps=10, optimizer=optimizer))
  found = memory.training_bytes(config, tx, tiny.mesh_of()) / count_params(config)
  assert found == pytest.approx(4 * (2 + moments), rel=0.01)
  of_eight = memory.training_bytes(config, tx, tiny.mesh_of((1, 8, 1)))
  assert of_eight == pytest.approx(found * count_params(config) / 8)


@pytest.mark.parametrize(
  ("job", "named", "unnamed"),
  [
    ("pretrain", "train.batch_size", "finetune."),
    ("finetune", "finetune.batch_size", "train."),
    ("probe", "probe.batch_size", "train."),
  ],
)
def test_a_step_that_does_not_fit_names_its_own_jobs_settings(monkeypatch, job, named, unnamed):
  monkeypatch.setattr(hardware, "memory_bytes", lambda mesh: 1)
  with pytest.raises(DoesNotFit, match="a step needs") as refused:
    memory.check_step(types.SimpleNamespace(needed_bytes=2), tiny.mesh_of(), job)
  assert named in str(refused.value) and unnamed not in str(refused.value)
