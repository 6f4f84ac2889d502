"""Where a run goes on in its data, by the step it resumes from and the times it went back."""

import types

import pytest

from igpt_jax.data import pipeline
from igpt_jax.data.sources import DataConfig
from igpt_jax.errors import UserError
from igpt_jax.runner.data_order import DataOrder
from igpt_jax.workspace import rollbacks
from support import tiny


@pytest.fixture
def order(tmp_path):
  split = types.SimpleNamespace(fingerprint="digits train", former_fingerprint="digits")
  return DataOrder(str(tmp_path), split, batch_size=16, seed=7)


def test_a_run_goes_on_with_the_next_batch(order, tmp_path, monkeypatch):
  monkeypatch.setattr(pipeline, "train_batches", lambda *args, **settings: settings)

  def begun(step):
    return order.batches(step, DataConfig(), None, tiny.mesh_of((2, 2, 2)))

  assert begun(0) == {
    "batch_size": 16, "seed": 7, "start_step": 0, "process_index": 0, "process_count": 1
  }  # fmt: skip
  assert begun(5)["start_step"] == 5 and order.position(5)["next_index"] == 80
  rollbacks.record(str(tmp_path), {"step": 9, "what": "rollback", "to": 4})
  seed = rollbacks.order_seeds(str(tmp_path), 7)[1]
  assert begun(4)["seed"] == order.position(4)["seed"] == seed != 7


def test_an_earlier_order_of_the_run_is_its_own(order, tmp_path):
  run = {"data": order.position(4)}
  rollbacks.record(str(tmp_path), {"step": 9, "what": "rollback", "to": 4})
  order.check(4, run)
  with pytest.raises(UserError, match=r"data seed: .* expected 8"):
    order.check(4, {"data": run["data"] | {"seed": 8}})


def test_a_branch_has_the_order_that_its_checkpoint_goes_on_with(order, tmp_path):
  """Later returns to after the checkpoint aren't its own."""
  went_back = (8, 4, 6)  # so that the run goes on from step 4 with the second other order
  for to in went_back:
    rollbacks.record(str(tmp_path), {"step": 9, "what": "spike", "loss": 1.0})
    rollbacks.record(str(tmp_path), {"step": 9, "what": "rollback", "to": to})
  for step, count in ((3, 0), (4, 2), (5, 2), (6, 3), (8, 3)):
    branch = tmp_path / str(step)
    branch.mkdir()
    rollbacks.copy(str(tmp_path), str(branch), step)
    assert rollbacks.rollback_steps(str(branch)) == list(went_back[:count])
  rollbacks.copy(str(tmp_path / "3" / "none"), str(branch), 3)
