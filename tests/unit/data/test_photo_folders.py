"""Photos in any layout are divided by their contents, and what is wrong with some of them is said, not fatal."""

import os
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from igpt_jax import errors
from igpt_jax.config.fields import Settings
from igpt_jax.data import image_decoding, image_files, own_images, photo_folder, pipeline, sources
from igpt_jax.data.loader import Loader
from igpt_jax.workspace import places
from support.photos import photo, photos

pytestmark = pytest.mark.usefixtures("old_files")

SPLITS = sources.SPLITS


def config_of(root, **changes):
  return sources.DataConfig(name="folder", path=str(root), **changes)


def open_all(root, **changes):
  return {name: sources.open_split(config_of(root, **changes), name) for name in SPLITS}


def members(root, **changes):
  """The paths of each split's images."""
  return {
    name: {os.path.relpath(split[i]["id"], root) for i in range(len(split))}
    for name, split in open_all(root, **changes).items()
  }


# --- layouts ---------------------------------------------------------------------------------------

NUMBERS = range(24)
LAYOUTS = {
  "flat": ([f"{i}.png" for i in NUMBERS], ()),
  "nested": ([f"{'a/' * (i % 3)}{i}.PNG" for i in NUMBERS], ()),
  "one folder": ([f"DCIM/100/{i}.png" for i in NUMBERS], ()),
  "classes": ([f"{'dogs/big' if i % 2 else 'cats'}/{i}.png" for i in NUMBERS], ("cats", "dogs")),
  "classes in a folder": ([f"my/{'ü' if i % 2 else 'b'}/{i}.png" for i in NUMBERS], ("b", "ü")),
  "classes and one beside": ([*(f"{'ab'[i % 2]}/{i}.png" for i in range(23)), "23.png"], ()),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_is_divided(tmp_path, layout, capsys):
  names, classes = LAYOUTS[layout]
  photos(tmp_path, names)
  (tmp_path / "README.txt").write_text("Holidays")
  splits = open_all(tmp_path)
  assert all(split.class_names == classes for split in splits.values())
  for split in splits.values():
    assert len(split) >= 3
    for record in (split[i] for i in range(len(split))):
      parts = os.path.relpath(record["id"], tmp_path).split(os.sep)
      assert record["label"] == (
        classes.index(next(p for p in parts if p in classes)) if classes else -1
      )
  chosen = members(tmp_path)
  assert sum(map(len, chosen.values())) == 24 and set.union(*chosen.values()) == set(names)
  first, second = capsys.readouterr().out.splitlines()  # once, though it was opened six times
  sizes = ", ".join(f"{len(splits[name])} {name}" for name in SPLITS)
  said = f"{len(classes)} classes" if classes else "no classes"
  assert first == f"{tmp_path}: 24 images, {said}, divided by contents: {sizes}"
  assert second == f"{tmp_path}: left out 1 file: README.txt (no image that can be read)"


def test_stored_splits_are_what_they_were(tmp_path):
  """By the version before this one."""
  names = [
    f"{split}/{name}/{i}.png" for split in ("train", "test") for name in "ab" for i in range(6)
  ]
  for seed, name in enumerate(names):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(f"no image, but nobody looks {seed}".encode())
  assert {name: split.fingerprint for name, split in open_all(tmp_path).items()} == {
    "train": "folder train[11 of 12] d7f04e867d071043",
    "validation": "folder validation[1 of 12] b073d2eca98364cb",
    "test": "folder test[12 of 12] f3f289215ad04f15",
  }


def test_train_alone_keeps_its_validation_which_stands_in_for_test(tmp_path, capsys):
  photos(tmp_path / "train", [f"{i}.png" for i in NUMBERS])
  splits = open_all(tmp_path)
  assert [len(splits[name]) for name in SPLITS] == [22, 2, 2]
  assert splits["test"].fingerprint == splits["validation"].fingerprint
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith(f"data.path {tmp_path}: no test/: the 2 validation images stand in for it")
  with pytest.raises(
    errors.NoSuchSplit, match=r"holds folders \['train'\]; expected .*/test/CLASS"
  ):
    sources.open_split(config_of(tmp_path, validation=0.0), "test")


def test_a_classifier_is_not_tested_on_what_chose_it(tmp_path):
  for name in ("cats", "dogs"):
    photos(tmp_path / "train" / name, [f"{name} {i}.png" for i in NUMBERS])
  with pytest.raises(errors.UserError, match=r"stands in for a test split, .*fix: a folder test/"):
    sources.check_labels(open_all(tmp_path))


def test_an_image_of_two_stored_splits_is_told(tmp_path, capsys):
  photos(tmp_path / "train", [f"{i}.png" for i in NUMBERS])
  photos(tmp_path / "test", [f"other {i}.png" for i in range(3)], first=22)
  open_all(tmp_path)
  expected = f"{tmp_path}: 2 images of test/ are in train/, too; fix: remove them from one\n"
  assert capsys.readouterr().out == expected


def layout(root, **folders):
  """Images in folders, FOLDER=number of images; `beside` lie in the root itself."""
  first = 0
  for folder, n in folders.items():
    photos(root / ("" if folder == "beside" else folder), [f"{i}.png" for i in range(n)], first)
    first += n
  return root


@pytest.mark.parametrize(
  ("folders", "classes", "said"),
  [
    ({"train": 9, "car": 9, "plane": 9}, ("car", "plane", "train"), "train/: car/, plane/ beside"),
    ({"Test": 9, "beside": 20}, (), "Test/: images beside"),
    ({"validation": 9, "beside": 20}, (), "validation/: images beside"),
    ({"Train": 9, "beside": 20}, (), "Train/: images beside"),
    ({"val": 12, "holidays": 12}, ("holidays", "val"), "val/: holidays/ beside"),
  ],
)
@pytest.mark.parametrize("above", ["", "my"])
def test_a_class_may_be_called_as_a_split_is(tmp_path, capsys, folders, classes, said, above):
  root = layout(tmp_path / above, **folders)
  splits = open_all(tmp_path)
  assert all(split.class_names == classes for split in splits.values())
  assert sum(map(len, splits.values())) == sum(folders.values())
  first = capsys.readouterr().out.splitlines()[0]
  assert (
    first == f"{root}: no stored splits, though there is {said} (splits would be train/ and test/)"
  )


@pytest.mark.parametrize(
  ("folders", "left_out"),
  [
    ({"train": 20, "test": 4, "extra": 4}, "test/, train/; left out extra/"),
    ({"train": 20, "val": 4, "Test": 4, "beside": 1}, "train/, val/; left out images, Test/"),
    ({"train": 20, "beside": 1}, "train/; left out images"),
  ],
)
def test_what_lies_beside_stored_splits_is_told(tmp_path, capsys, folders, left_out):
  root = layout(tmp_path, **folders)
  (root / "notes").mkdir()
  (root / "notes" / "a.txt").write_text("no image")
  assert len(open_all(root)["train"]) == 18
  assert capsys.readouterr().out.startswith(f"{root}: stored splits {left_out} beside them\n")


def test_a_test_split_alone_is_for_evaluation_and_training_says_how(tmp_path, capsys):
  root = layout(tmp_path, val=24)
  assert len(sources.open_split(config_of(root), "test")) == 24
  with pytest.raises(errors.NoSuchSplit, match=rf"fix: --config\.data\.path={root}/val divides"):
    open_all(root)
  assert sum(map(len, open_all(root / "val").values())) == 24


# --- who is in which split -------------------------------------------------------------------------


def digits_of(rng, n):
  return [rng.bytes(16).hex() for _ in range(n)]


def assignment(contents, validation=0.1):
  parts = photo_folder.draw(contents, validation)
  return {contents[i]: name for name, indices in parts.items() for i in indices}


def test_an_added_image_moves_no_other():
  rng = np.random.default_rng(0)
  contents = digits_of(rng, 600)
  before = assignment(contents)
  shares = [list(before.values()).count(name) / 600 for name in SPLITS]
  np.testing.assert_allclose(shares, [0.81, 0.09, 0.1], atol=0.04)
  after = assignment(contents + digits_of(rng, 400))
  assert before.items() <= after.items()
  more = assignment(contents, validation=0.5)  # takes from train alone
  assert all(more[c] == name for c, name in before.items() if name != "train")
  assert list(more.values()).count("validation") > 200


@pytest.mark.parametrize("seed", range(5))
def test_a_small_folder_has_three_of_each_and_moves_images_only_towards_train(seed):
  rng, places = np.random.default_rng(seed), ("test", "validation", "train")
  contents = digits_of(rng, 20)
  before = assignment(contents)
  for _ in range(80):
    contents += digits_of(rng, 1)
    after = assignment(contents)
    assert all(list(after.values()).count(name) >= 3 for name in places)
    assert all(places.index(after[c]) >= places.index(name) for c, name in before.items())
    before = after
  assert set(assignment(contents, validation=0.0).values()) == {"train", "test"}


def test_neither_names_nor_places_nor_copies_decide(tmp_path):
  photos(tmp_path / "a", [f"{i}.png" for i in range(40)])
  before = members(tmp_path / "a")
  shutil.copytree(tmp_path / "a", tmp_path / "elsewhere")
  fingerprints = [split.fingerprint for split in open_all(tmp_path / "a").values()]
  assert [split.fingerprint for split in open_all(tmp_path / "elsewhere").values()] == fingerprints
  for name in set.union(*before.values()):
    (tmp_path / "a" / name).rename(tmp_path / "a" / f"new {name}")
    shutil.copy(tmp_path / "elsewhere" / name, tmp_path / "a" / f"copy {name}")
  after = members(tmp_path / "a")
  for name in SPLITS:
    assert after[name] == {f"{kind} {image}" for kind in ("new", "copy") for image in before[name]}


# --- what is wrong with some of them ---------------------------------------------------------------


def test_all_that_is_wrong_is_said_once(album, capsys):
  splits = open_all(album)
  assert sum(map(len, splits.values())) == 32
  open_all(album)
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 4 and all(line.startswith(f"{album}: ") for line in lines)
  assert "32 images, no classes" in lines[0]
  assert lines[1].startswith(f"{album}: left out 5 files: ")
  for part in (
    "cut.jpg (unreadable image (", "empty.jpg (unreadable image (the file is empty))",
    "IMG_5.HEIC (HEIC, for which Pillow needs a plugin: pip install pillow-heif)", "phone.jpg (unreadable",
    "2019/up (a link to a folder that is read already)",
  ):  # fmt: skip
    assert part in lines[1]
  assert (
    "1 image is equal to another (IMG_3 (1).jpg): in the same split, and counted twice" in lines[2]
  )
  assert lines[3].endswith(": 1 image is nearly one colour (pocket.jpg)")


def test_many_reasons_stay_one_line():
  said = image_files.in_words({f"{i}.jpg": f"reason {i}" for i in range(7)})
  assert said.startswith("7 files: 0.jpg (reason 0), ") and said.endswith("4.jpg (reason 4), …")


def test_a_class_without_a_readable_image_is_none(tmp_path):
  photos(tmp_path, [f"{'ab'[i % 2]}/{i}.png" for i in NUMBERS])
  (tmp_path / "c").mkdir()
  (tmp_path / "c" / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
  assert sources.open_split(config_of(tmp_path), "train").class_names == ("a", "b")
  for path in (tmp_path / "b").iterdir():
    path.write_bytes(b"")
  photos(tmp_path / "a", [f"new {i}.png" for i in NUMBERS], 100)
  assert sources.open_split(config_of(tmp_path), "train").class_names == ()


def test_the_images_are_looked_at_once(album, monkeypatch):
  before = open_all(album)["train"].fingerprint
  looked = []
  read = own_images.read
  monkeypatch.setattr(
    own_images, "read", lambda data, name, side: looked.append(name) or read(data, name, side)
  )
  assert open_all(album)["train"].fingerprint == before
  # Only what couldn't be read is tried again: another version may be able to.
  assert {os.path.basename(name) for name in looked} == {"cut.jpg", "empty.jpg", "phone.jpg"}
  looked.clear()
  photo(album / "new.png", 99)
  open_all(album)
  assert [os.path.basename(name) for name in looked].count("new.png") == 1


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.98])
@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_a_scaled_look_finds_the_damage_that_reading_finds(tmp_path, share, options):
  photo(tmp_path / "a.jpg", 0, (700, 900), **options)
  data = (tmp_path / "a.jpg").read_bytes()
  assert min(own_images.read(data, "a", 64).shape[:2]) < 200
  for side in (0, 64):
    with pytest.raises(image_decoding.BadRecord):
      own_images.read(data[: int(len(data) * share)], "a", side)


