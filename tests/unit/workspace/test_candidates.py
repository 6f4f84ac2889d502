"""What a sized run begins with: the packaged model, another trained one, or random values."""

import dataclasses
import json

import numpy as np
import pytest

from igpt_jax.config.fields import value_of, with_values
from igpt_jax.data.palette import Palette
from igpt_jax.errors import DoesNotFit, UserError
from igpt_jax.training import compilation
from igpt_jax.workspace import sizing, weights, workdir
from support import own_checkpoint
from support.sizing import CPU, asking, begin, folder_of, photos_config, record, sized

pytestmark = pytest.mark.usefixtures("quick_compile")


def of_rope2d(path, resolution):
  """A checkpoint that nobody trained, without a table of positions."""
  own_checkpoint.write(path, resolution=resolution, positions="rope2d")
  return str(path)


def test_weights_without_a_table_of_positions_go_on_at_larger_images(photos, tmp_path, machine):
  machine(CPU)
  start = of_rope2d(tmp_path / "weights", 4)
  assert sized(asking(photos, init_from=start), tmp_path / "run").data.resolution == 32
  machine(CPU / 1_000)
  assert sized(asking(photos, init_from=start), tmp_path / "slow").data.resolution == 4
  machine(CPU)
  kept = asking(photos, init_from=start, **{"data.resolution": 12})
  assert sized(kept, tmp_path / "kept").data.resolution == 12
  large = of_rope2d(tmp_path / "large", 40)
  assert sized(asking(photos, init_from=large), tmp_path / "of_40").data.resolution == 40


def test_trained_weights_keep_their_positions(photos, tmp_path, machine):
  """Whatever photos have from random values; and what contradicts them is told before a step is timed."""
  timed = machine(CPU)
  start = own_checkpoint.write(tmp_path / "weights", positions="learned")
  found = begin(photos_config(photos, init_from=start), tmp_path / "run")
  assert weights.of_run(found, str(tmp_path / "other")).settings.model.positions == "learned"
  again = sized(photos_config(photos, init_from=start), tmp_path / "run")
  workdir.check(again, str(tmp_path / "run"))
  timed.clear()
  given = {"init_from": start, "model.positions": "axial"}
  with pytest.raises(UserError, match=r"positions: axial in the config, learned in the checkpoint"):
    sized(photos_config(photos, **given), tmp_path / "axial")
  assert not timed


@pytest.mark.parametrize("given", [{}, {"model.size": "s"}, {"data.resolution": 12}])
def test_photos_from_random_values_have_rotary_positions(photos, tmp_path, machine, given):
  machine(CPU)
  asked = {"sizing.packaged": False, **given}
  assert sized(photos_config(photos, **asked), tmp_path).model.positions == "rope2d"


def test_heads_that_rotary_positions_do_not_take_keep_the_table(photos, tmp_path, machine, capsys):
  """Given ones, of 6 channels: an option that nobody gave isn't what they are refused for."""
  machine(CPU)
  given = {"sizing.packaged": False, "model.n_embd": 72, "model.n_head": 12}
  found = sized(photos_config(photos, **given), tmp_path)
  assert (found.model.n_embd, found.model.positions) == (72, "learned")
  assert "of 72, learned positions; a step of" in capsys.readouterr().out


def flops_of_packaged():
  """FLOPs of an image of 32×32 pixels."""
  config = weights.describe("packaged", photos_config("any")).config
  return compilation.flops_per_image(dataclasses.replace(config, n_positions=1_024))


@pytest.mark.parametrize(("speed", "resolution"), [(CPU / 100, 16), (CPU / 5, 24), (CPU, 32)])
def test_photos_begin_with_the_packaged_model(photos, tmp_path, machine, capsys, speed, resolution):
  """At the largest images that the time allows; every later start finds what was chosen."""
  machine(speed)
  first = begin(photos_config(photos), tmp_path)
  assert (first.init_from, first.data.resolution) == ("packaged", resolution)
  assert (first.model.n_layer, first.palette.size) == (0, 0)
  assert (
    f"{resolution}×{resolution} pixels of 512 colours, 6 layers of 128, rope2d positions, begun from packaged"
    in (capsys.readouterr().out)
  )
  assert first.train.learning_rate == 1e-3
  for later in ({}, {"sizing.packaged": False}, {"init_from": "packaged"}):
    found = sized(photos_config(photos, **later), tmp_path)
    workdir.check(found, str(tmp_path))
    assert found.init_from == "packaged"
    said = "sizing.packaged: False changes nothing: the run was begun from packaged; fix: another"
    assert (said in capsys.readouterr().out) == ("sizing.packaged" in later)


