"""Tests run on the CPU unless JAX_PLATFORMS says otherwise, with eight virtual devices of it.

Set before any test opens jax's backend. Not by XLA_FLAGS: programs that tests start would inherit
those.
"""

import atexit
import gc
import os
import shutil
import signal
import tempfile

from support import bucket_server, kept_programs, photos

# Started in the background, this process ignores Ctrl-C, and so would every program a test starts
# to interrupt it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)
# The same under nohup: a shell can't trap what it was started to ignore.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
  signal.signal(signal.SIGHUP, signal.SIG_DFL)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, which would wait for each other
  os.environ.setdefault("OMP_NUM_THREADS", "1")
  os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest

from igpt_jax import cpu_compiler  # before any device is asked for: it sets the compiler's flags

jax.config.update("jax_num_cpu_devices", 8)
cpu_compiler.keep_collectives_in_order()
kept_programs.use()

# What data is known by, and TFDS' data sets, are kept here, not in the home of who runs the tests.
_own = tempfile.mkdtemp(prefix="igpt_jax_tests_")
atexit.register(shutil.rmtree, _own, ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = os.path.join(_own, "cache")
os.environ["TFDS_DATA_DIR"] = os.path.join(_own, "tfds")


@pytest.fixture(scope="module", autouse=True)
def small_heap():
  """Nothing of one file's programs is kept for the next, or looked at when garbage is collected.

  The end of every stream of data collects it all (grain's threads end so), which would take the
  longer the more tests have been run.
  """
  yield
  jax.clear_caches()
  gc.collect()
  gc.freeze()


@pytest.fixture(scope="module")
def quick_compile():
  """Compiles in half the time, to programs that are slower: for tests of tiny models."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def old_files(tmp_path_factory, monkeypatch):
  """An empty cache of the user's, to which all files were written long ago."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
  monkeypatch.setattr("igpt_jax.data.digests._TICK_NS", -(10**12))


@pytest.fixture
def album(tmp_path):
  """A folder of photos in which much is wrong."""
  return photos.make_album(tmp_path)


@pytest.fixture(scope="session")
def _buckets():
  """The tests' buckets: one server, since clients keep the address that they were first given."""
  with bucket_server.serving() as server:
    yield server


@pytest.fixture
def buckets(_buckets, monkeypatch):
  """A server of buckets with an empty one, gs://bucket, which this process and its children talk to."""
  for name, value in bucket_server.point_clients(_buckets).items():
    monkeypatch.setenv(name, value)
  pytest.importorskip("gcsfs", reason="gs:// is NOT tested; fix: pip install -e '.[gcs]'")
  bucket_server.forget()
  _buckets.reset("bucket")
  yield _buckets
  _buckets.reset()
