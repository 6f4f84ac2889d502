#!/usr/bin/env bash
# Runs `python -m igpt_jax.main "$@"`: where every launch script ends.
#
#   launch/entry.sh --config=configs/quickstart.py --workdir=runs/quickstart
#   launch/entry.sh --dry-run --config=…     print the command, run nothing
#
# A run that is told to stop (SIGTERM, Ctrl-C) saves a checkpoint and exits 0, as a finished one
# does. Whoever restarts runs must tell the two apart, so after such a signal the status here is 143
# whatever the run's own was. Ctrl-C again ends it at once, unsaved. SIGUSR1 is handed on. PYTHON names the
# interpreter (default: python). On the first host of a JobSet, when that starts for the first time
# (RESTART_ATTEMPT=0; by xpk.sh at every start), data, checkpoint and work directory are checked before the
# run joins the others.
# Relative paths are taken from the repository, wherever this is called from; beside an installed
# package, from where one stands.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

answer_help "$@"
if [ "${1:-}" = --dry-run ]; then
  dry_run=1
  shift
fi

command=("${PYTHON:-python}" -m igpt_jax.main "$@")
if [ -n "$dry_run" ]; then
  run "${command[@]}"
  exit 0
fi
cd "$REPO_DIR"

child="" stopped="" signalled=""
hand_on() {
  signalled=1
  [ -z "$child" ] || kill "-$1" "$child" 2>/dev/null || true
}
trap 'stopped=1; hand_on TERM' TERM INT
trap 'hand_on USR1' USR1

# attend COMMAND…: runs it, and hands signals on; sets `status`.
attend() {
  # A shell's background commands ignore Ctrl-C; the run is to hear it twice.
  (trap - INT && exec "$@") &
  child=$!
  # A signal that came before `child` was set has not been handed on.
  [ -z "$stopped" ] || hand_on TERM
  while :; do
    signalled="" status=0
    wait "$child" || status=$?
    # A trapped signal ends the wait, not the child.
    [ -n "$signalled" ] || break
  done
  [ -z "$stopped" ] || status=143
}

# All pods of a JobSet start together. The others wait for the first to join, which checks before it does.
if [ "${RESTART_ATTEMPT:-}" = 0 ] && [ "${JOB_COMPLETION_INDEX:-}${MEGASCALE_SLICE_ID:-0}" = 00 ]; then
  attend "${command[@]}" --check=machine
  [ "$status" -eq 0 ] || exit "$status"
fi
attend "${command[@]}"
exit "$status"