def test_images_that_vanish_or_break_meanwhile_end_nothing(tmp_path):
  photos(tmp_path, [f"{i}.png" for i in NUMBERS])
  config = config_of(tmp_path)
  split = sources.open_split(config, "train")
  paths = [pathlib.Path(split[i]["id"]) for i in range(len(split))]
  paths[0].unlink()
  paths[1].write_bytes(paths[1].read_bytes()[:60])
  with pipeline.train_batches(split, config, None, batch_size=8, seed=0) as batches:
    for _ in range(6):
      next(batches)
    assert set(batches.bad) == {"train[0]", "train[1]"}
  paths[2].unlink()
  paths[3].unlink()
  with (
    pytest.raises(errors.UserError, match=r"unreadable records: 4 of \d+ .* at most 3"),
    pipeline.train_batches(split, config, None, batch_size=8, seed=0) as batches,
  ):
    for _ in range(6):
      next(batches)


@pytest.mark.parametrize("augment", ["none", "cifar", "shift", "photo"])
def test_large_photos_are_decoded_once(tmp_path, monkeypatch, augment):
  """What is cached is small; the images are those that decoding each time would give."""
  for i in range(20):
    photo(tmp_path / f"{i}.jpg", i, (300, 450))
  read, reads, seen = own_images.read, [], []
  monkeypatch.setattr(own_images, "read", lambda *given: reads.append(given[1]) or read(*given))
  split = sources.open_split(config_of(tmp_path), "train")
  for cache_mb, n_times in ((0, 3), (1, 1)):
    config = config_of(tmp_path, augment=augment, cache_mb=cache_mb)
    loader = Loader(split, config, None, train=True, images=True)
    rng = np.random.default_rng(0)
    reads.clear()
    seen.append([loader.load(i % 5, rng)["image"] for i in range(15)])
    assert len(reads) == 5 * n_times
  np.testing.assert_array_equal(*seen)


