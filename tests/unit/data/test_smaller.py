"""Smaller copies: the same images and crops, read from fewer bytes; whole or not at all."""

import json
import os
import pathlib

import numpy as np
import pytest

from igpt_jax import errors, files
from igpt_jax.data import image_decoding, smaller, sources, tfds_source, transforms

RECIPE = smaller.Recipe(short_side=80, quality=95)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """The folder of prepared photo_patches: JPEGs with sides of 96 to 192."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(tfds_source.OWN, "photo_patches", "support.photo_patches")
    folder = tmp_path_factory.mktemp("prepared")
    tfds_source.make_own("photo_patches", str(folder))
    yield str(folder)


@pytest.fixture(scope="module")
def copied(prepared, tmp_path_factory):
  target, said = str(tmp_path_factory.mktemp("copied") / "smaller"), []
  folder = make(prepared, target, RECIPE, said.append)
  return target, folder, said


def make(prepared, *others):
  return smaller.make(tfds_source.make_own("photo_patches", prepared), prepared, *others)


def open_split(data_dir, split):
  config = sources.DataConfig(name="photo_patches", data_dir=data_dir, resolution=32, validation=0)
  return sources.open_split(config, split)


def test_a_copy_holds_the_same_images_smaller(prepared, copied):
  target, folder, said = copied
  assert pathlib.Path(folder) == pathlib.Path(target, "photo_patches", "1.0.0")
  assert "1,800 of 1,800 training images to a shorter side of 80" in said[0]
  whole, small = open_split(prepared, "train"), open_split(target, "train")
  assert len(small) == len(whole) == 1800 and small.class_names == whole.class_names
  assert small.fingerprint != whole.fingerprint
  n_bytes = [0, 0]
  for i in range(0, 1800, 50):
    before, after = whole[i], small[i]
    assert (after["label"], after["id"]) == (before["label"], before["id"])
    shape = image_decoding.decode(before["image"]).shape
    image = image_decoding.decode(after["image"])
    assert image.shape[:2] == transforms.scaled_to_short_side(*shape[:2], 80)
    n_bytes = np.add(n_bytes, [len(before["image"]), len(after["image"])])
  assert n_bytes[1] < 0.7 * n_bytes[0]
  # What a run is measured on keeps every byte.
  test = open_split(prepared, "test")
  assert open_split(target, "test").fingerprint == test.fingerprint


def test_crops_of_a_copy_are_those_of_the_whole(prepared, copied):
  """The same draws give the same crops: their distribution doesn't change, and their pixels hardly."""
  whole, small = open_split(prepared, "train"), open_split(copied[0], "train")
  errors_of, moved = [], []
  for i in range(0, 1800, 20):
    crops = [
      transforms.paper_train_encoded(split[i]["image"], np.random.default_rng(i), 32)
      for split in (whole, small)
    ]
    errors_of.append(np.mean((crops[0].astype(float) - crops[1]) ** 2))
    boxes = []
    for split in (whole, small):
      height, width, _ = image_decoding.decode(split[i]["image"]).shape
      crop = transforms.draw_paper_crop(np.random.default_rng(i), height, width)
      boxes.append([crop.top / crop.height, crop.left / crop.width, crop.height, crop.width])
    moved.append(np.abs(np.subtract(*boxes)))
  assert 10 * np.log10(255**2 / np.mean(errors_of)) > 30
  share, pixels = np.max(moved, axis=0)[:2], np.max(moved, axis=0)[2:]
  assert share.max() < 0.02 and pixels.max() <= 5  # the aspect ratio is rounded to whole pixels


def test_an_image_is_scaled_by_the_mean_over_areas():
  image = np.random.default_rng(0).integers(0, 256, (120, 90, 3), np.uint8)
  image = np.repeat(np.repeat(image, 2, 0), 2, 1)
  png = smaller.smaller(_png(image), smaller.Recipe(90, 0))
  np.testing.assert_array_equal(image_decoding.decode(png), image[::2, ::2])
  jpeg = smaller.smaller(_png(image), smaller.Recipe(90, 100))
  assert np.abs(image_decoding.decode(jpeg).astype(int) - image[::2, ::2]).mean() < 2


