"""Installs the checkout that it lies in into this Python, for the accelerator that is here.

  python launch/colab.py

For colab.ipynb. A jax that is installed and within setup.py's range stays as it is; libtpu, or the
plugin of CUDA, is the one that belongs to it. Prints what is installed then, and what has changed.
"""

import glob
import importlib
import importlib.metadata
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
_SHOWN = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "numpy", "flax")
_DEVICES = "import jax; d = jax.devices(); print(len(d), d[0].platform, d[0].device_kind)"


def main() -> int:
  """Installs, and returns the exit status."""
  before, extra = _versions(), _extra(_versions())
  target = f"{ROOT}[{extra}]" if extra else str(ROOT)
  pip = [sys.executable, "-m", "pip", "install", "--quiet", "--editable", target]
  status = subprocess.run(pip).returncode
  if status:
    print(f"pip could not install {target}; fix: what pip says above, and run this again")
    return status
  after = _versions()
  shown = [_change(name, before.get(name), after[name]) for name in after]
  print(f"Python {sys.version.split()[0]}, {', '.join(shown)}")
  # In another process: an accelerator belongs to one at a time.
  asked = subprocess.run([sys.executable, "-c", _DEVICES], capture_output=True, text=True)
  if asked.returncode:
    print(f"jax finds no device:\n{asked.stderr[-1000:]}")
    return asked.returncode
  print(f"devices: {asked.stdout.strip()}")
  if extra and asked.stdout.split()[1] == "cpu":
    print(
      f"the accelerator isn't used, though {extra} is installed: restart the session, run this again"
    )
  return 0


def _extra(installed: dict[str, str]) -> str:
  """Returns the extra of setup.py for the accelerator that is here; "" without one."""
  if shutil.which("nvidia-smi") and not subprocess.run(["nvidia-smi", "-L"]).returncode:
    return "cuda13" if "jax-cuda13-plugin" in installed else "cuda"
  return "tpu" if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*") else ""


def _versions() -> dict[str, str]:
  importlib.invalidate_caches()
  found = {}
  for name in _SHOWN:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def _change(name: str, before: str | None, after: str) -> str:
  if before == after:
    return f"{name} {after} (was there)"
  return f"{name} {after} ({f'was {before}' if before else 'new'})"


if __name__ == "__main__":
  sys.exit(main())
