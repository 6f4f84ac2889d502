#!/usr/bin/env bash
# Trains on a Cloud TPU slice: asks for it, installs, runs on all its hosts, streams the log, and
# deletes what it made.
#
#   launch/tpu_vm.sh --name=igpt-s --zone=ZONE --type=v5litepod-16 --capacity=spot \
#     --mount=BUCKET:/mnt/bucket -- \
#     --config=configs/imagenet32_s.py --workdir=gs://BUCKET/igpt-s \
#     --config.data.data_dir=/mnt/bucket/data
#
# What comes after "--" goes to `python -m igpt_jax.main` on every host, with --distributed.
#
#   --name=NAME             the queued resource, and its TPU node, to make
#   --zone=ZONE             where
#   --type=TYPE             accelerator type: v5litepod-16, v5p-128, v6e-64, …
#   --slices=N              so many slices of that type, joined by the network; default 1
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
#   --env=NAME[=VALUE]      environment of the run; without a value, the one that it has here, which isn't
#                           printed; may be repeated
#   --watch=JOB,…           beside it, evaluate each checkpoint: some of evaluate, probe, sample, quality
#   --watch-on=TYPE         what each of those runs on: a slice of that type, of its own, made and deleted
#                           like this one; or here, this machine
#   --grace=SECONDS         when the run is stopped, to save a checkpoint; default: what the config needs, 180
#                           or more
#   --keep                  leave the machines, and the run if this script is interrupted
#   --owner=ID              take over machines that a launch with this ID made (it prints its ID)
#   --delete                only stop the run and delete the machines; needs --owner
#   --no-check              read the config neither here first, nor on the first host
#   --dry-run               read the config, print the commands, run nothing
#
# Ctrl-C stops the run, which saves a checkpoint, and deletes the machines; with --keep it only
# detaches, and ends what --watch started. Once the run has ended, while jobs of --watch go on, it ends
# these. Run it in tmux or the like: closing the terminal counts as Ctrl-C.
#
# Exit status: 0 the run ended; 2 a mistake in the arguments or the config; 75 the machines were
# preempted or lost; 143 the run was told to stop; anything else is the failed run's own.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name="" zone="" type="" capacity=on-demand project="" runtime_version="" valid_until=""
internal_ips="" git="" ref="" keep="" owner="" delete="" slices="" grace="" watch="" watch_on=""
create_flag=() mount=() shared=() env=()
read_options --name= --zone= --type= --slices= --capacity= --project= --runtime-version= --valid-until= \
  --create-flag+= --internal-ips --git= --ref= --mount+= --shared+= --env+= --watch= --watch-on= \
  --grace= --keep --owner= --delete --no-check -- "$@"
set -- ${main_args[@]+"${main_args[@]}"}

# --- Arguments ------------------------------------------------------------------------------------

need_option name "$name"
need_option zone "$zone"
need_name name "$name"
[ -z "$owner" ] || need_name owner "$owner"
choose_slices "$@"
[ -z "$grace" ] || need_count grace "$grace"
# check_job_here JOB: ends the script with 2 if this machine's Python lacks what the job imports, which
# reading its config doesn't need.
check_job_here() {
  local python extra="" modules=igpt_jax.jobs.$1 why
  [ -z "$no_check" ] || return 0
  python=$(find_reader) || exit 2
  case $workdir in gs://*) extra="[gcs]" modules+=", gcsfs" ;; esac
  why=$(cd "$REPO_DIR" && "$python" -c "import $modules" 2>&1 >/dev/null) ||
    die "--watch-on=here: $python can't run job $1: $(tail -n 1 <<<"$why"); fix:" \
      "$(shell_quote "$python" -m pip install --editable "$REPO_DIR$extra"), or PYTHON=… of another"
}

need gcloud tar
# Of the run's lock: the same after every restart, and of one living run, as its machines' name is.
run_owner=tpu_vm/${project:-$(setting_of gcloud get-value project)}/$zone/$name
where=(--zone="$zone" --quiet)
[ -z "$project" ] || where+=(--project="$project")

if [ -n "$delete" ]; then
  need_option owner "$owner"
