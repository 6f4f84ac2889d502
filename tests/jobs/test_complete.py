"""Completing one's own images: files in, images out, whatever the batch and however often begun."""

import dataclasses
import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from igpt_jax.config.fields import Settings
from igpt_jax.config.job_fields import CompleteConfig
from igpt_jax.data.image_decoding import BadRecord
from igpt_jax.demo import models
from igpt_jax.errors import UserError
from igpt_jax.jobs import complete
from igpt_jax.model.decoding.autoregressive import SamplingConfig
from igpt_jax.pretrained import formats
from igpt_jax.sampling import completer as completer_lib
from igpt_jax.sampling import prompt_files
from igpt_jax.workspace import weights
from support import own_checkpoint
from support.tiny import changed, compilations, make_config, mesh_of, random_params, settings_of

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  return own_checkpoint.write(tmp_path_factory.mktemp("own") / "run")


@pytest.fixture
def photos(tmp_path):
  """CLASS/*.jpg of several formats and sizes, and one that isn't an image."""
  rng = np.random.default_rng(0)
  folder = tmp_path / "my"
  for name, size in (("cats/a.jpg", (31, 20)), ("cats/b.png", (4, 4)), ("dogs/a.webp", (9, 40))):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / name)
  return folder


def settings(trained, **changes):
  """Those of job complete, whose own settings need no group's name here."""
  own = {field.name for field in dataclasses.fields(CompleteConfig)}
  changes = {f"complete.{name}" if name in own else name: each for name, each in changes.items()}
  basis = {"job": "complete", "checkpoint": trained, "complete.n": 3, "sample.batch_size": 4}
  return settings_of(changes={**basis, **changes})


def completer_of(trained, mesh=None):
  config = settings(trained)
  found = completer_lib.describe(config, "")
  return completer_lib.Completer(found, config, mesh or mesh_of())


def some_pictures(n, seed=0):
  rng = np.random.default_rng(seed)
  return [
    completer_lib.InputImage(str(i), rng.integers(0, 11, 16).astype(np.int32)) for i in range(n)
  ]


def last(iterator):
  *_, drawn = iterator
  return drawn


def tokens_in(folder):
  found = {}
  for name in sorted(os.listdir(folder)):
    if name.endswith(".npz"):
      with np.load(folder / name, allow_pickle=False) as part:
        found |= dict(zip(part["numbers"].tolist(), part["tokens"].tolist(), strict=True))
  return found


# --- drawing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_a_sample_is_the_same_whatever_is_drawn_beside_it(trained, shape):
  completer, sampling = completer_of(trained, mesh_of(shape)), SamplingConfig()
  alone = completer_of(trained)
  pictures = some_pictures(3)
  together = last(completer.draw(pictures, range(4), 2, sampling, seed=5))
  assert together.settled.all()
  for i, picture in enumerate(pictures):
    for number in range(4):
      one = last(alone.draw([picture], [number], 2, sampling, seed=5))
      np.testing.assert_array_equal(together.tokens[4 * i + number], one.tokens[0])
      np.testing.assert_allclose(together.nll[4 * i + number], one.nll[0], atol=1e-4)
    np.testing.assert_array_equal(
      together.tokens[4 * i : 4 * i + 4, :8], np.tile(picture.tokens[:8], (4, 1))
    )
  other = last(completer.draw(pictures, range(4), 2, sampling, seed=6))
  assert (other.tokens[:, 8:] != together.tokens[:, 8:]).any()


def test_rows_appear_one_after_the_other_and_are_those_of_one_go(trained):
  completer, pictures = completer_of(trained), some_pictures(2)
  whole = last(completer.draw(pictures, [0, 1], 1, SamplingConfig(), seed=0))
  seen = list(completer.draw(pictures, [0, 1], 1, SamplingConfig(), seed=0, watched=True))
  assert [drawn.settled.sum(1).tolist() for drawn in seen] == [[8] * 4, [12] * 4, [16] * 4]
  for drawn in seen:
    np.testing.assert_array_equal(drawn.tokens, np.where(drawn.settled, whole.tokens, 0))
    assert not drawn.nll[:, :4].any()
    np.testing.assert_array_equal(drawn.nll[:, 4:] > 0, drawn.settled[:, 4:])
  np.testing.assert_allclose(seen[-1].nll, whole.nll, atol=1e-5)


