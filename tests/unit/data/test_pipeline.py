"""The order of images and their augmentation depend on the seed and the data, and on nothing else."""

import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from igpt_jax import errors
from igpt_jax.data import image_decoding, own_images, pipeline, sources, transforms
from igpt_jax.data import palette as palette_lib
from igpt_jax.data.loader import Loader, tolerance
from igpt_jax.tokens import TokenSpec
from support import icc
from support.paths import ROOT

PALETTE = palette_lib.Palette.from_uint8(
  np.random.default_rng(0).integers(0, 256, (200, 3), np.uint8)
)
TOKENS = TokenSpec(n_vocab=PALETTE.size, palette=PALETTE)
N = 53  # shares no factor with any batch size below


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """53 random images in two classes; the label is written into the name."""
  root = tmp_path_factory.mktemp("pictures")
  rng = np.random.default_rng(1)
  for split in ("train", "test"):
    for i in range(N):
      folder = root / split / f"class{i % 2}"
      folder.mkdir(parents=True, exist_ok=True)
      Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{i:03d}.png")
  return root


def _config(root, **changes):
  changes = {"augment": "cifar", "validation": 0.0, "threads": 2} | changes
  return sources.DataConfig(name="folder", path=str(root), **changes)


def _take(n, split, config, spec=TOKENS, **options):
  options = {"batch_size": 8, "seed": 5} | options
  with pipeline.train_batches(split, config, spec, **options) as batches:
    return list(itertools.islice(batches, n))


def _same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys()
    for key in x:
      np.testing.assert_array_equal(x[key], y[key], err_msg=key)


def _joined(parts):
  """The global batches of several hosts' streams."""
  return [
    {k: np.concatenate([p[k] for p in step]) for k in step[0]} for step in zip(*parts, strict=True)
  ]


def test_batch_is_what_the_model_takes(pictures):
  config = _config(pictures)
  batch = _take(1, sources.open_split(config, "train"), config, images=True)[0]
  assert batch["tokens"].shape == (8, 64) and batch["tokens"].dtype == np.uint16
  assert batch["label"].shape == (8,) and batch["label"].dtype == np.int32
  assert batch["image"].shape == (8, 8, 8, 3) and batch["image"].dtype == np.uint8
  np.testing.assert_array_equal(PALETTE.encode(batch["image"]).reshape(8, 64), batch["tokens"])


def test_without_palette_pictures_travel(pictures):
  config = _config(pictures)
  batch = _take(1, sources.open_split(config, "train"), config, None)[0]
  assert "tokens" not in batch and batch["image"].dtype == np.uint8


def test_labels_and_index_belong_to_the_picture(pictures):
  config = _config(pictures, augment="none")
  split = sources.open_split(config, "train")
  for batch in _take(7, split, config, images=True):
    for index, label, image in zip(batch["index"], batch["label"], batch["image"], strict=True):
      record = split[int(index)]
      assert record["label"] == label
      np.testing.assert_array_equal(image_decoding.decode(record["image"]), image)


