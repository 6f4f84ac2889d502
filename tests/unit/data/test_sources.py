"""Splits are disjoint, complete and fixed; missing or wrong data is refused with the way to fix it."""

import dataclasses
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from igpt_jax import errors
from igpt_jax.data import image_decoding, sources, tfds_source
from support.paths import ROOT


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
  return str(tmp_path_factory.mktemp("tfds"))


def _folder(root, split="train", classes=("cat", "dog"), n=10):
  for label, name in enumerate(classes):
    (root / split / name).mkdir(parents=True)
    for i in range(n):
      picture = np.full((8, 8, 3), 20 * label + i, np.uint8)
      Image.fromarray(picture).save(root / split / name / f"{i:03d}.png")
  return root


def _config(**changes):
  return sources.DataConfig(**changes)


def test_digits_are_the_scans_of_scikit_learn(data_dir):
  from sklearn import datasets

  train = sources.open_split(_config(data_dir=data_dir, validation=0), "train")
  test = sources.open_split(_config(data_dir=data_dir), "test")
  assert (len(train), len(test), train.n_classes) == (1497, 300, 10)
  assert train.class_names == tuple("0123456789")
  digits = datasets.load_digits()
  expected = sorted(
    (np.rint(i * 15.9375).astype(np.uint8).tobytes(), int(t))
    for i, t in zip(digits.images, digits.target, strict=True)
  )
  found = []
  for split in (train, test):
    for i in range(len(split)):
      image = image_decoding.decode(split[i]["image"])
      assert (image[..., 0] == image[..., 2]).all()
      found.append((image[..., 0].tobytes(), split[i]["label"]))
  assert sorted(found) == expected


def test_validation_is_a_fixed_part_of_train(data_dir):
  config = _config(data_dir=data_dir, validation=0.1)
  whole = dataclasses.replace(config, validation=0)
  train, validation, both = (
    [split[i]["id"] for i in range(len(split))]
    for split in (
      sources.open_split(config, "train"),
      sources.open_split(config, "validation"),
      sources.open_split(whole, "train"),
    )
  )
  assert len(validation) == 150
  assert set(train) | set(validation) == set(both)
  assert not set(train) & set(validation)
  order = np.random.default_rng(0).permutation(1497)
  assert set(validation) == {both[i] for i in order[-150:]}


@pytest.mark.parametrize("name", ["val", "validation"])
def test_a_stored_split_is_held_out_by_its_name(tmp_path, name):
  """Training then sees all of train, and the held-out images are nobody's test."""
  for split, n in (("train", 10), (name, 3)):
    _folder(tmp_path, split, n=n)
  stored = sources.open_split(_config(name="folder", path=str(tmp_path)), "test")
  assert len(stored) == 6  # as ImageNet's validation is
  config = _config(name="folder", path=str(tmp_path), validation_split=name)
  sizes = [len(sources.open_split(config, split)) for split in ("train", "validation")]
  assert sizes == [20, 6]
  held_out = [sources.open_split(config, split).fingerprint for split in ("test", "validation")]
  assert held_out[0] == held_out[1] and "validation[6 of 6]" in held_out[0]
  nothing = _config(name="folder", path=str(tmp_path), validation=0, validation_split="held_out")
  with pytest.raises(errors.NoSuchSplit, match=r"held_out/CLASS"):
    sources.open_split(nothing, "validation")
  _folder(tmp_path, "test", n=1)
  assert len(sources.open_split(config, "test")) == 2
  missing = dataclasses.replace(config, validation_split="held_out")
  with pytest.raises(errors.NoSuchSplit, match="held_out/CLASS"):
    sources.open_split(missing, "validation")


def test_tokens_and_tfds_splits_are_held_out_by_their_names(data_dir, tmp_path):
  np.save(tmp_path / "test.npy", np.zeros((2, 64), np.uint8))
  tokens = _config(name="tokens", path=str(tmp_path), validation_split="test", resolution=8)
  assert len(sources.open_split(tokens, "validation")) == 2
  with pytest.raises(errors.NoSuchSplit, match=r"'test' is held out, which leaves no test split"):
    sources.open_split(tokens, "test")
  config = _config(data_dir=data_dir, validation_split="test")
  assert [len(sources.open_split(config, s)) for s in ("train", "validation")] == [1497, 300]
  with pytest.raises(
    errors.NoSuchSplit, match=r"beside test, which data.validation_split holds out"
  ):
    sources.open_split(config, "test")


