"""A machine for the launch scripts: stand-ins for gcloud, xpk, kubectl, srun and Python."""

import dataclasses
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from support.paths import ROOT

PATIENCE = 90  # seconds; a script that works needs one or two, on a busy machine more


LAUNCH = ROOT / "launch"


FAKE_GCLOUD = r"""#!/usr/bin/env bash
# State: $FAKE/qr/states (one per look, the last stays), $FAKE/qr/owner, $FAKE/hosts/N (homes).
case "$*" in "config get-value "*) echo "my-${3##*/}"; exit ;; esac  # asks no server
printf '%s\n' "$(printf '%s\x1f' "$@")" >>"$FAKE/gcloud.log"
worker="" command="" owner="" slices=1
for arg in "$@"; do
  case $arg in
    --node-count=*) slices=${arg#*=} ;;
    --worker=*) worker=${arg#*=} ;;
    --command=*) command=${arg#*=} ;;
    --labels=igpt_jax_owner=*) owner=${arg##*=} ;;
  esac
done
kill_hosts() {
  local pid
  for pid in "$FAKE"/hosts/*/igpt_jax_run/pid; do
    [ ! -e "$pid" ] || kill -KILL -- "-$(cat "$pid")" 2>/dev/null
  done
  rm -rf "$FAKE/hosts"
}
# homes NODE WORKER: the home directories of a node's workers, node NAME or NAME-N of several.
homes() {
  local first=0
  if [ -d "$FAKE/hosts/2" ]; then first=$((2 * ${1##*-})); fi
  if [ "$2" = all ]; then
    echo "$FAKE/hosts/$first" "$FAKE/hosts/$((first + 1))"
  else
    echo "$FAKE/hosts/$((first + $2))"
  fi
}
active() { [ "$(head -n 1 "$FAKE/qr/states" 2>/dev/null)" = ACTIVE ]; }
case "$3 $4" in
  "queued-resources describe")
    if [ -e "$FAKE/flaky" ]; then rm "$FAKE/flaky"; echo "ERROR: no route" >&2; exit 1; fi
    if [ ! -d "$FAKE/qr" ]; then echo "ERROR: NOT_FOUND: Resource was not found" >&2; exit 1; fi
    state=$(head -n 1 "$FAKE/qr/states")
    [ "$(wc -l <"$FAKE/qr/states")" -eq 1 ] || sed -i 1d "$FAKE/qr/states"
    case $state in SUSPENDED | SUSPENDING | FAILED) kill_hosts ;; esac
    printf '%s\t%s\n' "$state" "$(cat "$FAKE/qr/owner")" ;;
  "queued-resources create")
    if [ -e "$FAKE/quota" ]; then echo "ERROR: quota exceeded" >&2; exit 1; fi
    if [ -e "$FAKE/race" ]; then
      mkdir "$FAKE/qr"; echo ACTIVE >"$FAKE/qr/states"; echo somebody >"$FAKE/qr/owner"
      echo "ERROR: ALREADY_EXISTS" >&2; exit 1
    fi
    mkdir "$FAKE/qr" || exit 1
    cat "$FAKE/states" >"$FAKE/qr/states" && echo "$owner" >"$FAKE/qr/owner"
    # Hosts 0 and 1 are the first node's, 2 and 3 the second's.
    for ((host = 0; host < 2 * slices; host++)); do mkdir -p "$FAKE/hosts/$host"; done ;;
  "queued-resources delete")
    if [ -e "$FAKE/sticky" ]; then rm "$FAKE/sticky"; echo "ERROR: is SUSPENDING" >&2; exit 1; fi
    [ -d "$FAKE/qr" ] || exit 1
    kill_hosts; rm -rf "$FAKE/qr" ;;
  "tpu-vm scp")
    active || exit 255
    for home in $(homes "${6%%:*}" all); do cp "$5" "$home/${6#*:}" || exit 1; done ;;
  "tpu-vm ssh")
    active && [ ! -e "$FAKE/deaf" ] || exit 255
    status=0
    limit=""
    case $command in
      *"follow start") [ ! -e "$FAKE/broken" ] || limit="timeout 0.2" ;;
      *"follow end") touch "$FAKE/followed_again" ;;
      *"tpu_worker.sh check "*)  # $FAKE/breaks: a line for each connection that breaks
        if [ -s "$FAKE/breaks" ]; then sed -i 1d "$FAKE/breaks"; exit 255; fi ;;
    esac
    pids=""
    for home in $(homes "$5" "$worker"); do
      (cd "$home" && HOME=$home exec $limit bash -c "$command") &
      pids="$pids $!"
    done
    for pid in $pids; do wait "$pid" || status=$?; done
    [ -z "$limit" ] || status=255
    exit "$status" ;;
  *) exit 64 ;;
esac
"""


