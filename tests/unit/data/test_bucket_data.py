"""Images, tokens and palettes in buckets: the same data as on a disk, copied once, and told when wrong."""

import io
import os
import pickle
import shutil

import numpy as np
import pytest

from igpt_jax import files
from igpt_jax.config.fields import Settings, with_values
from igpt_jax.config.read import check
from igpt_jax.config.run_fields import DataConfig
from igpt_jax.data import bucket_folders, sources, tfds_source
from igpt_jax.data.palette import Palette
from igpt_jax.errors import NoSuchSplit, UserError
from igpt_jax.workspace import places
from support import photos

PHOTOS = "gs://bucket/my photos"


@pytest.fixture(autouse=True)
def _scratch(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "_scratch", str(tmp_path / "scratch"))
  bucket_folders.copied.cache_clear()
  yield
  bucket_folders.copied.cache_clear()


def put(buckets, folder, name):
  """Puts all files of a folder into the bucket."""
  for path in sorted(folder.rglob("*")):
    if path.is_file():
      buckets.put("bucket", f"{name}/{path.relative_to(folder)}", path.read_bytes())


def opened(path, name="folder", again=True, **settings):
  if again:  # as another process does
    bucket_folders.copied.cache_clear()
  config = DataConfig(name=name, path=path, resolution=8, **settings)
  return {split: sources.open_split(config, split) for split in sources.SPLITS}


@pytest.mark.parametrize("splits", [False, True])
def test_a_folder_in_a_bucket_is_the_folder(buckets, tmp_path, splits):
  names = [f"train/{c}/{i}.png" for c in "ab" for i in range(12)] + ["test/a/0.png", "test/b/1.png"]
  root = photos.photos(
    tmp_path / "my photos", names if splits else [f"é/{i}.png" for i in range(40)]
  )
  put(buckets, root, "my photos")
  ours, theirs = opened(PHOTOS), opened(str(root))
  for name in sources.SPLITS:
    assert ours[name].fingerprint == theirs[name].fingerprint
    assert ours[name].class_names == theirs[name].class_names
    for i in range(len(theirs[name])):
      assert ours[name][i]["image"] == theirs[name][i]["image"]
      assert ours[name][i]["label"] == theirs[name][i]["label"]
  assert buckets.count("read") == len(names if splits else range(40))


def test_a_folder_is_copied_once_and_follows_the_bucket(buckets, tmp_path):
  """What is new or changed is copied, what was removed goes; the rest isn't read again."""
  root = photos.photos(tmp_path / "my photos", [f"{i}.png" for i in range(40)])
  put(buckets, root, "my photos")
  before = opened(PHOTOS)
  buckets.requests.clear()
  assert opened(PHOTOS)["train"].fingerprint == before["train"].fingerprint
  assert buckets.count("read") == 0 and buckets.count("list") == 2  # of 20 names each
  photos.photo(root / "0.png", 100)
  photos.photo(root / "new.png", 101)
  (root / "1.png").unlink()
  for name in ("0.png", "new.png"):
    buckets.put("bucket", f"my photos/{name}", (root / name).read_bytes())
  del buckets.buckets["bucket"]["my photos/1.png"]
  buckets.requests.clear()
  assert opened(PHOTOS)["train"].fingerprint == opened(str(root))["train"].fingerprint
  assert sorted(name for kind, name in buckets.requests if kind == "read") == [
    "bucket/my photos/0.png", "bucket/my photos/new.png"
  ]  # fmt: skip


def test_a_copy_that_was_interrupted_goes_on(buckets, tmp_path):
  root = photos.photos(tmp_path / "my photos", [f"{i}.png" for i in range(40)])
  put(buckets, root, "my photos")
  buckets.refusing["bucket"] = {"read"}
  with pytest.raises(UserError, match="no right"):
    opened(PHOTOS)
  buckets.refusing.clear()
  buckets.fail("read", "*/7.png", "cut")
  buckets.fail("read", "*/8.png", "503")
  buckets.fail("list", "*", "503")
  assert opened(PHOTOS)["train"].fingerprint == opened(str(root))["train"].fingerprint
  assert buckets.unspent() == 0
  left = [name for name in os.listdir(next((tmp_path / "scratch" / "of").iterdir()))]
  assert sorted(left) == ["my photos", "my photos.json", "my photos.lock"]


def test_a_copy_that_was_touched_is_made_again(buckets, tmp_path):
  """By its size; and leftovers of other programs aren't copied."""
  root = photos.photos(tmp_path / "my photos", [f"{i}.png" for i in range(40)])
  put(buckets, root, "my photos")
  buckets.put("bucket", "my photos/.DS_Store", b"x")
  buckets.put("bucket", "my photos/../x.png", b"")
  for name in ("my photos/", "my photos/albums/"):  # as the console makes folders
    buckets.put("bucket", name, b"")
  fingerprint = opened(PHOTOS)["train"].fingerprint
  (copy,) = (tmp_path / "scratch").rglob("3.png")
  copy.write_bytes(b"")
  assert opened(PHOTOS)["train"].fingerprint == fingerprint
  assert not list((tmp_path / "scratch").rglob(".DS_Store"))