def test_one_program_serves_all_that_is_asked_for_while_one_watches(trained):
  """Any number of rows, samples up to a bucket, and way of drawing."""
  completer, pictures = completer_of(trained), some_pictures(3)
  asked = [
    (4, 2, SamplingConfig()), (3, 1, SamplingConfig(0.5)), (2, 3, SamplingConfig(0.0)),
    (2, 1, SamplingConfig(0.9, 3, 0.8)),
  ]  # fmt: skip
  with compilations() as found:
    drawn = [
      last(completer.draw(pictures[:1], range(n), rows, way, seed=1, watched=True))
      for n, rows, way in asked
    ]
  assert found["begin"] == found["extend"] == 1
  for (n, rows, way), samples in zip(asked, drawn, strict=True):
    alone = last(completer.draw(pictures[:1], range(n), rows, way, seed=1))
    np.testing.assert_array_equal(samples.tokens, alone.tokens)
    np.testing.assert_allclose(samples.nll, alone.nll, atol=1e-5)
    assert len(samples.tokens) == n


def test_another_temperature_compiles_nothing_in_a_job(trained):
  completer, pictures = completer_of(trained), some_pictures(1)
  with compilations() as found:
    for way in (SamplingConfig(), SamplingConfig(0.5), SamplingConfig(0.0)):
      last(completer.draw(pictures, [0], 2, way, seed=0))
  assert found["begin"] == found["extend"] == 1
  with compilations() as found:
    last(completer.draw(pictures, [0], 2, SamplingConfig(top_k=3), seed=0))
    last(completer.draw(pictures, [0], 2, SamplingConfig(top_p=0.9), seed=0))
  assert found["begin"] == 0 and found["extend"] == 1


@pytest.mark.parametrize(("n", "expected"), [(1, 1), (2, 4), (4, 4), (9, 16), (16, 16), (17, 32)])
def test_buckets(n, expected):
  assert completer_lib.bucket(n) == expected


def test_the_pages_programs_all_stay(trained, monkeypatch):
  monkeypatch.setattr(completer_lib, "_PROGRAMS", 1)
  served = models.Models([str(trained)])
  assert served.programs(8) == [(0, 4), (0, 1), (0, 8)]
  assert served.completer(0)._n_kept == 3


def test_only_the_newest_programs_are_kept(trained, monkeypatch):
  monkeypatch.setattr(completer_lib, "_PROGRAMS", 2)
  completer = completer_of(trained)
  for rows in (1, 2, 3, 2):
    last(completer.draw(some_pictures(1), [0], rows, SamplingConfig(), seed=0))
  assert [shape for shape, *_ in completer._programs] == [(1, 12), (1, 8)]


# --- reading ---------------------------------------------------------------------------------------


def encoded(image, **options):
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, **options)
  return buffer.getvalue()


def test_a_picture_is_turned_as_the_camera_was_held(trained):
  reader = completer_of(trained).reader
  image = np.zeros((16, 16, 3), np.uint8)
  image[:4] = 255
  upright = reader.read(encoded(image, format="PNG"), "upright").tokens
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned clockwise
  lying = np.ascontiguousarray(np.rot90(image, 1))
  turned = reader.read(encoded(lying, format="PNG", exif=exif), "turned").tokens
  np.testing.assert_array_equal(turned, upright)
  assert (reader.read(encoded(lying, format="PNG"), "lying").tokens != upright).any()


@pytest.mark.parametrize("augment", [None, "none", "paper", "cifar"])
def test_an_image_of_the_models_own_size_is_encoded_as_it_is(trained, augment):
  """Whoever wrote the checkpoint: one that says nothing of its data is taken for the paper's."""
  found = completer_lib.describe(settings(trained), "")
  run = {**found.run, "resolution": 8, "config": {"data": {"augment": augment} if augment else {}}}
  reader = completer_lib.Reader(dataclasses.replace(found, run=run))
  tokens = np.random.default_rng(0).integers(0, 11, 64).astype(np.int32)
  image = reader.paint(tokens[None])[0]
  np.testing.assert_array_equal(reader.read(encoded(image, format="PNG"), "").tokens, tokens)
  beside = np.pad(image, ((0, 0), (3, 4), (0, 0)))
  np.testing.assert_array_equal(reader.read(encoded(beside, format="PNG"), "").tokens, tokens)


