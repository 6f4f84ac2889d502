"""Types: pyright's basic rules find nothing in igpt_jax. Its settings are in pyproject.toml."""

import importlib.util
import json
import subprocess
import sys

import pytest

from support.paths import ROOT


@pytest.mark.skipif(
  importlib.util.find_spec("pyright") is None,
  reason="TYPES ARE NOT CHECKED: pyright isn't installed; fix: pip install -e '.[test]'",
)
def test_pyright_finds_nothing(tmp_path):
  """Nothing in the package, and what is wrong in a file beside it: it has looked."""
  broken = tmp_path / "broken.py"
  broken.write_text("def f(x: int) -> str:\n  return x\n")
  options = ["--pythonpath", sys.executable, "--outputjson"]
  command = [sys.executable, "-m", "pyright", *options, "igpt_jax", str(broken)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  report = json.loads(done.stdout)
  assert report["summary"]["filesAnalyzed"] > len(list((ROOT / "igpt_jax").rglob("*.py")))
  errors = [found for found in report["generalDiagnostics"] if found["severity"] == "error"]
  wrong = [found for found in errors if found["file"] != str(broken)]
  assert not wrong, "\n".join(
    f"{found['file']}:{found['range']['start']['line'] + 1}: {found['message']}" for found in wrong
  )
  assert [found["rule"] for found in errors] == ["reportReturnType"]
