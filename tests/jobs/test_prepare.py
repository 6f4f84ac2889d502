"""The real builders run on real archives; what is missing is named before the work begins."""

import builtins
import fcntl
import importlib
import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from igpt_jax import errors
from igpt_jax.data import image_decoding, palette, pipeline, sources, tfds_prepare
from igpt_jax.tokens import TokenSpec


@pytest.fixture
def tensorflow_installed(monkeypatch):
  """Lets `prepare` go on where there is no TensorFlow; the builder's file access then needs `shim`."""
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name, *a: name == "tensorflow" or find(name, *a)
  )


@pytest.fixture
def shim(monkeypatch, tensorflow_installed):
  """The three functions of tf.io.gfile that TFDS's ImageNet builder opens local files with."""
  from tensorflow_datasets.core.download import extractor
  from tensorflow_datasets.datasets.imagenet2012 import (
    imagenet2012_dataset_builder,
    imagenet_common,
  )

  class Files:
    GFile = staticmethod(builtins.open)
    exists = staticmethod(os.path.exists)

  class Io:
    gfile = Files

  class Compat:
    as_text = staticmethod(lambda text: text if isinstance(text, str) else text.decode())

  class TensorFlow:
    io = Io
    compat = Compat

  for module in (extractor, imagenet2012_dataset_builder, imagenet_common):
    monkeypatch.setattr(module, "tf", TensorFlow)


def _add(tar, name, data):
  info = tarfile.TarInfo(name)
  info.size = len(data)
  tar.addfile(info, io.BytesIO(data))


def _jpeg(value, size=(150, 200)):
  file = io.BytesIO()
  Image.fromarray(np.full((*size, 3), value, np.uint8)).save(file, "jpeg", quality=95)
  return file.getvalue()


def _archives(folder):
  """ILSVRC's two archives with two synsets, five training and four validation images."""
  folder.mkdir()
  with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as tar:
    for synset, n in (("n01440764", 3), ("n01443537", 2)):
      inner = io.BytesIO()
      with tarfile.open(fileobj=inner, mode="w") as sub:
        for i in range(n):
          _add(sub, f"{synset}_{i + 1}.JPEG", _jpeg(40 * (i + 1)))
      _add(tar, f"{synset}.tar", inner.getvalue())
  with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
    for i in range(4):
      _add(tar, f"ILSVRC2012_val_{i + 1:08d}.JPEG", _jpeg(30 * (i + 1)))


def test_imagenet_by_its_real_builder(tmp_path, shim):
  _archives(tmp_path / "manual")
  data_dir = str(tmp_path / "data")
  first = tfds_prepare.prepare("imagenet2012", data_dir, str(tmp_path / "manual"))
  assert first == tfds_prepare.prepare(
    "imagenet2012", data_dir, "nothing is needed the second time"
  )
  config = sources.DataConfig(
    name="imagenet2012", data_dir=data_dir, resolution=32, augment="paper", validation=0.2
  )
  train, test = (sources.open_split(config, s) for s in ("train", "test"))
  assert (len(train), len(test), train.n_classes) == (4, 4, 1000)
  assert train.class_names[train[0]["label"]].startswith("n0144")
  assert "n0144" in train[0]["id"] and "ILSVRC2012_val" in test[0]["id"]
  assert len(sources.open_split(config, "validation")) == 1
  values = sorted(round(image_decoding.decode(test[i]["image"]).mean()) for i in range(4))
  assert values == [30, 60, 90, 120]
  spec = TokenSpec(palette=palette.Palette.default())
  with pipeline.train_batches(train, config, spec, batch_size=8, seed=0) as batches:
    batch = next(batches)
  assert batch["tokens"].shape == (8, 1024)
  assert (np.ptp(batch["tokens"], axis=1) == 0).all()  # each image is of one colour


def test_missing_archives_are_named(tmp_path, tensorflow_installed):
  _archives(tmp_path / "manual")
  (tmp_path / "manual" / "ILSVRC2012_img_val.tar").unlink()
  with pytest.raises(errors.UserError, match=r"ILSVRC2012_img_val\.tar not in") as caught:
    tfds_prepare.prepare("imagenet2012", str(tmp_path / "data"), str(tmp_path / "manual"))
  assert "img_train" not in str(caught.value)
  assert not (tmp_path / "data" / "imagenet2012").exists()


@pytest.mark.parametrize("side", [32, 64])
def test_archives_that_no_server_has_are_named_before_it_is_asked(
  tmp_path, tensorflow_installed, side
):
  name = f"downsampled_imagenet/{side}x{side}"
  (tmp_path / f"train_{side}x{side}.tar").touch()
  with pytest.raises(errors.UserError) as caught:
    tfds_prepare.prepare(name, str(tmp_path / "data"), str(tmp_path))
  assert str(caught.value).startswith(
    f"data set {name}: valid_{side}x{side}.tar not in {tmp_path};"
  )
  assert "image-net.org no longer has" in str(caught.value)
  assert not (tmp_path / "data").exists()


def test_another_archive_of_that_name_is_refused_in_words(tmp_path, tensorflow_installed):
  for name in ("train_32x32.tar", "valid_32x32.tar"):
    (tmp_path / name).write_bytes(b"not it")
  with pytest.raises(errors.UserError, match=r"_32x32\.tar, has wrong checksum; expected the file"):
    tfds_prepare.prepare("downsampled_imagenet/32x32", str(tmp_path / "data"), str(tmp_path))


def test_without_tensorflow_the_extra_is_named(tmp_path, monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name, *a: None if name == "tensorflow" else find(name, *a)
  )
  with pytest.raises(errors.UserError, match=r"\[prepare\]"):
    tfds_prepare.prepare("cifar10", str(tmp_path))


def test_unknown_names_get_a_suggestion(tmp_path, tensorflow_installed):
  with pytest.raises(errors.UserError, match="did you mean cifar10"):
    tfds_prepare.prepare("cifar01", str(tmp_path))


def test_own_and_unprepared_kinds(tmp_path):
  path = tfds_prepare.prepare("digits", str(tmp_path))
  assert os.path.isdir(path) and path == tfds_prepare.prepare("digits", str(tmp_path))
  with pytest.raises(errors.UserError, match="needs no preparation"):
    tfds_prepare.prepare("folder", str(tmp_path))


def test_two_processes_do_not_prepare_one_data_set(tmp_path, tensorflow_installed):
  _archives(tmp_path / "manual")
  with open(tmp_path / ".imagenet2012.lock", "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    with pytest.raises(errors.UserError, match="in use by another run"):
      tfds_prepare.prepare("imagenet2012", str(tmp_path), str(tmp_path / "manual"))


def test_leftovers_of_a_killed_generation_are_removed(tmp_path, shim):
  _archives(tmp_path / "manual")
  leftover = tmp_path / "data" / "imagenet2012" / "incomplete.ABC123_5.1.0"
  leftover.mkdir(parents=True)
  (leftover / "half.array_record").write_text("half")
  tfds_prepare.prepare("imagenet2012", str(tmp_path / "data"), str(tmp_path / "manual"))
  assert [p.name for p in (tmp_path / "data" / "imagenet2012").iterdir()] == ["5.1.0"]