def test_nothing_held_out(data_dir):
  """The paper's final runs: train is all of train, and there is no validation to choose by."""
  config = _config(data_dir=data_dir, validation=0)
  assert not sources.has_validation(config) and sources.has_validation(_config())
  assert len(sources.open_split(config, "train")) == 1497
  with pytest.raises(
    errors.NoSuchSplit, match=r"data.validation: 0 .*--config.data.validation=0.1"
  ):
    sources.open_split(config, "validation")


@pytest.mark.parametrize("name", ["train", "../train", "a/b", "val[:10]"])
def test_what_no_held_out_split_can_be_called(name):
  with pytest.raises(errors.UserError, match=r"data.validation_split"):
    _config(validation_split=name)


def test_select_is_a_part_in_the_order_asked_for(data_dir):
  split = sources.open_split(_config(data_dir=data_dir), "test")
  part = split.select(np.array([7, 3]))
  assert [part[0], part[1]] == [split[7], split[3]]
  assert len(part) == 2 and part.fingerprint != split.fingerprint


def test_photo_patches_have_imagenets_form_and_disjoint_regions(data_dir, monkeypatch):
  pytest.importorskip("skimage")
  monkeypatch.setitem(tfds_source.OWN, "photo_patches", "support.photo_patches")
  config = _config(
    name="photo_patches", data_dir=data_dir, resolution=32, augment="paper", validation=0
  )
  regions = {}
  for name, n in (("train", 1800), ("test", 360)):
    split = sources.open_split(config, name)
    assert len(split) == n and split.n_classes == 9
    for i in range(n):
      record = split[i]
      label, _, _, x, _ = record["id"].split()[-1].split("_")
      assert label == split.class_names[record["label"]]
      height, width = image_decoding.decode(record["image"]).shape[:2]
      assert 96 <= height <= 192 and 96 <= width <= 192
      low, high = regions.get((label, name), (10**6, 0))
      regions[label, name] = min(low, int(x[1:])), max(high, int(x[1:]) + width)
  for label in split.class_names:
    assert regions[label, "train"][1] <= regions[label, "test"][0]


def test_buckets_are_mounted_not_addressed():
  with pytest.raises(errors.UserError, match="gcsfuse"):
    sources.open_split(_config(data_dir="gs://bucket/data"), "train")


def test_fingerprint_tells_splits_and_shares_apart(data_dir):
  prints = {
    sources.open_split(_config(data_dir=data_dir, validation=v), s).fingerprint
    for v in (0.1, 0.2)
    for s in ("train", "validation", "test")
  }
  assert len(prints) == 5
  assert all(p.startswith("digits/1.0.0 ") for p in prints)


