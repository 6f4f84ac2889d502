"""Versions of the packages that a measurement depends on."""

import contextlib
import hashlib
import importlib.metadata
import pathlib
import platform

from igpt_jax import __version__

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def source_digest() -> str:
  """Returns 16 hexadecimal digits of this program's own source, which its version's number doesn't tell."""
  digest = hashlib.sha256()
  for path in sorted(_PACKAGE.rglob("*.py")):
    contents = hashlib.sha256(path.read_bytes()).hexdigest()
    digest.update(f"{path.relative_to(_PACKAGE).as_posix()} {contents}\n".encode())
  return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
  """Versions of the packages that a measurement depends on."""
  installed = {"igpt_jax": __version__, "python": platform.python_version()}
  for package in ("jax", "jaxlib", "libtpu", "flax", "optax"):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      installed[package] = importlib.metadata.version(package)
  return installed
