"""What launchers check before they ask for anything, by the program itself, and what they hand on.

The interpreter here is the real one; gcloud, xpk, kubectl and srun are stand-ins whose calls are counted.
"""

import contextlib
import itertools
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

from support.launch_world import TRAIN_FOREVER, readme_commands, write_executable
from support.paths import ROOT

CONFIG = "--config=configs/imagenet32_s.py"
MAIN = ["--", CONFIG, "--workdir=gs://bucket/run"]
TPU = ["--name=run-1", "--zone=zone-a"]
GKE = ["--name=run-1", "--image=reg/i:1"]
XPK = ["--name=run-1", "--cluster=c", "--image=reg/i:1"]

# Script, its options, and the option that names the slice, for slices of 16 chips.
LAUNCHERS = {
  "tpu_vm.sh": (TPU, ["--type=v5litepod-16"]),
  "tpu_babysit.sh": (TPU, ["--type=v5litepod-16"]),
  "gke.sh": (GKE, ["--accelerator=tpu-v5-lite-podslice", "--topology=4x4"]),
  "xpk.sh": (XPK, ["--type=v5litepod-16"]),
}


@pytest.fixture
def real(world):
  """The world with the program and its configs in the repository, and a Python that runs them."""
  for name in ("igpt_jax", "configs"):
    (world.repo / name).symlink_to(ROOT / name)
  world.env |= {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
  return world


def requests(world):
  return sorted(path.name for path in world.fake.glob("*.log"))


TYPOS = {
  "no such config": ([], ["--config=configs/imagenet32_z.py"], "fix: imagenet32_s"),
  "no such setting": (
    [],
    ["--config.train.batch_sise=64"],
    "did you mean config.train.batch_size?",
  ),
  "out of bounds": ([], ["--config.train.b1=1.5"], "config.train.b1: 1.5; expected"),
  "not its type": ([], ["--config.train.steps=many"], "train.steps"),
  "batch": ([], ["--config.train.batch_size=100"], "nearest: 96 or 112"),
  "batch over slices": (["--slices=2"], ["--config.train.batch_size=16"], "batch_size: 16"),
}


def slow_but(quick, *axes):
  """Returns all combinations of the axes' values; those that aren't `quick` are left to the slow tests."""
  return [
    pytest.param(*values, marks=() if values in quick else pytest.mark.slow)
    for values in itertools.product(*axes)
  ]


# One of each typo, and of each launcher.
QUICK = {
  ("tpu_vm.sh", "no such config"),
  ("tpu_babysit.sh", "no such setting"),
  ("gke.sh", "out of bounds"),
  ("xpk.sh", "not its type"),
  ("tpu_vm.sh", "batch"),
  ("gke.sh", "batch over slices"),
}


@pytest.mark.parametrize("script, typo", slow_but(QUICK, LAUNCHERS, TYPOS))
def test_a_typo_ends_a_dry_run_before_anything_is_asked_for(real, script, typo):
  options, args, named = TYPOS[typo]
  place, where = LAUNCHERS[script]
  result = real.run(script, *place, *where, *options, "--dry-run", *MAIN, *args)
  assert result.returncode == 2, result.stdout
  assert named in result.stderr and "Traceback" not in result.stderr
  assert not requests(real)


@pytest.mark.parametrize(
  "script, where, named",
  [
    ("tpu_vm.sh", ["--type=v5litepod-17"], "v5litepod-8, v5litepod-16, v5litepod-32"),
    ("tpu_babysit.sh", ["--type=v5p-7"], "v5p-8, v5p-16"),
    ("xpk.sh", ["--type=v5p-7"], "v5p-8, v5p-16"),
    ("gke.sh", ["--accelerator=tpu-v5p-slice", "--topology=4x4x5"], "v5p:4x4x4, v5p:4x4x8"),
    ("gke.sh", ["--accelerator=tpu-v5-slice", "--topology=4x4"], "no such TPU"),
  ],
)
@pytest.mark.parametrize("dry", [pytest.param(["--dry-run"], marks=pytest.mark.slow), []])
def test_a_slice_that_there_is_not_is_refused_with_the_nearest(real, script, where, named, dry):
  result = real.run(script, *LAUNCHERS[script][0], *where, *dry, *MAIN)
  assert result.returncode == 2, result.stdout
  assert named in result.stderr
  assert not requests(real)


@pytest.mark.parametrize(
  "script, typo",
  slow_but(
    {("slurm.sbatch", "no such setting"), ("prepare_data.sh", "no such config")},
    ["slurm.sbatch", "prepare_data.sh"],
    ["no such config", "no such setting", "out of bounds", "not its type"],
  ),
)
def test_a_typo_ends_the_other_launchers_dry_run_too(real, script, typo):
  _, args, named = TYPOS[typo]
  main = MAIN[1:] if script == "slurm.sbatch" else MAIN
  result = real.run(script, "--dry-run", *main, *args)
  assert result.returncode == 2 and named in result.stderr
  assert not requests(real)


@pytest.mark.parametrize("script", slow_but({("tpu_vm.sh",), ("gke.sh",)}, LAUNCHERS))
def test_a_dry_run_tells_chips_hours_and_where_prices_are(real, script):
  place, where = LAUNCHERS[script]
  result = real.run(script, *place, *where, "--dry-run", *MAIN)
  assert result.returncode == 0, result.stderr
  assert "v5litepod-16 (v5e:4x4): 16 chips, 4 hosts" in result.stderr
  assert "13.7 hours, 219 chip-hours" in result.stderr
  assert "https://cloud.google.com/tpu/pricing" in result.stderr
  assert not requests(real)


def test_the_readmes_commands_pass_the_check(real):
  """Runs them as they stand, but for the names in capitals."""
  for script, *words in readme_commands():
    if script in (*LAUNCHERS, "prepare_data.sh", "slurm.sbatch"):
      words = [word.replace("BUCKET", "bucket") for word in words]
      result = real.run(script, "--dry-run", *words)
      assert result.returncode == 0, f"{script} {words}: {result.stderr}"


def test_what_evaluates_beside_the_training_is_checked_with_it(real):
  watch = ["--watch=probe", "--watch-on=v5litepod-9", "--dry-run"]
  result = real.run("tpu_vm.sh", *TPU, "--type=v5litepod-16", *watch, *MAIN)
  assert result.returncode == 2 and "'v5litepod-9'" in result.stderr
  watch[1] = "--watch-on=v5litepod-4"
  args = [*MAIN, "--config.features.batch_size=6"]
  result = real.run("tpu_vm.sh", *TPU, "--type=v5litepod-16", *watch, *args)
  assert result.returncode == 2 and "features.batch_size: 6" in result.stderr


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_evaluation_here_needs_a_python_that_can_run_it(world, tmp_path, options):
  """Once the slice is paid for it would be too late to learn that jax isn't installed."""
  write_executable(
    tmp_path / "bare",
    '#!/usr/bin/env bash\ncase "$2" in *jobs.probe*gcsfs*) echo "No module named \'jax\'" >&2; exit 1 ;; esac\n'
    'exec python "$@"\n',
  )
  watch = ["--watch=probe", "--watch-on=here", *options]
  args = [*TPU, "--type=v5litepod-16", *watch, *MAIN]
  result = world.run("tpu_vm.sh", *args, PYTHON=str(tmp_path / "bare"))
  assert result.returncode == 2 and not requests(world)
  assert "can't run job probe: No module named 'jax'" in result.stderr
  assert "-m pip install --editable" in result.stderr and "repo[gcs]" in result.stderr


def test_without_a_python_it_says_what_to_install_or_is_told_not_to_check(world, tmp_path):
  bare = tmp_path / "bare"
  bare.mkdir()
  for name in ("awk", "bash", "cat", "date", "dirname", "mktemp", "rm", "sed"):
    (bare / name).symlink_to(shutil.which(name))
  for name in ("xpk", "kubectl"):
    (bare / name).symlink_to(tmp_path / "bin" / name)
  write_executable(bare / "python3", "#!/usr/bin/env bash\nexit 1\n")  # without the modules
  args = [*XPK, "--type=v5p-128", *MAIN]
  result = world.run("xpk.sh", *args, PATH=str(bare))
  assert result.returncode == 2 and not world.calls("xpk")
  assert "pip install absl-py ml_collections" in result.stderr and "--no-check" in result.stderr
  result = world.run("xpk.sh", "--no-check", *args, PATH=str(bare))
  assert result.returncode == 0, result.stderr
  assert len(world.calls("xpk")) == 1


# --- On the slice's first host --------------------------------------------------------------------


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_babysit.sh"])
def test_a_mistake_that_only_the_slice_can_see_starts_no_host(world, script):
  world.write("check.status", "2")
  world.write("check.machine", "igpt_jax: data set imagenet2012: not prepared\n")
  result = world.run(script, *TPU, "--type=v5litepod-16", *MAIN)
  assert result.returncode == 2, result.stderr
  assert "not prepared" in result.stderr
  assert not world.calls("main.0") and not world.calls("main.1")
  assert len(world.gcloud("create")) == 1 and not world.exists("qr"), "it isn't deleted"


def test_a_check_that_fails_otherwise_is_no_mistake_of_the_user(world):
  world.write("check.status", "9")
  result = world.run("tpu_vm.sh", *TPU, "--type=v5litepod-16", *MAIN)
  assert result.returncode == 1 and not world.calls("main.0")
  result = world.run("tpu_vm.sh", *TPU, "--type=v5litepod-16", "--no-check", *MAIN)
  assert result.returncode == 0 and world.calls("main.0")


@pytest.mark.parametrize("breaks, status, checks", [(2, 0, 3), (9, 1, 3)])
def test_a_check_whose_connection_breaks_is_asked_for_again(world, breaks, status, checks):
  world.write("breaks", "broken\n" * breaks)
  result = world.run("tpu_vm.sh", *TPU, "--type=v5litepod-16", *MAIN)
  assert result.returncode == status, result.stderr
  assert "the connection broke" in result.stderr and bool(world.calls("main.0")) == (status == 0)
  assert sum(" check " in call[-1] for call in world.gcloud("ssh")) == checks


@pytest.mark.parametrize(
  "env, checked",
  [
    ({"RESTART_ATTEMPT": "0", "JOB_COMPLETION_INDEX": "0"}, True),
    ({"RESTART_ATTEMPT": "0", "JOB_COMPLETION_INDEX": "0", "MEGASCALE_SLICE_ID": "0"}, True),
    ({"RESTART_ATTEMPT": "0", "JOB_COMPLETION_INDEX": "0", "MEGASCALE_SLICE_ID": "1"}, False),
    ({"RESTART_ATTEMPT": "0", "JOB_COMPLETION_INDEX": "1"}, False),
    ({"RESTART_ATTEMPT": "1", "JOB_COMPLETION_INDEX": "0"}, False),
    ({}, False),
  ],
)
def test_the_first_pod_checks_before_it_joins(world, env, checked):
  world.write("check.status", "2")
  result = world.run("entry.sh", *MAIN[1:], **env)
  assert result.returncode == (2 if checked else 0)
  assert len(world.calls("main.home")) == (0 if checked else 1)


def test_slurm_checks_on_the_first_node_once(world):
  job = {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS_PER_NODE": "4"}
  world.write("check.status", "2")
  result = world.run("slurm.sbatch", *MAIN[1:], **job)
  assert result.returncode == 2 and not world.calls("srun") and not world.calls("scontrol")
  for options, env in ([["--no-check"], {}], [[], {"SLURM_RESTART_COUNT": "1"}]):
    assert world.run("slurm.sbatch", *options, *MAIN[1:], **job, **env).returncode == 0
  assert len(world.calls("srun")) == 2


# --- What is handed on ----------------------------------------------------------------------------

SECRET = "s3cret 'quoted' $HOME"
TELL = (
  'printf "%s" "$WANDB_API_KEY" >"$FAKE/key.$host"; printf "%s" "$IGPT_OWNER" >"$FAKE/owner.$host"'
)


def test_an_environment_variable_reaches_every_host_and_is_nowhere_to_be_read(world):
  world.write("train.sh", TELL)
  args = [*TPU, "--type=v5litepod-16", "--env=WANDB_API_KEY", *MAIN]
  result = world.run("tpu_vm.sh", *args, WANDB_API_KEY=SECRET)
  assert result.returncode == 0, result.stderr
  for host in "01":
    assert (world.fake / f"key.{host}").read_text() == SECRET
    assert (world.fake / f"owner.{host}").read_text() == "tpu_vm/my-project/zone-a/run-1"
  logged = "".join(path.read_text() for path in world.fake.glob("*.log"))
  assert "s3cret" not in logged + result.stdout + result.stderr
  dry = world.run("tpu_vm.sh", "--dry-run", *args, WANDB_API_KEY=SECRET)
  assert dry.returncode == 0 and "s3cret" not in dry.stdout + dry.stderr


def test_a_host_keeps_no_copy_of_the_environment(world):
  home = pathlib.Path(world.env["HOME"])
  (home / "igpt_jax_env").write_text("export WANDB_API_KEY=abc\n")
  world.write("train.sh", TELL + "\n" + TRAIN_FOREVER)
  assert world.run("tpu_worker.sh", "start", *MAIN[1:], PYTHON="python").returncode == 0
  world.wait_for("training.home")
  assert (world.fake / "key.home").read_text() == "abc"
  assert not (home / "igpt_jax_env").exists()


def test_on_gke_it_is_a_secret_that_the_pods_read(world):
  yaml = pytest.importorskip("yaml")
  write_executable(
    world.fake.parent / "bin" / "kubectl",
    "#!/usr/bin/env bash\n"
    'case "$*" in *current-context) echo "a b"; exit ;; *namespace*) echo n; exit ;; esac\n'
    'n=$(ls "$FAKE" | grep -c "^fed")\nprintf "%s\\x1f\\n" "$*" >>"$FAKE/kubectl.log"\n'
    'cat >"$FAKE/fed.$n"\n',
  )
  where = [
    "--accelerator=tpu-v5-lite-podslice",
    "--topology=4x4",
    "--env=WANDB_API_KEY",
    "--slices=2",
  ]
  watch = ["--watch=probe", "--watch-on=cpu"]
  result = world.run("gke.sh", *GKE, *where, *watch, *MAIN, WANDB_API_KEY=SECRET)
  assert result.returncode == 0, result.stderr
  training, secret, probe = (
    yaml.safe_load((world.fake / f"fed.{n}").read_text()) for n in range(3)
  )
  assert secret["stringData"] == {"WANDB_API_KEY": SECRET}
  assert secret["metadata"]["name"] == "run-1-env"
  spec, _ = (jobset["spec"]["replicatedJobs"][0] for jobset in (training, probe))
  assert spec["replicas"] == 2
  pods = [
    jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    for jobset in (training, probe)
  ]
  for pod, owner in zip(pods, ("gke/a b/n/run-1", "gke/a b/n/run-1-probe"), strict=True):
    (container,) = pod["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "run-1-env"}}]
    assert {"name": "IGPT_OWNER", "value": owner} in container["env"]
  assert pods[0]["containers"][0]["args"][-2:] == ["--config.mesh.slices=2", "--distributed"]
  args = pods[1]["containers"][0]["args"]
  assert args[2:4] == ["--config.job=probe", "--config.watch=True"] and "--distributed" not in args
  assert pods[1]["nodeSelector"] == {} and pods[1]["containers"][0]["resources"] == {}
  logged = (world.fake / "kubectl.log").read_text()
  assert "s3cret" not in logged + result.stdout + result.stderr
  assert "jobset/run-1 secret/run-1-env jobset/run-1-probe" in result.stderr


def test_xpk_reads_it_from_a_file_that_is_gone_afterwards(world):
  write_executable(
    world.fake.parent / "bin" / "xpk",
    '#!/usr/bin/env bash\nprintf "%s\\n" "$(printf "%s\\x1f" "$@")" >>"$FAKE/xpk.log"\n'
    'for arg in "$@"; do case $arg in --env-file=*) file=${arg#*=} ;; esac; done\n'
    'cp "$file" "$FAKE/env"; stat -c %a "$file" >"$FAKE/mode"\n',
  )
  args = [*XPK, "--type=v5p-128", "--slices=2", "--env=WANDB_API_KEY", "--env=A=b", *MAIN]
  result = world.run("xpk.sh", *args, WANDB_API_KEY=SECRET)
  assert result.returncode == 0, result.stderr
  assert (world.fake / "env").read_text() == f"WANDB_API_KEY={SECRET}\nA=b\n"
  assert (world.fake / "mode").read_text() == "600\n"
  (call,) = world.calls("xpk")
  (file,) = [word.partition("=")[2] for word in call if word.startswith("--env-file=")]
  assert not pathlib.Path(file).exists()
  assert "--num-slices=2" in call and "s3cret" not in " ".join(call)
  assert "IGPT_OWNER=xpk/my-project/my-zone/c/run-1" in call[-1]


@pytest.mark.parametrize(
  "script, needed, options, given, said",
  [
    ("gke.sh", "3", [], "120", None),
    ("gke.sh", "300", [], "300", None),
    ("gke.sh", "300", ["--grace=60"], "60", "to save, the run needs 300 s"),
    ("gke.sh", "40", ["--spot"], "120", "15 s of notice, to save takes 40 s"),
    ("xpk.sh", "300", [], "300", None),
    ("tpu_vm.sh", "3", ["--capacity=spot"], "180", None),
    ("tpu_vm.sh", "300", ["--capacity=spot"], "300", "30 s of notice, to save takes 300 s"),
  ],
)
def test_the_grace_is_what_the_config_needs(world, script, needed, options, given, said):
  world.write("grace", needed)
  place, where = LAUNCHERS[script]
  result = world.run(script, *place, *where, *options, "--dry-run", *MAIN)
  assert result.returncode == 0, result.stderr
  text = {
    "gke.sh": f"terminationGracePeriodSeconds: {given}\n",
    "xpk.sh": f"--termination-grace-period-seconds={given} ",
  }
  if script in text:
    assert text[script] in result.stdout
  assert (said is None) == ("notice" not in result.stderr and "needs" not in result.stderr)
  assert said is None or said in result.stderr


# --- Several slices, and evaluation beside the training -------------------------------------------


def test_several_slices_are_one_queued_resource_and_one_run(world):
  result = world.run("tpu_vm.sh", *TPU, "--type=v5litepod-16", "--slices=2", *MAIN)
  assert result.returncode == 0, result.stderr
  (create,) = world.gcloud("create")
  assert {"--node-count=2", "--node-prefix=run-1"} <= set(create)
  started = [call[4] for call in world.gcloud("ssh") if " start " in call[-1]]
  assert sorted(started) == ["run-1-0", "run-1-1"]
  assert [call[4] for call in world.gcloud("ssh") if " check " in call[-1]] == ["run-1-0"]
  assert world.calls("main.0")[0][-2:] == ["--config.mesh.slices=2", "--distributed"]
  assert not world.exists("qr")


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_babysit.sh"])
def test_evaluation_starts_beside_the_training_and_outlives_its_slice(world, script):
  world.write(
    "train.sh",
    'case "$*" in *job=probe*) while [ ! -e "$FAKE/trained" ] || [ -e "$FAKE/qr" ]; do sleep 0.02; done; '
    'echo probed ;; *) echo trained; touch "$FAKE/trained" ;; esac',
  )
  watch = ["--watch=probe", "--watch-on=here"]
  result = world.run(script, *TPU, "--type=v5litepod-16", *watch, *MAIN)
  assert result.returncode == 0, result.stderr
  assert "trained\n" in result.stdout and "[probe] probed\n" in result.stdout
  (call,) = world.calls("main.home")
  assert "--config.job=probe" in call and "--distributed" not in call
  assert not world.exists("qr")


def test_evaluation_that_fails_does_not_concern_the_training(world):
  world.write("train.sh", 'case "$*" in *job=probe*) exit 9 ;; esac')
  watch = ["--watch=probe", "--watch-on=here"]
  result = world.run("tpu_vm.sh", *TPU, "--type=v5litepod-16", *watch, *MAIN)
  assert result.returncode == 0, result.stderr
  assert "probe ended with status 9" in result.stderr


def test_a_training_that_is_stopped_stops_what_evaluates_it(world):
  world.write("train.sh", TRAIN_FOREVER)
  watch = ["--watch=probe", "--watch-on=here"]
  process = world.start("tpu_vm.sh", *TPU, "--type=v5litepod-16", *watch, *MAIN)
  world.wait_for("training.0", "training.1", "training.home")
  process.terminate()
  process.communicate(timeout=90)
  assert process.returncode == 143
  assert world.exists("saved.home") and world.exists("saved.0")
  assert not world.exists("qr")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_evaluation_that_goes_on_after_the_training_can_be_stopped(world, number):
  """Its slices would go on costing money; a shell's background commands don't hear Ctrl-C themselves."""
  world.write("train.sh", f'case "$*" in *job=probe*) {TRAIN_FOREVER} ;; esac')
  watch = ["--watch=probe", "--watch-on=here"]
  process = world.start("tpu_vm.sh", *TPU, "--type=v5litepod-16", *watch, *MAIN)
  world.wait_for("training.home")
  world.wait_until(lambda: not world.exists("qr"))

  def has_ended():
    process.send_signal(number)  # it may come before the wait for the evaluation begins
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(1)  # nobody presses Ctrl-C faster
    return process.poll() is not None

  world.wait_until(has_ended)
  assert "stopping what --watch started" in process.communicate()[0]
  assert process.returncode == 0 and world.exists("saved.home")
