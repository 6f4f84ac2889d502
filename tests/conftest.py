"""Tests run on the CPU unless JAX_PLATFORMS says otherwise, with eight virtual devices of it.

Set before any test imports jax's backend. Not by XLA_FLAGS: programs that tests start would inherit
those.
"""

import os
import signal

# Started in the background, this process ignores Ctrl-C, and so would every program a test starts
# to interrupt it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)
# The same under nohup: a shell can't trap what it was started to ignore.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
  signal.signal(signal.SIGHUP, signal.SIG_DFL)

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module")
def quick_compile():
  """Compiles in half the time, to programs that are slower: for tests of tiny models."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)
