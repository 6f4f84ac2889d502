"""Features on disk: written in parts, found again, refused when they are of something else."""

import json

import numpy as np
import pytest

from igpt_jax.errors import UserError
from igpt_jax.probing import store as store_lib
from igpt_jax.probing.features import FeatureRows
from igpt_jax.probing.store import FeatureStore

ROWS, WIDTH, SIDE = 20, 6, 4
IDENTITY = {"checkpoint": "abc", "data": "digits train", "resolution": 4}


def store(folder, rows=ROWS, **changes):
  return FeatureStore(str(folder), {**IDENTITY, **changes}, rows=rows, width=WIDTH, side=SIDE)


def rows_of(layers, first, last, without=()):
  index = np.array([i for i in range(first, min(last, ROWS)) if i not in without], np.int32)
  features = np.stack([index[:, None] + 100.0 * layer + np.zeros(WIDTH) for layer in layers])
  images = np.repeat(index, SIDE * SIDE * 3).reshape(-1, SIDE, SIDE, 3).astype(np.uint8)
  return FeatureRows(index, features.astype(np.float32), images, index % 5)


def fill(folder, layers, first=0, last=ROWS, without=(), rows=ROWS):
  found = store(folder, rows)
  writing = found.begin(layers)
  for start in range(first, last, 8):
    writing.add(rows_of(layers, start, min(start + 8, rows), without), start + 8)
  writing.save(last)
  return found


def test_what_was_written_is_found(tmp_path):
  fill(tmp_path / "train", (0, 2), without=(7,))
  found = store(tmp_path / "train")
  assert found.missing((0, 1, 2)) == (1,)
  assert found.rows_done((0, 2)) == ROWS
  labels = found.labels()
  assert labels[7] == -1 and (np.delete(labels, 7) == np.delete(np.arange(ROWS) % 5, 7)).all()
  assert found.layer(2).shape == (ROWS, WIDTH) and found.layer(2).dtype == np.float32
  np.testing.assert_array_equal(found.layer(2)[[0, 19], 0], [200, 219])
  assert (found.images()[9] == 9).all() and (found.layer(0)[7] == 0).all()


def test_an_interrupted_pass_goes_on(tmp_path):
  fill(tmp_path / "train", (0, 1), last=16)
  found = store(tmp_path / "train")
  assert found.missing((0, 1)) == (0, 1) and found.rows_done((0, 1)) == 16
  writing = found.begin((0, 1))
  writing.add(rows_of((0, 1), 16, 24), 24)
  again = store(tmp_path / "train")
  assert again.missing((0, 1)) == ()
  np.testing.assert_array_equal(again.layer(1)[:, 0], 100 + np.arange(ROWS))
  np.testing.assert_array_equal(again.labels(), np.arange(ROWS) % 5)


def test_rows_count_only_once_they_are_on_disk(tmp_path):
  """A batch that no save followed is computed again."""
  found = store(tmp_path / "train")
  writing = found.begin((0,))
  writing.add(rows_of((0,), 0, 8), 8)
  assert store(tmp_path / "train").rows_done((0,)) == 0
  writing._saved -= store_lib._SECONDS_BETWEEN_SAVES + 1
  writing.add(rows_of((0,), 8, 16), 16)
  assert store(tmp_path / "train").rows_done((0,)) == 16


def test_another_layer_is_added(tmp_path):
  fill(tmp_path / "train", (0,))
  fill(tmp_path / "train", (3,))
  found = store(tmp_path / "train")
  assert found.missing((0, 3)) == ()
  assert found.layer(0)[5, 0] == 5 and found.layer(3)[5, 0] == 305


def test_fewer_rows_are_the_first_of_more(tmp_path):
  fill(tmp_path / "train", (0,), without=(3,))
  fewer = store(tmp_path / "train", rows=6)
  assert fewer.missing((0,)) == () and fewer.rows_done((0,)) == 6
  assert fewer.layer(0).shape == (6, WIDTH) and fewer.images().shape == (6, SIDE, SIDE, 3)
  assert fewer.labels().tolist() == [0, 1, 2, -1, 4, 0]
  # Another layer of the first rows takes nothing from the one that has them all.
  fill(tmp_path / "train", (0, 1), last=6, rows=6)
  every = store(tmp_path / "train")
  assert every.missing((0, 1)) == (1,) and every.rows_done((0,)) == ROWS
  np.testing.assert_array_equal(every.layer(0)[4:, 0], np.arange(4, ROWS))


