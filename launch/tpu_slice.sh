# shellcheck shell=bash
# The machines behind tpu_vm.sh: a queued resource, its TPU VMs and the run on them. It is sourced
# after the arguments are read, and everything that asks or tells Google Cloud something is here.
# shellcheck disable=SC2034,SC2154  # the options, and some of the state, are tpu_vm.sh's

LOST=75              # exit status: the machines were preempted or lost
STATE_TICKS=30       # between two looks at the queued resource
REACH_TRIES=10       # looks at machines that don't answer before they count as lost
CHECK_TRIES=3        # of a check whose connection breaks
STRAGGLER_TICKS=${STRAGGLER_TICKS:-300}  # how long other hosts may outlive the first one
DELETE_TRIES=30
MAX_ARCHIVE_KIB=204800

# --- The queued resource --------------------------------------------------------------------------

state=""        # what the last look saw: ACTIVE, …, GONE, or UNKNOWN if gcloud failed
state_owner=""  # the label it carries
owned=""        # it may be deleted at the end
created=""      # this process saw its creation succeed
dry_state=GONE

queued_resource() {
  local verb=$1
  shift
  run gcloud compute tpus queued-resources "$verb" "$name" "${where[@]}" "$@"
}

look() {
  local line
  state_owner=""
  set -- describe \
    --format='value(state.state,tpu.nodeSpec[0].node.labels.igpt_jax_owner)'
  if [ -n "$dry_run" ]; then
    queued_resource "$@"
    state=$dry_state state_owner=$owner
  elif line=$(queued_resource "$@" 2>"$tmp/describe"); then
    IFS=$'\t' read -r state state_owner <<<"$line" || true
    [ -n "$state" ] || state=UNKNOWN
  elif grep -q NOT_FOUND "$tmp/describe"; then
    state=GONE
  else
    state=UNKNOWN
    say "no answer about $name: $(head -n 1 "$tmp/describe")"
  fi
}

# True once the machines are known to be going or gone; a silent gcloud proves nothing.
machines_gone() {
  look
  case $state in ACTIVE | UNKNOWN) return 1 ;; esac
  say "$name is $state: the machines are lost"
}

create() {
  # Set before asking: an interrupted request may still have arrived.
  owned=1
  if [ "$slices" -eq 1 ]; then
    set -- --node-id="$name"
  else
    set -- --node-count="$slices" --node-prefix="$name"
  fi
  set -- create "$@" --accelerator-type="$type" --runtime-version="$runtime_version" \
    --labels="igpt_jax_owner=$owner" ${create_flag[@]+"${create_flag[@]}"}
  if [ -n "$dry_run" ]; then
    queued_resource "$@"
    dry_state=ACTIVE
    return
  fi
  say "asking for $slices × $type in $zone, $capacity; owner ID $owner"
  if queued_resource "$@" 2>"$tmp/create"; then
    created=1
    return
  fi
  cat "$tmp/create" >&2
  return 1
}

wait_until_active() {
  local seen="" unknown=0
  while :; do
    look
    [ -n "$dry_run" ] || [ "$state" = "$seen" ] || say "$name: $state"
    seen=$state
    case $state in
      ACTIVE) return 0 ;;
      UNKNOWN)
        unknown=$((unknown + 1))
        [ "$unknown" -lt "$REACH_TRIES" ] || return "$LOST"
        ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | GONE)
        queued_resource describe --format='value(state)' >&2 || true
        return "$LOST"
        ;;
      *) unknown=0 ;;
    esac
    nap "$STATE_TICKS"
  done
}

acquire() {
  look
  case $state in
    UNKNOWN) return 1 ;;
    GONE) create || return 1 ;;
    *)
      [ "$state_owner" = "$owner" ] ||
        die "--name=$name exists and this launch didn't make it (owner ID: ${state_owner:-none});" \
          "fix: another --name, or --owner=${state_owner:-…} if it is yours"
      owned=1
      say "taking over $name"
      ;;
  esac
  wait_until_active
}

delete_own() {
  local i
  for ((i = 0; i < DELETE_TRIES; i++)); do
    look
    case $state in
      GONE) return 0 ;;
      UNKNOWN | DELETING) ;;
      *)
        # No label at all can be the service's doing; then having seen it created must do.
        if [ "${state_owner:-${created:+$owner}}" != "$owner" ]; then
          say "not deleting $name: its owner ID is ${state_owner:-none}, not $owner"
          return 1
        fi
        ! queued_resource delete --force || return 0
        ;;
    esac
    nap 10
  done
  say "$name could NOT be deleted and may go on costing money; fix: delete it yourself:" \
    "$(shell_quote gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force)"
  return 1
}

