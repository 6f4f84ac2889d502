#!/usr/bin/env bash
# Trains on a Cloud TPU slice: asks for it, installs, runs on all its hosts, streams the log, and
# deletes what it made.
#
#   launch/tpu_vm.sh --name=igpt-s --zone=ZONE --type=v5litepod-16 --capacity=spot \
#     --mount=BUCKET:/mnt/bucket -- \
#     --config=configs/imagenet32_s.py --workdir=/mnt/bucket/igpt-s
#
# What comes after "--" goes to `python -m igpt_jax.main` on every host, with --distributed.
#
#   --name=NAME             the queued resource, and its TPU node, to make
#   --zone=ZONE             where
#   --type=TYPE             accelerator type: v5litepod-16, v5p-128, v6e-64, …
#   --capacity=KIND         on-demand (default), spot, or reserved
#   --project=PROJECT       default: gcloud's own setting
#   --runtime-version=V     TPU VM image; default: the one made for TYPE
#   --valid-until=DURATION  give up if no TPU was granted by then, e.g. 6h; default: wait
#   --create-flag=FLAG      one more flag for `queued-resources create`; may be repeated
#   --internal-ips          machines without public addresses, reached from inside their network
#   --git=URL --ref=REF     install that commit, tag or branch; default: copy this repository
#   --mount=BUCKET:DIR      mount a bucket at DIR on every host with gcsfuse; may be repeated
#   --shared=DIR            DIR outlives the machines and is the same on all of them by other means,
#                           an NFS mount or the like; may be repeated
#   --env=NAME=VALUE        environment of the run; may be repeated
#   --keep                  leave the machines, and the run if this script is interrupted
#   --owner=ID              take over machines that a launch with this ID made (it prints its ID)
#   --delete                only stop the run and delete the machines; needs --owner
#   --dry-run               print the commands, run nothing
#
# Ctrl-C stops the run, which saves a checkpoint, and deletes the machines; with --keep it only
# detaches. Run it in tmux or the like: closing the terminal counts as Ctrl-C.
#
# Exit status: 0 the run ended; 2 a mistake in the arguments or the config; 75 the machines were
# preempted or lost; 143 the run was told to stop; anything else is the failed run's own.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name="" zone="" type="" capacity=on-demand project="" runtime_version="" valid_until=""
internal_ips="" git="" ref="" keep="" owner="" delete=""
create_flag=() mount=() shared=() env=()
read_options --name= --zone= --type= --capacity= --project= --runtime-version= --valid-until= \
  --create-flag+= --internal-ips --git= --ref= --mount+= --shared+= --env+= --keep --owner= --delete \
  -- "$@"
set -- ${main_args[@]+"${main_args[@]}"}

# --- Arguments ------------------------------------------------------------------------------------

need_option name "$name"
need_option zone "$zone"
need_name name "$name"
[ -z "$owner" ] || need_name owner "$owner"
where=(--zone="$zone" --quiet)
[ -z "$project" ] || where+=(--project="$project")

if [ -n "$delete" ]; then
  need_option owner "$owner"
else
  need_option type "$type"
  case $capacity in
    on-demand) ;;
    spot | reserved) create_flag+=("--$capacity") ;;
    *) die "--capacity=$capacity; expected on-demand, spot or reserved" ;;
  esac
  if [ -z "$runtime_version" ]; then
    case $type in
      v2-* | v3-* | v4-*) runtime_version=tpu-ubuntu2204-base ;;
      v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
      v5p-*) runtime_version=v2-alpha-tpuv5 ;;
      v6e-*) runtime_version=v2-alpha-tpuv6e ;;
      *) die "--type=$type; expected v2-…, v3-…, v4-…, v5litepod-…, v5p-… or v6e-…;" \
        "fix: give --runtime-version=… for another type (TPU7x is on GKE only: launch/gke.sh)" ;;
    esac
  fi
  [ -z "$valid_until" ] || create_flag+=("--valid-until-duration=$valid_until")
  [ -z "$internal_ips" ] || create_flag+=(--internal-ips)
  [ -z "$ref" ] || need_option git "$git"
  check_main_args "$@"
  check_mounts mount ${mount[@]+"${mount[@]}"}
  [ -n "$keep" ] ||
    check_lasting_workdir ${mount[@]+"${mount[@]}"} ${shared[@]+"${shared[@]/#/shared:}"}
  for variable in ${env[@]+"${env[@]}"}; do
    [[ $variable =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die "--env=$variable; expected NAME=VALUE"
  done
  [ -n "$owner" ] || owner=igpt-$(date +%Y%m%d-%H%M%S)-$RANDOM
fi
main_args=("$@" --distributed)

# shellcheck source-path=SCRIPTDIR source=tpu_slice.sh
. "$LAUNCH_DIR/tpu_slice.sh"

# --- The session ----------------------------------------------------------------------------------

# step WHAT COMMAND…: fails with 75 if that is because the machines went away, otherwise with 1.
step() {
  local status=0
  [ -n "$dry_run" ] || say "$1"
  shift
  "$@" || status=$?
  case $status in 0 | "$LOST") return "$status" ;; esac
  ! machines_gone || return "$LOST"
  return 1
}

session() {
  [ -n "$git" ] || pack_source || return 1
  acquire || return
  step "reaching the machines" reach || return
  outcome=none
  [ -n "$created" ] || [ -n "$dry_run" ] || workers_state
  if [ "$outcome" = running ]; then
    say "a run is going on there: following it"
    started=1
  else
    step "copying the code" put_source || return
    step "installing" on_workers all "$worker install" || return
    step "mounting buckets" mount_buckets || return
    step "starting" start || return
  fi
  follow
}

# shellcheck disable=SC2329  # cleanup runs it
how_to_delete() {
  local words=("$0" --name="$name" --zone="$zone")
  [ -z "$project" ] || words+=(--project="$project")
  [ -z "$internal_ips" ] || words+=(--internal-ips)
  shell_quote "${words[@]}" --owner="$owner" --delete
}

# shellcheck disable=SC2329  # the trap runs it
cleanup() {
  local status=$?
  trap - EXIT
  trap '' INT TERM HUP
  [ -z "$follower" ] || kill -TERM -- "-$follower" 2>/dev/null || true
  if [ -n "$owned" ] && [ -n "$keep" ]; then
    # A babysitter decides about them itself.
    [ -n "$dry_run${BABYSITTER:-}" ] || say "$name is kept; to stop the run and delete it: $(how_to_delete)"
  elif [ -n "$owned" ]; then
    if [ -n "$started" ] && [ "$state" = ACTIVE ]; then
      say "stopping the run: it saves a checkpoint"
      on_workers all "$worker stop" || true
    fi
    [ -n "$dry_run" ] || say "deleting $name"
    delete_own || [ "$status" -ne 0 ] || status=1
  fi
  [ -n "$dry_run" ] || rm -rf "$tmp"
  exit "$status"
}

need gcloud tar
tmp=${TMPDIR:-/tmp}/igpt_jax.XXXXXX
[ -n "$dry_run" ] || tmp=$(mktemp -d "$tmp")
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 129' HUP
trap 'exit 143' TERM

if [ -n "$delete" ]; then
  dry_state=ACTIVE owned=1 started=1 keep=""
  for ((i = 0; i < REACH_TRIES; i++)); do
    look
    [ "$state" = UNKNOWN ] || break
    nap "$STATE_TICKS"
  done
  exit 0
fi
status=0
session || status=$?
exit "$status"
