"""Data is known by what is in it: exchanged contents are noticed, a place or a copy makes no difference."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from igpt_jax import errors, watchdog
from igpt_jax.data import digests, image_decoding, pipeline, sources, tfds_source

SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  """An empty cache of the user's."""
  folder = tmp_path_factory.mktemp("cache")
  monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
  return folder


@pytest.fixture
def later(monkeypatch):
  """As if files had been written long before they are read."""
  now = digests.time.time_ns
  monkeypatch.setattr(digests.time, "time_ns", lambda: now() + 10**10)


@pytest.fixture
def reads(monkeypatch):
  """Names of the files whose contents are read, as they are."""
  names = []
  read = digests._Reader.__call__
  monkeypatch.setattr(
    digests._Reader,
    "__call__",
    lambda self, path: names.append(os.path.basename(path)) or read(self, path),
  )
  return names


@pytest.fixture
def root(tmp_path):
  """Five files in each of three classes, and files of tokens; no images, but nobody looks."""
  root = tmp_path / "data"
  for split in ("train", "test"):
    for name in ("cat-2", "cat", "dog"):
      (root / split / name).mkdir(parents=True)
      for i in range(5):
        (root / split / name / f"{i:03d}.png").write_bytes(f"{split} {name} {i}".encode())
    np.save(root / f"{split}.npy", np.arange(12 * 64, dtype=np.uint16).reshape(12, 64) % 17)
  return root


def prints(path, name="folder", **changes):
  """Fingerprints of all splits."""
  config = sources.DataConfig(name=name, path=str(path), **changes)
  return {split: sources.open_split(config, split).fingerprint for split in SPLITS}


def exchange(a, b):
  """Swaps what is in two files of one size, at the same times as before."""
  contents, status = [a.read_bytes(), b.read_bytes()], [a.stat(), b.stat()]
  assert len(contents[0]) == len(contents[1]) and contents[0] != contents[1]
  for path, content, was in ((a, contents[1], status[0]), (b, contents[0], status[1])):
    path.write_bytes(content)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


# --- what makes data another -----------------------------------------------------------------------


@pytest.mark.usefixtures("later")
def test_exchanged_images_are_another_data_set(root):
  before = prints(root)
  exchange(root / "train/cat/000.png", root / "train/cat/001.png")
  after = prints(root)
  assert before["train"] != after["train"] and before["validation"] != after["validation"]
  assert before["test"] == after["test"]
  exchange(root / "test/cat/000.png", root / "test/dog/000.png")
  assert prints(root)["test"] != after["test"] and prints(root)["train"] == after["train"]


def test_another_label_or_name_is_another_data_set(root):
  def train():
    return sources.open_split(sources.DataConfig(name="folder", path=str(root)), "train")

  seen = [train().fingerprint]
  (root / "train/cat").rename(root / "train/cut")
  seen.append(train().fingerprint)
  (root / "train/cut/004.png").rename(root / "train/cut/005.png")
  seen.append(train().fingerprint)
  assert len(set(seen)) == 3
  # A class more in train: none of test's files is another, but all its labels are.
  config = sources.DataConfig(name="folder", path=str(root))
  shutil.move(root / "train/cut", root / "train/cat")
  before = sources.open_split(config, "test")
  (root / "train" / "ant").mkdir()
  after = sources.open_split(config, "test")
  assert [after[i]["label"] - before[i]["label"] for i in range(15)] == [1] * 15
  assert after.fingerprint != before.fingerprint


def test_neither_place_nor_time_nor_links_make_another(root, tmp_path, monkeypatch):
  before = prints(root)
  shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
  assert prints(tmp_path / "copy") == before
  (tmp_path / "link").symlink_to(root)
  assert prints(tmp_path / "link") == before
  monkeypatch.chdir(tmp_path)
  assert prints("data") == before
  assert prints(root, "tokens") == prints("copy", "tokens")


