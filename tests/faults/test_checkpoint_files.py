"""Every file of a checkpoint truncated, with a bit flipped, or deleted, in turn: the one before is used,
or there is a clear error; nothing is read that isn't what was saved."""

import collections
import os
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest

from igpt_jax import checkpoint
from igpt_jax.checkpoint import Checkpoints, reading, writing
from igpt_jax.errors import UserError
from support import tiny
from support.small_checkpoints import (
  ABSTRACT,
  CLASSES,
  CONFIG,
  PALETTE,
  make_run,
  random_state,
  same,
  shardings,
  write,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

LONG = os.environ.get("IGPT_JAX_FAULTS") == "long"
OLD, NEW = 3, 7


@pytest.fixture(scope="module", autouse=True)
def no_pause():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(writing, "_PAUSE_SECONDS", 0)
    yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A workdir with two checkpoints."""
  workdir = tmp_path_factory.mktemp("whole")
  write(workdir, OLD, NEW)
  return workdir


def truncated(path: pathlib.Path, rng) -> str:
  data = path.read_bytes()
  left = rng.randrange(len(data)) if data else 0
  path.write_bytes(data[:left])
  return f"{left} of {len(data)} bytes left"


def emptied(path: pathlib.Path, rng) -> str:
  path.write_bytes(b"")
  return "empty"


def flipped(path: pathlib.Path, rng) -> str:
  data = bytearray(path.read_bytes())
  if not data:
    return "was empty"
  at = rng.randrange(8 * len(data))
  data[at // 8] ^= 1 << at % 8
  path.write_bytes(data)
  return f"bit {at} flipped"


def deleted(path: pathlib.Path, rng) -> str:
  path.unlink()
  return "deleted"


def files_of(folder):
  return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def check_resumed(workdir, what):
  """Returns the step that a run goes on from; None where it is refused."""
  said = []
  try:
    checkpoints = Checkpoints(str(workdir), keep_best="accuracy", say=said.append)
    found = checkpoints.resume(ABSTRACT, shardings())
  except UserError as error:
    assert "checkpoint: none in" in str(error) and "fix: " in str(error), what
    assert not said, what
    return None
  assert found is not None or any("it was never finished" in each for each in said), what
  if found is None:
    return -1
  assert same(found.state, random_state(found.step)), what
  assert make_run(found.step).items() <= found.run.items(), what
  if found.step == OLD:
    (line,) = said
    assert line.startswith(f"checkpoint {NEW} is set aside as "), what
    # Written again, it is there again.
    checkpoints.save(random_state(NEW), palette=PALETTE, run=make_run(NEW))
    checkpoints.close()
    assert checkpoint.whole_steps(str(workdir)) == [OLD, NEW], what
  else:
    assert not said, (what, said)
    checkpoints.close()
  return found.step


def check_read(folder, what) -> bool:
  """Whether everything was read, to what was saved; what wasn't is an error in words."""
  mesh, expected = tiny.mesh_of(), random_state(NEW)
  params = {name: leaf for name, leaf in expected.params.items() if name != "clf"}
  try:
    found = checkpoint.describe(str(folder))
    assert (
      found.config == CONFIG and found.classes == CLASSES and found.run["elapsed_seconds"] == 12.5
    ), what
    assert np.array_equal(found.palette, PALETTE), what
    head, read = checkpoint.load_head(found, mesh), checkpoint.load_params(found, mesh)
    on_host = checkpoint.load_host_params(found)
  except UserError as error:
    assert "fix: " in str(error) and "\n" not in str(error), what
    return False
  assert same(read, params) and same(on_host, params) and same(head, expected.params["clf"]), what
  return True


DAMAGES = (truncated, emptied, flipped, deleted)


def check_damaged(whole, tmp_path, name, damage, rng) -> str:
  """With one before, that is used; alone, it is refused. Nothing else is ever read."""
  workdir, alone = tmp_path / "run", tmp_path / "alone"
  shutil.copytree(whole, workdir)
  what = (str(name), damage(workdir / "checkpoints" / str(NEW) / name, rng))
  shutil.copytree(workdir, alone)
  shutil.rmtree(alone / "checkpoints" / str(OLD))
  try:
    check_read(workdir / "checkpoints" / str(NEW), what)
    step = check_resumed(workdir, what)
    assert step in (OLD, NEW), what
    if step == NEW:
      return "read"
    left = check_resumed(alone, what)
    assert left in (None, -1), what
    # Refused, it stays where it is; never finished, it is out of the way.
    kept = str(NEW) if left is None else f"{NEW}.unfinished"
    assert os.listdir(alone / "checkpoints") == [kept], what
    return "refused" if left is None else "never finished"
  finally:
    shutil.rmtree(workdir)
    shutil.rmtree(alone)


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(len(DAMAGES)) if LONG else [0])
def test_every_file_in_turn(whole, tmp_path, turn):
  """Each by one kind of damage; in the long form by all kinds, some of them ten times."""
  rng = random.Random(turn)
  outcomes = collections.Counter()
  names = files_of(whole / "checkpoints" / str(NEW))
  assert len(names) > 20
  for i, name in enumerate(names):
    damage = DAMAGES[(i + turn) % len(DAMAGES)]
    for _ in range(10 if LONG and damage in (truncated, flipped) else 1):
      outcomes[check_damaged(whole, tmp_path, name, damage, rng)] += 1
  print(f"{len(names)} files: {dict(outcomes)}")
  assert outcomes["refused"]


