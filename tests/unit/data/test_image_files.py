"""All images of a folder are read, wherever below it they lie and whatever they are called, or it is said."""

import concurrent.futures.thread  # noqa: F401 (imported late by others, when nobody may read it)
import contextlib
import json
import os
import pathlib
import tempfile
import tracemalloc

import numpy as np
import pytest
from PIL import Image, features

from igpt_jax import errors
from igpt_jax.data import image_decoding, image_files, pipeline, sources
from igpt_jax.parallel import hosts


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  """An empty cache of the user's."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def png(path, value=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path, "png")


def ids(root):
  config = sources.DataConfig(name="folder", path=str(root), validation=0.0)
  found = sources.open_split(config, "train")
  records = (found[i] for i in range(len(found)))
  return sorted((os.path.relpath(record["id"], root), record["label"]) for record in records)


def test_images_lie_at_any_depth_and_have_any_suffix(tmp_path, capsys):
  train = tmp_path / "train"
  for name in ("cat/a.png", "cat/2020/b.PNG", "cat/2020/01/c", "dog/d.jfif", "dog/e.2020-01-01"):
    png(train / name)
  (train / "dog" / "f.txt").write_text("P1 isn't what a text begins with")
  (train / "dog" / "g").write_text("")
  (train / "dog" / "h.nef").write_bytes(b"MM\0*")
  (train / "dog" / "i.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
  assert ids(tmp_path) == [
    ("train/cat/2020/01/c", 0), ("train/cat/2020/b.PNG", 0), ("train/cat/a.png", 0),
    ("train/dog/d.jfif", 1), ("train/dog/e.2020-01-01", 1),
  ]  # fmt: skip
  assert capsys.readouterr().out == (
    f"{train}: left out 4 files: dog/i.HEIC (HEIC, for which Pillow needs a plugin: pip install "
    "pillow-heif), dog/h.nef (a raw photograph, to be developed first), dog/f.txt and 1 more (no image "
    "that can be read)\n"
  )
  ids(tmp_path)
  assert not capsys.readouterr().out  # once is enough


FORMATS = {
  "JPEG": {}, "PNG": {}, "GIF": {}, "BMP": {}, "TIFF": {}, "WEBP": {}, "PPM": {}, "JPEG2000": {},
  "AVIF": {}, "QOI": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_known_without_its_suffix(tmp_path, kind):
  if kind == "AVIF" and not features.check("avif"):
    pytest.skip("this Pillow reads no AVIF")
  (tmp_path / "train").mkdir()
  Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(tmp_path / "train" / "image", kind)
  split = sources.open_split(sources.DataConfig(name="folder", path=str(tmp_path)), "train")
  assert abs(image_decoding.decode(split[0]["image"]).astype(int) - 90).max() < 4


def test_a_header_that_promises_much_costs_nothing(tmp_path):
  """92 bytes that announce 4 GiB of names of formats: they were all looked for."""
  (tmp_path / "bomb").write_bytes(b"\xff\xff\xff\xffftypisom" + bytes(80))
  tracemalloc.start()
  assert image_files.why_not(str(tmp_path / "bomb")) == "no image that can be read"
  assert tracemalloc.get_traced_memory()[1] < 10**6
  tracemalloc.stop()


@pytest.mark.parametrize(
  "start, heic",
  [
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", True),
    (b"\0\0\0\x18ftyphevc\0\0\0\0mif1heic", True),
    (b"\0\0\0\x18ftypmsf1\0\0\0\0mif1heic", True),
    (b"\0\0\0\x10ftypisom\0\0\0\0mif1heic", False),
    (b"\xff\xd8\xff heic", False),
  ],
)
def test_heic_is_one_thing_to_whoever_lists_and_whoever_reads(start, heic):
  assert image_files.is_heic(start + bytes(100)) == heic


def test_what_systems_leave_behind_is_neither_class_nor_image(tmp_path, capsys):
  train = tmp_path / "train"
  png(train / "cat/a.png")
  for name in (
    "__MACOSX/cat/a.png",
    ".git/a.png",
    "@eaDir/b.png",
    "cat/._a.png",
    "cat/@eaDir/a.png",
  ):
    png(train / name)
  for name in ("Thumbs.db", ".DS_Store", "desktop.ini"):
    (train / name).write_bytes(b"\xff\xd8\xff")
    (train / "cat" / name).write_bytes(b"\xff\xd8\xff")
  split = sources.open_split(sources.DataConfig(name="folder", path=str(tmp_path)), "train")
  assert (len(split), split.class_names) == (1, ("cat",))
  assert not capsys.readouterr().out


def test_links_are_followed_but_not_in_circles(tmp_path, capsys):
  train, elsewhere = tmp_path / "data" / "train", tmp_path / "elsewhere"
  png(train / "cat" / "a.png")
  png(elsewhere / "deep" / "b.png")
  png(tmp_path / "c.png")
  (train / "dog").symlink_to(elsewhere)
  (train / "cat" / "c.png").symlink_to(tmp_path / "c.png")
  (train / "cat" / "up").symlink_to(train)
  (train / "cat" / "far").symlink_to(tmp_path / "data")
  (train / "cat" / "self").symlink_to(train / "cat" / "self")
  (train / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
  (elsewhere / "deep" / "loop").symlink_to(elsewhere)
  os.mkfifo(train / "cat" / "pipe.png")
  assert ids(tmp_path / "data") == [
    ("train/cat/a.png", 0),
    ("train/cat/c.png", 0),
    ("train/dog/deep/b.png", 1),
  ]
  (line,) = capsys.readouterr().out.splitlines()
  assert "cat/far and 2 more (a link to a folder that is read already)" in line
  assert "cat/pipe.png (a pipe or a device)" in line and "cat/gone.png (a link to nothing)" in line


def test_loose_images_beside_classes_and_nothing_at_all(tmp_path):
  (tmp_path / "train" / "cat").mkdir(parents=True)
  (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
  with pytest.raises(errors.UserError, match=r"left out 1 file: cat/notes\.txt \(no image "):
    ids(tmp_path)
  png(tmp_path / "train" / "loose")
  with pytest.raises(errors.UserError, match="loose images"):
    ids(tmp_path)


@contextlib.contextmanager
def nobody():
  """Without root's right to read everything, where tests are root's."""
  if os.geteuid():
    yield
    return
  os.seteuid(65534)
  try:
    yield
  finally:
    os.seteuid(0)


def test_what_may_not_be_read_is_said(capsys):
  with tempfile.TemporaryDirectory() as name:  # pytest's own are root's alone
    root = pathlib.Path(name)
    root.chmod(0o755)
    for image in ("cat/a.png", "cat/b.png", "dog/c.png", "dog/closed/d.png"):
      png(root / "train" / image)
    (root / "train/dog/closed").chmod(0)
    (root / "train/cat/b.png").chmod(0)
    config = sources.DataConfig(name="folder", path=name, validation=0.0)
    with nobody():
      split = sources.open_split(config, "train")
      assert len(split) == 3
      assert "dog/closed (Permission denied)" in capsys.readouterr().out
      with pytest.raises(image_decoding.BadRecord, match=r"cat/b\.png: Permission denied"):
        [split[i] for i in range(3)]
    (root / "train").chmod(0)
    with nobody(), pytest.raises(errors.UserError, match=r"train: Permission denied"):
      sources.open_split(config, "train")
    root.chmod(0)
    with nobody(), pytest.raises(errors.UserError, match=r": Permission denied; expected a folder"):
      sources.open_split(config, "train")
    root.chmod(0o755)
    (root / "train").chmod(0o755)
    (root / "train/dog/closed").chmod(0o755)


# --- names -----------------------------------------------------------------------------------------


def test_names_that_are_not_utf8_train(tmp_path, capsys):
  strange = os.fsdecode(b"caf\xe9")
  for i in range(3):
    png(tmp_path / "train" / strange / f"{strange}{i}.png", i)
    png(tmp_path / "train" / "tea" / f"{i}.png", i)
  config = sources.DataConfig(name="folder", path=str(tmp_path), validation=0.0)
  split = sources.open_split(config, "train")
  assert split.class_names == ("caf\\xe9", "tea")
  shown = [split[i]["id"] for i in range(6)]
  assert json.dumps(shown).encode() and "\n".join(shown).encode()
  with pipeline.train_batches(split, config, None, batch_size=6, seed=0) as batches:
    assert sorted(next(batches)["label"]) == [0, 0, 0, 1, 1, 1]
  hosts.say(f"unreadable: {strange}")
  assert capsys.readouterr().out == "unreadable: caf\\xe9\n"


ONE, TWO = "caf\u00e9", "cafe\u0301"  # é as one character, and as two


def test_a_name_is_one_in_any_normal_form(tmp_path):
  for name in (ONE, "tea"):
    for i in range(3):
      png(tmp_path / "a" / "train" / name / f"{ONE}{i}.png", i)
      png(tmp_path / "b" / "train" / {ONE: TWO}.get(name, name) / f"{TWO}{i}.png", i)
  png(tmp_path / "a" / "test" / TWO / "0.png")
  png(tmp_path / "a" / "test" / "tea" / "0.png")
  config = sources.DataConfig(name="folder", path=str(tmp_path / "a"))
  train, test = (sources.open_split(config, split) for split in ("train", "test"))
  assert train.class_names == test.class_names == (ONE, "tea")
  assert sorted(test[i]["label"] for i in range(2)) == [0, 1]
  other = sources.open_split(sources.DataConfig(name="folder", path=str(tmp_path / "b")), "train")
  assert other.fingerprint == train.fingerprint
  assert [other[i]["image"] for i in range(5)] == [train[i]["image"] for i in range(5)]


def test_two_folders_of_one_name_are_refused(tmp_path):
  png(tmp_path / "train" / ONE / "a.png")
  png(tmp_path / "train" / TWO / "b.png")
  with pytest.raises(errors.UserError, match=rf"two folders are called '{ONE}'.*put them together"):
    ids(tmp_path)
