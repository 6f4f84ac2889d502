"""launch/photos.sh and local.sh, run against the stand-in for Python of test_launch."""

import os
import signal

import pytest

from support.launch_world import PATIENCE

# What a job leaves, by its flags.
TRAIN = """
for arg; do case $arg in --workdir=*) workdir=${arg#*=} ;; --config.job=*) job=${arg##*=} ;; esac; done
mkdir -p "$workdir"
if [ -z "${job:-}" ]; then touch "$workdir/training.json"; fi
echo "- summary" >"$workdir/summary.md"
"""


@pytest.fixture
def photos(world):
  folder = world.fake.parent / "my photos"
  folder.mkdir()
  return folder


def jobs(world):
  """The flags of every start of the program, without its name."""
  return [call[2:] for call in world.calls("main.home")]


def test_photos_are_trained_on_and_completed(world, photos):
  world.write("train.sh", TRAIN)
  result = world.run("photos.sh", str(photos), "--config.sizing.minutes=3")
  assert result.returncode == 0, result.stderr
  own = "--workdir=runs/my photos"
  assert jobs(world) == [
    [
      "--config=configs/photos.py",
      f"--config.data.path={photos}",
      own,
      "--config.sizing.minutes=3",
    ],
    *(
      [
        "--config=runs/my photos/config.json",
        own,
        "--config.sizing.minutes=3",
        f"--config.job={job}",
      ]
      for job in ("evaluate", "sample")
    ),
  ]
  assert "- summary" in result.stdout and "Look at runs/my photos/completions.png" in result.stdout


def test_a_folder_named_from_where_one_is(world, photos):
  world.write("train.sh", TRAIN)
  result = world.run("photos.sh", "../my photos/", WORKDIR="elsewhere")
  assert result.returncode == 0, result.stderr
  assert jobs(world)[0][1:] == [f"--config.data.path={photos}", "--workdir=elsewhere"]


@pytest.mark.parametrize(
  ("args", "named"),
  [
    ([], "no folder: expected a folder of photos"),
    (["missing"], "missing: no such folder"),
    (["--config.sizing.minutes=3"], "--config.sizing.minutes=3: expected a folder of photos first"),
  ],
)
def test_a_missing_folder_is_one_line(world, args, named):
  result = world.run("photos.sh", *args)
  assert result.returncode == 2 and named in result.stderr
  assert len(result.stderr.splitlines()) == 1 and not jobs(world)


@pytest.mark.parametrize("config", ["small", "configs/small.py"])
def test_a_config_is_named_or_found_by_its_path(world, config):
  (world.repo / "configs").mkdir()
  (world.repo / "configs" / "small.py").touch()
  world.write("train.sh", TRAIN)
  result = world.run("local.sh", config)
  assert result.returncode == 0, result.stderr
  assert jobs(world)[0][:2] == ["--config=configs/small.py", "--workdir=runs/small"]
  result = world.run("local.sh", "smal")
  assert (
    result.returncode == 2 and "smal: no such config; expected a path, or the name" in result.stderr
  )


@pytest.mark.parametrize("script", ["photos.sh", "local.sh", "first_contact.sh"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_job_and_the_script(world, photos, script, number):
  """SIGTERM comes to the script alone, Ctrl-C to all of its processes."""
  (world.repo / "configs").mkdir()
  (world.repo / "configs" / "quickstart.py").touch()
  world.write_run_of_two_signals()
  arguments = {"photos.sh": [str(photos)], "first_contact.sh": ["--extra=none"]}
  process = world.start(script, *arguments.get(script, ()))
  world.wait_for("training.home")
  if number == signal.SIGINT:
    os.killpg(process.pid, number)
  else:
    process.send_signal(number)
  assert process.wait(PATIENCE) == 143
  assert "stopped; the same command goes on from here" in process.stdout.read()
  assert (world.fake / "saved.home").read_text() == "saved\n"
  assert len(jobs(world)) == 1


def test_a_run_that_was_stopped_by_itself_is_not_evaluated(world, photos):
  """SIGTERM to the run alone: it saves and exits 0, without the result of a finished one."""
  world.write("train.sh", "exit 0")
  result = world.run("photos.sh", str(photos))
  assert result.returncode == 143 and "the same command goes on" in result.stderr
  assert len(jobs(world)) == 1


@pytest.mark.parametrize("status", [1, 2, 134])
def test_a_failure_ends_the_script_with_its_status(world, photos, status):
  world.write("train.sh", f"exit {status}")
  assert world.run("photos.sh", str(photos)).returncode == status
  assert len(jobs(world)) == 1


@pytest.mark.parametrize(
  ("seen", "given", "installed"),
  [
    ("", "", ""),
    ("nvidia-smi", "", "[cuda]"),
    ("nvidia-smi", "none", ""),
    ("", "tpu", "[tpu]"),
  ],
)
def test_it_installs_what_the_accelerator_needs(world, photos, seen, given, installed):
  world.write("train.sh", TRAIN)
  if seen:
    tool = world.fake.parent / "bin" / seen
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
  result = world.run("photos.sh", str(photos), EXTRA=given)
  assert result.returncode == 0, result.stderr
  asked = [call[-1] for call in world.calls("pip") if "--editable" in call]
  assert asked == [f"{world.repo}{installed}"]


def test_an_unknown_extra_is_refused(world, photos):
  result = world.run("photos.sh", str(photos), EXTRA="rocm")
  assert result.returncode == 2 and "rocm (or EXTRA); expected cuda, tpu or none" in result.stderr
