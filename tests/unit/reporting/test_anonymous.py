"""What a report says to strangers names no machine, user or path, and still says what happened."""

import getpass
import os
import socket

import pytest

from igpt_jax.reporting.anonymous import scrubbed


@pytest.fixture(autouse=True)
def somebody(monkeypatch):
  monkeypatch.setattr(socket, "gethostname", lambda: "boreas.example.org")
  monkeypatch.setattr(getpass, "getuser", lambda: "wilhelmina")
  monkeypatch.setenv("HOME", "/home/wilhelmina b")
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "t1v-n-7f-w-0,t1v-n-7f-w-1")


@pytest.mark.parametrize(
  ("text", "left"),
  [
    ("can't read /home/wilhelmina b/x y.txt: gone", "can't read <path> y.txt: gone"),
    ("Mosaic failed at /src/igpt_jax/tpu.py:33:5", "Mosaic failed at <path>:33:5"),
    ("in '/venv/lib/python3.11/site-packages/jax/_src/core.py'", "in 'jax/_src/core.py'"),
    ("--xla_dump_to=/scratch/w/d --xla_a=1", "--xla_dump_to=<path> --xla_a=1"),
    ("see gs://bucket/run and ~/run", "see <address> and <path>"),
    ("host boreas or Boreas.example.org is gone", "host <name> or <name> is gone"),
    ("wilhelmina@example.org of wilhelmina", "<address> of <name>"),
    ("t1v-n-7f-w-1 at 10.128.0.4:8471, fe80::1:2", "<name> at <address>, <address>"),
    ("worker-3.c.project.internal:8471", "<address>"),
  ],
)
def test_what_tells_whose_it_is_goes(text, left):
  assert scrubbed(text) == left


@pytest.mark.parametrize(
  "text",
  [
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.98G of 15.75G hbm.",
    "3 images/s, N/A, and/or; 12:33:44; data 2 × fsdp 4",
    "jit(train_step)/jvp()/btd,sde->sbte/dot_general has no rule for bf16[2,128]",
    "cuDNN 9.1.0.70 error: std::bad_alloc",
  ],
)
def test_the_rest_stays(text):
  expected = text.replace("9.1.0.70", "<address>")  # four numbers: who knows
  assert scrubbed(text) == expected


def test_a_user_called_root_is_everybody(monkeypatch):
  monkeypatch.setattr(getpass, "getuser", lambda: "root")
  monkeypatch.setenv("HOME", "/root")
  assert scrubbed("the root of 4") == "the root of 4"


def test_a_user_without_a_name(monkeypatch):
  def nobody():
    raise KeyError("getpwuid(): uid not found: 1000")

  monkeypatch.setattr(getpass, "getuser", nobody)
  assert scrubbed(f"in {os.getcwd()} on boreas") == "in <path> on <name>"