def test_an_exchanged_row_of_tokens_is_noticed(root):
  before = prints(root, "tokens")
  rows = np.load(root / "train.npy")
  np.save(root / "train.npy", rows[[0, 2, 1, *range(3, 12)]])
  after = prints(root, "tokens")
  assert before["train"] != after["train"] and before["test"] == after["test"]


def test_a_fingerprint_names_which_records_are_chosen(root):
  split = sources.open_split(sources.DataConfig(name="folder", path=str(root)), "train")
  parts = [split.select(np.array(chosen)).fingerprint for chosen in ([0, 1], [0, 2], [1, 0])]
  assert len(set(parts)) == 3
  assert all(part.startswith("folder train[2 of 15] ") for part in parts)


@pytest.mark.parametrize("limit", [2**30, 0], ids=["small", "large"])
def test_a_tfds_set_prepared_anew(tmp_path, monkeypatch, limit):
  """The same again is the same, though TFDS writes other bytes; another is another."""
  import tensorflow_datasets as tfds

  monkeypatch.setattr(tfds_source, "_READ_WHOLE_BYTES", limit)
  noise, level = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), np.uint8), 0

  class Squares(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Coloured squares."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = {
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
        "label": tfds.features.ClassLabel(num_classes=2),
        "id": tfds.features.Text(),
      }
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
      for i, image in enumerate(noise):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png", compress_level=level)
        yield i, {"image": file.getvalue(), "label": i % 2, "id": f"square{i}"}

  def prepared(folder):
    Squares(data_dir=tmp_path / folder, file_format="array_record").download_and_prepare()
    config = sources.DataConfig(name="squares", data_dir=str(tmp_path / folder))
    return sources.open_split(config, "train")

  first = prepared("a")
  assert first.fingerprint.startswith("squares/1.0.0 train[")
  assert prepared("b").fingerprint == first.fingerprint
  sent = pickle.loads(pickle.dumps(first))  # as to a worker
  part = np.arange(3)
  assert sent.select(part).fingerprint == first.select(part).fingerprint != first.fingerprint
  # Where all is read, of the same size; else as TFDS' own records tell.
  noise, level = (255 - noise, 0) if limit else (0 * noise, 9)
  assert prepared("c").fingerprint != first.fingerprint
  shutil.rmtree(tmp_path / "a")
  second = prepared("a")  # in the first one's place
  assert second.fingerprint != first.fingerprint
  shard = next((tmp_path / "a").rglob("*train.array_record*"))
  shard.unlink()
  with pytest.raises(errors.UserError, match=r"squares/1\.0\.0: .*array_record.*fix: "):
    sources.open_split(sources.DataConfig(name="squares", data_dir=str(tmp_path / "a")), "train")


def test_a_tfds_set_is_known_by_its_pixels_not_by_how_they_are_compressed(tmp_path, monkeypatch):
  """Our own sets are made on each machine, by the PNG encoder that is there."""

  def fingerprint():
    config = sources.DataConfig(name="digits", data_dir=str(tmp_path), verify=True)
    return sources.open_split(config, "test").fingerprint

  first, whole = fingerprint(), tfds_source.TfdsRecords.__getitem__
  changed = 0

  def compressed_anew(self, index):
    record = whole(self, index)
    pixels = np.array(Image.open(io.BytesIO(record["image"])))
    pixels.flat[0] += changed
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    assert file.getvalue() != record["image"]
    return {**record, "image": file.getvalue()}

  monkeypatch.setattr(tfds_source.TfdsRecords, "__getitem__", compressed_anew)
  assert fingerprint() == first
  changed = 1
  assert fingerprint() != first


def test_damaged_records_of_a_tfds_set_are_bad_ones_and_make_it_another(tmp_path):
  config = sources.DataConfig(data_dir=str(tmp_path))
  whole = sources.open_split(config, "train")
  records = [whole[i] for i in range(len(whole))]
  shard = next(tmp_path.rglob("*train.array_record*"))
  content = bytearray(shard.read_bytes())
  content[100_000:100_010] = bytes(10)
  shard.write_bytes(content)
  damaged = sources.open_split(config, "train")
  assert damaged.fingerprint != whole.fingerprint
  bad = []
  for i in range(len(damaged)):
    try:
      assert damaged[i] == records[i]
    except image_decoding.BadRecord as error:
      bad.append(str(error))
  assert 1 <= len(bad) <= 2 and bad[0].startswith("digits/1.0.0 train[")


