#!/usr/bin/env bash
# Keeps a run on a Cloud TPU slice going until it has ended: after a preemption it makes the machines
# again and goes on in the same --workdir.
#
#   launch/tpu_babysit.sh --name=igpt-l --zone=ZONE --type=v5p-32 --capacity=spot \
#     --mount=BUCKET:/mnt/bucket -- \
#     --config=configs/imagenet32_l.py --workdir=gs://BUCKET/igpt-l \
#     --config.data.data_dir=/mnt/bucket/data
#
# Takes every option of tpu_vm.sh except --delete, and:
#
#   --max-restarts=N   give up after N restarts of any kind; default 100
#   --max-failures=N   give up after N failures in a row that no preemption explains; default 3
#   --backoff=SECONDS  wait before the first restart, doubled each time up to 30 minutes; default 30
#   --healthy=SECONDS  a run that lasted this long starts both counts anew; default 1800
#
# What a session of tpu_vm.sh came to decides:
#   0    the run has ended                     delete the machines, exit 0
#   2    a mistake in the arguments or config  delete the machines, exit 2
#   75   the machines were lost                delete what is left of them, make them again
#   143  the run was told to stop              start it again, on the same machines if they live
#   else the run failed, hung (124) or lost    start it again on the same machines, a few times
#        a host (134)
#
# --dry-run prints one session and the deletion. With --keep the machines are left at the end. To go
# on with machines of a babysitter that is gone, give the --owner=ID that it printed.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

MAX_PAUSE=1800
max_restarts=100 max_failures=3 backoff=30 healthy=1800 keep="" owner=""
read_options --max-restarts= --max-failures= --backoff= --healthy= --keep --owner= '*' -- "$@"
set -- ${main_args[@]+"${main_args[@]}"}
place=()
for option in ${others[@]+"${others[@]}"}; do
  case $option in
    --delete) die "--delete is tpu_vm.sh's" ;;
    --name=* | --zone=* | --project=* | --internal-ips | --slices=* | --grace=*) place+=("$option") ;;
  esac
done
need_count max-restarts "$max_restarts"
need_count max-failures "$max_failures"
need_count backoff "$backoff"
need_count healthy "$healthy"
[ -n "$owner" ] || owner=igpt-$(date +%Y%m%d-%H%M%S)-$RANDOM
session_options=(${others[@]+"${others[@]}"} --owner="$owner")
tpu_vm=$LAUNCH_DIR/tpu_vm.sh

# A dry run of the session checks all of its arguments.
if [ -n "$dry_run" ]; then
  exec bash "$tpu_vm" ${keep:+--keep} --dry-run "${session_options[@]}" -- "$@"
fi
need gcloud tar
bash "$tpu_vm" --dry-run ${keep:+--keep} "${session_options[@]}" -- "$@" >/dev/null

machines_end=deletes
[ -z "$keep" ] || machines_end=keeps
child=""
# Runs tpu_vm.sh in a process group of its own, so that a signal to this script is answered at once.
tpu_vm() {
  local status=0
  set -m
  BABYSITTER=$machines_end bash "$tpu_vm" "$@" </dev/null &
  child=$!
  set +m
  wait "$child" || status=$?
  child=""
  return "$status"
}

delete_machines() {
  bash "$tpu_vm" "${place[@]}" --owner="$owner" --delete
}

cleanup() {
  local status=$?
  trap - EXIT
  trap '' INT TERM HUP
  if [ -n "$child" ]; then
    # It detaches and leaves the machines, because it runs with --keep.
    kill -TERM -- "-$child" 2>/dev/null || true
    wait "$child" 2>/dev/null || true
  fi
  if [ -n "$keep" ]; then
    say "the machines are kept; to stop the run and delete them:" \
      "$(shell_quote "$tpu_vm" "${place[@]}" --owner="$owner" --delete)"
  else
    delete_machines || [ "$status" -ne 0 ] || status=1
  fi
  exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 129' HUP
trap 'exit 143' TERM

say "owner ID $owner"
restarts=0 failures=0 pause=$backoff
while :; do
  began=$SECONDS status=0
  tpu_vm --keep "${session_options[@]}" -- "$@" || status=$?
  if [ $((SECONDS - began)) -ge "$healthy" ]; then
    restarts=0 failures=0 pause=$backoff
  fi
  case $status in
    0)
      say "the run has ended"
      exit 0
      ;;
    2)
      say "stopping: a restart can't mend this"
      exit 2
      ;;
    75)
      say "the machines were lost"
      delete_machines || exit 1
      ;;
    143) say "the run was told to stop" ;;
    *)
      failures=$((failures + 1))
      say "the run failed with status $status, $failures of $max_failures in a row"
      [ "$failures" -lt "$max_failures" ] || exit "$status"
      ;;
  esac
  restarts=$((restarts + 1))
  if [ "$restarts" -gt "$max_restarts" ]; then
    say "giving up after $max_restarts restarts"
    exit "$status"
  fi
  say "restart $restarts of $max_restarts in $pause s"
  nap "$pause"
  pause=$((pause * 2 < MAX_PAUSE ? pause * 2 : MAX_PAUSE))
done
