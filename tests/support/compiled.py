"""A compilation cache of a test's own."""

import os

import jax

from igpt_jax.parallel import compilation_cache

SETTINGS = (
  "jax_compilation_cache_dir",
  "jax_persistent_cache_min_compile_time_secs",
)


def kept_in(folder) -> list[str]:
  return sorted(os.path.relpath(path, folder) for path in folder.rglob("*-cache"))


def start(setting, workdir="") -> None:
  """Forgets what this process has compiled, as a new one knows nothing."""
  jax.clear_caches()
  compilation_cache.use(str(setting), str(workdir))


def own_cache(monkeypatch):
  """A process as a person has it: the tests' own cache comes back at the end."""
  kept = {name: getattr(jax.config, name) for name in SETTINGS}
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  monkeypatch.setattr(compilation_cache, "_LEAST_SECONDS", 0.0)
  yield
  compilation_cache.use("off", "")
  for name, value in kept.items():
    jax.config.update(name, value)
  jax.clear_caches()