def test_more_rows_are_added_to_fewer(tmp_path):
  fill(tmp_path / "train", (0, 1), last=6, without=(2,), rows=6)
  more = store(tmp_path / "train")
  assert more.missing((0, 1)) == (0, 1) and more.rows_done((0, 1)) == 6
  writing = more.begin((0, 1))
  assert more.labels().tolist() == [0, 1, -1, 3, 4, 0] + [-1] * 14
  # Cut off here, the first rows are still there for whoever wants no more.
  assert store(tmp_path / "train", rows=6).missing((0, 1)) == ()
  assert store(tmp_path / "train").rows_done((0, 1)) == 6
  writing.add(rows_of((0, 1), 6, 14), 14)
  writing.save(14)
  between = store(tmp_path / "train", rows=10)
  assert between.missing((0, 1)) == () and between.layer(1)[9, 0] == 109
  writing.add(rows_of((0, 1), 14, 20), 20)
  whole = store(tmp_path / "train")
  assert whole.missing((0, 1)) == ()
  np.testing.assert_array_equal(
    whole.layer(1)[:, 0], np.where(np.arange(ROWS) == 2, 0, 100 + np.arange(ROWS))
  )
  assert whole.labels()[2] == -1 and (whole.images()[13] == 13).all()


@pytest.mark.parametrize(
  "change", [{"checkpoint": "xyz"}, {"data": "digits test"}, {"resolution": 8}]
)
def test_features_of_something_else_are_refused(tmp_path, change):
  fill(tmp_path / "train", (0,))
  ((name, value),) = change.items()
  with pytest.raises(
    UserError, match=f"something else:\n  {name}: {IDENTITY[name]} there, {value}"
  ):
    store(tmp_path / "train", **change)


@pytest.mark.parametrize(
  "damage", ["identity", "progress", "layer cut", "layer shape", "layer gone"]
)
def test_damage_is_said(tmp_path, damage):
  folder = tmp_path / "train"
  fill(folder, (0,))
  layer = folder / "layer-00.npy"
  if damage in ("identity", "progress"):
    (folder / f"{damage}.json").write_text('{"rows": ')
  elif damage == "layer cut":
    layer.write_bytes(layer.read_bytes()[:200])
  elif damage == "layer shape":
    np.save(layer, np.zeros((3, WIDTH), np.float32))
  else:
    layer.unlink()
  with pytest.raises(UserError, match=rf"features: .*{damage.split()[0]}.*remove {folder}"):
    store(folder).layer(0)


@pytest.mark.parametrize("progress", ["[]", '{"0": "20"}', '{"0": -1}', '{"0": 1.5}'])
def test_progress_that_counts_no_rows_is_said(tmp_path, progress):
  fill(tmp_path / "train", (0,))
  (tmp_path / "train" / "progress.json").write_text(progress)
  with pytest.raises(UserError, match=r"progress\.json can't be read"):
    store(tmp_path / "train")


def test_a_layer_shorter_than_its_progress_is_said(tmp_path):
  folder = tmp_path / "train"
  fill(folder, (0,))
  np.save(folder / "layer-00.npy", np.zeros((ROWS - 1, WIDTH), np.float32))
  with pytest.raises(
    UserError, match=r"layer-00.npy is float32 \[19, 6\]; expected float32 \[20, 6\]"
  ):
    store(folder).layer(0)


def test_pickles_are_not_loaded(tmp_path):
  fill(tmp_path / "train", (0,))
  np.save(tmp_path / "train" / "layer-00.npy", np.array([{}], dtype=object), allow_pickle=True)
  with pytest.raises(UserError, match="can't be read"):
    store(tmp_path / "train").layer(0)


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
  monkeypatch.setattr(store_lib.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
  with pytest.raises(UserError, match=r"needs .*B for 2 layers of 20 images.*fix: "):
    store(tmp_path / "train").begin((0, 1))
  assert not list((tmp_path / "train").iterdir())


def test_nothing_but_numbers_is_in_the_json(tmp_path):
  fill(tmp_path / "train", (0, 1))
  assert json.loads((tmp_path / "train" / "progress.json").read_text()) == {"0": ROWS, "1": ROWS}
  identity = json.loads((tmp_path / "train" / "identity.json").read_text())
  assert identity == {**IDENTITY, "width": WIDTH}


def test_rows_are_flushed_before_they_count(tmp_path, monkeypatch):
  """After a power cut, too, what progress.json counts is there."""
  done, flush, note = [], np.memmap.flush, FeatureStore._done
  writing = store(tmp_path / "train").begin((0, 2))
  monkeypatch.setattr(np.memmap, "flush", lambda array: (done.append("flushed"), flush(array))[1])
  monkeypatch.setattr(
    FeatureStore, "_done", lambda *given: (done.append("counted"), note(*given))[1]
  )
  writing.add(rows_of((0, 2), 0, 20), 20)
  assert done.index("counted") == len(done) - 1 >= 4  # labels, images and two layers
