"""What the tests of jobs share: one tiny pretraining, and the single device that most people have."""

import jax
import pytest

from igpt_jax.jobs import pretrain
from support.quickstart import shrunk
from support.tiny import on_one_device


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
  """The shrunk quickstart's workdir, trained once: checkpoints 4, 8 and 12. To be copied, not written to."""
  workdir = tmp_path_factory.mktemp("tiny") / "run"
  compiled_slowly = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  on_one_device(pretrain, shrunk(), str(workdir))
  jax.config.update("jax_disable_most_optimizations", compiled_slowly)
  return workdir


@pytest.fixture(scope="module")
def one_device():
  """One device of the eight, unless a test asks for more."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "devices", lambda *args: jax.local_devices()[:1])
    yield