def test_a_kept_photo_is_still_cropped_anywhere(tmp_path):
  """A wide photo whose pixels tell their column: crops reach both of its ends, from the cache, too."""
  ramp = np.broadcast_to(np.linspace(0, 255, 600).astype(np.uint8)[None, :, None], (200, 600, 3))
  for i in range(20):
    (tmp_path / "wide").mkdir(exist_ok=True)
    Image.fromarray(np.minimum(ramp, 255 - i)).save(tmp_path / "wide" / f"{i}.png")
  config = config_of(tmp_path, augment="photo")
  split = sources.open_split(config, "train")
  loader = Loader(split, config, None, train=True, images=True)
  rng = np.random.default_rng(0)
  crops = [loader.load(0, rng)["image"] for _ in range(200)]
  assert min(crop.min() for crop in crops) < 20 and max(crop.max() for crop in crops) > 220


# --- refused ---------------------------------------------------------------------------------------


def test_folders_that_are_refused(tmp_path):
  def refused(root, says, split="train", **changes):
    with pytest.raises(errors.UserError, match=says) as caught:
      sources.open_split(config_of(root, **changes), split)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400

  refused(tmp_path / "nowhere", "no such folder; expected a folder of images")
  root = photos(tmp_path / "few", [f"{i}.png" for i in range(19)])
  refused(root / "0.png", "is a file; expected a folder of images")
  (root / "cut.png").write_bytes(b"")
  refused(root, r"holds 19 different images; expected 20 or more .* left out 1 file: cut\.png")
  shutil.copy(root / "0.png", root / "again.png")
  refused(root, r"19 different images \(1 more are copies\)")
  photos(root, ["19.png"], 19)
  assert len(sources.open_split(config_of(root), "test")) >= 3
  refused(root, r"data\.validation: 0\.95 of 21 images leaves nothing for train", validation=0.95)
  refused(root, "no folders; expected .*few/val/CLASS", "validation", validation_split="val")
  with pytest.raises(errors.NoSuchSplit, match=r"data\.validation: 0"):
    sources.open_split(config_of(root, validation=0.0), "validation")