# --- what is kept of it ----------------------------------------------------------------------------


def test_what_was_written_just_now_is_read_again(root, monkeypatch):
  """Within a tick of the file system's clock nothing but the contents tells that they changed."""

  class Coarse:
    """The operating system, with the clock of a FAT file system."""

    def __getattr__(self, name):
      return getattr(os, name)

    def stat(self, file):
      status = os.stat(file)
      return types.SimpleNamespace(
        st_size=status.st_size,
        st_ino=status.st_ino,
        st_mtime_ns=status.st_mtime_ns // 2_000_000_000 * 2_000_000_000,
        st_ctime_ns=status.st_ctime_ns // 2_000_000_000 * 2_000_000_000,
      )

  monkeypatch.setattr(digests, "os", Coarse())
  file = root / "train/dog/000.png"
  seen = set()
  for i in range(30):
    file.write_bytes(f"version {i:2d}".encode())
    seen.add(prints(root)["train"])
  assert len(seen) == 30


@pytest.mark.usefixtures("later")
def test_files_are_read_once(root, reads):
  first = prints(root)
  assert len(reads) == 30 and len(set(reads)) == 5
  reads.clear()
  assert prints(root) == first and not reads
  exchange(root / "train/cat/000.png", root / "train/cat/001.png")
  second = prints(root)
  assert second["train"] != first["train"]
  assert sorted(reads) == ["000.png", "001.png"]
  reads.clear()
  assert prints(root) == second and not reads
  assert prints(root, verify=True) == second
  assert len(reads) == 45  # train twice
  reads.clear()
  prints(root, "tokens")
  assert reads == ["train.npy", "test.npy"]
  prints(root, "tokens")
  assert len(reads) == 2


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize(
  "damage",
  [
    lambda whole: whole[:-7],
    lambda whole: b"",
    lambda whole: b"\xff\0 nothing" * 40,
    lambda whole: whole[:-3] + b"00\n",
    lambda whole: whole.replace(b"\n", b"\n\n", 2),
  ],
)
def test_a_damaged_index_is_read_past(root, cache, reads, damage):
  expected = prints(root)
  paths = [path for path in cache.rglob("*") if path.is_file()]
  assert len(paths) == 2
  for path in paths:
    path.write_bytes(damage(path.read_bytes()))
  reads.clear()
  assert prints(root) == expected
  assert len(reads) == 30
  assert prints(root) == expected and len(reads) == 30  # and is mended


@pytest.mark.usefixtures("later")
def test_an_index_has_the_permissions_of_any_new_file(root, cache):
  prints(root)
  (root / "new").touch()
  usual = (root / "new").stat().st_mode
  assert {path.stat().st_mode for path in cache.rglob("*") if path.is_file()} == {usual}


@pytest.mark.usefixtures("later")
def test_a_cache_that_cannot_be_written(root, reads, tmp_path, monkeypatch):
  expected = prints(root)
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  for _ in range(2):
    reads.clear()
    assert prints(root) == expected and len(reads) == 45
  monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.chdir(tmp_path)
  assert prints(root) == expected
  assert not (tmp_path / "relative").exists()
  assert (tmp_path / "home" / ".cache" / "igpt_jax" / "digests").is_dir()


