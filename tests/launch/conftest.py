"""The world that each launch script is run in."""

import os
import shutil
import signal

import pytest

from support.launch_world import (
  FAKE_GCLOUD,
  FAKE_PYTHON,
  FAKE_TOOL,
  LAUNCH,
  World,
  write_executable,
)


@pytest.fixture
def world(tmp_path):
  repo = tmp_path / "a repo"
  shutil.copytree(LAUNCH, repo / "launch")
  (repo / "setup.py").write_text("# stands for setup.py\n")
  (repo / "constraints").mkdir()
  (repo / "constraints" / "py313.txt").write_text("# stands for the releases that were tested\n")
  fake, bin_dir, home = tmp_path / "fake", tmp_path / "bin", tmp_path / "home"
  for directory in (fake, bin_dir, home):
    directory.mkdir()
  write_executable(bin_dir / "gcloud", FAKE_GCLOUD)
  for name in ("python", "python3", "python3.13"):
    write_executable(bin_dir / name, FAKE_PYTHON)
  for name in ("xpk", "kubectl", "srun", "scontrol", "mountpoint", "sudo", "gcsfuse"):
    write_executable(bin_dir / name, FAKE_TOOL)
  (fake / "mountpoint.status").write_text("1")
  (fake / "states").write_text("WAITING_FOR_RESOURCES\nACTIVE\n")
  (fake / "train.sh").write_text('echo "host $host trains"\n')
  env = {
    "PATH": f"{bin_dir}:/usr/bin:/bin",
    "HOME": str(home),
    "TMPDIR": str(tmp_path),
    "FAKE": str(fake),
    "LAUNCH_TICK": "0.002",
    "LC_ALL": "C.UTF-8",
  }
  world = World(repo, fake, env)
  yield world
  for process in world.started:
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
      process.wait()
  for pid in [*fake.glob("hosts/*/igpt_jax_run/pid"), *home.glob("igpt_jax_run/pid")]:
    try:
      os.killpg(int(pid.read_text()), signal.SIGKILL)
    except (ProcessLookupError, ValueError):
      pass