def test_every_epoch_has_each_picture_once_and_batches_straddle(pictures):
  config = _config(pictures)
  split = sources.open_split(config, "train")
  drawn = np.concatenate([b["index"] for b in _take(3 * N // 8 + 1, split, config)])
  epochs = [drawn[i * N : (i + 1) * N] for i in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(N))
  assert len({tuple(e) for e in epochs}) == 3


def test_augmentation_is_new_each_epoch(pictures):
  config = _config(pictures)
  split = sources.open_split(config, "train")
  batches = _take(2 * N // 8 + 1, split, config, images=True)
  images = np.concatenate([b["image"] for b in batches])
  index = np.concatenate([b["index"] for b in batches])
  changed = [not np.array_equal(*images[np.flatnonzero(index[: 2 * N] == i)]) for i in range(N)]
  assert np.mean(changed) > 0.9


def test_seeds_differ_and_neighbours_do_not_share_epochs(pictures):
  config = _config(pictures)
  split = sources.open_split(config, "train")
  orders = [
    np.concatenate([b["index"] for b in _take(14, split, config, seed=s)])[: 2 * N]
    for s in (0, 1, 2)
  ]
  epochs = [tuple(o[i * N : (i + 1) * N]) for o in orders for i in range(2)]
  assert len(set(epochs)) == 6


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
  """Eight photographs in every orientation, some with alpha or a profile; stored, not upright."""
  root = tmp_path_factory.mktemp("turned")
  rng = np.random.default_rng(2)
  profile = icc.rgb_profile(icc.ADOBE_RGB, 2.2)
  for i in range(24):
    image = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize((420, 300))
    exif = Image.Exif()
    exif[0x0112] = 1 + i % 8
    suffix, options = [("jpg", {}), ("jpg", {"icc_profile": profile}), ("png", {})][i // 8]
    if suffix == "png":
      image.putalpha(Image.linear_gradient("L").resize(image.size))
    folder = root / ("train" if i % 8 < 7 else "test") / "class"
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / f"{i:02d}.{suffix}", exif=exif, **options)
  return root


@pytest.mark.parametrize("cache_mb", [0, 512])
@pytest.mark.parametrize("resample", ["fused", "literal"])
def test_a_person_s_files_are_turned_upright_before_they_are_cropped(turned, resample, cache_mb):
  """However they are decoded: in part, whole, or once and kept."""
  config = _config(turned, augment="paper", resolution=32, resample=resample, cache_mb=cache_mb)
  split = sources.open_split(config, "train")
  assert split.is_folder
  loader = Loader(split, config, None, train=True, images=True)
  evaluate = Loader(split, config, None, train=False, images=True)
  for i in range(len(split)):
    upright = own_images.read(split[i]["image"])
    for seed in range(2):  # the second time from the cache
      expected = transforms.paper_train(upright, np.random.default_rng(seed), 32, resample)
      got = loader.load(i, np.random.default_rng(seed))["image"]
      np.testing.assert_array_equal(got, expected, err_msg=split[i]["id"])
      got = evaluate.load(i, None)["image"]
      np.testing.assert_array_equal(got, transforms.paper_eval(upright, 32))


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_global_batch_is_the_same_on_any_number_of_hosts(pictures, hosts):
  config = _config(pictures)
  split = sources.open_split(config, "train")
  parts = [
    _take(9, split, config, images=True, process_index=h, process_count=hosts) for h in range(hosts)
  ]
  _same(_joined(parts), _take(9, split, config, images=True))


@pytest.mark.parametrize("threads", [1, 5])
def test_threads_change_nothing(pictures, threads):
  config = _config(pictures)
  split = sources.open_split(config, "train")
  _same(_take(9, split, dataclasses.replace(config, threads=threads)), _take(9, split, config))


def test_cache_changes_nothing(pictures):
  config = _config(pictures)
  split = sources.open_split(config, "train")
  _same(_take(16, split, dataclasses.replace(config, cache_mb=0)), _take(16, split, config))


@pytest.mark.parametrize("step", [1, 6, 7, 11])
def test_any_step_can_be_started_from(pictures, step):
  config = _config(pictures)
  split = sources.open_split(config, "train")
  whole = _take(16, split, config)
  _same(_take(16 - step, split, config, start_step=step), whole[step:])


@pytest.mark.parametrize("trial", range(12))
def test_killed_anywhere_resumed_on_other_hosts_nothing_changes(tmp_path, trial):
  """Sizes, seeds, hosts and the moment of death drawn at random; the stream goes on as it would have."""
  rng = np.random.default_rng(trial)
  n, rows = int(rng.integers(5, 90)), int(rng.integers(1, 5))
  batch_size = 24 * rows
  np.save(tmp_path / "train.npy", np.arange(n)[:, None].astype(np.int32))
  config = sources.DataConfig(name="tokens", path=str(tmp_path), resolution=1, validation=0.0)
  split = sources.open_split(config, "train")
  death = int(
    rng.integers(n // batch_size, 2 * n // batch_size + 2)
  )  # in the second epoch, or near
  seed = int(rng.integers(2**31))
  whole = _take(death + 4, split, config, batch_size=batch_size, seed=seed)
  saved = json.loads(
    json.dumps(pipeline.position(split, batch_size=batch_size, seed=seed, step=death))
  )
  hosts = int(rng.choice([1, 2, 3, 4, 8]))
  fresh = pipeline.position(split, batch_size=batch_size, seed=seed, step=0)
  start = pipeline.check_position(saved, fresh)
  parts = [
    _take(
      4, split, config, batch_size=batch_size, seed=seed, start_step=start,
      process_index=h, process_count=hosts,
    )
    for h in range(hosts)
  ]  # fmt: skip
  _same(_joined(parts), whole[death:])


@pytest.mark.parametrize("hosts", [1, 3, 4])
def test_fifty_thousand_are_fifty_thousand(tmp_path, hosts):
  np.save(tmp_path / "test.npy", np.arange(50_000)[:, None].astype(np.uint16))
  config = sources.DataConfig(name="tokens", path=str(tmp_path), resolution=1)
  split = sources.open_split(config, "test")
  total, seen = 0, []
  for host in range(hosts):
    with pipeline.eval_batches(
      split, config, None, batch_size=96, process_index=host, process_count=hosts
    ) as batches:
      for batch in batches:
        total += int(batch["mask"].sum())
        seen.append(batch["tokens"][batch["mask"], 0])
  assert total == 50_000
  np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(50_000))


@pytest.mark.parametrize("hosts", [1, 3, 4])
@pytest.mark.parametrize("batch_size", [12, 60])
def test_evaluation_sees_every_picture_once(pictures, hosts, batch_size):
  config = _config(pictures)
  split = sources.open_split(config, "test")
  parts = []
  for host in range(hosts):
    with pipeline.eval_batches(
      split, config, TOKENS, batch_size=batch_size, process_index=host, process_count=hosts
    ) as batches:
      parts.append(list(batches))
  joined = _joined(parts)
  mask = np.concatenate([b["mask"] for b in joined])
  index = np.concatenate([b["index"] for b in joined])
  label = np.concatenate([b["label"] for b in joined])
  assert mask.sum() == N
  np.testing.assert_array_equal(index[mask], np.arange(N))
  assert (index[~mask] == -1).all() and (label[~mask] == -1).all()
  np.testing.assert_array_equal(label[mask], [split[i]["label"] for i in range(N)])
  assert len(joined) == -(-N // batch_size)


def test_evaluation_does_not_augment(pictures):
  config = _config(pictures)
  split = sources.open_split(config, "test")
  with pipeline.eval_batches(split, config, None, batch_size=16) as batches:
    for batch in batches:
      for index, image in zip(batch["index"], batch["image"], strict=True):
        if index >= 0:
          np.testing.assert_array_equal(image, image_decoding.decode(split[int(index)]["image"]))


def test_image_stream_is_one_pass(pictures):
  config = _config(pictures)
  split = sources.open_split(config, "train")
  for augment in (False, True):
    images = list(pipeline.image_stream(split, config, augment=augment, batch_size=16))
    assert sum(len(i) for i in images) == N


def test_tokens_pass_through(tmp_path):
  rows = np.random.default_rng(0).integers(0, 500, (21, 64)).astype(np.int32)
  np.save(tmp_path / "train.npy", rows)
  config = sources.DataConfig(name="tokens", path=str(tmp_path), validation=0.0)
  split = sources.open_split(config, "train")
  for spec in (TOKENS, None):
    batch = _take(1, split, config, spec)[0]
    np.testing.assert_array_equal(batch["tokens"], rows[batch["index"]])
    assert batch["tokens"].dtype == np.uint16 and "image" not in batch
  with pipeline.eval_batches(split, config, None, batch_size=8) as batches:
    seen = np.concatenate([b["tokens"][b["mask"]] for b in batches])
  np.testing.assert_array_equal(seen, rows)


# --- damage ----------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
  """40 grey images, of which two in a row (in the split's order) are cut short."""
  (tmp_path / "train").mkdir()
  (tmp_path / "test").mkdir()
  for split in ("train", "test"):
    for i in range(40):
      Image.fromarray(np.full((8, 8), 6 * i, np.uint8)).save(tmp_path / split / f"{i:02d}.png")
  config = sources.DataConfig(
    name="folder", path=str(tmp_path), validation=0.0, max_bad=0.05, threads=2
  )
  for name in ("train", "test"):
    split = sources.open_split(config, name)
    for index in (10, 11):
      path = pathlib.Path(split[index]["id"])
      path.write_bytes(path.read_bytes()[:40])
  return config


def test_damaged_records_are_replaced_by_the_next_named_and_counted(damaged, caplog):
  split = sources.open_split(damaged, "train")
  with pipeline.train_batches(split, damaged, TOKENS, batch_size=8, seed=0, images=True) as batches:
    taken = list(itertools.islice(batches, 10))
    bad = dict(batches.bad)
  assert set(bad) == {"train[10]", "train[11]"}
  for index in (10, 11):
    assert split[index]["id"] in bad[f"train[{index}]"]
    assert split[index]["id"] in caplog.text
  index = np.concatenate([b["index"] for b in taken])
  images = np.concatenate([b["image"] for b in taken])
  replacement = image_decoding.decode(split[12]["image"])
  for i in (10, 11):
    assert (images[index == i] == replacement).all()
    assert (index == i).sum() == 2  # two epochs


def test_damaged_records_are_masked_in_evaluation(damaged):
  split = sources.open_split(damaged, "test")
  with pipeline.eval_batches(split, damaged, TOKENS, batch_size=16) as batches:
    taken = list(batches)
    assert len(batches.bad) == 2
  mask = np.concatenate([b["mask"] for b in taken])
  index = np.concatenate([b["index"] for b in taken])
  np.testing.assert_array_equal(np.flatnonzero(~mask[:40]), [10, 11])
  np.testing.assert_array_equal(index[:40], np.arange(40))


@pytest.mark.parametrize("split_name", ["train", "test"])
def test_too_much_damage_is_an_error_that_names_it(damaged, split_name):
  config = dataclasses.replace(damaged, max_bad=0.0)
  split = sources.open_split(config, split_name)
  with pytest.raises(errors.UserError, match=r"of 40.*max_bad") as caught:
    if split_name == "train":
      _take(10, split, config)
    else:
      with pipeline.eval_batches(split, config, TOKENS, batch_size=16) as batches:
        list(batches)
  assert any(split[index]["id"] in str(caught.value) for index in (10, 11))


def test_how_much_damage_is_too_much():
  folder = sources.DataConfig(name="folder", path="photos", max_bad=0.01)
  assert [tolerance(n, folder) for n in (2, 20, 1_000)] == [1, 3, 10]
  assert tolerance(1_000, dataclasses.replace(folder, max_bad=0.0)) == 0
  assert tolerance(20, sources.DataConfig(max_bad=0.01)) == 0  # of a prepared data set


def test_nothing_but_damage_ends(tmp_path):
  (tmp_path / "train").mkdir()
  for i in range(30):
    (tmp_path / "train" / f"{i}.jpg").write_bytes(b"\xff\xd8no image")
  config = sources.DataConfig(name="folder", path=str(tmp_path), validation=0.0)
  with pytest.raises(errors.UserError, match="unreadable"):
    _take(1, sources.open_split(config, "train"), config)


def test_the_last_readable_record_is_not_outvoted(tmp_path):
  """max_bad=1 puts up with everything but a split without a single image."""
  (tmp_path / "train").mkdir()
  for i in range(3):
    (tmp_path / "train" / f"{i}.jpg").write_bytes(b"no image")
  config = sources.DataConfig(name="folder", path=str(tmp_path), validation=0.0, max_bad=1.0)
  with pytest.raises(errors.UserError, match="3 of 3"):
    _take(1, sources.open_split(config, "train"), config)


def test_closed_batches_say_so(pictures):
  config = _config(pictures)
  batches = pipeline.train_batches(
    sources.open_split(config, "train"), config, TOKENS, batch_size=8, seed=0
  )
  next(batches)
  batches.close()
  batches.close()
  with pytest.raises(ValueError, match="closed"):
    next(batches)


# --- position --------------------------------------------------------------------------------------


def test_position_survives_json_and_refuses_changes_by_name(pictures):
  config = _config(pictures)
  split = sources.open_split(config, "train")
  saved = pipeline.position(split, batch_size=8, seed=5, step=7)
  saved = json.loads(json.dumps(saved))
  assert saved["next_index"] == 56
  fresh = pipeline.position(split, batch_size=8, seed=5, step=0)
  assert pipeline.check_position(saved, fresh) == 7
  other = sources.open_split(_config(pictures, validation=0.2), "train")
  for changed, name in (
    (pipeline.position(other, batch_size=8, seed=5, step=0), "data set"),
    (pipeline.position(split, batch_size=16, seed=5, step=0), "batch size: 16; expected 8"),
    (pipeline.position(split, batch_size=8, seed=6, step=0), "seed: 6; expected 5"),
  ):
    with pytest.raises(errors.UserError, match=name):
      pipeline.check_position(saved, changed)


def test_batch_that_hosts_cannot_share_is_refused(pictures):
  config = _config(pictures)
  split = sources.open_split(config, "train")
  with pytest.raises(errors.UserError, match=r"batch size: 8.*3 hosts"):
    pipeline.train_batches(split, config, TOKENS, batch_size=8, seed=0, process_count=3)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_beyond_32_bits_are_refused(pictures, seed):
  config = _config(pictures)
  with pytest.raises(errors.UserError, match="seed"):
    _take(1, sources.open_split(config, "train"), config, seed=seed)


WORKERS = """
import dataclasses, itertools, sys
import numpy as np
from igpt_jax.data import palette, pipeline, sources
from igpt_jax.tokens import TokenSpec

def main():
  config = sources.DataConfig(name="folder", path=sys.argv[1], augment="cifar", validation=0.0)
  colors = palette.Palette.from_uint8(np.random.default_rng(0).integers(0, 256, (200, 3), np.uint8))
  spec = TokenSpec(n_vocab=200, palette=colors)
  split = sources.open_split(config, "train")

  def take(n, hosts, workers, start):
    settings = dataclasses.replace(config, workers=workers)
    parts = []
    for host in range(hosts):
      with pipeline.train_batches(
        split, settings, spec, batch_size=8, seed=5, start_step=start,
        process_index=host, process_count=hosts,
      ) as batches:
        parts.append(list(itertools.islice(batches, n)))
    return [{k: np.concatenate([p[k] for p in step]) for k in step[0]} for step in zip(*parts)]

  whole = take(16, hosts=1, workers=0, start=0)
  for hosts, workers, start in ((1, 2, 0), (2, 1, 9)):  # 9: in the second epoch
    resumed = take(16 - start, hosts, workers, start)
    for a, b in zip(whole[start:], resumed, strict=True):
      for key in a:
        np.testing.assert_array_equal(a[key], b[key])
  global left_open  # whoever forgets to close hears nothing of it either
  left_open = pipeline.train_batches(
    split, dataclasses.replace(config, workers=1), spec, batch_size=8, seed=5
  )
  next(left_open)
  print("same")

if __name__ == "__main__":
  main()
"""


def test_worker_processes_change_nothing_and_leave_quietly(pictures, tmp_path):
  script = tmp_path / "script.py"
  script.write_text(WORKERS)
  run = subprocess.run(
    [sys.executable, str(script), str(pictures)],
    cwd=ROOT,
    env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    capture_output=True,
    text=True,
    timeout=180,
  )
  assert run.returncode == 0, run.stderr
  assert run.stdout == "same\n"
  assert run.stderr == ""
