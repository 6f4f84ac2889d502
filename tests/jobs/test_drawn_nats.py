"""How likely jobs say that drawn pixels are: read back from the images, against the model called here.

What is given counts nowhere, every drawn pixel once, under the model itself whatever the temperature.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from igpt_jax import checkpoint
from igpt_jax.data.palette import Palette
from igpt_jax.jobs import complete, quality, sample
from igpt_jax.model.image_gpt import bind
from igpt_jax.training.objectives import token_nll
from support import own_checkpoint, tiny

pytestmark = pytest.mark.usefixtures("quick_compile")

SIDE, GAP = 4, 4  # of an image and between two, in the PNGs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  return own_checkpoint.write(tmp_path_factory.mktemp("own") / "run")


@pytest.fixture(scope="module")
def model(trained):
  """(tokens -> nats per token [N, T], palette) of the checkpoint."""
  read = checkpoint.load_pretrained(trained, tiny.mesh_of())

  def nats(tokens):
    tokens = jnp.asarray(tokens, jnp.int32)
    return np.asarray(token_nll(bind(read.config, read.params)(tokens), tokens), np.float64)

  return nats, Palette(np.asarray(read.palette), name="own")


@pytest.fixture
def config(trained, model, tmp_path, monkeypatch):
  """A quarter of each image is given."""
  monkeypatch.setattr(jax, "devices", lambda *args: jax.local_devices()[:1])
  rng = np.random.default_rng(0)
  for split in ("train", "test"):
    (tmp_path / "data" / split).mkdir(parents=True)
    for i in range(8):
      image = model[1].decode(rng.integers(11, size=(SIDE, SIDE)))
      Image.fromarray(image).save(tmp_path / "data" / split / f"{i}.png")
  return tiny.settings_of(changes={
    "checkpoint": trained, "data.name": "folder", "data.path": str(tmp_path / "data"),
    "data.resolution": SIDE, "sample.samples": 6, "sample.completions": 3, "sample.per_image": 2,
    "sample.keep": 0.25, "sample.temperature": 0.6, "sample.scale": 1, "sample.batch_size": 4,
    "quality.images": 6, "complete.images": str(tmp_path / "data" / "test"), "complete.n": 3, "complete.keep": 0.25,
  })  # fmt: skip


def cells(path, rows, columns):
  """The images of a grid, which is below its text: uint8 [rows, columns, H, W, 3]."""
  step = SIDE + GAP
  whole = np.asarray(Image.open(path))[-rows * step :, GAP : GAP + columns * step]
  split = whole.reshape(rows, step, columns, step, 3).swapaxes(1, 2)
  return split[:, :, :SIDE, :SIDE]


def test_of_samples_and_completions(config, model, tmp_path):
  nats, palette = model
  out = tmp_path / "out"
  sample.run(config, str(out))
  values = json.loads((out / "sample.json").read_text())

  def of(images):
    return nats(palette.encode(images).reshape(-1, SIDE**2))

  samples = of(cells(out / "samples.png", 2, 4).reshape(-1, SIDE, SIDE, 3)[:6])
  assert values["each_sample_nats_per_token"] == pytest.approx(samples.mean(1), abs=1e-3)
  assert values["samples_nats_per_token"] == pytest.approx(samples.mean(), abs=1e-4)
  completions = of(cells(out / "completions.png", 3, 4)[:, 1:-1])
  drawn = completions[:, SIDE:]
  assert values["rows_given"] == 1 and len(drawn) == 6
  assert values["each_completion_nats_per_token"] == pytest.approx(drawn.mean(1), abs=1e-3)
  assert values["completions_nats_per_token"] == pytest.approx(drawn.mean(), abs=1e-4)
  assert abs(completions.mean() - drawn.mean()) > 0.05  # what is given would show


def test_of_quality(config, model, tmp_path, monkeypatch):
  nats, _ = model
  gather, drawn = quality.gather, {}

  def keep(*args):
    tokens, nll = gather(*args)
    drawn[args[-1]] = nats(tokens)
    return tokens, nll

  monkeypatch.setattr(quality, "gather", keep)
  quality.run(config, str(tmp_path / "out"))
  values = json.loads((tmp_path / "out" / "quality.json").read_text())
  assert drawn["samples"].shape == drawn["completions"].shape == (6, SIDE**2)
  assert values["samples_nats_per_token"] == pytest.approx(drawn["samples"].mean(), abs=1e-4)
  completions = drawn["completions"]
  expected = completions[:, SIDE:].mean()
  assert values["completions_nats_per_token"] == pytest.approx(expected, abs=1e-4)
  assert abs(completions.mean() - expected) > 0.05


def test_of_ones_own_images(config, model, tmp_path):
  nats, palette = model
  out = tmp_path / "out"
  complete.run(config, str(out))
  values = json.loads((out / "complete.json").read_text())
  assert len(values["each_nats_per_token"]) == 8
  of_all = []
  for name, told in values["each_nats_per_token"].items():
    images = np.stack([np.asarray(Image.open(out / name / f"{n:04d}.png")) for n in range(3)])
    drawn = nats(palette.encode(images).reshape(3, -1))[:, SIDE:]
    assert told == pytest.approx(drawn.mean(), abs=1e-4), name
    of_each = json.loads((out / name / "complete.json").read_text())["samples"]
    found = [each["nats_per_token"] for each in of_each]
    assert found == pytest.approx(drawn.mean(1), abs=1e-4), name
    of_all.append(drawn)
  assert values["nats_per_token"] == pytest.approx(np.mean(of_all), abs=1e-4)