else
  need_option type "$type"
  # What the slices of --watch have in common with this one.
  alike=(--zone="$zone" --capacity="$capacity" ${project:+--project="$project"}
    ${internal_ips:+--internal-ips} ${valid_until:+--valid-until="$valid_until"}
    ${git:+--git="$git"} ${ref:+--ref="$ref"} ${create_flag[@]+"${create_flag[@]/#/--create-flag=}"}
    ${mount[@]+"${mount[@]/#/--mount=}"} ${shared[@]+"${shared[@]/#/--shared=}"})
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
  read_env ${env[@]+"${env[@]}"}
  check_watch
  for job in ${watched[@]+"${watched[@]}"}; do
    watch_args "$job" "$@"
    if [ "$watch_on" = here ]; then slice=""; else slice=$watch_on; fi
    preflight "$slice" "${job_args[@]}"
    [ "$watch_on" != here ] || check_job_here "$job"
  done
  preflight "${slices}x$type" "${main_args[@]}"
  # Spot machines go 30 s after they are told.
  notice=""
  if [ "$capacity" = spot ]; then notice=30; fi
  choose_grace 180 $notice
  [ -n "$owner" ] || owner=igpt-$(date +%Y%m%d-%H%M%S)-$RANDOM
fi
[ -n "$grace" ] || grace=180
run_args=("$@")
main_args+=(--distributed)

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
    [ ${#variables[@]} -eq 0 ] || step "copying the environment" put_env || return
    step "checking data, checkpoint and work directory on the first host" check_there ||
      return $((refused ? 2 : $?))
    step "starting" start || return
  fi
  start_watchers
  follow
}

watchers=()   # process ids of what --watch started, one for each of `watched`
signalled=""  # they were told to stop just now

# Starts the jobs of --watch, each on a slice of its own by this script, or here.
start_watchers() {
  local job command variable
  for job in ${watched[@]+"${watched[@]}"}; do
    watch_args "$job" "${run_args[@]}"
    if [ "$watch_on" = here ]; then
      command=(env IGPT_OWNER="$run_owner/$job" PYTHON="$(find_reader)" bash "$LAUNCH_DIR/entry.sh" "${job_args[@]}")
    else
      command=(bash "$0" --name="$name-$job" --type="$watch_on" "${alike[@]}" --owner="$owner"
        ${no_check:+--no-check} ${env[@]+"${env[@]/#/--env=}"} ${dry_run:+--dry-run} -- "${job_args[@]}")
    fi
    if [ -z "$dry_run" ]; then
      say "$job of each checkpoint, on $watch_on"
      "${command[@]}" </dev/null > >(sed "s/^/[$job] /") 2>&1 &
      watchers+=("$!")
    elif [ "$watch_on" = here ]; then
      shell_quote "${command[@]}"
    else
      "${command[@]}"
    fi
  done
}

# Waits for them: they end once the last checkpoint is done.
# shellcheck disable=SC2329  # cleanup runs it
wait_for_watchers() {
  local i status
  for i in ${watchers[@]+"${!watchers[@]}"}; do
    while :; do
      signalled="" status=0
      wait "${watchers[i]}" || status=$?
      # A trapped signal ends the wait, not the child.
      [ -n "$signalled" ] || break
    done
    [ "$status" -eq 0 ] || say "${watched[i]} ended with status $status; the training isn't concerned"
  done
}

# Tells them to stop: what trains here saves, and those with slices of their own delete them.
# shellcheck disable=SC2329  # cleanup runs it
stop_watchers() {
  signalled=1
  [ ${#watchers[@]} -eq 0 ] || kill -TERM "${watchers[@]}" 2>/dev/null || true
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
  # A babysitter decides about the machines itself, unless what --watch started outlives the run.
  if [ "$status" -eq 0 ] && [ "${BABYSITTER:-}" = deletes ] && [ ${#watchers[@]} -gt 0 ]; then keep=""; fi
  if [ -n "$owned" ] && [ -n "$keep" ]; then
    [ -n "$dry_run${BABYSITTER:-}" ] || say "$name is kept; to stop the run and delete it: $(how_to_delete)"
  elif [ -n "$owned" ]; then
    if [ -n "$started" ] && [ "$state" = ACTIVE ]; then
      say "stopping the run: it saves a checkpoint"
      on_workers all "$worker stop $grace" || true
    fi
    [ -n "$dry_run" ] || say "deleting $name"
    delete_own || [ "$status" -ne 0 ] || status=1
  fi
  [ "$status" -eq 0 ] || stop_watchers
  if [ ${#watchers[@]} -gt 0 ]; then
    # They may take hours. They don't hear Ctrl-C: a shell's background commands ignore it.
    trap 'say "stopping what --watch started"; stop_watchers' INT TERM HUP
    wait_for_watchers
    trap '' INT TERM HUP
  fi
  [ -n "$dry_run" ] || rm -rf "$tmp"
  exit "$status"
}

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
