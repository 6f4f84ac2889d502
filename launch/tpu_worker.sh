#!/usr/bin/env bash
# The part of tpu_vm.sh that runs on each TPU VM: it lives in the copied repository, ~/igpt_jax.
#
#   tpu_worker.sh install            a virtual environment with igpt_jax[tpu,gcs]
#   tpu_worker.sh mount BUCKET DIR   mount a bucket with gcsfuse, unless it is mounted
#   tpu_worker.sh check ARGS…        check ARGS, and data, checkpoint and work directory here; its last line:
#                                    igpt_jax_worker: checked STATUS
#   tpu_worker.sh start ARGS…        start igpt_jax.main in the background; it outlives the connection
#   tpu_worker.sh follow start|end   print the log, from its start or from now, until the run ends
#   tpu_worker.sh status             one line: running, none, or ended STATUS
#   tpu_worker.sh report             host name and last lines of the log, if the run failed
#   tpu_worker.sh stop [SECONDS]     SIGTERM, wait so long (180) for the last checkpoint, then SIGKILL
#
# The run's state is kept in ~/igpt_jax_run: the connection may break at any time, so what a run came
# to is read from there and never from the connection. Its environment is in ~/igpt_jax_env, if that was
# copied here: lines that a shell reads, deleted once the run has them. --dry-run before the verb prints the command
# that `start` would run. Exit status 3: another run is going on here.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source-path=SCRIPTDIR source=environment.sh
. "$LAUNCH_DIR/environment.sh"

state_dir=$HOME/igpt_jax_run
venv=$state_dir/venv
env_file=$HOME/igpt_jax_env

boot_id() {
  cat /proc/sys/kernel/random/boot_id
}

is_running() {
  local pid
  [ -s "$state_dir/pid" ] && [ ! -e "$state_dir/status" ] || return 1
  # After a reboot the number may be another process's.
  [ "$(cat "$state_dir/boot_id" 2>/dev/null)" = "$(boot_id)" ] || return 1
  pid=$(cat "$state_dir/pid")
  kill -0 "$pid" 2>/dev/null && grep -qa tpu_worker.sh "/proc/$pid/cmdline" 2>/dev/null
}

status_line() {
  if is_running; then
    echo "igpt_jax_worker: running"
  elif [ -s "$state_dir/status" ]; then
    echo "igpt_jax_worker: ended $(cat "$state_dir/status")"
  elif [ -s "$state_dir/pid" ]; then
    # It ended without a word: the machine was restarted or the run was killed.
    echo "igpt_jax_worker: ended 143"
  else
    echo "igpt_jax_worker: none"
  fi
}

install() {
  local python candidate=""
  if [ ! -x "$venv/bin/pip" ]; then
    for python in python3.13 python3.12 python3.11 python3; do
      # ensurepip is what Debian splits off and venv needs.
      "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
        2>/dev/null && candidate=$python && break
    done
    if [ -n "$candidate" ]; then
      "$candidate" -m venv "$venv"
    else
      # The TPU VM images are Ubuntu 22.04, whose Python is 3.10; uv brings its own.
      python3 -m pip install --quiet --user --upgrade uv
      python3 -m uv venv --quiet --seed --python 3.12 "$venv"
    fi
  fi
  choose_constraints "$venv/bin/python"
  "$venv/bin/pip" install --quiet ${constraints[@]+"${constraints[@]}"} --editable "${REPO_DIR}[tpu,gcs]"
}

mount_bucket() {
  local bucket=$1 directory=$2 keyring=/usr/share/keyrings/cloud.google.asc release
  ! mountpoint -q "$directory" || return 0
  if ! command -v gcsfuse >/dev/null; then
    release=$(lsb_release --short --codename)
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$keyring" >/dev/null
    echo "deb [signed-by=$keyring] https://packages.cloud.google.com/apt gcsfuse-$release main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -qq
    sudo apt-get install -qq -y gcsfuse
  fi
  sudo mkdir -p "$directory"
  sudo chown "$(id -u):$(id -g)" "$directory"
  gcsfuse --implicit-dirs --rename-dir-limit="$RENAME_LIMIT" "$bucket" "$directory"
}

