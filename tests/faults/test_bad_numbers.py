"""Losses and gradients that aren't finite, and losses that jump: as configured, and exact afterwards."""

import dataclasses
import json
import os
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpt_jax import checkpoint
from igpt_jax.config.read import settings_of
from igpt_jax.config.run_fields import GuardConfig
from igpt_jax.errors import UserError
from igpt_jax.jobs import finetune, pretrain
from igpt_jax.parallel import sharding
from igpt_jax.parallel.sharding import make_mesh
from igpt_jax.reporting import metrics
from igpt_jax.runner import guard, loop
from igpt_jax.training import optimizer
from igpt_jax.training import state as state_lib
from igpt_jax.training import step as step_lib
from igpt_jax.training.bad_numbers import BadNumbers
from igpt_jax.training.objectives import make_objective
from support import tiny
from support.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]


SMALL = {
  "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 16, "train.batch_size": 16,
  "train.steps": 16, "train.warmup_steps": 2, "train.log_every": 1, "train.eval_every": 8,
  "train.checkpoint_every": 4, "train.eval_images": 32, "train.max_to_keep": 10,
}  # fmt: skip


def config_of(**overrides):
  config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]()
  config.update_from_flattened_dict({**SMALL, **overrides})
  return settings_of(config)


ORIGINAL = step_lib.make_train_step


def step_that(factor):
  """A make_train_step whose losses are multiplied by factor(step)."""

  def faulty(config, objective, *rest):
    def train_step(state, batch):
      def changed(model, tokens, keys):
        nll, weight = objective(model, tokens, keys)
        return nll * factor(state.step), weight

      return ORIGINAL(config, changed, *rest)(state, batch)

    return train_step

  return faulty


def params_of(workdir, step=None):
  found = checkpoint.describe(str(workdir if step is None else workdir / "checkpoints" / str(step)))
  mesh = make_mesh(devices=jax.devices()[:1])
  return jax.tree.map(np.asarray, checkpoint.load_params(found, mesh))


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def losses(workdir):
  records = metrics.read_jsonl(workdir / "metrics.jsonl")
  return {r["step"]: r["loss"] for r in records if "loss" in r}


def incidents(workdir):
  with open(workdir / "incidents.jsonl", encoding="utf-8") as lines:
    return [json.loads(line) for line in lines]


def at(*steps):
  return lambda step: jnp.where(jnp.isin(step, jnp.asarray(steps)), jnp.nan, 1.0)


def test_an_update_that_is_not_finite_is_left_out():
  """Bit by bit, it is as if that step had done nothing but count; and it is all counted."""
  config = tiny.make_config()
  settings = optimizer.OptimizerConfig(learning_rate=0.01, steps=9, clip_norm=1.0)
  schedule, tx = optimizer.make_schedule(settings), optimizer.make_optimizer(settings)
  objective = make_objective("autoregressive", 0.15)
  step = jax.jit(step_that(at(3, 4, 6))(config, objective, tx, schedule))
  begun = state_lib.init_state(config, tx, 0)
  batches = [{"tokens": tiny.random_tokens(config, 4, seed=i)} for i in range(9)]
  state, skips = begun, begun
  for i, batch in enumerate(batches):
    state, told = step(state, batch)
    if i in (3, 4, 6):
      skips = dataclasses.replace(skips, step=skips.step + 1)
    else:
      skips, _ = step(skips, batch)
    for name in ("params", "opt_state", "rng", "step"):
      assert_same(getattr(state, name), getattr(skips, name))
    in_row = {3: 1, 4: 2, 6: 1}.get(i, 0)
    in_all = sum(i >= bad for bad in (3, 4, 6))
    assert (int(told["skipped_in_row"]), int(told["skipped_updates"])) == (in_row, in_all)
    assert np.isfinite(told["loss"]) == (i not in (3, 4, 6))


def test_counts_go_on_with_the_run(tmp_path, monkeypatch):
  monkeypatch.setattr(step_lib, "make_train_step", step_that(at(2)))
  tiny.on_one_device(pretrain, config_of(**{"train.steps": 16, "seed": 1}), str(tmp_path / "whole"))
  stopped = config_of(seed=1)
  asked = loop.StopSignal.asked
  monkeypatch.setattr(
    loop.StopSignal, "asked", lambda self, step: "SIGTERM" if step == 6 else asked(self, step)
  )
  tiny.on_one_device(pretrain, stopped, str(tmp_path / "resumed"))
  monkeypatch.setattr(loop.StopSignal, "asked", asked)
  tiny.on_one_device(pretrain, stopped, str(tmp_path / "resumed"))
  assert_same(params_of(tmp_path / "whole"), params_of(tmp_path / "resumed"))
  last = metrics.read_jsonl(tmp_path / "resumed" / "metrics.jsonl")[-2]
  assert last["skipped_updates"] == 1 and last["step"] == 16


