"""Versions of the packages that a measurement depends on."""

import contextlib
import importlib.metadata
import platform

from igpt_jax import __version__


def versions() -> dict[str, str]:
  """Versions of the packages that a measurement depends on."""
  installed = {"igpt_jax": __version__, "python": platform.python_version()}
  for package in ("jax", "jaxlib", "libtpu", "flax", "optax"):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      installed[package] = importlib.metadata.version(package)
  return installed
