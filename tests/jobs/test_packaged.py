"""The model that comes with the package, a tiny one in its place: where no checkpoint is named, and by its name."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import igpt_jax
from igpt_jax import checkpoint
from igpt_jax.config.fields import Settings
from igpt_jax.demo import __main__ as page
from igpt_jax.demo import models, serve
from igpt_jax.errors import UserError
from igpt_jax.jobs import complete, convert, pretrain
from igpt_jax.pretrained import packaged
from igpt_jax.workspace import weights
from support import own_checkpoint
from support.images import make_images
from support.quickstart import shrunk
from support.tiny import mesh_of, on_one_device, settings_of

pytestmark = pytest.mark.usefixtures("quick_compile")

SAID = "checkpoint: packaged, the model that comes with igpt_jax: tiny, 4×4 pixels, "


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A checkpoint that nobody trained, and the packaged model that job convert makes of it."""
  folder = tmp_path_factory.mktemp("made")
  source = own_checkpoint.write(folder / "run")
  settings_of_it = settings_of(changes={
    "job": "convert", "convert.source": source, "convert.target": str(folder / "tiny.safetensors"),
    "convert.format": "safetensors", "convert.dtype": "bfloat16",
  })  # fmt: skip
  convert.run(settings_of_it, "")
  return source, folder / "tiny.safetensors"


@pytest.fixture(autouse=True)
def tiny(run, monkeypatch):
  monkeypatch.setattr(packaged, "FILE", run[1])


def completing(tmp_path, **changes):
  make_images(tmp_path / "photos", 2)
  images = {"job": "complete", "complete.images": str(tmp_path / "photos"), "complete.n": 1}
  return settings_of(changes=images | changes)


def drawn(out):
  return json.loads((pathlib.Path(out) / "complete.json").read_text())


def test_photos_are_completed_by_it_where_none_is_named(run, tmp_path, capsys):
  complete.run(completing(tmp_path), str(tmp_path / "out"))
  said = capsys.readouterr().out
  assert SAID in said and "another one: --config.checkpoint=WORKDIR" in said
  found = drawn(tmp_path / "out")
  assert found["settings"]["parameters"] == weights.describe("packaged", Settings()).sums["params"]
  # Named, or by the path of its file, it is the same model: there is nothing left to draw.
  for name in ("packaged", str(run[1])):
    complete.run(completing(tmp_path, checkpoint=name), str(tmp_path / "out"))
    said = capsys.readouterr().out
    assert "2 done before" in said and SAID not in said


def test_it_is_not_used_where_another_is_named_or_was_trained(run, tmp_path, capsys):
  for name, workdir, settings in (
    ("named", tmp_path / "a", completing(tmp_path, checkpoint=run[0])),
    ("init_from", tmp_path / "b", completing(tmp_path, init_from=run[0])),
    ("the workdir's", pathlib.Path(own_checkpoint.write(tmp_path / "c")), completing(tmp_path)),
  ):
    complete.run(settings, str(workdir))
    assert SAID not in capsys.readouterr().out, name


def test_python_and_the_page_have_it(run, tmp_path, capsys, monkeypatch):
  model = igpt_jax.load()
  assert SAID in capsys.readouterr().out
  exact = igpt_jax.load(run[0])
  assert SAID not in capsys.readouterr().out
  named = igpt_jax.load("packaged")
  images = np.random.default_rng(0).integers(0, 256, (3, 9, 9, 3), np.uint8)
  nats = model.nats_per_token(images)
  np.testing.assert_array_equal(nats, named.nats_per_token(images))
  # Rounded to bfloat16, and computed in float32, it is nearly the model that it was made of.
  assert 0 < np.abs(nats - exact.nats_per_token(images)).max() < 0.05
  assert models.Models(["packaged"], mesh=mesh_of()).describe()[0]["name"] == "tiny"
  offered = []
  monkeypatch.setattr(serve, "check_installed", lambda: None)
  monkeypatch.setattr(serve, "bind", lambda *where: None)
  monkeypatch.setattr(serve, "run", lambda served, *rest: offered.append(served))
  assert page.main([]) == 0 and len(offered[0]) == 1
  assert SAID in capsys.readouterr().out
  assert page.main([f"--checkpoint={run[0]}", "--checkpoint=packaged"]) == 0
  assert [offered[1].name(i) for i in range(2)] == ["run", "tiny"]
  assert SAID not in capsys.readouterr().out


def test_training_goes_on_from_it(tmp_path, capsys):
  make_images(tmp_path / "photos" / "train", 24)
  make_images(tmp_path / "photos" / "test", 4)
  settings = shrunk(**{
    "init_from": "packaged", "data.name": "folder", "data.path": str(tmp_path / "photos"),
    "data.resolution": 4, "data.augment": "none", "model.n_layer": 0, "model.n_embd": 0,
    "model.n_head": 0, "model.size": "", "palette.size": 0, "train.steps": 2, "train.warmup_steps": 1,
  })  # fmt: skip
  on_one_device(pretrain, settings, str(tmp_path / "run"))
  assert f"starting from {packaged.FILE}" in capsys.readouterr().out
  made, begun = checkpoint.describe(str(tmp_path / "run")), weights.describe("packaged", Settings())
  assert made.config.n_embd == begun.config.n_embd
  np.testing.assert_array_equal(made.palette, begun.palette)


def test_an_installation_without_it_says_so(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(packaged, "FILE", tmp_path / "lost.safetensors")
  lacking = r"^checkpoint: packaged: this installation lacks .*lost.*; fix: install igpt_jax again"
  with pytest.raises(UserError, match=lacking):
    igpt_jax.load()
  with pytest.raises(UserError, match=lacking):
    complete.run(completing(tmp_path), str(tmp_path / "out"))
  assert not (tmp_path / "out").exists()
  monkeypatch.setattr(serve, "check_installed", lambda: None)
  assert page.main(["--port=0"]) == 2
  assert "igpt_jax.demo: checkpoint: packaged" in capsys.readouterr().err
  (tmp_path / "lost.safetensors").write_bytes(b"no model")
  with pytest.raises(UserError, match=r"lost.safetensors: .*expected"):
    igpt_jax.load()


def test_the_command_takes_its_name_from_anywhere(tmp_path):
  """No folder of that name is needed, and none changes what it means."""
  (tmp_path / "packaged").mkdir()
  program = (
    "import sys, pathlib; from igpt_jax.pretrained import packaged; "
    "packaged.FILE = pathlib.Path(sys.argv.pop(1)); from igpt_jax.__main__ import run; run()"
  )
  make_images(tmp_path / "photos", 1)
  done = subprocess.run(
    [sys.executable, "-c", program, str(packaged.FILE), "--config=complete",
     "--config.complete.images=photos", "--config.complete.n=1", "--config.checkpoint=packaged"],
    cwd=tmp_path, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "runs" / "complete" / "grid.png").exists()