def test_splits_that_are_nearly_there_are_not_mixed(tmp_path):
  names = [f"{split}/{i}.png" for split in ("train", "test") for i in NUMBERS]
  photos(tmp_path / "zip" / "data", names)
  with pytest.raises(errors.UserError, match=rf"fix: --config\.data\.path={tmp_path}/zip/data$"):
    open_all(tmp_path / "zip")
  photos(tmp_path / "capitals", [name.capitalize() for name in names])
  with pytest.raises(
    errors.UserError, match=r"capitals/Test; expected .*/test; fix: rename it to test"
  ):
    open_all(tmp_path / "capitals")
  layout(tmp_path / "one", train=20, Test=4)
  with pytest.raises(errors.UserError, match=r"one/Test; .*fix: rename it to test$"):
    open_all(tmp_path / "one")


def test_results_are_no_photos(tmp_path):
  photos(tmp_path, [f"{i}.png" for i in NUMBERS])
  settings = Settings(data=config_of(tmp_path))
  for workdir in (tmp_path, tmp_path / "runs" / "a"):
    with pytest.raises(errors.UserError, match=r"lies within data\.path"):
      places.check(settings, str(workdir))
  places.check(settings, str(tmp_path) + "-run")
  for folders, is_safe in (({"train": 9, "test": 9}, True), ({"train": 18}, False)):
    root = layout(tmp_path / f"{len(folders)}", **folders)
    stored = Settings(data=config_of(root))
    if is_safe:
      places.check(stored, str(root / "runs" / "a"))
    else:  # its images would make classes of train/ and runs/
      with pytest.raises(errors.UserError, match=r"lies within data\.path"):
        places.check(stored, str(root / "runs" / "a"))


# --- jobs ------------------------------------------------------------------------------------------