def test_goes_back_with_other_data(tmp_path, monkeypatch, capsys):
  """After two bad steps in a row: to the checkpoint before, other images, and on to the end."""
  rolled = []
  make_go_back = guard.go_back

  def go_back(*arguments):
    make_go_back(*arguments)
    rolled.append(True)
    jax.clear_caches()  # the step is the same one, traced again

  monkeypatch.setattr(guard, "go_back", go_back)

  def faulty(*arguments):
    return step_that(lambda s: jnp.where((s >= 6) & (not rolled), jnp.nan, 1.0))(*arguments)

  monkeypatch.setattr(step_lib, "make_train_step", faulty)
  tiny.on_one_device(pretrain, config_of(**{"guard.in_row": 4}), str(tmp_path))
  assert rolled == [True]
  assert [each["what"] for each in incidents(tmp_path)] == ["not finite", "rollback"]
  assert incidents(tmp_path)[1] == {"step": 10, "what": "rollback", "to": 4}
  assert "going back to step 4" in capsys.readouterr().out
  assert sorted(losses(tmp_path)) == list(range(1, 17))  # each step once
  assert all(np.isfinite(list(losses(tmp_path).values())))
  assert sorted(os.listdir(tmp_path / "checkpoints")) == ["12", "16", "4", "8", "8.rolled_back"]
  dump = tmp_path / "incidents" / "10"
  diagnosis = json.loads((dump / "diagnosis.json").read_text())
  assert diagnosis["well_until"] == 6 and diagnosis["metrics"]["loss"] == "nan"
  assert diagnosis["parameters"]["['wte']"]["not_finite"] == 0
  with np.load(dump / "batch.npz", allow_pickle=False) as batch:
    assert batch["tokens"].shape == (16, 64)

  # Up to the checkpoint it is the same run, then with other images, as if begun so.
  monkeypatch.setattr(step_lib, "make_train_step", ORIGINAL)
  tiny.on_one_device(pretrain, config_of(), str(tmp_path / "plain"))
  plain, gone_back = losses(tmp_path / "plain"), losses(tmp_path)
  assert [plain[s] for s in range(1, 5)] == [gone_back[s] for s in range(1, 5)]
  assert plain[5] != gone_back[5]


@pytest.mark.parametrize(("log_every", "bad"), [(1, 7), (3, 9), (1, 16)])
def test_the_batch_that_is_kept_is_the_bad_one(tmp_path, monkeypatch, log_every, bad):
  """Though the next one is read, and trained on, before the numbers of a step are looked at."""
  batches, put = [], sharding.put_batch
  monkeypatch.setattr(
    sharding, "put_batch", lambda batch, mesh: (batches.append(batch), put(batch, mesh))[1]
  )
  settings = {"train.steps": 16, "train.log_every": log_every, "guard.in_row": 1}
  settings |= {"train.eval_every": 0, "guard.then": "stop"}
  tiny.on_one_device(pretrain, config_of(**settings), str(tmp_path / "good"))
  read = [batch["tokens"] for batch in batches if "mask" not in batch]
  assert len(read) == 16
  marked = jnp.asarray(read[bad - 1])

  def faulty(config, objective, *rest):
    def changed(model, tokens, keys):
      nll, weight = objective(model, tokens, keys)
      return jnp.where((tokens == marked).all(), jnp.nan, nll), weight

    return ORIGINAL(config, changed, *rest)

  monkeypatch.setattr(step_lib, "make_train_step", faulty)
  with pytest.raises(BadNumbers, match=f"step {bad}: loss nan"):
    tiny.on_one_device(pretrain, config_of(**settings), str(tmp_path / "bad"))
  dump = tmp_path / "bad" / "incidents" / str(bad)
  with np.load(dump / "batch.npz", allow_pickle=False) as kept:
    np.testing.assert_array_equal(kept["tokens"], read[bad - 1])
  diagnosis = json.loads((dump / "diagnosis.json").read_text())
  assert diagnosis["parameters_of_step"] == min(bad + 1, 16)


def test_goes_on_after_it_went_back(tmp_path, monkeypatch):
  """Interrupted after a rollback, the run goes on with the same other data."""
  rolled = []
  go_back = guard.go_back
  monkeypatch.setattr(
    guard, "go_back", lambda *a: (go_back(*a), rolled.append(True), jax.clear_caches())
  )

  def faulty(*arguments):
    return step_that(lambda s: jnp.where((s == 5) & (not rolled), jnp.nan, 1.0))(*arguments)

  monkeypatch.setattr(step_lib, "make_train_step", faulty)
  settings = config_of(**{"guard.in_row": 1})
  tiny.on_one_device(pretrain, settings, str(tmp_path / "whole"))
  rolled.clear()
  asked = loop.StopSignal.asked
  monkeypatch.setattr(
    loop.StopSignal,
    "asked",
    lambda self, step: "SIGTERM" if rolled and step == 9 else asked(self, step),
  )
  tiny.on_one_device(pretrain, settings, str(tmp_path / "cut"))
  monkeypatch.setattr(loop.StopSignal, "asked", asked)
  tiny.on_one_device(pretrain, settings, str(tmp_path / "cut"))
  assert_same(params_of(tmp_path / "whole"), params_of(tmp_path / "cut"))
  assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_a_request_to_stop_outlives_going_back(tmp_path, monkeypatch, capsys):
  """Asked to stop at the step whose numbers make it go back, it goes back and stops there."""
  signals = []

  class Heard(loop.StopSignal):
    def __init__(self, *given):
      super().__init__(*given)
      signals.append(self)

  look = guard.Guard.look

  def asked_meanwhile(self, step, *given):
    if step == 5:
      signals[0]._answer("SIGTERM")
    look(self, step, *given)

  monkeypatch.setattr(loop, "StopSignal", Heard)
  monkeypatch.setattr(guard.Guard, "look", asked_meanwhile)
  monkeypatch.setattr(step_lib, "make_train_step", step_that(at(5)))
  tiny.on_one_device(pretrain, config_of(**{"guard.in_row": 1}), str(tmp_path))
  assert len(signals) == 2 and checkpoint.latest_step(str(tmp_path)) == 4
  assert "stopped by SIGTERM at step 4" in capsys.readouterr().out


