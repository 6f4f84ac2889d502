"""Trained models in Python: what the jobs compute for the same images and seed, and mistakes in words."""

import dataclasses
import io
import json
import re
import weakref

import numpy as np
import pytest
from PIL import Image

import igpt_jax
from igpt_jax.data.sources import open_split
from igpt_jax.errors import UserError
from igpt_jax.jobs import complete, evaluate, sample
from igpt_jax.pretrained import formats
from igpt_jax.probing import sets
from igpt_jax.workspace import weights
from support import own_checkpoint
from support.images import make_images
from support.paths import ROOT
from support.tiny import compilations, make_config, mesh_of, random_params, settings_of

pytestmark = pytest.mark.usefixtures("quick_compile")

PROGRAMS = ("begin", "extend", "extract", "likelihood")
BLOCKS = {
  f"{path.relative_to(ROOT)}, {number}": block
  for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
  for number, block in enumerate(
    re.findall(
      r"^```python\n(import igpt_jax\n.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE
    )
  )
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  return own_checkpoint.write(tmp_path_factory.mktemp("causal") / "run")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
  return own_checkpoint.write(tmp_path_factory.mktemp("bert") / "run", causal=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Settings of 5 test images, in two classes."""
  folder = tmp_path_factory.mktemp("data")
  for split, n in (("train", 6), ("test", 3)):
    for name in ("cats", "dogs"):
      make_images(folder / split / name, n, colours=256 if name == "cats" else 128)
  (folder / "test" / "dogs" / "00.png").unlink()
  return {
    "data.name": "folder", "data.path": str(folder), "data.resolution": 4, "data.augment": "none",
    "data.validation": 0.2,
  }  # fmt: skip


@pytest.fixture(scope="module")
def model(trained):
  return igpt_jax.load(trained)


def images_of(settings):
  """The test images as evaluation sees them, before they are scaled."""
  return [
    np.asarray(Image.open(io.BytesIO(record["image"])))
    for record in open_split(settings.data, "test")
  ]


def some(n, height=9, width=7, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), np.uint8)


def write_photos(folder):
  """One of each way in which a file's pixels aren't what a viewer shows."""
  folder.mkdir()
  turned = Image.Exif()
  turned[0x0112] = 6
  pixels = np.kron(some(1, 8, 5)[0], np.ones((8, 8, 1), np.uint8))
  Image.fromarray(pixels).save(folder / "jpeg.jpg", quality=92)
  Image.fromarray(pixels).save(folder / "turned.jpg", exif=turned)
  Image.fromarray(pixels).convert("CMYK").save(folder / "print.jpg")
  Image.fromarray(np.dstack([pixels, pixels[..., 0]])).save(folder / "clear.png")
  Image.fromarray(pixels).quantize(7).save(folder / "indexed.gif")
  Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")


# --- the same as the jobs --------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_completions_are_those_of_the_job(request, tmp_path, causal):
  path = request.getfixturevalue("trained" if causal else "bert")
  write_photos(tmp_path / "my")
  values = {"complete.keep": 0.3, "complete.n": 3, "seed": 5, "sample.temperature": 0.8}
  drawing = {"complete.images": str(tmp_path / "my"), "sample.top_k": 7, "sample.scale": 1}
  settings = settings_of(changes={"job": "complete", "checkpoint": path, **values, **drawing})
  complete.run(settings, str(tmp_path / "out"))
  files = sorted((tmp_path / "my").iterdir())
  model = igpt_jax.load(path, batch_size=6)
  drawn = model.complete(
    [Image.open(file) for file in files], keep=0.3, n=3, seed=5, temperature=0.8, top_k=7
  )
  assert drawn.shape == (6, 3, 4, 4, 3) and drawn.dtype == np.uint8
  for file, samples in zip(files, drawn, strict=True):
    for number, pixels in enumerate(samples):
      with Image.open(tmp_path / "out" / file.stem / f"{number:04d}.png") as written:
        np.testing.assert_array_equal(pixels, np.asarray(written.convert("RGB")), file.name)
  assert len(np.unique(drawn.reshape(18, -1), axis=0)) > 6  # not one for each image


def test_samples_are_those_of_the_job(trained, data, tmp_path, monkeypatch):
  shown = []
  monkeypatch.setattr(
    sample.figures, "samples", lambda images, **unused: shown.append(images) or images[0]
  )
  drawing = {"sample.samples": 6, "sample.completions": 2, "sample.top_p": 0.9, "seed": 3}
  settings = settings_of(changes={"job": "sample", "checkpoint": trained, **data, **drawing})
  sample.run(settings, str(tmp_path))
  drawn = igpt_jax.load(trained, batch_size=4).sample(6, seed=3, top_p=0.9)
  assert drawn.dtype == np.uint8
  np.testing.assert_array_equal(drawn, shown[0])


@pytest.mark.parametrize("causal", [True, False])
def test_nats_are_those_of_the_job(request, data, tmp_path, causal):
  path = request.getfixturevalue("trained" if causal else "bert")
  settings = settings_of(changes={"job": "evaluate", "checkpoint": path, **data})
  evaluate.run(settings, str(tmp_path), mesh_of())
  expected = json.loads((tmp_path / "evaluation.json").read_text())
  model = igpt_jax.load(path, batch_size=2)
  nats = model.nats_per_token(images_of(settings))
  assert nats.shape == (5,) and nats.dtype == np.float32
  assert np.nanmean(nats) == pytest.approx(expected["nats_per_token"], rel=1e-5)
  assert np.isfinite(nats).sum() == (5 if causal else expected["masks_counted"])
  assert len(np.unique(nats[np.isfinite(nats)])) > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_features_are_those_of_the_job(trained, data, tmp_path, dtype):
  """The API's weights are in the compute dtype, as drawing needs them; the job's are float32."""
  changes = {"job": "probe", "checkpoint": trained, "model.dtype": dtype, **data}
  settings = settings_of(changes=changes)
  model = igpt_jax.Model(weights.describe(trained, settings), settings, mesh_of())
  source = sets.open_source(settings, str(tmp_path), mesh_of())
  stored = sets.compute(settings, str(tmp_path), source)["layer"]["test"]
  images = images_of(settings)
  for layer in range(3):
    features = model.features(images, layer=layer)
    assert features.shape == (5, 16) and features.dtype == np.float32
    # The job's batch is larger; in bfloat16 what is fused, and so rounded, may depend on that.
    atol = 1e-6 if dtype == "float32" else 5e-3
    np.testing.assert_allclose(features, stored.layer(layer)[:], rtol=1e-5, atol=atol)
  np.testing.assert_array_equal(model.features(images), model.features(images, layer=1))


def test_a_bert_model_gives_features_and_no_samples(bert):
  model = igpt_jax.load(bert)
  assert np.isfinite(model.features(some(2), layer=2)).all()
  with pytest.raises(UserError, match="is a BERT model"):
    model.sample(2)


@pytest.mark.parametrize("kind", ["openai", "huggingface"])
def test_others_checkpoints(tmp_path, kind):
  """Those of one model give the same as this program's own."""
  own = igpt_jax.load(own_checkpoint.write(tmp_path / "own"))
  config = make_config(n_positions=16, n_vocab=11)
  path = tmp_path / kind / ("model.ckpt-7" if kind == "openai" else "")
  path.parent.mkdir(exist_ok=True)
  formats.save(path, kind, config, random_params(config), clusters=own.info.palette)
  other = igpt_jax.load(path)
  images = some(2, 4, 4)  # of the model's size: released models crop as the paper does
  np.testing.assert_array_equal(other.complete(images, seed=1), own.complete(images, seed=1))


# --- images ----------------------------------------------------------------------------------------


def test_images_are_taken_as_they_come(model):
  images = some(3)
  expected = model.nats_per_token(images)
  as_pillow = [Image.fromarray(image) for image in images]
  for same in (list(images), tuple(as_pillow), [as_pillow[0], *images[1:]], images.tolist()):
    if isinstance(same[0], list):
      same = [np.array(image, np.uint8) for image in same]
    np.testing.assert_array_equal(model.nats_per_token(same), expected)
  for one in (images[0], as_pillow[0], [images[0]], images[:1]):
    np.testing.assert_allclose(model.nats_per_token(one), expected[:1], rtol=1e-5)
  different = [images[0], some(1, 20, 31)[0]]
  assert model.complete(different, n=1).shape == (2, 1, 4, 4, 3)


def test_a_program_is_not_run(model, tmp_path):
  """Pillow's images are read when they are used, and EPS by Ghostscript."""
  Image.fromarray(some(1)[0]).save(tmp_path / "drawing.eps")
  with Image.open(tmp_path / "drawing.eps") as image:
    with pytest.raises(UserError, match="EPS is a program that draws"):
      model.features(image)


def test_another_number_of_images_compiles_nothing(model):
  def use(n, height):
    images = some(n, height)
    model.complete(images, n=2, temperature=1 / n, seed=n)
    model.sample(n)
    model.features(images, layer=n % 3)
    model.nats_per_token(images)

  use(4, 9)
  with compilations() as found:
    for n, height in ((4, 8), (3, 4), (2, 17)):
      use(n, height)
  assert not any(found[name] for name in PROGRAMS), found
  with compilations() as found:
    use(9, 9)
  assert all(found[name] == 1 for name in ("extract", "likelihood")), found


def test_a_large_batch_is_computed_in_parts(trained):
  whole, parts = igpt_jax.load(trained, batch_size=16), igpt_jax.load(trained, batch_size=3)
  images = some(7)
  np.testing.assert_array_equal(whole.complete(images, n=2), parts.complete(images, n=2))
  np.testing.assert_array_equal(whole.complete(images[0], n=5), parts.complete(images[0], n=5))
  np.testing.assert_array_equal(whole.sample(7), parts.sample(7))
  np.testing.assert_allclose(whole.features(images), parts.features(images), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(whole.nats_per_token(images), parts.nats_per_token(images), rtol=1e-5)


def test_other_layers_features_are_not_kept(trained, monkeypatch):
  model, computed = igpt_jax.load(trained, batch_size=2), []
  extract = model._features

  def watched(params, batches):
    for rows in extract(params, batches):
      assert not any(ref() is not None for ref in computed[:-1])
      features = rows.features.copy()  # an array of its own, which views would keep
      computed.append(weakref.ref(features))
      yield dataclasses.replace(rows, features=features)
      del rows, features

  monkeypatch.setattr(model, "_features", watched)
  assert model.features(some(7), layer=1).shape == (7, 16) and len(computed) == 4


# --- mistakes --------------------------------------------------------------------------------------

IMAGES = some(2)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda m: m.complete(IMAGES / 255), "number 0 is float64 (9, 7, 3); expected a PIL image, or uint8"),
    (lambda m: m.features(IMAGES[..., 0]), "number 0 is uint8 (2, 9, 7); expected"),
    (lambda m: m.features([IMAGES[0], IMAGES]), "number 1 is uint8 (2, 9, 7, 3); expected"),
    (lambda m: m.features("photo.jpg"), "(); expected a PIL image, or uint8 [height, width, 3]"),
    (lambda m: m.nats_per_token(IMAGES[:, :0]), "(0, 7, 3); expected"),
    (lambda m: m.nats_per_token([]), "images: none; expected one or more"),
    (lambda m: m.nats_per_token(IMAGES[:0]), "images: none; expected one or more"),
    (lambda m: m.complete(Image.new("F", (4, 4), 7.0)), "images: number 0: unreadable image (values"),
    (lambda m: m.complete(IMAGES, keep=1.0), "keep: 1.0; expected within (0, 1)"),
    (lambda m: m.complete(IMAGES, keep=np.float32(0)), "keep: 0.0; expected within (0, 1)"),
    (lambda m: m.complete(IMAGES, n=0), "n: 0; expected 1 to 65,536"),
    (lambda m: m.complete(IMAGES, seed=-1), "seed: -1; expected 0 to"),
    (lambda m: m.complete(IMAGES, top_k=1.5), "top_k: 1.5; expected a whole number"),
    (lambda m: m.sample(0), "n: 0; expected 1 to 65,536"),
    (lambda m: m.sample(2, temperature=-1), "temperature: -1; expected 0 (greedy)"),
    (lambda m: m.sample(2, top_p=0), "top_p: 0; expected a number from"),
    (lambda m: m.features(IMAGES, layer=3), "layer: 3; expected 0 to 2"),
    (lambda m: m.features(IMAGES, layer=-1), "layer: -1; expected 0 to 2"),
    (lambda m: m.features(IMAGES, layer=1.0), "layer: 1.0; expected 0 to 2"),
  ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_compiles(model, call, message):
  with compilations() as found, pytest.raises(UserError, match=re.escape(message)) as error:
    call(model)
  assert not found and "\n" not in str(error.value)


def test_checkpoints_that_cannot_be_loaded(trained, tmp_path):
  with pytest.raises(UserError, match="nothing is there; expected"):
    igpt_jax.load(tmp_path / "nowhere")
  for nothing in ("", None, b"runs/quickstart", 7):
    with pytest.raises(UserError, match=re.escape(f"path: {nothing!r}; expected a path")):
      igpt_jax.load(nothing)
  with pytest.raises(UserError, match="batch_size: 0; expected 1 to"):
    igpt_jax.load(trained, batch_size=0)
  bare = own_checkpoint.write(tmp_path / "bare", palette=False)
  with pytest.raises(UserError, match=r'path: .* carries no palette .*; fix: palette="FILE.npy"'):
    igpt_jax.load(bare)
  palette = igpt_jax.load(trained).info.palette
  np.save(tmp_path / "same.npy", palette)
  np.testing.assert_array_equal(
    igpt_jax.load(bare, palette=tmp_path / "same.npy").info.palette, palette
  )
  np.save(tmp_path / "other.npy", -palette)
  with pytest.raises(UserError, match=r"other colours .*; fix: leave palette out"):
    igpt_jax.load(trained, palette=tmp_path / "other.npy")


def test_a_cache_that_does_not_fit_is_said(model, monkeypatch):
  monkeypatch.setattr("igpt_jax.parallel.hardware.memory_bytes", lambda device: 1)
  with pytest.raises(
    UserError, match=r"keys and values of 16 images .* fix: a smaller batch_size of"
  ):
    model.complete(some(4), n=4)


# --- the documents' examples -----------------------------------------------------------------------


def test_the_readme_has_an_example():
  assert any(name.startswith("README.md") for name in BLOCKS)
  assert {"load", "Model"} <= set(dir(igpt_jax))


@pytest.mark.parametrize("name", BLOCKS)
def test_an_example_runs(name, trained, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "runs").mkdir()
  (tmp_path / "runs" / "quickstart").symlink_to(trained)
  Image.fromarray(some(1, 40, 60)[0]).save("photo.jpg")
  exec(compile(BLOCKS[name], name, "exec"), {})
