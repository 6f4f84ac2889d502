"""What is saved comes back bit for bit, on whatever mesh; what isn't whole isn't there."""

import asyncio
import dataclasses
import functools
import gc
import logging
import os
import shutil
import sys
import warnings

import jax
import numpy as np
import pytest

from igpt_jax import checkpoint
from igpt_jax.checkpoint import Checkpoints, find, load_pretrained, process_wide, reading, writing
from igpt_jax.errors import UserError
from igpt_jax.training.state import (
  HEAD,
  abstract_state,
  make_state,
  param_shardings,
  state_shardings,
)
from support import tiny
from support.saved_states import ABSTRACT, CONFIG, OPTIMIZER, PALETTE, make_run, random_state, save

pytestmark = pytest.mark.usefixtures("quick_compile")


def restore(workdir, step, shape=(1, 1, 1)):
  checkpoints = Checkpoints(str(workdir))
  shardings = state_shardings(CONFIG, OPTIMIZER, tiny.mesh_of(shape))
  state = checkpoints.restore(step, ABSTRACT, shardings)
  checkpoints.close()
  return state


def assert_same_state(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for name, leaf in tiny.leaf_names(found).items():
    theirs = tiny.leaf_names(expected)[name]
    assert leaf.dtype == theirs.dtype, name
    np.testing.assert_array_equal(leaf, theirs, err_msg=name)


def steps_in(workdir):
  return sorted(int(name) for name in os.listdir(workdir / "checkpoints") if name.isdigit())


@pytest.mark.parametrize("written_on", [(1, 1, 1), *tiny.MESHES], ids=str)
def test_restored_state_is_the_saved_one_on_any_mesh(tmp_path, written_on):
  state = random_state(5, written_on)
  save(tmp_path, state)
  for read_on in [(1, 1, 1), *tiny.MESHES]:
    found = restore(tmp_path, 5, read_on)
    assert_same_state(found, state)
    wanted = tiny.leaf_names(state_shardings(CONFIG, OPTIMIZER, tiny.mesh_of(read_on)))
    for name, leaf in tiny.leaf_names(found).items():
      assert leaf.sharding.is_equivalent_to(wanted[name], leaf.ndim), (read_on, name)


def test_the_run_travels_with_the_state(tmp_path):
  data = {"step": 4, "seed": 3, "fingerprint": "digits/train · 9"}
  save(tmp_path, random_state(4), data=data, elapsed_seconds=1.5)
  checkpoints = Checkpoints(str(tmp_path))
  assert checkpoints.latest() == 4
  found = checkpoints.read_run(4)
  assert make_run(data=data, elapsed_seconds=1.5).items() <= found.items()
  assert found.keys() - make_run().keys() == {
    "data",
    "elapsed_seconds",
    "skipped",
    "format_version",
  }
  checkpoints.close()


def test_a_new_workdir_has_no_checkpoint(tmp_path):
  checkpoints = Checkpoints(str(tmp_path / "new"))
  assert checkpoints.latest() is None
  checkpoints.close()


def test_saving_is_not_disturbed_by_what_the_next_step_does(tmp_path):
  """The arrays are copied before `save` returns: the step that follows may overwrite them."""
  state = random_state(1)
  expected = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
  overwrite = tiny.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
  checkpoints = Checkpoints(str(tmp_path))
  checkpoints.save(state, palette=None, run=make_run())
  jax.block_until_ready(overwrite(state))
  checkpoints.close()
  assert_same_state(restore(tmp_path, 1), expected)


def test_saving_a_step_twice_writes_it_once(tmp_path):
  save(tmp_path, random_state(2))
  written = os.stat(tmp_path / "checkpoints" / "2").st_mtime_ns
  save(tmp_path, random_state(2))
  assert os.stat(tmp_path / "checkpoints" / "2").st_mtime_ns == written


@pytest.mark.parametrize(
  "keep, keep_every, left", [(2, 0, [5, 6]), (1, 3, [3, 6]), (10, 0, [1, 2, 3, 4, 5, 6])]
)
def test_retention(tmp_path, keep, keep_every, left):
  states = [random_state(step) for step in range(1, 7)]
  save(tmp_path, *states, keep=keep, keep_every=keep_every)
  assert steps_in(tmp_path) == left
  assert_same_state(restore(tmp_path, left[0]), states[left[0] - 1])


def half_write(workdir, step, kind):
  """A step's folder as a killed run may leave it."""
  folder = workdir / "checkpoints"
  whole = folder / str(step)
  if kind == "not renamed yet":
    shutil.copytree(whole, folder / f"{step + 1}.orbax-checkpoint-tmp")
  elif kind == "empty":
    os.makedirs(folder / str(step + 1))
  else:
    os.makedirs(folder / str(step + 1) / "params.orbax-checkpoint-tmp" / "ocdbt.process_0")


@pytest.mark.parametrize("kind", ["not renamed yet", "empty", "begun"])
def test_half_written_steps_are_not_there(tmp_path, kind):
  """Neither for a run that goes on nor for a job that reads; the run writes over them."""
  state = random_state(3)
  save(tmp_path, state)
  half_write(tmp_path, 3, kind)
  assert find(str(tmp_path)) == (str(tmp_path / "checkpoints" / "3"), 3)
  checkpoints = Checkpoints(str(tmp_path))
  assert checkpoints.latest() == 3
  shardings = state_shardings(CONFIG, OPTIMIZER, tiny.mesh_of())
  assert_same_state(checkpoints.restore(3, ABSTRACT, shardings), state)
  following = random_state(4)
  checkpoints.save(following, palette=None, run=make_run())
  checkpoints.close()
  assert find(str(tmp_path))[1] == 4
  assert_same_state(restore(tmp_path, 4), following)


def test_a_checkpoint_is_found_by_workdir_or_step(tmp_path):
  save(tmp_path, random_state(1), random_state(2), random_state(10))
  folder = tmp_path / "checkpoints"
  assert find(str(tmp_path)) == (str(folder / "10"), 10)  # the newest, not the last by name
  assert find(str(folder)) == (str(folder / "10"), 10)
  assert find(str(folder / "2")) == (str(folder / "2"), 2)


@pytest.mark.parametrize("inside", ["", "nothing", "checkpoints", "checkpoints/7", "7"])
def test_where_there_is_no_checkpoint_the_error_names_the_place(tmp_path, inside):
  (tmp_path / "checkpoints" / "notes").mkdir(parents=True)
  with pytest.raises(
    UserError, match=r"no checkpoint in .*pretrain.*--config.checkpoint="
  ) as error:
    find(str(tmp_path / inside))
  assert str(tmp_path / inside) in str(error.value)
  assert sorted(os.listdir(tmp_path)) == ["checkpoints"]  # looking makes nothing


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_a_model_is_read_without_its_optimizer(tmp_path, shape):
  state = random_state(6)
  save(tmp_path, state, resolution=4)
  # What isn't read may as well not be there.
  (training,) = (tmp_path / "checkpoints" / "6").glob("training")
  shutil.rmtree(training / "d", ignore_errors=True)
  shutil.rmtree(training / "ocdbt.process_0", ignore_errors=True)
  mesh = tiny.mesh_of(shape)
  trained = load_pretrained(str(tmp_path), mesh, dtype="bfloat16")
  assert (trained.path, trained.step) == (str(tmp_path / "checkpoints" / "6"), 6)
  assert trained.config == dataclasses.replace(CONFIG, dtype="bfloat16")
  assert trained.run["resolution"] == 4
  np.testing.assert_array_equal(trained.palette, PALETTE)
  assert trained.palette.dtype == np.float32
  assert_same_state(trained.params, state.params)
  wanted = tiny.leaf_names(param_shardings(CONFIG, mesh))
  for name, leaf in tiny.leaf_names(trained.params).items():
    assert leaf.sharding.is_equivalent_to(wanted[name], leaf.ndim), name


def test_a_model_of_bare_tokens_has_no_palette(tmp_path):
  save(tmp_path, random_state(1), palette=None)
  assert load_pretrained(str(tmp_path), tiny.mesh_of()).palette is None


def test_another_programs_checkpoint_is_refused(tmp_path):
  from orbax.checkpoint import v1 as ocp

  path = str(tmp_path / "checkpoints" / "3")
  ocp.save_checkpointables(path, {"params": {"w": np.zeros(3, np.float32)}})
  with pytest.raises(UserError, match="not written by igpt_jax"):
    load_pretrained(path, tiny.mesh_of())


def test_a_damaged_checkpoint_is_one_line(tmp_path):
  save(tmp_path, random_state(3))
  for found in (tmp_path / "checkpoints" / "3" / "params").rglob("*"):
    if found.is_file() and os.path.basename(found.parent) == "d":
      found.write_bytes(b"")
  with pytest.raises(UserError, match=r"checkpoint: .*checkpoints/3 can't be read"):
    load_pretrained(str(tmp_path), tiny.mesh_of())


def test_a_failed_read_leaves_nothing_to_be_told_later(tmp_path, monkeypatch, caplog):
  """Orbax' other reads are over, and heard; how the process tells errors is as it was."""
  save(tmp_path, random_state(5))
  unraisable, hook = [], lambda told: unraisable.append(told)
  monkeypatch.setattr(sys, "unraisablehook", hook)
  filters = list(logging.getLogger("asyncio").filters), list(warnings.filters)
  found = checkpoint.describe(str(tmp_path))
  for piece in (tmp_path / "checkpoints" / "5" / "params").glob("**/d/*"):
    piece.write_bytes(piece.read_bytes()[:10])
  for _ in range(10):
    with pytest.raises(UserError, match="can't be read"):
      checkpoint.load_params(found, tiny.mesh_of((1, 1, 1)))
    gc.collect()
  assert not unraisable and not [r for r in caplog.records if r.name == "asyncio"]
  assert sys.unraisablehook is hook
  assert (list(logging.getLogger("asyncio").filters), list(warnings.filters)) == filters


def test_what_a_run_changes_of_the_process_is_undone_with_the_last_of_them(tmp_path, monkeypatch):
  # Other tests may have left runs open.
  mine = process_wide.ProcessWide(process_wide._ignoring_followup_errors)
  monkeypatch.setattr(writing, "ignore_followup_errors", mine)
  before = sys.unraisablehook, list(logging.getLogger("absl").filters)
  first, second = Checkpoints(str(tmp_path / "a")), Checkpoints(str(tmp_path / "b"))
  first.close()
  assert sys.unraisablehook is not before[0]
  assert len(logging.getLogger("absl").filters) == len(before[1]) + 1
  second.close()
  assert (sys.unraisablehook, logging.getLogger("absl").filters) == before


@pytest.mark.parametrize("maker", ["asyncio", "uvloop"])
def test_reads_that_go_on_are_waited_for_when_one_fails(maker):
  """In loops as orbax makes them: of asyncio, and of uvloop for one within another."""
  module, ended = pytest.importorskip(maker), []

  async def read(seconds):
    await asyncio.sleep(seconds)
    ended.append(seconds)
    raise LookupError(f"after {seconds} s")

  async def read_all():
    await asyncio.gather(read(0.1), read(0), read(0.2))

  original = module.new_event_loop
  with pytest.raises(UserError, match="after 0 s"), reading.reading("here"):
    loop = module.new_event_loop()
    try:
      loop.run_until_complete(read_all())
    finally:
      loop.close()
  assert ended == [0, 0.1, 0.2]
  assert module.new_event_loop is original


def test_the_folder_is_named_as_documented(tmp_path):
  save(tmp_path, random_state(1))
  assert checkpoint.FOLDER == "checkpoints"
  items = {path.name for path in (tmp_path / "checkpoints" / "1").iterdir() if path.is_dir()}
  assert {"params", "training", "palette"} <= items


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_a_head_lies_beside_the_model(tmp_path, shape):
  """Written on another mesh; the model alone is what it is without a head."""
  classes = ("cat", "dog", "owl")
  state = make_state(CONFIG, OPTIMIZER, 0, tiny.mesh_of((1, 2, 4)), n_classes=3)
  head = np.random.default_rng(0).standard_normal((3, CONFIG.n_embd)).astype(np.float32)
  placed = jax.device_put(head, state.params[HEAD].sharding)
  state = dataclasses.replace(state, params={**state.params, HEAD: placed})
  save(tmp_path, state, classes=list(classes))
  mesh = tiny.mesh_of(shape)
  found = load_pretrained(str(tmp_path), mesh)
  assert found.classes == classes
  np.testing.assert_array_equal(checkpoint.load_head(found, mesh), head)
  assert HEAD not in found.params
  assert found.params.keys() == state.params.keys() - {HEAD}
  checkpoints = Checkpoints(str(tmp_path))
  abstract = abstract_state(CONFIG, OPTIMIZER, 3)
  restored = checkpoints.restore(0, abstract, state_shardings(CONFIG, OPTIMIZER, mesh, 3))
  checkpoints.close()
  assert_same_state(restored, state)


def test_classes_without_a_head_are_none(tmp_path):
  """A run may speak of a head that a conversion has left behind."""
  save(tmp_path, random_state(1), classes=["cat", "dog"])
  assert checkpoint.describe(str(tmp_path)).classes == ()


def test_the_first_of_the_best_is_kept(tmp_path):
  """Beside the newest; also by those who open the folder later; what has no score isn't best."""
  scores = [0.2, 0.6, None, 0.6, 0.1, None]
  for begun in (0, 3):
    checkpoints = Checkpoints(str(tmp_path), keep=1, keep_best="accuracy")
    for step in range(begun + 1, begun + 4):
      score = scores[step - 1]
      checkpoints.save(
        random_state(step),
        palette=None,
        run=make_run(),
        scores=None if score is None else {"accuracy": score},
      )
      checkpoints.wait()
    checkpoints.close()
    assert steps_in(tmp_path) == [2, begun + 3]


@pytest.mark.parametrize("ended_by", ["a kill before", "a kill after", "a failure", None])
def test_a_step_saved_again_with_its_score_is_never_lost(tmp_path, monkeypatch, ended_by):
  """Until it has been written anew the old one is set aside, and comes back if it wasn't."""
  state = random_state(2)
  save(tmp_path, state)
  checkpoints = Checkpoints(str(tmp_path), keep=1, keep_best="accuracy")

  def fail(*_, **__):
    raise OSError("no space")

  if ended_by in ("a kill before", "a failure"):
    monkeypatch.setattr(checkpoints._checkpointer.__class__, "save_checkpointables_async", fail)
  if ended_by == "a kill after":
    monkeypatch.setattr(writing.folders, "put_back", fail)
  again = functools.partial(
    checkpoints.save, state, palette=None, run=make_run(), scores={"accuracy": 0.5}
  )
  if ended_by in ("a kill before", "a failure"):
    with pytest.raises(OSError, match="no space"):
      again()
  else:
    again()
  if ended_by == "a kill after":
    with pytest.raises(OSError, match="no space"):
      checkpoints.wait()
  monkeypatch.undo()
  if ended_by == "a failure":
    checkpoints.reopen()
    again()
  if ended_by in ("a failure", None):
    checkpoints.close()
  checkpoints.let_go()
  assert_same_state(restore(tmp_path, 2), state)
  assert os.listdir(tmp_path / "checkpoints") == ["2"]
  checkpoints = Checkpoints(str(tmp_path), keep_best="accuracy")
  assert checkpoints.scores() == {2: None if ended_by == "a kill before" else 0.5}
  checkpoints.close()