# Exports what is in `env_file`.
export_env() {
  # shellcheck source=/dev/null
  if [ -e "$env_file" ]; then . "$env_file"; fi
}

check() {
  local status=0
  export_env
  (cd "$REPO_DIR" && "${PYTHON:-$venv/bin/python}" -m igpt_jax.main "$@" --check=machine) >&2 || status=$?
  echo "igpt_jax_worker: checked $status"
}

start() {
  local i args
  args=$(shell_quote "$@")
  if is_running; then
    # A connection that broke right after the start makes the caller ask twice.
    [ "$args" = "$(cat "$state_dir/args")" ] && return 0
    say "another run is going on here: $(cat "$state_dir/args")"
    exit 3
  fi
  rm -f "$state_dir/pid" "$state_dir/status" "$state_dir/entry_pid"
  printf '%s\n' "$args" >"$state_dir/args"
  nohup setsid bash "$0" _run "$@" >"$state_dir/log" 2>&1 </dev/null &
  for ((i = 0; i < 500; i++)); do
    [ ! -s "$state_dir/entry_pid" ] || return 0
    sleep 0.02
  done
  say "the run didn't start:"
  cat "$state_dir/log" >&2
  exit 1
}

# The background half of `start`: outlives the run and writes down how it ended.
run_and_record() {
  local signalled="" status entry
  # The machine's shutdown signals every process; entry.sh answers it, this one must see it end.
  trap 'signalled=1' TERM HUP INT
  export_env
  rm -f "$env_file"
  boot_id >"$state_dir/boot_id"
  echo $$ >"$state_dir/pid"
  PYTHON=${PYTHON:-$venv/bin/python} bash "$LAUNCH_DIR/entry.sh" "$@" &
  entry=$!
  echo "$entry" >"$state_dir/entry_pid"
  while :; do
    signalled="" status=0
    wait "$entry" || status=$?
    [ -n "$signalled" ] || break
  done
  echo "$status" >"$state_dir/status.new"
  mv "$state_dir/status.new" "$state_dir/status"
}

follow() {
  local lines=+1
  [ "$1" != end ] || lines=0
  if is_running; then
    tail -n "$lines" -s "$TICK" -f --pid="$(cat "$state_dir/pid")" "$state_dir/log"
  elif [ -e "$state_dir/log" ]; then
    tail -n "$lines" "$state_dir/log"
  fi
}

report() {
  case $(status_line) in
    *"ended 0") ;;
    *ended*)
      echo "--- $(hostname): $(status_line); the log's last lines:"
      tail -n 40 "$state_dir/log"
      ;;
  esac
}

stop() {
  local i ticks=${1:-180}
  is_running || return 0
  kill -TERM "$(cat "$state_dir/entry_pid")" 2>/dev/null || true
  for ((i = 0; i < ticks; i++)); do
    is_running || return 0
    sleep "$TICK"
  done
  say "still running after $ticks s: killed"
  kill -KILL -- "-$(cat "$state_dir/pid")" 2>/dev/null || true
}

answer_help "$@"
if [ "${1:-}" = --dry-run ]; then
  dry_run=1
  shift
fi
[ $# -gt 0 ] || die "missing verb; see --help"
verb=$1
shift
if [ -n "$dry_run" ]; then
  [ "$verb" = start ] || die "--dry-run $verb; expected --dry-run start ARGS…"
  PYTHON=${PYTHON:-$venv/bin/python} exec bash "$LAUNCH_DIR/entry.sh" --dry-run "$@"
fi
mkdir -p "$state_dir"
case $verb in
  install) install ;;
  mount)
    [ $# -eq 2 ] || die "mount $*; expected: mount BUCKET DIR"
    mount_bucket "$@"
    ;;
  check) check "$@" ;;
  start) start "$@" ;;
  _run) run_and_record "$@" ;;
  follow) follow "${1:-start}" ;;
  status) status_line ;;
  report) report ;;
  stop) stop "$@" ;;
  *) die "unknown verb: $verb; see --help" ;;
esac