def test_a_run_of_an_older_version_goes_on_from_its_random_values(
  photos, tmp_path, machine, capsys
):
  """Its config.json lacks the choice, and its sizing.json has a limit that is none any more."""
  machine(CPU)
  first = begin(photos_config(photos, **{"sizing.packaged": False}), tmp_path)
  assert (first.init_from, first.model.n_layer, first.train.learning_rate) == ("", 4, 3e-3)
  config = json.loads((tmp_path / "config.json").read_text())
  del config["sizing"]["packaged"]
  (tmp_path / "config.json").write_text(json.dumps(config))
  older = {**record(tmp_path), "most_steps": first.train.steps}
  (tmp_path / "sizing.json").write_text(json.dumps(older))
  found = sized(photos_config(photos), tmp_path)
  workdir.check(found, str(tmp_path))
  assert with_values(found, {"sizing.packaged": False}) == first
  found = sized(photos_config(photos, **{"sizing.minutes": 60.0}), tmp_path)
  assert found.init_from == "" and found.train.steps == 120 * 200 // 16
  out = capsys.readouterr().out
  assert "sizing.packaged: True changes nothing: the run was begun from random values; fix: " in out
  assert "1,500 steps instead of" in out and "with so few images, more would only learn" in out


@pytest.mark.parametrize(
  ("given", "reason"),
  [
    ({"model.n_layer": 3}, "model.n_layer: 3 in the config, 6 in the checkpoint"),
    ({"model.size": "s"}, "model.size: s in the config"),
    ({"model.size": "s", "model.n_layer": 6}, "model.size: s in the config"),
    ({"palette.size": 32}, "palette.size: 32 in the config, 512 in the checkpoint"),
    ({"model.qk_norm": True}, "model.qk_norm: True in the config, False in the checkpoint"),
    (
      {"model.positions": "axial"},
      "model.positions: axial in the config, rope2d in the checkpoint",
    ),
    ({"objective": "masked"}, "objective: masked in the config, autoregressive in the checkpoint"),
    (
      {"data.token_kind": "channels"},
      "data.token_kind: channels in the config, palette in the checkpoint",
    ),
  ],
)
def test_what_is_given_is_kept_before_the_packaged_model(
  photos, tmp_path, machine, capsys, given, reason
):
  machine(CPU)
  found = sized(photos_config(photos, **given), tmp_path)
  assert found.init_from == ""
  for name, value in given.items():
    assert value_of(found, name) == value
  out = capsys.readouterr().out
  assert f"sizing: from random values instead of the packaged model; {reason}" in out


def test_tokens_are_trained_on_from_random_values(tmp_path, machine, capsys):
  """Nobody knows which colours they stand for."""
  machine(CPU)
  for split in ("train", "test"):
    np.save(tmp_path / f"{split}.npy", np.zeros((60, 64), np.uint16))
  found = sized(photos_config(tmp_path, **{"data.name": "tokens"}), tmp_path / "run")
  assert found.init_from == ""
  assert "the packaged model; data.name: tokens, whose colours aren't known" in (
    capsys.readouterr().out
  )


@pytest.mark.parametrize("where", ["given", "in the workdir"])
def test_a_palette_decides_what_a_run_begins_with(photos, tmp_path, machine, capsys, where):
  """One of other colours is kept; the packaged model's own suits it."""
  machine(CPU)
  others = Palette(np.linspace(-1, 1, 96, dtype=np.float32).reshape(32, 3))
  for palette, init_from in ((others, ""), (Palette.default(), "packaged")):
    run = tmp_path / (init_from or "random")
    path = tmp_path / "mine.npy" if where == "given" else run / "palette.npy"
    run.mkdir()
    palette.save(path)
    given = {"palette.path": str(path)} if where == "given" else {}
    found = sized(photos_config(photos, **given), run)
    assert (found.init_from, found.palette.size) == (init_from, 0)
    assert (f"palette: {path} has other colours" in capsys.readouterr().out) == (not init_from)
  with pytest.raises(UserError, match=r"missing\.npy: No such file"):
    sized(photos_config(photos, **{"palette.path": str(tmp_path / "missing.npy")}), tmp_path)


