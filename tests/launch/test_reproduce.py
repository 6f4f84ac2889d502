"""launch/reproduce.sh with its real jobs, on stand-ins for the released files whose likelihood is known."""

import math
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from igpt_jax.model.image_gpt import abstract_params
from igpt_jax.model.model_config import ImageGPTConfig
from igpt_jax.pretrained import formats, released
from support.blob_store import BlobStore
from support.loopback import serving
from support.paths import ROOT

MODEL = ImageGPTConfig(n_layer=1, n_head=2, n_embd=16, n_vocab=512, n_positions=1024)
IMAGES = 3


def write_model(size: str, nats: float, folder: pathlib.Path, store: BlobStore) -> None:
  """Puts a checkpoint into the store that gives every token 0 a likelihood of `nats`."""
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_params(MODEL))
  params["wpe"] += 1  # whatever the tokens, the last norm's output is all ones
  params["ln_f"]["g"] += 1
  probability = math.exp(-nats)
  logit = math.log((MODEL.n_vocab - 1) * probability / (1 - probability))
  params["wtet"][0] = logit / MODEL.n_embd
  palette = np.zeros((MODEL.n_vocab, 3), np.float32)
  prefix = folder / size / "model.ckpt-1000000"
  prefix.parent.mkdir(parents=True)
  shards = released.MODELS[size]
  formats.save(prefix, "openai", MODEL, params, clusters=palette, num_shards=shards)
  for name in released.checkpoint_files(size):
    store.files[name] = (prefix.parent / name.rpartition("/")[2]).read_bytes()


def write_tokens(folder: pathlib.Path, store: BlobStore) -> None:
  for name in released.dataset_files("imagenet"):
    path = folder / name.rpartition("/")[2]
    np.save(path, np.zeros((IMAGES, MODEL.n_positions if "X" in path.name else 1000), np.uint8))
    store.files[name] = path.read_bytes()


@pytest.fixture
def run(tmp_path):
  """Runs the script with this interpreter standing for an environment that is installed already."""
  venv = tmp_path / "venv"
  (venv / "bin").mkdir(parents=True)
  python = venv / "bin" / "python"
  python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
  python.chmod(0o755)
  with open(ROOT / "setup.py") as setup:
    stamp = subprocess.run(["cksum"], stdin=setup, capture_output=True, check=True).stdout
  (venv / "igpt_jax.stamp").write_bytes(stamp)

  def run(*arguments: str) -> subprocess.CompletedProcess:
    options = [f"--venv={venv}", "--extra=none", f"--directory={tmp_path / 'files'}"]
    command = ["bash", str(ROOT / "launch" / "reproduce.sh"), *options]
    command += [f"--workdir={tmp_path / 'results'}", *arguments]
    environment = {**os.environ, "CONSTRAINTS": ""}  # the stamp is that of setup.py alone
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)

  return run


@pytest.mark.slow
def test_sizes_pass_or_fail_line_by_line_and_what_is_done_is_kept(run, tmp_path):
  with serving(BlobStore()) as store:
    write_tokens(tmp_path, store)
    write_model("s", 2.0895, tmp_path / "made", store)
    write_model("m", 2.0622, tmp_path / "made", store)
    first = run(f"--url={store.url}")
    lines = first.stdout.splitlines()[-3:]
    assert first.returncode == 1, first.stderr
    assert lines[0] == (
      "pass  small   measured 2.0895 nats/token of 3 images, expected 2.0895, tolerance 0.0005"
    )
    assert lines[1] == (
      "FAIL  medium  measured 2.0622 nats/token of 3 images, expected 2.0614, tolerance 0.0005"
    )
    assert lines[2] == "FAIL  large  not fetched: job download ended with status 2"
    assert "404" in first.stderr
    asked = len(store.requests)
    write_model("l", 2.0467, tmp_path / "made", store)
    second = run(f"--url={store.url}", "large", "small")
    assert second.returncode == 0, second.stderr
    assert [line[:11] for line in second.stdout.splitlines()[-2:]] == ["pass  large", "pass  small"]
    fetched = [path for path, _ in store.requests[asked:]]
    assert not [path for path in fetched if "/igpt-l/" not in path and "clusters" not in path]
    third = run("small", "medium")
    assert third.returncode == 1 and third.stdout.splitlines() == lines[:2]
    limited = run(f"--url={store.url}", "small", "--", "--config.evaluate.images=2")
    assert "of 2 images" in limited.stdout.splitlines()[-1], (
      "what was made of all isn't what is asked"
    )
    assert "of 3 images" in run(f"--url={store.url}", "small").stdout.splitlines()[-1], "nor this"


def test_a_damaged_result_is_a_failure(run, tmp_path):
  (tmp_path / "results" / "small").mkdir(parents=True)
  (tmp_path / "results" / "small" / "evaluation.json").write_text("{")
  (tmp_path / "results" / "small" / "made_with.txt").write_text(f"{tmp_path / 'files'}\n")
  done = run("small")
  assert done.returncode == 1
  assert done.stdout.startswith("FAIL  small") and "fix: remove it" in done.stdout
