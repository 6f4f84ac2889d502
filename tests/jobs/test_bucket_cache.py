"""Compiled programs that are kept in a bucket."""

import logging
import warnings

import jax
import pytest

from igpt_jax.errors import BucketError
from igpt_jax.jobs import pretrain
from igpt_jax.parallel import compilation_cache
from support.compiled import own_cache, start
from support.quickstart import shrunk
from support.tiny import on_one_device

pytestmark = pytest.mark.usefixtures("buckets", "quick_compile")
SETTINGS = {"train.steps": 4, "train.checkpoint_every": 4, "train.eval_every": 4}


@pytest.fixture(autouse=True)
def as_before(monkeypatch, buckets):
  """A process as a person has it: the tests' own cache comes back at the end."""
  xla_caches = jax.config.jax_persistent_cache_enable_xla_caches
  yield from own_cache(monkeypatch)
  jax.config.update("jax_persistent_cache_enable_xla_caches", xla_caches)


def test_a_restart_from_a_bucket_compiles_nothing(tmp_path):
  counted = []
  for name in ("cold", "warm"):
    start("gs://bucket/run/compiled")
    programs = compilation_cache.Tally()
    on_one_device(pretrain, shrunk(**SETTINGS), str(tmp_path / name))
    counted.append(programs.programs())
  assert counted[0]["compiled"] > 5
  assert counted[1]["compiled"] == 0 and counted[1]["read"] >= counted[0]["compiled"]
  assert 0 < counted[1]["read_seconds"]


def test_a_bucket_that_fails_later_only_costs_time(tmp_path, buckets, caplog):
  """It is told once; what is there stays, since no object is half of one."""
  start("gs://bucket/compiled")
  square = jax.jit(lambda x: x @ x)
  square(jax.numpy.ones((8, 8)))
  kept = buckets.count()
  with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
    warnings.simplefilter("always")
    jax.clear_caches()
    start("gs://bucket/compiled")
    buckets.fail("*", "*compiled*-cache", "403", times=50)
    assert float(square(jax.numpy.ones((8, 8)))[0, 0]) == 8
  told = [message for message in caplog.messages if "compilation_cache" in message]
  assert kept and len(told) in (1, 2), told  # of reading, and of writing
  assert all("compiled without it" in message for message in told)


def test_a_users_own_cache_may_be_in_a_bucket(monkeypatch, buckets):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/theirs")
  start("user")
  assert jax.jit(lambda x: x @ x + 3)(jax.numpy.ones((8, 8)))[0, 0] == 11
  assert any(name.endswith("-cache") for name in buckets.names("bucket", "theirs/"))
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://missing/theirs")
  with pytest.raises(BucketError, match=r"JAX_COMPILATION_CACHE_DIR: .*there is no bucket missing"):
    start("user")


def test_a_bucket_that_is_not_there_is_a_mistake(tmp_path):
  with pytest.raises(BucketError, match=r"config\.compilation_cache: .*there is no bucket missing"):
    compilation_cache.use("gs://missing/compiled", str(tmp_path))