def test_other_colours_than_the_checkpoints_are_told_before_a_step_is_timed(
  photos, tmp_path, machine
):
  timed = machine(CPU)
  run = tmp_path / "run"
  others = Palette(np.linspace(-1, 1, 1536, dtype=np.float32).reshape(512, 3))
  others.save(tmp_path / "mine.npy")
  given = {"init_from": "packaged", "palette.path": str(tmp_path / "mine.npy")}
  with pytest.raises(UserError, match=r"mine\.npy has other colours than those of the checkpoint"):
    sized(photos_config(photos, **given), run)
  run.mkdir(exist_ok=True)
  others.save(run / "palette.npy")
  with pytest.raises(UserError, match=r"other colours than .*palette\.npy, which job fit_palette"):
    sized(photos_config(photos, init_from="packaged"), run)
  assert not timed and not (run / "sizing.json").exists()


def test_colours_that_somebody_put_there_are_not_written_over(tmp_path):
  """By those of a model that training starts from."""
  Palette(np.linspace(-1, 1, 96, dtype=np.float32).reshape(32, 3)).save(tmp_path / "palette.npy")
  with pytest.raises(UserError, match=r"other colours than .*palette\.npy, which job .*; fix: "):
    weights.of_run(photos_config("any", init_from="packaged"), str(tmp_path))
  Palette.default().save(tmp_path / "palette.npy")
  assert weights.of_run(photos_config("any", init_from="packaged"), str(tmp_path)).weights


def test_what_is_given_as_the_packaged_model_has_it_suits(photos, tmp_path, machine):
  machine(CPU)
  given = {"model.n_layer": 6, "palette.size": 512, "data.resolution": 20}
  found = sized(photos_config(photos, **given), tmp_path)
  assert (found.init_from, found.data.resolution) == ("packaged", 20)


def test_many_photos_on_a_fast_machine_are_worth_a_larger_model(tmp_path, machine):
  machine(100 * CPU)
  many = folder_of(tmp_path, 2_000)
  found = sized(photos_config(many), tmp_path / "run")
  assert (found.init_from, found.model.n_embd) == ("", 256)
  named = {"model.n_layer": 6, "model.n_head": 4, "model.n_embd": 128}
  assert sized(photos_config(many, **named), tmp_path / "named").init_from == "packaged"
  machine(CPU)
  assert sized(photos_config(many), tmp_path / "slow").init_from == "packaged"


def test_where_a_larger_model_does_not_fit_the_packaged_one_does(tmp_path, monkeypatch):
  def seconds(settings, model, mesh):
    if model.n_embd > 128:
      raise DoesNotFit("training: a step needs too much; fix: less")
    return compilation.flops_per_image(model) * settings.train.batch_size / (100 * CPU)

  monkeypatch.setattr(sizing, "step_seconds", seconds)
  found = sized(photos_config(folder_of(tmp_path, 2_000)), tmp_path / "run")
  assert (found.init_from, found.data.resolution) == ("packaged", 32)


def test_many_photos_are_trained_on_for_as_long_as_is_asked(tmp_path, machine, capsys):
  """Beyond what a good result takes, while they aren't learnt by heart yet."""
  machine(20 * CPU)
  many = folder_of(tmp_path, 1_900)  # too few for a larger model
  found = sized(photos_config(many), tmp_path / "run")
  seen = found.train.steps * found.train.batch_size
  assert seen * flops_of_packaged() == pytest.approx(20 * CPU * 12 * 60 * 0.8, rel=0.02)
  assert seen < 50 * 1_900
  out = capsys.readouterr().out
  assert "sizing: about 12 minutes on this machine for a good result" in out
  assert "by heart" not in out
  sized(photos_config(many, **{"sizing.minutes": 60.0}), tmp_path / "longer")
  assert "with so few images, more steps would only learn them by heart" in capsys.readouterr().out


@pytest.mark.parametrize(("minutes", "told"), [(0.01, ""), (500.0, ": with so few images, more ")])
def test_why_more_minutes_are_no_more_steps(photos, tmp_path, machine, capsys, minutes, told):
  """The fewest steps of any run are as many for a moment more; the most are enough for any time."""
  machine(CPU)
  first = begin(photos_config(photos, **{"sizing.minutes": minutes}), tmp_path)
  capsys.readouterr()
  longer = sized(photos_config(photos, **{"sizing.minutes": 1.5 * minutes}), tmp_path)
  assert longer.train.steps == first.train.steps
  (line,) = capsys.readouterr().out.splitlines()
  assert f"{first.train.steps:,} steps, as before{told}" in line
  assert line.endswith("as before") == (not told)