# Stands for the interpreter that makes the environment, and inside it for the training.
FAKE_PYTHON = r"""#!/usr/bin/env bash
case "$1 ${2:-}" in
  "-c "*"print("*) echo py313 ;;
  "-c "*) exit 0 ;;
  "-m venv")
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && printf '%s\n' '#!/usr/bin/env bash' \
      'printf "%s\n" "$(printf "%s\x1f" "$@")" >>"$FAKE/pip.log"' \
      '[ ! -e "$FAKE/pip_fails" ]' >"$3/bin/pip" && chmod +x "$3/bin/pip" ;;
  "-m igpt_jax.main")
    case "${*: -1}" in
      --check=machine)
        [ ! -e "$FAKE/check.machine" ] || cat "$FAKE/check.machine" >&2
        exit "$(cat "$FAKE/check.status" 2>/dev/null || echo 0)" ;;
      --check=*)
        if [ -e "$FAKE/here.status" ]; then echo "igpt_jax: refused" >&2; exit "$(cat "$FAKE/here.status")"; fi
        printf '%s\n' "slice: ${*: -1}" "grace: $(cat "$FAKE/grace" 2>/dev/null || echo 3) s to save"
        exit ;;
    esac
    host=${HOME##*/}
    printf '%s\n' "$(printf '%s\x1f' "$@")" >>"$FAKE/main.$host.log"
    pwd >>"$FAKE/pwd.log"
    attempt=$(wc -l <"$FAKE/main.$host.log")
    . "$FAKE/train.sh" ;;
  *) exit 64 ;;
esac
"""


FAKE_TOOL = r"""#!/usr/bin/env bash
tool=${0##*/}
case "$tool $1" in "kubectl config") echo "my-${2##*-}"; exit ;; esac  # asks no server
printf '%s\n' "$(printf '%s\x1f' "$@")" >>"$FAKE/$tool.log"
[ ! -e "$FAKE/$tool.stdin" ] || cat >"$FAKE/$tool.stdin"
[ ! -e "$FAKE/$tool.status" ] || exit "$(cat "$FAKE/$tool.status")"
"""


# Runs until it is told to stop, then saves and exits 0, as training does.
TRAIN_FOREVER = """
trap 'echo saved >>"$FAKE/saved.$host"; exit 0' TERM
echo "host $host trains"; touch "$FAKE/training.$host"
while :; do sleep 0.02; done
"""


# Hears Ctrl-C, and saves by SIGTERM. bash would lose one of the two, if they come at once.
HEARS_CTRL_C = """
import os, pathlib, signal
fake, both = pathlib.Path(os.environ["FAKE"]), {signal.SIGINT, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, both)
(fake / "training.home").touch()
while signal.sigwait(both) != signal.SIGTERM:
  (fake / "heard").touch()
(fake / "saved.home").write_text("saved\\n")
"""


@dataclasses.dataclass
class World:
  """A copy of launch/ in a repository whose path has a space, and the stand-ins on PATH."""

  repo: pathlib.Path
  fake: pathlib.Path
  env: dict[str, str]
  started: list[subprocess.Popen] = dataclasses.field(default_factory=list)

  def command(self, script: str, *args: str) -> list[str]:
    return ["bash", str(self.repo / "launch" / script), *args]

  def run(self, script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
      self.command(script, *args),
      env=self.env | env,
      cwd=self.env["HOME"],
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      timeout=PATIENCE,
    )

  def start(self, script: str, *args: str) -> subprocess.Popen:
    # As from a terminal: in a shell's background these tests ignore Ctrl-C, which children inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
      self.command(script, *args),
      env=self.env,
      cwd=self.env["HOME"],
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      start_new_session=True,
    )
    signal.signal(signal.SIGINT, before)
    self.started.append(process)
    return process

  def write(self, name: str, text: str = "") -> None:
    (self.fake / name).write_text(text)

  def write_run_of_two_signals(self) -> None:
    self.write("train.py", HEARS_CTRL_C)
    self.write("train.sh", f'exec "{sys.executable}" "$FAKE/train.py"')

  def exists(self, name: str) -> bool:
    return (self.fake / name).exists()

  def calls(self, tool: str) -> list[list[str]]:
    log = self.fake / f"{tool}.log"
    if not log.exists():
      return []
    return [line.split("\x1f")[:-1] for line in log.read_text().splitlines()]

  def gcloud(self, verb: str) -> list[list[str]]:
    return [call for call in self.calls("gcloud") if call[3] == verb]

  def wait_for(self, *names: str) -> None:
    self.wait_until(lambda: all(self.exists(name) for name in names))

  def wait_until(self, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
      assert time.monotonic() < deadline, "waited in vain"
      time.sleep(0.02)

  def processes(self, program: str) -> list[str]:
    """Process ids of what runs `program` in this world."""
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
      try:
        words = (process / "cmdline").read_bytes().split(b"\0")
        environment = (process / "environ").read_bytes()
      except OSError:
        continue
      if words[0].decode() == program and f"FAKE={self.fake}".encode() in environment:
        found.append(process.name)
    return found

  def follows(self) -> int:
    """How often the run's log was followed from its start."""
    return sum(call[-1].endswith("follow start") for call in self.gcloud("ssh"))


def write_executable(path: pathlib.Path, text: str) -> None:
  path.write_text(text)
  path.chmod(0o755)


def readme_commands() -> list[list[str]]:
  """Returns the words of each command in launch/README.md, from the script's name, that a script begins."""
  text = (LAUNCH / "README.md").read_text().replace("\\\n", " ")
  commands = []
  for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S):
    for line in block.splitlines():
      words = shlex.split(line, comments=True)
      if words and words[0] == "sbatch":
        words = words[[word.startswith("launch/") for word in words].index(True) :]
      if words and words[0].startswith("launch/"):
        commands.append([words[0].removeprefix("launch/"), *words[1:]])
  return commands