def _png(image):
  import cv2

  return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def test_a_small_image_stays_as_it_is_and_a_bad_one_is_refused():
  small = _png(np.zeros((80, 300, 3), np.uint8))
  assert smaller.smaller(small, RECIPE) is small
  with pytest.raises(image_decoding.BadRecord, match="photo 3"):
    smaller.smaller(b"\xff\xd8 no image", RECIPE, "photo 3")


@pytest.mark.parametrize("kill", [0, 1])
def test_an_interrupted_copy_goes_on_and_a_finished_one_stays(
  prepared, copied, tmp_path, monkeypatch, kill
):
  target = str(tmp_path / "smaller")
  whole = files.replacing

  def killed(path):
    if os.path.basename(path) in ("dataset_info.json", "features.json")[kill:]:
      raise KeyboardInterrupt
    return whole(path)

  monkeypatch.setattr(files, "replacing", killed)
  with pytest.raises(KeyboardInterrupt):
    make(prepared, target, RECIPE, lambda line: None)
  monkeypatch.undo()
  monkeypatch.setitem(tfds_source.OWN, "photo_patches", "support.photo_patches")
  assert tfds_source.find("photo_patches", target) is None  # not ready for any run
  said = []
  folder = make(prepared, target, RECIPE, said.append)
  assert "0 of 1,800 training images" in said[0]
  info = [
    json.loads((pathlib.Path(f) / "dataset_info.json").read_text()) for f in (folder, copied[1])
  ]
  assert info[0]["splits"] == info[1]["splits"]
  assert open_split(target, "train").fingerprint == open_split(copied[0], "train").fingerprint
  make(prepared, target, RECIPE, said.append)
  assert len(said) == 1


def test_another_recipe_or_data_set_needs_another_folder(prepared, copied, tmp_path):
  target, *_ = copied
  for recipe, expected in (
    (smaller.Recipe(64, 95), "short_side: 80 there, 64 here"),
    (smaller.Recipe(80, 90), "quality: 95 there, 90 here"),
  ):
    with pytest.raises(errors.UserError, match=expected):
      make(prepared, target, recipe, print)
  with pytest.raises(errors.UserError, match=r"config\.prepare\.target: .* is data\.data_dir"):
    make(prepared, prepared, RECIPE, print)
  (tmp_path / "photo_patches" / "1.0.0").mkdir(parents=True)
  (tmp_path / "photo_patches" / "1.0.0" / "mine.txt").write_text("")
  with pytest.raises(errors.UserError, match="holds another data set"):
    make(prepared, str(tmp_path), RECIPE, print)


def test_a_damaged_image_is_told_and_stays(prepared, tmp_path):
  """Keeps the record, so that the data set has as many as before; reading it tells, too."""
  from array_record.python import array_record_module
  from tensorflow_datasets.proto import tf_example_pb2

  source = tmp_path / "source.array_record"
  writer = array_record_module.ArrayRecordWriter(str(source), "group_size:1")
  for data in (b"\xff\xd8 torn", _png(np.full((100, 100, 3), 7, np.uint8))):
    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(data)
    writer.write(example.SerializeToString())
  writer.close()
  (message,) = smaller.shrink_shard(str(source), str(tmp_path / "target"), "image", RECIPE)
  assert "source.array_record[0]" in message and message.endswith("stays as it is")
  reader = array_record_module.ArrayRecordReader(str(tmp_path / "target"))
  torn, small = (
    tf_example_pb2.Example.FromString(record).features.feature["image"].bytes_list.value[0]
    for record in reader.read_all()
  )
  assert torn == b"\xff\xd8 torn" and image_decoding.decode(small).shape == (80, 80, 3)
  assert sorted(os.listdir(tmp_path)) == ["source.array_record", "target"]