# --- The machines ---------------------------------------------------------------------------------

# ssh alone would wait for hours on a machine that vanished.
ssh_flags=(--ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4
  --ssh-flag=-oConnectTimeout=30)
scp_flags=(--scp-flag=-oConnectTimeout=30)
if [ -n "$internal_ips" ]; then
  ssh_flags+=(--internal-ip)
  scp_flags+=(--internal-ip)
fi
worker="bash igpt_jax/launch/tpu_worker.sh"
outcome=""   # of the run, by workers_state: none, running, ended, or unreachable
ended=0      # the status it ended with
started=""   # it may be running
follower=""  # process group that streams the log

# The nodes: one slice is one node.
nodes=("$name")
if [ "$slices" -gt 1 ]; then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi

# on_nodes COMMAND…: runs `COMMAND… NODE` for every node, at once; fails as one of those that fail.
on_nodes() {
  local node status=0 pid pids=()
  if [ ${#nodes[@]} -eq 1 ] || [ -n "$dry_run" ]; then
    for node in "${nodes[@]}"; do "$@" "$node" || return; done
    return
  fi
  for node in "${nodes[@]}"; do
    "$@" "$node" &
    pids+=("$!")
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
  return "$status"
}

# on_node WORKER LINE NODE
on_node() {
  run gcloud compute tpus tpu-vm ssh "$3" "${where[@]}" "${ssh_flags[@]}" \
    --worker="$1" --command="$2" </dev/null
}

# on_workers WORKER LINE: runs a line of shell on all workers, or on the first node's worker 0.
on_workers() {
  if [ "$1" = all ]; then on_nodes on_node all "$2"; else on_node "$1" "$2" "${nodes[0]}"; fi
}

# copy FILE TARGET NODE: copies a file into the home directory of every worker of a node.
copy() {
  run gcloud compute tpus tpu-vm scp "$1" "$3:$2" "${where[@]}" "${scp_flags[@]}" --worker=all
}

reach() {
  local i
  if [ -n "$dry_run" ]; then
    on_workers all true
    return
  fi
  for ((i = 0; i < REACH_TRIES; i++)); do
    ! on_workers all true || return 0
    ! machines_gone || return "$LOST"
    nap "$STATE_TICKS"
  done
  say "$name is ACTIVE but doesn't answer"
  return "$LOST"
}

# Makes the archive that `put_source` copies; first of all, so that a mistake costs nothing.
pack_source() {
  local archive=$tmp/igpt_jax.tar.gz
  need_checkout
  run tar -czf "$archive" -C "$REPO_DIR" --exclude=./.git --exclude='./.venv*' --exclude=./runs \
    --exclude=./build --exclude=./dist --exclude='*.egg-info' --exclude=__pycache__ \
    --exclude=.pytest_cache --exclude=.ruff_cache . || return
  [ -z "$dry_run" ] || return 0
  [ "$(du -k "$archive" | cut -f 1)" -le "$MAX_ARCHIVE_KIB" ] ||
    die "$REPO_DIR makes an archive of more than $MAX_ARCHIVE_KIB KiB; fix: move data and runs out" \
      "of it, or use --git=URL"
}

put_source() {
  local line="rm -rf igpt_jax"
  if [ -n "$git" ]; then
    line="$line && git clone --quiet -- $(shell_quote "$git") igpt_jax"
    [ -z "$ref" ] || line="$line && git -C igpt_jax checkout --quiet $(shell_quote "$ref")"
  else
    on_nodes copy "$tmp/igpt_jax.tar.gz" igpt_jax.tar.gz || return
    line="$line && mkdir igpt_jax && tar -xzf igpt_jax.tar.gz -C igpt_jax"
  fi
  on_workers all "$line"
}

mount_buckets() {
  local bucket
  for bucket in ${mount[@]+"${mount[@]}"}; do
    on_workers all "$worker mount $(shell_quote "${bucket%%:*}" "${bucket#*:}")" || return
  done
}

# Copies the environment of --env: on a command line others could read it.
put_env() {
  local variable
  if [ -z "$dry_run" ]; then
    for variable in "${variables[@]}"; do
      printf 'export %s\n' "$(shell_quote "$variable")"
    done >"$tmp/env"
    chmod 600 "$tmp/env"
  fi
  on_nodes copy "$tmp/env" igpt_jax_env
}

refused=""  # the first host found a mistake in the arguments, the config, the data or the work directory

# Lets the first host open what the run will need, before all hosts start. It tells how that ended; without
# a word of it the connection broke.
check_there() {
  local lines i
  [ -z "$no_check" ] || return 0
  set -- on_workers 0 "$worker check $(shell_quote "${main_args[@]}")"
  if [ -n "$dry_run" ]; then
    "$@"
    return
  fi
  for ((i = 1; i <= CHECK_TRIES; i++)); do
    lines=$("$@") || true
    case $lines in
      *": checked 0"*) return 0 ;;
      *": checked 2"*) refused=1 ;;
    esac
    case $lines in *": checked "*) return 1 ;; esac
    say "the connection broke during the check, try $i of $CHECK_TRIES"
    ! machines_gone || return "$LOST"
    nap "$STATE_TICKS"
  done
  return 1
}

