"""Programs that a start reads instead of compiling: the same numbers, and no harm if that fails."""

import logging
import os
import platform
import shutil
import warnings

import jax
import jax.numpy as jnp
import pytest

from igpt_jax import files
from igpt_jax.parallel import compilation_cache
from igpt_jax.training import compilation
from support.compiled import kept_in, own_cache, start


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
  """A process as a person has it: the tests' own cache comes back at the end."""
  yield from own_cache(monkeypatch)


def compiled() -> bool:
  """Compiles a program; True if it was read."""
  program = jax.jit(lambda x: jnp.cumsum(x).max() + 0.5)
  step = compilation.timed(lambda: program.lower(jnp.ones(3)).compile())
  assert float(step.executable(jnp.ones(3))) == 3.5
  assert step.took.endswith(" s (read from the cache)" if step.from_cache else " s")
  return step.from_cache


def test_it_is_known_whether_a_program_was_read(tmp_path):
  assert not compilation_cache.Tally().all_read
  start(tmp_path)
  assert not compiled()
  start(tmp_path)
  assert compiled()
  start("off")
  assert not compiled()


def test_where_programs_are_kept(tmp_path, monkeypatch):
  """A folder for each kind of CPU: what one has compiled may use instructions that another lacks."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
  for setting, root in (
    ("user", tmp_path / "home" / "igpt_jax" / "compiled"),
    ("workdir", tmp_path / "run" / "compiled"),
    (str(tmp_path / "mine"), tmp_path / "mine"),
  ):
    start(setting, tmp_path / "run")
    compiled()
    (machine,) = root.iterdir()
    assert machine.name.startswith(platform.machine()) and kept_in(machine)
    assert machine.stat().st_mode & 0o077 == 0
  monkeypatch.setattr(platform, "processor", lambda: "another")
  start(tmp_path / "mine")
  assert len(list((tmp_path / "mine").iterdir())) == 2
  assert not compiled()


def test_a_users_own_cache_is_used(tmp_path, monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "theirs"))
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
  start("user")
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")
  start("off")
  assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("damage", ["half", "empty", "noise"])
def test_a_damaged_program_is_compiled_again_and_replaced(tmp_path, caplog, damage):
  start(tmp_path)
  compiled()
  for path in tmp_path.rglob("*-cache"):
    whole = path.read_bytes()
    half = len(whole) // 2
    noise = whole[:half] + bytes(byte ^ 255 for byte in whole[half:])
    path.write_bytes({"half": whole[:half], "empty": b"", "noise": noise}[damage])
  with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
    warnings.simplefilter("always")
    start(tmp_path)
    assert not compiled()
  (message,) = [each for each in caplog.messages if "compilation_cache" in each]
  assert "reading" in message and "compiled without it" in message
  start(tmp_path)
  assert compiled()


def test_a_disk_that_takes_no_more_is_told_once(tmp_path, caplog):
  with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
    warnings.simplefilter("always")
    start(tmp_path)
    compiled()
    (folder,) = tmp_path.iterdir()
    shutil.rmtree(folder)
    folder.write_text("")
    for n in (5, 6):
      assert float(jax.jit(lambda x: x.sum() * 2)(jnp.ones(n))) == 2 * n
  (message,) = [each for each in caplog.messages if "compilation_cache" in each]
  assert "writing" in message and "Not a directory" in message


def test_a_place_that_is_no_folder_is_told(tmp_path, caplog):
  (tmp_path / "file").write_text("")
  start(tmp_path / "file")
  assert "config.compilation_cache: " in caplog.text and "Not a directory" in caplog.text
  assert not compiled()


def test_programs_that_were_read_longest_ago_make_room(tmp_path, monkeypatch):
  monkeypatch.setattr(compilation_cache, "_MOST_BYTES", 250)
  for age, name in enumerate("abcd"):
    path = tmp_path / f"machine{age % 2}" / f"jit_{name}-1-cache"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(100))
    os.utime(path, (2_000_000_000 - age, 1_000_000_000))
  (tmp_path / "machine0" / "letter.txt").write_bytes(bytes(1_000))
  start(tmp_path)
  assert kept_in(tmp_path) == ["machine0/jit_a-1-cache", "machine1/jit_b-1-cache"]
  assert (tmp_path / "machine0" / "letter.txt").exists()


def test_the_users_cache_is_where_the_system_keeps_such_things(monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", "relative")
  assert files.user_cache("x") == os.path.expanduser("~/.cache/igpt_jax/x")
