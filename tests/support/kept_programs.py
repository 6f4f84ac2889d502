"""Compiled programs, kept between runs of the tests: most of their time would go into compiling them.

jax' cache isn't made for several writers at once: each process that runs tests has a folder, into which
what the others compiled before is linked when it starts. A jax of another version has other folders, and
so does another kind of CPU; together they are bounded as a user's own cache is.
"""

import contextlib
import glob
import os

import jax

from igpt_jax import files
from igpt_jax.parallel import compilation_cache


def use() -> None:
  """Has this process, and those that it starts, keep what they compile; by jax' variables, too."""
  # Set once: processes that run tests begin in one whose user's cache is another folder already.
  root = os.environ.setdefault(
    "IGPT_JAX_TESTS_PROGRAMS", files.user_cache(f"tests-jax-{jax.__version__}")
  )
  worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
  compilation_cache.use(os.path.join(root, worker), workdir="")
  folder = jax.config.jax_compilation_cache_dir
  if folder is None:  # a home that can't be written: it has been said
    return
  machine = os.path.basename(folder)
  for program in glob.iglob(os.path.join(glob.escape(root), "*", machine, "*-cache")):
    with contextlib.suppress(OSError):  # it is there, or gone, or the file system has no links
      os.link(program, os.path.join(folder, os.path.basename(program)))
  settings = {
    "jax_compilation_cache_dir": folder,
    "jax_persistent_cache_min_compile_time_secs": 0.1,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  for name, value in settings.items():
    os.environ[name.upper()] = str(value)
    jax.config.update(name, value)