def test_what_is_wrong_with_a_folder_names_the_address(buckets, tmp_path, monkeypatch):
  with pytest.raises(UserError, match=r"data.path gs://bucket/none: no files there"):
    opened("gs://bucket/none")
  put(buckets, photos.photos(tmp_path / "few", [f"{i}.png" for i in range(5)]), "few")
  with pytest.raises(
    UserError, match=r"data.path gs://bucket/few: holds 5 different images"
  ) as told:
    opened("gs://bucket/few")
  assert "scratch" not in str(told.value)
  buckets.put("bucket", "up/a//x.png", b"x")
  with pytest.raises(UserError, match=r"gs://bucket/up: 'a//x.png' can't be a file's name"):
    opened("gs://bucket/up")
  monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1))
  put(buckets, tmp_path / "few", "room")
  with pytest.raises(UserError, match=r"config.scratch: .* are free; fix: .*gcsfuse"):
    opened("gs://bucket/room")


def test_scratch_that_cannot_be_written(buckets, tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  monkeypatch.setattr(files, "_scratch", str(tmp_path / "file"))
  buckets.put("bucket", "my photos/a.png", b"x")
  with pytest.raises(UserError, match=r"config.scratch: .*fix: --config.scratch="):
    opened(PHOTOS)


def array(values) -> bytes:
  np.save(file := io.BytesIO(), values)
  return file.getvalue()


def test_tokens_in_a_bucket(buckets, tmp_path):
  """Only the splits that are asked for are copied; another file of the name is another data set."""
  rows = np.random.default_rng(0).integers(0, 9, (30, 64), np.uint16)
  np.save(tmp_path / "test.npy", rows)
  for name in ("train", "test"):
    buckets.put("bucket", f"tokens/{name}.npy", array(rows))
  config = DataConfig(name="tokens", path="gs://bucket/tokens/", resolution=8)
  local = DataConfig(name="tokens", path=str(tmp_path), resolution=8)
  split = sources.open_split(config, "test")
  assert split.fingerprint == sources.open_split(local, "test").fingerprint
  assert [name for kind, name in buckets.requests if kind == "read"] == ["bucket/tokens/test.npy"]
  np.testing.assert_array_equal(pickle.loads(pickle.dumps(split.records))[7]["tokens"], rows[7])
  assert len(sources.open_split(config, "validation")) == 3  # a share of train
  buckets.put("bucket", "tokens/validation.npy", array(rows[:5]))
  assert len(sources.open_split(config, "validation")) == 5

  alone = DataConfig(name="tokens", path="gs://bucket/tokens/test.npy", resolution=8)
  buckets.requests.clear()
  assert sources.open_split(alone, "test").fingerprint == split.fingerprint
  assert buckets.count("read") == 0
  buckets.put("bucket", "tokens/test.npy", array(rows[::-1]))
  other = sources.open_split(alone, "test")
  assert other.fingerprint != split.fingerprint
  np.testing.assert_array_equal(other[0]["tokens"], rows[-1])


def test_wrong_tokens_in_a_bucket_name_the_address(buckets):
  with pytest.raises(NoSuchSplit, match=r"data.path gs://bucket/none.npy: no such file"):
    opened_tokens("gs://bucket/none.npy")
  buckets.put("bucket", "wrong.npy", array(np.zeros((4, 63), np.uint16)))
  with pytest.raises(UserError, match=r"data.path gs://bucket/wrong.npy: 63 tokens"):
    opened_tokens("gs://bucket/wrong.npy")
  buckets.refusing["bucket"] = {"read"}
  buckets.put("bucket", "other.npy", array(np.zeros((4, 64), np.uint16)))
  with pytest.raises(UserError, match=r"gs://bucket/other.npy: no right") as told:
    opened_tokens("gs://bucket/other.npy")
  assert told.value.status == 2


def opened_tokens(path):
  return sources.open_split(DataConfig(name="tokens", path=path, resolution=8), "test")


def test_a_palette_in_a_bucket(buckets, tmp_path):
  centers = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
  buckets.put("bucket", "palette.npy", array(centers))
  palette = Palette.from_setting("gs://bucket/palette.npy")
  np.testing.assert_array_equal(palette.centers, centers)
  buckets.put("bucket", "palette.npy", array(-centers))
  np.testing.assert_array_equal(Palette.from_setting("gs://bucket/palette.npy").centers, -centers)
  with pytest.raises(UserError, match=r"palette gs://bucket/none.npy: No such file"):
    Palette.from_setting("gs://bucket/none.npy")


def test_what_settings_take_an_address(buckets):
  for changes in (
    {"data.name": "folder", "data.path": PHOTOS},
    {"data.name": "tokens", "data.path": "gs://bucket/tokens"},
    {"palette.path": "gs://bucket/palette.npy"},
  ):
    check(with_values(Settings(), changes))
  with pytest.raises(UserError, match=r"config.palette.path: gs:///x.npy.*no bucket"):
    check(with_values(Settings(), {"palette.path": "gs:///x.npy"}))
  with pytest.raises(
    UserError, match=r"config.data.path: s3://x/y; expected a local path or gs://"
  ):
    check(with_values(Settings(), {"data.name": "tokens", "data.path": "s3://x/y"}))
  with pytest.raises(
    UserError, match=r"data.data_dir: gs://x/y; .*gcsfuse --implicit-dirs x /mnt/x"
  ):
    tfds_source.open_records("cifar10", "gs://x/y", "train", "", False)


def test_a_workdir_within_the_images_of_a_bucket_is_refused(buckets):
  settings = with_values(Settings(), {"data.name": "folder", "data.path": "gs://bucket/photos"})
  with pytest.raises(UserError, match=r"lies within data.path gs://bucket/photos"):
    places.check(settings, "gs://bucket/photos/run")
  places.check(settings, "gs://bucket/photos-run")
