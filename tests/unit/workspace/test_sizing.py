"""Sizes of a run: larger on faster machines, small for few images, chosen once, kept where given."""

import dataclasses
import math
import types

import jax
import optax
import pytest

from igpt_jax.config import choices
from igpt_jax.config.fields import value_of, with_values
from igpt_jax.errors import DoesNotFit, UserError
from igpt_jax.parallel import hardware
from igpt_jax.training import compilation
from igpt_jax.workspace import memory, sizing, workdir
from support import own_checkpoint
from support.sizing import CPU, asking, begin, claim, folder_of, record, sized
from support.tiny import mesh_of

pytestmark = pytest.mark.usefixtures("quick_compile")


def flops(settings):
  settled = choices.settle(settings)
  model = choices.model_config(settled)
  return compilation.flops_per_image(model)


def test_a_faster_machine_trains_a_larger_model(photos, tmp_path, machine):
  """In the time that it is given, of which a part is left for what goes on beside the steps."""
  costs = []
  for speed in (CPU / 100, CPU / 4, CPU, 100 * CPU):
    machine(speed)
    found = sized(asking(photos), tmp_path)
    costs.append(flops(found))
    took = found.train.steps * found.train.batch_size * flops(found) / speed
    assert took <= 12 * 60 or found.train.steps == 20
    assert record(tmp_path)["first_minutes"] <= 12.01 or found.train.steps == 20
  assert costs == sorted(costs) and len(set(costs)) == 4


def test_two_cores_and_200_photos(photos, tmp_path, machine, capsys):
  """What a student has: both are told before it starts, what is chosen and how long it takes."""
  timed = machine(CPU)
  found = sized(asking(photos), tmp_path)
  assert (found.data.resolution, found.model.n_layer, found.model.n_embd) == (24, 4, 128)
  assert timed == [(16, 64, 16), (24, 128, 16)]
  train = found.train
  assert train.eval_every == train.checkpoint_every and train.steps // train.eval_every >= 5
  assert 0 < train.warmup_steps < train.steps / 5 and 1 <= train.log_every <= 50
  said = capsys.readouterr().out
  assert (
    "sizing: 24×24 pixels of 256 colours, 4 layers of 128, rope2d positions; a step of 16 images takes"
    in said
  )
  good = math.ceil(record(tmp_path)["good_minutes"])
  assert "sizing: about 12 minutes on this machine for a first result" in said
  assert f"for a good one (--config.sizing.minutes={good})" in said and good > 12


def test_few_images_are_seen_a_bounded_number_of_times(tmp_path, machine, capsys):
  machine(1000 * CPU)
  few = folder_of(tmp_path, 20)
  found = sized(asking(few), tmp_path / "run")
  assert found.train.steps * found.train.batch_size < 130 * 20
  assert found.data.resolution == 16
  assert "with so few images, more steps would only learn them by heart" in capsys.readouterr().out


def test_a_size_that_is_slower_than_extrapolated_is_left(photos, tmp_path, monkeypatch):
  def seconds(settings, model, mesh):
    slower = 10 if settings.data.resolution == 24 else 1
    return slower * compilation.flops_per_image(model) * settings.train.batch_size / CPU

  monkeypatch.setattr(sizing, "step_seconds", seconds)
  found = sized(asking(photos), tmp_path)
  assert (found.data.resolution, found.model.n_embd) == (16, 128)


def refuse(resolution, error, patch):
  """Has the timing of a step at a resolution end with an error."""

  def seconds(settings, model, mesh):
    if settings.data.resolution == resolution:
      raise error
    return compilation.flops_per_image(model) * settings.train.batch_size / CPU

  patch.setattr(sizing, "step_seconds", seconds)


def test_a_size_that_does_not_fit_the_memory_is_left(photos, tmp_path, monkeypatch):
  refuse(24, DoesNotFit("training: a step needs too much; fix: less"), monkeypatch)
  assert sized(asking(photos), tmp_path).data.resolution == 16


def test_another_error_of_a_size_is_not_taken_for_a_lack_of_memory(photos, tmp_path, monkeypatch):
  refuse(24, UserError("train.steps: too few"), monkeypatch)
  with pytest.raises(UserError, match=r"train\.steps: too few"):
    sized(asking(photos), tmp_path)


def test_what_is_too_large_is_told_from_other_mistakes(monkeypatch):
  monkeypatch.setattr(hardware, "memory_bytes", lambda device: 1)
  model, mesh = choices.model_config(choices.settle(asking("any")), n_vocab=9), mesh_of()
  with pytest.raises(DoesNotFit, match="parameters"):
    memory.check_state(model, optax.sgd(0.1), mesh)
  with pytest.raises(DoesNotFit, match="a step needs"):
    memory.check_step(types.SimpleNamespace(needed_bytes=2), mesh)