def test_a_checkpoint_without_checksums_is_read_in_silence(tmp_path, monkeypatch):
  """One that was written before there were any."""
  from igpt_jax.checkpoint import file_sums

  monkeypatch.setattr(file_sums, "with_sums", lambda run, found: dict(run))
  write(tmp_path, NEW)
  monkeypatch.undo()
  assert check_read(tmp_path / "checkpoints" / str(NEW), "no checksums")
  assert check_resumed(tmp_path, "no checksums") == NEW


@pytest.mark.parametrize("item", ["params", "training", "head", "palette"])
def test_other_numbers_are_noticed_though_every_file_is_right(tmp_path, monkeypatch, item):
  """As of a device or a network that computed or sent something else."""
  from igpt_jax.checkpoint import file_sums

  of_items = file_sums.of_items

  def other(items):
    changed = jax.tree.map(lambda leaf: np.array(leaf), items[item])
    leaf = jax.tree.leaves(changed)[0]
    leaf.reshape(-1).view(np.uint8)[0] ^= 1
    return of_items({**items, item: changed})

  write(tmp_path, OLD)
  monkeypatch.setattr(file_sums, "of_items", other)
  write(tmp_path, NEW)
  monkeypatch.undo()
  folder = tmp_path / "checkpoints" / str(NEW)
  assert check_read(folder, item) == (item == "training")
  assert check_resumed(tmp_path, item) == OLD


def test_the_newest_good_one_may_be_far_back(tmp_path):
  """What comes after is set aside, whatever is wrong with each."""
  write(tmp_path, 1, 2)
  folder = tmp_path / "checkpoints"
  for step in (4, 5, 6, 9):
    shutil.copytree(folder / "2", folder / str(step))
  for step in ("4", "9"):  # being deleted, being written
    (folder / step / "commit_success.txt").unlink()
  (folder / "5" / "_CHECKPOINT_METADATA").write_text("{")
  for path in (folder / "6" / "training" / "d").iterdir():
    path.write_bytes(b"")
  (folder / "2" / "params" / "_METADATA").unlink()
  said = []
  checkpoints = Checkpoints(str(tmp_path), say=said.append)
  found = checkpoints.resume(ABSTRACT, shardings())
  assert found.step == 1 and same(found.state, random_state(1))
  assert sorted(os.listdir(folder)) == ["1", "2.damaged", "5.damaged", "6.damaged", "9.unfinished"]
  assert sorted(line.split()[1] for line in said) == ["2", "5", "6", "9"]
  checkpoints.close()


@pytest.mark.parametrize("read", ["check_readable", "read_run", "restore"])
def test_what_fails_to_be_read_only_once_is_not_set_aside(whole, tmp_path, monkeypatch, read):
  shutil.copytree(whole, tmp_path / "run")
  owner = reading if read == "check_readable" else Checkpoints
  original, failures = getattr(owner, read), []

  def fails_once(*arguments):
    if not failures:
      failures.append(read)
      raise UserError("the bucket is away")
    return original(*arguments)

  monkeypatch.setattr(owner, read, fails_once)
  said = []
  checkpoints = Checkpoints(str(tmp_path / "run"), say=said.append)
  found = checkpoints.resume(ABSTRACT, shardings())
  assert failures and found.step == NEW and same(found.state, random_state(NEW))
  assert not said
  checkpoints.close()


def test_an_error_names_the_others(whole, tmp_path):
  shutil.copytree(whole, tmp_path / "run")
  folder = tmp_path / "run" / "checkpoints"
  for path in (folder / str(NEW) / "params" / "d").iterdir():
    path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(
    UserError, match=rf"checkpoints/{NEW} .*fix: another step of the run \({OLD}\)"
  ):
    checkpoint.load_pretrained(str(tmp_path / "run"), tiny.mesh_of())
