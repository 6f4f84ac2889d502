"""Data is known by what is in it: exchanged contents are noticed, a place or a copy makes no difference."""

import contextlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from PIL import Image

from igpt_jax import errors
from igpt_jax.data import digests, pipeline, sources, tfds_source, transforms

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
  """Of every split, its fingerprint."""
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
  noise = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), np.uint8)

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
        Image.fromarray(image).save(file, "png", compress_level=0)
        yield i, {"image": file.getvalue(), "label": i % 2, "id": f"square{i}"}

  def prepared(folder):
    Squares(data_dir=tmp_path / folder, file_format="array_record").download_and_prepare()
    config = sources.DataConfig(name="squares", data_dir=str(tmp_path / folder))
    return sources.open_split(config, "train")

  first = prepared("a")
  assert first.fingerprint.startswith("squares/1.0.0 train[")
  assert prepared("b").fingerprint == first.fingerprint
  # Where all is read, of the same size; else as TFDS' own records tell.
  noise = 255 - noise if limit else noise[:-1]
  assert prepared("c").fingerprint != first.fingerprint
  shutil.rmtree(tmp_path / "a")
  second = prepared("a")  # in the first one's place
  assert second.fingerprint != first.fingerprint
  shard = next((tmp_path / "a").rglob("*train.array_record*"))
  shard.unlink()
  with pytest.raises(errors.UserError, match=r"squares/1\.0\.0: .*array_record.*fix: "):
    sources.open_split(sources.DataConfig(name="squares", data_dir=str(tmp_path / "a")), "train")


# --- what is kept of it ----------------------------------------------------------------------------


def test_what_was_written_just_now_is_read_again(root):
  """Within one tick of the file system's clock nothing but the contents tells that they changed."""
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
  monkeypatch.setattr(digests, "_BLOCK", 100_000)
  (root / "train/cat/big.png").write_bytes(bytes(40_000_000))
  now = iter(range(10**6))  # a second between any two looks at the clock
  monkeypatch.setattr("igpt_jax.metrics.time.monotonic", lambda: next(now))
  prints(root)
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
  newer = position(5)
  assert pipeline.check_position(newer, position()) == 5
  # The names, and the first row and the last, stay.
  exchange(root / "train/cat/000.png", root / "train/cat/001.png")
  np.save(root / "train.npy", np.load(root / "train.npy")[[0, 2, 1, *range(3, 12)]])
  assert position()["former_fingerprint"] == newer["former_fingerprint"]
  with pytest.raises(errors.UserError, match="data set: "):
    pipeline.check_position(newer, position())


# --- which files are images ------------------------------------------------------------------------


def png(path, value=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path, "png")


def ids(root):
  config = sources.DataConfig(name="folder", path=str(root), validation=0.0)
  found = sources.open_split(config, "train")
  records = (found[i] for i in range(len(found)))
  return sorted((os.path.relpath(record["id"], root), record["label"]) for record in records)


def test_images_lie_at_any_depth_and_have_any_suffix(tmp_path, caplog):
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
  (line,) = [record.getMessage() for record in caplog.records]
  assert line == (
    f"{train}: left out 4: 1 HEIC, for which Pillow needs a plugin (pip install pillow-heif) "
    "(dog/i.HEIC), 2 no images that can be read (dog/f.txt, …), 1 raw photographs, to be developed "
    "first (dog/h.nef)"
  )
  caplog.clear()
  ids(tmp_path)
  assert not caplog.records  # once is enough


FORMATS = {
  "JPEG": {}, "PNG": {}, "GIF": {}, "BMP": {}, "TIFF": {}, "WEBP": {}, "PPM": {}, "JPEG2000": {},
  "AVIF": {}, "QOI": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_known_without_its_suffix(tmp_path, kind):
  from PIL import features

  if kind == "AVIF" and not features.check("avif"):
    pytest.skip("this Pillow reads no AVIF")
  (tmp_path / "train").mkdir()
  Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(tmp_path / "train" / "image", kind)
  split = sources.open_split(sources.DataConfig(name="folder", path=str(tmp_path)), "train")
  assert abs(transforms.decode(split[0]["image"]).astype(int) - 90).max() < 4


def test_heic_is_read_where_its_plugin_is(tmp_path):
  """A plugin in its place, which reads one grey for any."""
  (tmp_path / "pillow_heif.py").write_text(
    "from PIL import Image, ImageFile\n"
    "class Heif(ImageFile.ImageFile):\n"
    "  format = 'HEIF'\n"
    "  def _open(self):\n"
    "    self._mode, self._size = 'RGB', (4, 4)\n"
    "  def load(self):\n"
    "    return Image.new('RGB', (4, 4), (7, 7, 7)).load()\n"
    "  def convert(self, mode):\n"
    "    return Image.new(mode, (4, 4), (7, 7, 7))\n"
    "def register_heif_opener():\n"
    "  Image.register_open('HEIF', Heif, lambda start: start[4:12] == b'ftypheic')\n"
  )
  (tmp_path / "data" / "train").mkdir(parents=True)
  (tmp_path / "data" / "train" / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
  program = (
    "import sys; sys.path.insert(0, sys.argv[1])\n"
    "from igpt_jax.data import sources, transforms\n"
    "split = sources.open_split(sources.DataConfig(name='folder', path=sys.argv[2]), 'train')\n"
    "print(transforms.decode(split[0]['image']).tolist()[0][0])\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", program, tmp_path, tmp_path / "data"], capture_output=True, text=True
  )
  assert done.stdout == "[7, 7, 7]\n", done.stderr


def test_what_systems_leave_behind_is_neither_class_nor_image(tmp_path, caplog):
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
  assert not caplog.records


def test_links_are_followed_but_not_in_circles(tmp_path, caplog):
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
  (line,) = [record.getMessage() for record in caplog.records]
  assert "3 links to folders that are read already (cat/far, …)" in line
  assert "1 links to nothing (cat/gone.png)" in line and "1 not files (cat/pipe.png)" in line


def test_loose_images_beside_classes_and_nothing_at_all(tmp_path):
  (tmp_path / "train" / "cat").mkdir(parents=True)
  (tmp_path / "train" / "cat" / "notes.txt").write_text("no picture")
  with pytest.raises(errors.UserError, match=r"left out 1: 1 no images .*\(cat/notes\.txt\)"):
    ids(tmp_path)
  png(tmp_path / "train" / "loose")
  with pytest.raises(errors.UserError, match="loose pictures"):
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


def test_what_may_not_be_read_is_said(caplog):
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
      assert "1 Permission denied (dog/closed)" in caplog.records[0].getMessage()
      with pytest.raises(transforms.BadRecord, match=r"cat/b\.png: Permission denied"):
        [split[i] for i in range(3)]
    (root / "train").chmod(0)
    with nobody(), pytest.raises(errors.UserError, match=r"train: Permission denied"):
      sources.open_split(config, "train")
    (root / "train").chmod(0o755)
    (root / "train/dog/closed").chmod(0o755)


# --- names -----------------------------------------------------------------------------------------


def test_names_that_are_not_utf8_train(tmp_path, capsys):
  from igpt_jax.jobs import common

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
  common.say(f"unreadable: {strange}")
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