def test_a_given_decay_must_suit_the_chosen_steps_alone(photos, tmp_path, monkeypatch):
  """Not those of the plans that are only timed; and it is refused before anything is written."""
  monkeypatch.setattr(sizing.device, "compile_training_step", lambda *args: None)
  monkeypatch.setattr(sizing.device, "step_call", lambda *args: None)
  monkeypatch.setattr(sizing.memory, "check_step", lambda *args: None)
  of_step = {"step": types.SimpleNamespace(seconds=0.02)}
  monkeypatch.setattr(sizing.device, "take_turns", lambda *args: of_step)
  given = {"train.schedule": "wsd", "train.warmup_steps": 50}
  found = sized(asking(photos, **given, **{"train.decay_steps": 400}), tmp_path / "run")
  assert (found.train.schedule, found.train.decay_steps) == ("wsd", 400)
  assert found.train.steps > 450 and found.train.warmup_steps == 50
  with pytest.raises(UserError, match=r"a decay of 900000 leave no step between them; .*fix: more"):
    sized(asking(photos, **given, **{"train.decay_steps": 900_000}), tmp_path / "other")
  assert not (tmp_path / "other" / "sizing.json").exists()


def test_what_is_given_is_kept(photos, tmp_path, machine):
  machine(CPU)
  given = {
    "data.resolution": 12, "model.n_layer": 3, "train.batch_size": 24, "train.steps": 77,
    "train.learning_rate": 1e-4, "palette.size": 32,
  }  # fmt: skip
  found = sized(asking(photos, **given), tmp_path)
  for name, value in given.items():
    assert value_of(found, name) == value, name
  assert found.train.eval_every <= 77 and found.model.n_embd
  by_name = sized(asking(photos, **{"model.size": "s"}), tmp_path)
  assert (by_name.model.n_layer, by_name.train.learning_rate) == (0, 0.0)
  own_palette = sized(asking(photos, **{"palette.path": "default"}), tmp_path)
  assert own_palette.palette.size == 0


def test_without_minutes_nothing_is_chosen(photos, tmp_path, machine):
  timed = machine(CPU)
  settings = asking(photos, 0.0)
  assert sized(settings, tmp_path) is settings and not timed


def test_trained_weights_keep_their_model(photos, tmp_path, machine):
  """Their resolution is taken, their shape and palette left to them, and batch and steps chosen."""
  timed = machine(CPU)
  start = own_checkpoint.write(tmp_path / "weights")
  found = sized(asking(photos, init_from=start), tmp_path / "run")
  assert found.data.resolution == 4 and found.train.steps > 20
  assert (found.model.n_layer, found.palette.size) == (0, 0)
  assert {width for _, width, _ in timed} == {16}
  assert found.train.learning_rate == 1e-3


def test_a_run_is_sized_once(photos, tmp_path, machine, capsys):
  timed = machine(CPU)
  first = begin(asking(photos), tmp_path)
  timed.clear()
  machine(CPU / 50)
  assert sized(asking(photos), tmp_path) == first and not timed
  workdir.check(first, str(tmp_path))
  capsys.readouterr()
  assert sized(asking(photos, 6.0), tmp_path).train.steps == first.train.steps
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith("sizing.minutes: 6 changes nothing: the run was sized for ")


def test_more_minutes_are_more_steps(photos, tmp_path, machine, capsys):
  """The time that was measured decides, not this machine's today; always the same number of steps."""
  machine(CPU)
  first = begin(asking(photos, 1.0), tmp_path)
  timed = machine(CPU / 50)
  timed.clear()
  longer = sized(asking(photos, 3.0), tmp_path)
  assert longer.train.steps == pytest.approx(3 * first.train.steps, rel=0.02) and not timed
  assert sized(asking(photos, 3.0), tmp_path) == longer
  kept = {"train.steps": first.train.steps, "sizing.minutes": 1.0}
  assert with_values(longer, kept) == first
  said = capsys.readouterr().out
  told = f"sizing: 3 minutes instead of 1: {longer.train.steps:,} steps instead of"
  assert f"{told} {first.train.steps:,}" in said
  (tmp_path / "sizing.json").unlink()
  with pytest.raises(UserError, match=r"sizing.minutes: 3; .*fix: --config.train.steps="):
    sized(asking(photos, 3.0), tmp_path)


def test_a_run_that_was_not_sized_stays_as_it_is(photos, tmp_path, machine):
  timed = machine(CPU)
  claim(asking(photos, 0.0), tmp_path)
  settings = asking(photos)
  assert sized(settings, tmp_path) is settings and not timed


def test_a_start_without_a_checkpoint_binds_nothing(photos, tmp_path, machine):
  """Neither its size, nor that it had none, nor where its photos lie."""
  machine(CPU)
  workdir.claim(asking(photos, 0.0), str(tmp_path))
  found = sized(asking(photos), tmp_path)
  assert found.data.resolution == 24
  machine(CPU / 50)
  assert sized(asking(photos, 60.0), tmp_path).train.steps != found.train.steps
  moved = dataclasses.replace(found, data=dataclasses.replace(found.data, path="elsewhere"))
  workdir.claim(moved, str(tmp_path))
  assert workdir.read(str(tmp_path))["data.path"] == "elsewhere"


def test_many_devices_share_a_batch(photos, tmp_path, machine):
  machine(CPU)
  found = sizing.size(asking(photos), str(tmp_path), mesh_of((jax.device_count(), 1, 1)))
  assert found.train.batch_size % jax.device_count() == 0