def test_processes_may_race_to_prepare(tmp_path):
  code = (
    "from igpt_jax.data import sources\n"
    f"s = sources.open_split(sources.DataConfig(data_dir={str(tmp_path)!r}), 'test')\n"
    "import sys; print(len(s), 'tensorflow' in sys.modules, 'jax' in sys.modules)"
  )
  runs = [
    subprocess.Popen(
      [sys.executable, "-c", code],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for _ in range(2)
  ]
  for run in runs:
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert out.split() == ["300", "False", "False"]
  assert [p.name for p in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_splits_travel_to_other_processes(data_dir, tmp_path):
  root = _folder(tmp_path)
  for config in (_config(data_dir=data_dir), _config(name="folder", path=str(root))):
    split = sources.open_split(config, "train")
    copy = pickle.loads(pickle.dumps(split))
    assert copy.fingerprint == split.fingerprint
    assert copy[3] == split[3]


def test_folder_with_classes(tmp_path):
  root = _folder(tmp_path)
  _folder(tmp_path, "test", ("dog",), 3)  # fewer classes, the same labels
  config = _config(name="folder", path=str(root), validation=0.2)
  train = sources.open_split(config, "train")
  assert (len(train), train.class_names) == (16, ("cat", "dog"))
  for record in (train[i] for i in range(16)):
    assert image_decoding.decode(record["image"])[0, 0, 0] // 20 == record["label"]
    assert record["label"] == train.class_names.index(pathlib.Path(record["id"]).parent.name)
  both = sources.open_split(dataclasses.replace(config, validation=0), "train")
  assert len({both[i]["label"] for i in range(6)}) == 2  # not class after class
  test = sources.open_split(config, "test")
  assert [test[i]["label"] for i in range(3)] == [1, 1, 1]
  assert test.class_names == ("cat", "dog")


def test_folder_without_classes(tmp_path):
  (tmp_path / "train").mkdir()
  for i in range(4):
    Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / "train" / f"{i}.JPG", "jpeg")
  (tmp_path / "train" / "notes.txt").write_text("not an image")
  split = sources.open_split(_config(name="folder", path=str(tmp_path), validation=0), "train")
  assert (len(split), split.n_classes, split[0]["label"]) == (4, 0, -1)


def test_folder_fingerprint_follows_its_files(tmp_path):
  config = _config(name="folder", path=str(_folder(tmp_path)))
  before = sources.open_split(config, "train").fingerprint
  assert sources.open_split(config, "train").fingerprint == before
  (tmp_path / "train" / "cat" / "000.png").rename(tmp_path / "train" / "cat" / "new.png")
  assert sources.open_split(config, "train").fingerprint != before


def test_wrong_folders_are_refused_by_name(tmp_path):
  def refused(says, split="train"):
    with pytest.raises(errors.UserError, match=says) as caught:
      sources.open_split(_config(name="folder", path=str(tmp_path / "root")), split)
    assert str(tmp_path) in str(caught.value)

  refused("no such folder")
  (tmp_path / "root").mkdir()
  refused("holds no images")
  (tmp_path / "root" / "train").mkdir()
  refused("holds no images")
  _folder(tmp_path / "root", "train2")
  (tmp_path / "root" / "train").rmdir()
  (tmp_path / "root" / "train2").rename(tmp_path / "root" / "train")
  _folder(tmp_path / "root", "test", ("cow",), 1)
  refused("'cow' is not among train's", "test")
  Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "root" / "train" / "loose.png")
  refused("loose images")
  with pytest.raises(errors.UserError, match=r"data\.path"):
    _config(name="folder")


def test_too_small_for_a_validation_split(tmp_path):
  config = _config(name="folder", path=str(_folder(tmp_path, n=2)), validation=0.1)
  assert len(sources.open_split(config, "train")) == 4
  with pytest.raises(errors.UserError, match=r"data\.validation"):
    sources.open_split(config, "validation")


def test_missing_data_set_says_how_to_get_it(tmp_path):
  with pytest.raises(errors.UserError, match="cifar10") as caught:
    sources.open_split(_config(name="cifar10", data_dir=str(tmp_path)), "train")
  message = str(caught.value)
  assert str(tmp_path) in message and "prepare_data.sh" in message and "fix:" in message


def test_missing_tokens_say_how_to_get_the_released_ones(tmp_path):
  config = _config(name="tokens", path=str(tmp_path / "imagenet_teX.npy"))
  with pytest.raises(
    errors.UserError, match=r"imagenet_teX\.npy: no such .*--config\.job=download"
  ):
    sources.open_split(config, "test")


def test_unwritable_data_dir_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.UserError, match="data_dir"):
    sources.open_split(_config(data_dir=str(tmp_path / "file")), "train")