def test_processes_may_race_to_keep(root, cache):
  program = (
    "import sys\n"
    "from igpt_jax.data import digests, sources\n"
    "digests._TICK_NS = -10**12\n"
    "config = sources.DataConfig(name='folder', path=sys.argv[1])\n"
    "for _ in range(30):\n"
    "  print(sources.open_split(config, 'train').fingerprint)\n"
    "  sources.open_split(sources.DataConfig(name='folder', path=sys.argv[1], verify=True), 'test')\n"
  )
  runs = [
    subprocess.Popen([sys.executable, "-c", program, str(root)], stdout=subprocess.PIPE, text=True)
    for _ in range(3)
  ]
  lines = [line for run in runs for line in run.communicate(timeout=120)[0].splitlines()]
  assert len(lines) == 90 and set(lines) == {prints(root)["train"]}
  assert len([path for path in cache.rglob("*") if path.is_file()]) == 2  # nothing half-written


def test_long_reading_is_told(root, caplog, monkeypatch):
  monkeypatch.setattr(digests, "_BLOCK_BYTES", 100_000)
  (root / "train/cat/big.png").write_bytes(bytes(40_000_000))
  now = iter(range(10**6))  # a second between any two looks at the clock
  monkeypatch.setattr("igpt_jax.reporting.progress.time.monotonic", lambda: next(now))
  beats = watchdog._beats
  prints(root)
  assert watchdog._beats - beats > 400  # at every block, so that no watchdog takes it for a hang
  lines = [record.getMessage() for record in caplog.records]
  assert any("data/train: megabytes read" in line and "/40" in line for line in lines), lines


# --- older runs ------------------------------------------------------------------------------------

# By 2abf26f, of the names above and of the first and last row.
FORMER = {
  "folder": {
    "train": "folder:9244dee8a75c train[13 of 15]",
    "validation": "folder:9244dee8a75c validation[2 of 15]",
    "test": "folder:9244dee8a75c test[15 of 15]",
  },
  "tokens": {
    "train": "tokens:4668ad0f4544 train[11 of 12]",
    "validation": "tokens:4668ad0f4544 validation[1 of 12]",
    "test": "tokens:4668ad0f4544 test[12 of 12]",
  },
}


@pytest.mark.parametrize("name", FORMER)
def test_former_fingerprints_are_what_older_checkpoints_hold(root, name):
  config = sources.DataConfig(name=name, path=str(root))
  for split, expected in FORMER[name].items():
    assert sources.open_split(config, split).former_fingerprint == expected
  split = sources.open_split(config, "train")
  expected = {"folder": "train/cat/002.png", "tokens": "train.npy[0]"}[name]
  assert split[0]["id"] == str(root / expected)  # and the order is theirs


@pytest.mark.parametrize("name", FORMER)
def test_an_older_checkpoint_goes_on_and_knows_its_data_from_then_on(root, name, caplog):
  config = sources.DataConfig(name=name, path=str(root))

  def position(step=0):
    split = sources.open_split(config, "train")
    return json.loads(json.dumps(pipeline.position(split, batch_size=2, seed=0, step=step)))

  older = {"next_index": 6, "batch_size": 2, "seed": 0, "fingerprint": FORMER[name]["train"]}
  assert pipeline.check_position(older, position()) == 3
  (line,) = [record.getMessage() for record in caplog.records]
  assert FORMER[name]["train"] in line and position()["fingerprint"] in line
  for wrong in ("folder:0244dee8a75c train[13 of 15]", FORMER[name]["validation"], None):
    with pytest.raises(errors.UserError, match="data set: "):
      pipeline.check_position(older | {"fingerprint": wrong}, position())
  deeper = root / "train/cat/2020/new.png"
  deeper.parent.mkdir()
  deeper.write_bytes(b"an image that no older version has read")
  if name == "folder":
    with pytest.raises(errors.UserError, match="images at any depth"):
      pipeline.check_position(older, position())
  shutil.rmtree(deeper.parent)
  newer = position(5)
  assert pipeline.check_position(newer, position()) == 5
  # The names, and the first row and the last, stay.
  exchange(root / "train/cat/000.png", root / "train/cat/001.png")
  np.save(root / "train.npy", np.load(root / "train.npy")[[0, 2, 1, *range(3, 12)]])
  assert position()["former_fingerprint"] == newer["former_fingerprint"]
  with pytest.raises(errors.UserError, match="data set: "):
    pipeline.check_position(newer, position())
