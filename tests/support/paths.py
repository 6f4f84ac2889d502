"""Where the tests find the project's files, and those that stand beside a clone of it."""

import os
import pathlib

TESTS = pathlib.Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
# Real images and golden files of the original; tests that need them are skipped without them.
SHARED = pathlib.Path(os.environ.get("IGPT_SHARED", ROOT.parent / "shared"))
