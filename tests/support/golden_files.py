"""Where the golden files of the original code are: `../shared/golden`, or under $IGPT_SHARED.

They hold what openai/image-gpt's own code computes on random weights. A clone without them still
compares the model with `numpy_reference`.
"""

import pathlib

import numpy as np
import pytest

from support.paths import SHARED


def golden(*parts: str) -> pathlib.Path:
  """A golden file's path; skips the test where there are none."""
  path = SHARED.joinpath("golden", *parts)
  if not (SHARED / "golden").is_dir():
    pytest.skip(f"NO GOLDEN FILES at {SHARED / 'golden'}: parity with the original not checked")
  assert path.exists() or path.with_name(path.name + ".index").exists(), f"{path} is missing"
  return path


def arrays(*parts: str) -> dict[str, np.ndarray]:
  """The content of one golden .npz."""
  with np.load(golden(*parts), allow_pickle=False) as file:
    return dict(file)