def test_a_file_that_is_no_picture_is_named(trained):
  with pytest.raises(BadRecord, match=r"^my\.jpg: unreadable image \(cannot identify image\)$"):
    completer_of(trained).reader.read(b"nothing", "my.jpg")


def test_files_are_found_by_name_glob_and_folder(photos):
  assert [f.name for f in prompt_files.find(str(photos / "cats" / "a.jpg"))] == ["a"]
  assert [(f.group, f.name) for f in prompt_files.find(str(photos))] == [
    ("cats", "a"),
    ("cats", "b"),
    ("dogs", "a"),
  ]
  shutil.copy(photos / "cats" / "b.png", photos / "cats" / "A.png")
  names = [f.name for f in prompt_files.find(str(photos / "**" / "[aA].*"))]
  assert names == ["A", "a.jpg", "a.webp"]
  with pytest.raises(UserError, match="matches no file"):
    prompt_files.find(str(photos / "*.tiff"))
  (photos / "empty").mkdir()
  with pytest.raises(UserError, match="holds no images"):
    prompt_files.find(str(photos / "empty"))


def test_images_are_found_by_their_contents_at_any_depth(tmp_path, capsys):
  my = tmp_path / "my"
  for name in ("a", "cats/b.jfif", "cats/2020/b.png", "__MACOSX/c.png", "cats/._d.png"):
    (my / name).parent.mkdir(parents=True, exist_ok=True)
    (my / name).write_bytes(encoded(np.zeros((4, 4, 3), np.uint8), format="PNG"))
  (my / "notes.txt").write_text("no image")
  (my / "cats" / "e.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
  (my / "cats" / "loop").symlink_to(my)
  found = [("", "a"), ("cats", "b"), ("cats", "b.jfif")]
  assert [(f.group, f.name) for f in prompt_files.find(str(my))] == found
  said = capsys.readouterr().out
  assert (
    "config.complete.images: left out 3 files: " in said
    and "cats/e.heic (HEIC" in said
    and "notes.txt" in said
  )
  assert [f.name for f in prompt_files.find(str(my / "*"))] == ["a"]
  assert "notes.txt" in capsys.readouterr().out
  assert [f.name for f in prompt_files.find(str(my / "notes.txt"))] == [
    "notes"
  ]  # who names it, means it
  with pytest.raises(UserError, match=r"holds no images.*left out 1 file: .*e\.heic \(HEIC"):
    prompt_files.find(str(my / "cats" / "*.heic"))


def test_results_have_names_of_their_own(trained, tmp_path):
  """Whatever images and classes are called: no folder is in the way of a file, or of another."""
  (tmp_path / "my" / "cat").mkdir(parents=True)
  (tmp_path / "my" / "grid.png").mkdir()
  names = (
    "grid.jpg", "grid.gif", "complete.json.png", "settings.json.png", "cat.png", "Cat.png",
    "grid.png.partial.png", "grid.png/0000.png.png", "cat/grid.bmp", "cat/grid.png", "cat/grid.png.png",
    "e\u0301.png", "\u00e9.png",
  )  # fmt: skip
  for i, name in enumerate(names):
    Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(tmp_path / "my" / name)
  folder = str(tmp_path / "my")
  found = prompt_files.find(folder)
  places = [os.path.join(file.group, file.name).lower() for file in found]
  assert len(set(places)) == len(names)
  for attempt in range(2):  # the second one finds what the first has left
    complete.run(settings(trained, images=folder, n=1), str(tmp_path / "out"))
    values = json.loads((tmp_path / "out" / "complete.json").read_text())
    assert values["pictures"] == len(names), attempt
  for place in ("grid.png", "cat/grid.png", "settings.json"):
    assert (tmp_path / "out" / place).is_file()
  for file in found:
    own = tmp_path / "out" / file.group / file.name / "complete.json"
    assert json.loads(own.read_text())["picture"] == file.path


# --- the job ---------------------------------------------------------------------------------------


def test_a_folder_of_classes(trained, photos, tmp_path, capsys):
  (photos / "cats" / "bad.jpg").write_bytes(b"no image")
  out = tmp_path / "out"
  complete.run(settings(trained, images=str(photos), keep=0.5), str(out))
  assert "bad.jpg: unreadable image" in capsys.readouterr().out
  values = json.loads((out / "complete.json").read_text())
  assert list(values["each_nats_per_token"]) == ["cats/a", "cats/b", "dogs/a"]
  assert len(values["unreadable"]) == 1
  one = json.loads((out / "cats" / "a" / "complete.json").read_text())
  assert [sample["file"] for sample in one["samples"]] == ["0000.png", "0001.png", "0002.png"]
  assert [sample["seed"][2] for sample in one["samples"]] == [0, 1, 2]
  assert one["nats_per_token"] == pytest.approx(values["each_nats_per_token"]["cats/a"], abs=1e-4)
  side = 4 * 24  # default_scale
  assert Image.open(out / "cats" / "a" / "0002.png").size == (side, side)
  of_cats, of_dogs = (Image.open(out / group / "grid.png") for group in ("cats", "dogs"))
  cell = 128 + 4
  assert of_cats.width == of_dogs.width == 5 * cell + 4  # given, three samples, original
  assert of_cats.height - of_dogs.height == cell and of_dogs.height > cell + 4  # title and heads
  gif = Image.open(out / "dogs" / "a" / "appearing.gif")
  assert gif.n_frames == 1 + 8 and gif.info["loop"] == 0
  first, final = np.asarray(gif.convert("RGB")), None
  gif.seek(8)
  final = np.asarray(gif.convert("RGB"))
  np.testing.assert_array_equal(first[: side // 2], final[: side // 2])
  assert (first[side // 2 + 8 : side] != final[side // 2 + 8 : side]).any()


def test_from_nothing(trained, tmp_path):
  out = tmp_path / "out"
  complete.run(settings(trained, n=5), str(out))
  values = json.loads((out / "complete.json").read_text())
  assert values["pictures"] == 0 and values["settings"]["rows_given"] == 0
  assert sorted(tokens_in(out / "unconditional")) == [0, 1, 2, 3, 4]
  grid = Image.open(out / "grid.png")
  assert grid.width == 4 * 132 + 4 and grid.height > 2 * 132 + 4


def test_an_interrupted_run_goes_on_with_the_rest(trained, photos, tmp_path, monkeypatch):
  config = settings(trained, images=str(photos), n=5)
  whole, out = tmp_path / "whole", tmp_path / "out"
  complete.run(config, str(whole))

  drawn, draw = [], complete._draw

  def interrupted(completer, batch, numbers, *rest):
    if len(drawn) == 3:
      raise KeyboardInterrupt
    draw(completer, batch, numbers, *rest)
    drawn.append((batch[0].image.name, numbers))

  monkeypatch.setattr(complete, "_draw", interrupted)
  with pytest.raises(KeyboardInterrupt):
    complete.run(config, str(out))
  # Two batches of three samples an image: the first image is whole, the second one begun.
  assert (out / "cats" / "a" / "complete.json").exists()
  assert (out / "cats" / "b" / "0002.png").exists()
  assert not (out / "cats" / "b" / "complete.json").exists()
  assert not (out / "complete.json").exists()

  monkeypatch.setattr(complete, "_draw", lambda *args: (drawn.append(args[2]), draw(*args)))
  complete.run(config, str(out))
  assert len(drawn) == 6
  for name in ("cats/a", "cats/b", "dogs/a"):
    assert tokens_in(out / name) == tokens_in(whole / name)
    assert (out / name / "appearing.gif").read_bytes() == (
      whole / name / "appearing.gif"
    ).read_bytes()

  complete.run(config, str(out))  # all there
  assert len(drawn) == 6
  config = changed(config, {"sample.batch_size": 16})  # another batch size isn't another sample
  complete.run(config, str(tmp_path / "at_once"))
  for name in ("cats/a", "cats/b", "dogs/a"):
    assert tokens_in(tmp_path / "at_once" / name) == tokens_in(whole / name)


def test_a_file_that_has_changed_is_completed_anew(trained, photos, tmp_path):
  config = settings(trained, images=str(photos / "cats" / "*"))
  complete.run(config, str(tmp_path / "out"))
  before = tokens_in(tmp_path / "out" / "b")
  shutil.copy(photos / "dogs" / "a.webp", photos / "cats" / "b.png")
  complete.run(config, str(tmp_path / "out"))
  after = tokens_in(tmp_path / "out" / "b")
  assert before != after
  fresh = tmp_path / "fresh"
  complete.run(config, str(fresh))
  assert after == tokens_in(fresh / "b")


def test_a_workdir_of_other_samples_is_left_alone(trained, photos, tmp_path):
  complete.run(settings(trained, images=str(photos)), str(tmp_path / "out"))
  with pytest.raises(UserError, match=r"rows_given: 2 there, 1 here"):
    complete.run(settings(trained, images=str(photos), keep=0.3), str(tmp_path / "out"))


def write_foreign(prefix, seed):
  """A model in OpenAI's format, its palette beside it."""
  config = make_config(n_vocab=11)
  levels = np.random.default_rng(0).integers(0, 256, (11, 3))
  centers = (levels / 127.5 - 1).astype(np.float32)
  os.makedirs(os.path.dirname(prefix))
  formats.save(prefix, "openai", config, random_params(config, seed), clusters=centers)


@pytest.mark.parametrize("kind", ["own", "openai"])
def test_another_model_in_the_same_place_is_refused(tmp_path, kind):
  """Same path, same step: only what is in the weights tells them apart."""
  place = tmp_path / "model"

  def write(seed):
    shutil.rmtree(place, ignore_errors=True)
    if kind == "own":
      return own_checkpoint.write(place, seed=seed)
    write_foreign(str(place / "model.ckpt-7"), seed)
    return str(place)

  config = settings(write(0), n=2)
  complete.run(config, str(tmp_path / "out"))
  write(1)
  with pytest.raises(
    UserError, match=r"by another model:\n  parameters: \w{16} there, \w{16} here\nfix"
  ):
    complete.run(config, str(tmp_path / "out"))
  write(0)
  complete.run(config, str(tmp_path / "out"))


def test_the_same_model_elsewhere_has_nothing_to_do(trained, tmp_path, monkeypatch):
  """Not even to read its weights."""
  complete.run(settings(trained, n=2), str(tmp_path / "out"))
  shutil.copytree(trained, tmp_path / "moved")
  monkeypatch.setattr(complete, "Completer", None)
  complete.run(settings(str(tmp_path / "moved"), n=2), str(tmp_path / "out"))
  values = json.loads((tmp_path / "out" / "complete.json").read_text())
  assert values["checkpoint"].startswith(str(tmp_path / "moved"))


def test_a_checkpoint_of_any_format_has_one_checksum(tmp_path):
  own = own_checkpoint.write(tmp_path / "own", seed=3)
  write_foreign(str(tmp_path / "foreign" / "model.ckpt-7"), 3)
  sums = {
    weights.checksum_of(weights.describe(path, Settings()))
    for path in (own, str(tmp_path / "foreign"))
  }
  described = weights.describe(own, Settings())
  older = dataclasses.replace(described, sums={})  # from before checkpoints had checksums
  assert sums == {weights.checksum_of(older)} == {described.sums["params"]}


def test_samples_say_themselves_what_they_are_of(trained, tmp_path):
  """What was drawn with other settings isn't taken for these, though no settings.json says so."""
  out, fresh = tmp_path / "out", tmp_path / "fresh"
  complete.run(settings(trained, n=2), str(out))
  (out / "settings.json").unlink()
  complete.run(settings(trained, n=2, seed=1), str(out))
  complete.run(settings(trained, n=2, seed=1), str(fresh))
  assert tokens_in(out / "unconditional") == tokens_in(fresh / "unconditional")
  told = [
    json.loads((each / "unconditional" / "complete.json").read_text()) for each in (out, fresh)
  ]
  assert told[0] == told[1]


def test_larger_images_are_other_results(trained, tmp_path):
  complete.run(settings(trained, n=2), str(tmp_path / "out"))
  with pytest.raises(UserError, match=r"scale: 24 there, 3 here"):
    complete.run(settings(trained, n=2, **{"sample.scale": 3}), str(tmp_path / "out"))


@pytest.mark.parametrize(
  "damage", ["cut", "empty", "noise", "no zip inside", "of an older version"]
)
def test_damaged_samples_are_drawn_again(trained, tmp_path, damage):
  out = tmp_path / "out"
  complete.run(settings(trained, n=2), str(out))
  before = tokens_in(out / "unconditional")
  kept = out / "unconditional" / "0000.npz"
  whole = kept.read_bytes()
  with np.load(kept, allow_pickle=False) as part:
    arrays = dict(part)
  if damage == "of an older version":
    del arrays["settings"]
    arrays["tokens"] = arrays["tokens"] * 0
    np.savez(kept, **arrays)
  else:
    kept.write_bytes(
      {
        "cut": whole[: len(whole) // 2], "empty": b"", "noise": b"noise" * 50,
        "no zip inside": whole[:200] + b"\0" * (len(whole) - 400) + whole[-200:],
      }[damage]
    )  # fmt: skip
  complete.run(settings(trained, n=2), str(out))
  assert tokens_in(out / "unconditional") == before


@pytest.mark.parametrize("text", ['{"n": ', "[]"])
def test_damaged_settings_are_said(trained, tmp_path, text):
  complete.run(settings(trained, n=2), str(tmp_path / "out"))
  (tmp_path / "out" / "settings.json").write_text(text)
  with pytest.raises(UserError, match=r"settings\.json is damaged .*fix: another --workdir"):
    complete.run(settings(trained, n=2), str(tmp_path / "out"))


def test_a_run_of_its_own_gets_a_folder_for_it(photos, tmp_path):
  run = own_checkpoint.write(tmp_path / "run")
  complete.run(settings("", images=str(photos)), run)
  assert (tmp_path / "run" / "complete" / "cats" / "grid.png").exists()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"keep": 1.0}, "config.complete.keep: 1.0; expected within"),
    ({"keep": 0.0}, "config.complete.keep: 0.0; expected within"),
    ({"n": 0}, "config.complete.n: 0; expected 1 to 65,536"),
    ({"sample.top_p": 0.0}, "top_p: 0.0"),
    ({"sample.temperature": 1e-38}, "temperature: 1e-38"),
    ({"seed": 2**32}, "config.seed: 4294967296"),
    ({"sample.batch_size": 0}, "config.sample.batch_size"),
    ({"images": "nowhere/*.jpg"}, "matches no file in .*; expected"),
    ({"images": "/nowhere/x.jpg"}, "'/nowhere/x.jpg' matches no file; expected"),
  ],
)
def test_mistakes_are_told_before_weights_are_read(
  trained, changes, message, tmp_path, monkeypatch
):
  monkeypatch.setattr(completer_lib, "Completer", None)
  with pytest.raises(UserError, match=message):
    complete.run(settings(trained, **changes), str(tmp_path / "out"))
  assert not (tmp_path / "out").exists()


def test_nothing_readable(trained, tmp_path):
  (tmp_path / "bad.jpg").write_bytes(b"no image")
  with pytest.raises(UserError, match=r"none can be read:\n.*bad\.jpg"):
    complete.run(settings(trained, images=str(tmp_path / "bad.jpg")), str(tmp_path / "out"))


def test_a_cache_of_another_dtype(trained, photos, tmp_path):
  """Nearly the same likelihoods; another run than that of the model's own dtype."""
  nats = {}
  for cache in ("", "int8"):
    out = tmp_path / (cache or "own")
    complete.run(settings(trained, images=str(photos), **{"sample.cache": cache}), str(out))
    nats[cache] = json.loads((out / "complete.json").read_text())["nats_per_token"]
  assert nats["int8"] != nats[""] and nats["int8"] == pytest.approx(nats[""], rel=0.1)
  with pytest.raises(UserError, match="cache:  there, int8 here"):
    complete.run(
      settings(trained, images=str(photos), **{"sample.cache": "int8"}), str(tmp_path / "own")
    )
  with pytest.raises(UserError, match=r"config\.sample\.cache: 'int4'; expected one of .*int8"):
    settings(trained, **{"sample.cache": "int4"})


def test_checkpoints_that_cannot_complete(photos, tmp_path):
  bare = own_checkpoint.write(tmp_path / "bare", palette=False)
  with pytest.raises(UserError, match="carries no palette"):
    complete.run(settings(bare, images=str(photos)), str(tmp_path / "out"))
  bert = own_checkpoint.write(tmp_path / "bert", causal=False)
  with pytest.raises(UserError, match="is a BERT model"):  # as the page asks
    completer_lib.describe(settings(bert), "")
  (tmp_path / "begun").mkdir()
  (tmp_path / "begun" / "config.json").write_text('{"seed": 0}')
  with pytest.raises(UserError, match="no checkpoint in"):
    complete.run(settings("", images=str(photos)), str(tmp_path / "begun"))