def test_stops_when_it_is_to_stop(tmp_path, monkeypatch):
  monkeypatch.setattr(step_lib, "make_train_step", step_that(at(5, 6, 7)))
  with pytest.raises(BadNumbers, match="3 updates in a row were left out"):
    tiny.on_one_device(
      pretrain, config_of(**{"guard.in_row": 3, "guard.then": "stop"}), str(tmp_path)
    )
  assert max(losses(tmp_path)) == 8
  assert not [n for n in os.listdir(tmp_path / "checkpoints") if n.endswith("rolled_back")]


def test_goes_back_only_so_often(tmp_path, monkeypatch):
  monkeypatch.setattr(
    step_lib, "make_train_step", step_that(lambda s: jnp.where(s >= 5, jnp.nan, 1.0))
  )
  with pytest.raises(UserError, match="it went back 2 times already"):
    tiny.on_one_device(
      pretrain, config_of(**{"guard.in_row": 1, "guard.rollbacks": 2}), str(tmp_path)
    )
  assert [each["what"] for each in incidents(tmp_path)].count("rollback") == 2


def test_nowhere_to_go_back_to(tmp_path, monkeypatch):
  monkeypatch.setattr(step_lib, "make_train_step", step_that(at(1, 2)))
  with pytest.raises(UserError, match="no checkpoint of step 1 or before"):
    tiny.on_one_device(pretrain, config_of(**{"guard.in_row": 2}), str(tmp_path))


@pytest.mark.parametrize("then", ["warn", "rollback", "stop"])
def test_spikes(tmp_path, monkeypatch, capsys, then):
  rolled = []
  go_back = guard.go_back
  monkeypatch.setattr(
    guard, "go_back", lambda *a: (go_back(*a), rolled.append(True), jax.clear_caches())
  )

  def faulty(*arguments):
    return step_that(lambda s: jnp.where((s == 9) & (not rolled), 3.0, 1.0))(*arguments)

  monkeypatch.setattr(step_lib, "make_train_step", faulty)
  settings = config_of(**{"guard.spike_then": then})
  if then == "stop":
    with pytest.raises(BadNumbers, match="the loss jumped to"):
      tiny.on_one_device(pretrain, settings, str(tmp_path))
    return
  tiny.on_one_device(pretrain, settings, str(tmp_path))
  out = capsys.readouterr().out
  assert "step 10: the loss jumped to" in out
  assert ("going back to step 8" in out) == (then == "rollback")
  expected = ["spike", "rollback"] if then == "rollback" else ["spike"]
  assert [each["what"] for each in incidents(tmp_path)] == expected
  assert sorted(losses(tmp_path)) == list(range(1, 17))


def test_fine_tuning_is_guarded_too(tmp_path, monkeypatch):
  from igpt_jax.training import joint as finetune_lib

  make = finetune_lib.make_finetune_step

  def faulty(*arguments):
    inner = make(*arguments)

    def train_step(state, batch):
      bad = jnp.where(state.step == 2, jnp.nan, 0.0)
      params = jax.tree.map(lambda leaf: leaf + bad, state.params)
      new, told = inner(dataclasses.replace(state, params=params), batch)
      return new, told

    return train_step

  monkeypatch.setattr(finetune_lib, "make_finetune_step", faulty)
  settings = config_of(**{
    "job": "finetune", "finetune.scratch": True, "finetune.steps": 6, "finetune.eval_every": 2,
    "finetune.batch_size": 16, "guard.in_row": 1, "guard.then": "stop",
  })  # fmt: skip
  with pytest.raises(BadNumbers, match="1 updates in a row"):
    tiny.on_one_device(finetune, settings, str(tmp_path))


@pytest.mark.parametrize(
  "settings",
  [{"then": "pray"}, {"in_row": 0}, {"spike": -1.0}, {"rollbacks": -1}, {"spike": float("nan")}],
)
def test_settings_are_checked(settings):
  with pytest.raises(UserError, match=f"config.guard.{next(iter(settings))}"):
    GuardConfig(**settings)