start() {
  started=1
  on_workers all "env $(shell_quote "IGPT_OWNER=$run_owner") $worker start $(shell_quote "${main_args[@]}")"
}

workers_state() {
  local lines status
  outcome=unreachable ended=0
  lines=$(on_workers all "$worker status || echo igpt_jax_worker: none" 2>"$tmp/status") || return 0
  case $lines in
    *": running"*) outcome=running ;;
    *": ended "*) outcome=ended ;;
    *": none"*) outcome=none ;;
  esac
  # One host that was told to stop explains the others' failures, and so does a refused config.
  while read -r status; do
    case $status:$ended in
      0:*) ;;
      143:* | *:0) ended=$status ;;
      2:143) ;;
      2:*) ended=2 ;;
    esac
  done < <(sed -n 's/^igpt_jax_worker: ended //p' <<<"$lines")
}

# Streams worker 0's log, from its start or its end; sets `lasted`, in ticks.
stream() {
  local look_in=$STATE_TICKS
  lasted=0
  # A process group of its own: gcloud leaves its ssh behind when it alone is killed.
  set -m
  on_workers 0 "$worker follow $1" 2>"$tmp/follow" &
  follower=$!
  set +m
  while kill -0 "$follower" 2>/dev/null; do
    nap 1
    lasted=$((lasted + 1)) look_in=$((look_in - 1))
    [ "$look_in" -eq 0 ] || continue
    look_in=$STATE_TICKS
    ! machines_gone || return "$LOST"
  done
  wait "$follower" 2>/dev/null || true
  follower=""
}

follow() {
  local from=start idle=0 silent=0 stragglers="" i
  if [ -n "$dry_run" ]; then
    on_workers 0 "$worker follow start"
    on_workers all "$worker status || echo igpt_jax_worker: none"
    started=""
    return
  fi
  while :; do
    stream "$from" || return
    # What is logged while the connection is down stays in the host's log alone.
    from=end
    workers_state
    [ "$outcome" = unreachable ] || silent=0
    case $outcome in
      running)
        # Either the connection broke, or the first host ended before the others.
        [ "$lasted" -le 10 ] || idle=0
        idle=$((idle + 10))
        if [ "$idle" -gt "$STRAGGLER_TICKS" ]; then
          say "some hosts still run $STRAGGLER_TICKS s after the first one ended: stopping them"
          # What the others came to is what happened, not that these were stopped for it.
          stragglers=$((ended ? ended : 1))
          on_workers all "$worker stop $grace" || true
        fi
        ;;
      unreachable)
        silent=$((silent + 1))
        say "no answer from all of the machines, $silent of $REACH_TRIES tries"
        ! machines_gone || return "$LOST"
        [ "$silent" -lt "$REACH_TRIES" ] || return "$LOST"
        nap "$STATE_TICKS"
        ;;
      *) break ;;
    esac
    nap 10
  done
  started=""
  [ "$outcome" = ended ] || return "$LOST"
  ended=${stragglers:-$ended}
  [ "$ended" -ne 0 ] || return 0
  on_workers all "$worker report" || true
  # Preempted machines stop their processes before the queued resource says so.
  for ((i = 0; i < 3; i++)); do
    ! machines_gone || return "$LOST"
    [ "$ended" -ne 2 ] || break
    nap 10
  done
  say "the run ended with status $ended"
  return "$ended"
}