def test_any_tfds_data_set_by_its_name(tmp_path):
  """A data set prepared elsewhere, with its own feature names and no test split."""
  import tensorflow_datasets as tfds

  class TwoSplits(tfds.core.GeneratorBasedBuilder):
    """Coloured squares."""

    VERSION = tfds.core.Version("2.0.0")

    def _info(self):
      features = {
        "picture": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
        "kind": tfds.features.ClassLabel(names=["dark", "bright"]),
        "id": tfds.features.Text(),
      }
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples(6), "validation": self._generate_examples(2)}

    def _generate_examples(self, n):
      import io

      for i in range(n):
        file = io.BytesIO()
        Image.fromarray(np.full((5, 7, 3), 100 * (i % 2), np.uint8)).save(file, "png")
        yield i, {"picture": file.getvalue(), "kind": i % 2, "id": f"square{i}"}

  TwoSplits(data_dir=tmp_path / "a", file_format="array_record").download_and_prepare()
  config = _config(name="two_splits", data_dir=str(tmp_path / "a"), validation=0.0)
  train, test = (sources.open_split(config, s) for s in ("train", "test"))
  assert (len(train), len(test)) == (6, 2)
  assert train.class_names == ("dark", "bright")
  for record in (train[i] for i in range(6)):
    assert image_decoding.decode(record["image"]).mean() == 100 * record["label"]
    assert "square" in record["id"]


def test_tfds_data_set_without_pictures_is_refused(tmp_path):
  import tensorflow_datasets as tfds

  class OnlyText(tfds.core.GeneratorBasedBuilder):
    """Words."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      yield 0, {"text": "word"}

  OnlyText(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  with pytest.raises(errors.UserError, match=r"text.*expected one image"):
    sources.open_split(_config(name="only_text", data_dir=str(tmp_path)), "train")
  with pytest.raises(errors.UserError, match=r"has splits train; expected test"):
    sources.open_split(_config(name="only_text", data_dir=str(tmp_path)), "test")


def _tokens(path, n=12, t=64, dtype=np.uint16):
  rows = np.random.default_rng(n).integers(0, 17, (n, t)).astype(dtype)
  np.save(path, rows)
  return rows


def test_token_file_is_a_test_split(tmp_path):
  rows = _tokens(tmp_path / "held_out.npy", dtype=np.int64)
  config = _config(name="tokens", path=str(tmp_path / "held_out.npy"))
  split = sources.open_split(config, "test")
  assert split.is_tokens and split.n_classes == 0
  np.testing.assert_array_equal([split[i]["tokens"] for i in range(12)], rows)
  copy = pickle.loads(pickle.dumps(split))
  np.testing.assert_array_equal(copy[5]["tokens"], rows[5])
  with pytest.raises(errors.UserError, match=r"train\.npy"):
    sources.open_split(config, "train")


def test_token_folder(tmp_path):
  _tokens(tmp_path / "train.npy", 20)
  config = _config(name="tokens", path=str(tmp_path))
  assert len(sources.open_split(config, "validation")) == 2
  _tokens(tmp_path / "validation.npy", 5)
  assert len(sources.open_split(config, "validation")) == 5
  assert len(sources.open_split(config, "train")) == 20
  with pytest.raises(errors.UserError, match=r"test\.npy"):
    sources.open_split(config, "test")


@pytest.mark.parametrize(
  ("array", "says"),
  [
    (np.zeros((4, 63), np.uint16), "63 tokens"),
    (np.zeros((4, 64), np.float32), "float32"),
    (np.zeros((4, 8, 8), np.uint16), r"\[4, 8, 8\]"),
    (np.full((4, 64), -1), "-1"),
    (np.full((4, 64), 70000), "70000"),
    (np.array([None, {}], dtype=object), "[Oo]bject|[Pp]ickle"),
  ],
)
def test_wrong_tokens_are_refused_by_name(tmp_path, array, says):
  np.save(tmp_path / "wrong.npy", array, allow_pickle=True)
  with pytest.raises(errors.UserError, match=says) as caught:
    sources.open_split(_config(name="tokens", path=str(tmp_path / "wrong.npy")), "test")
  assert "wrong.npy" in str(caught.value)


@pytest.mark.parametrize(
  "changes",
  [{"validation": 1.0}, {"max_bad": -0.1}, {"workers": -1}, {"augment": "x"}, {"name": ""}],
)
def test_impossible_configs_are_refused(changes):
  with pytest.raises(errors.UserError, match=next(iter(changes))):
    _config(**changes)


def test_unknown_split_is_refused(data_dir):
  with pytest.raises(errors.UserError, match="tset"):
    sources.open_split(_config(data_dir=data_dir), "tset")
