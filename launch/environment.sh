# shellcheck shell=bash
# The environments that scripts install, and the jobs that they run in them. It is sourced after lib.sh.

# find_python: prints an interpreter of 3.11 or later: $PYTHON if set, else the first on PATH.
find_python() {
  local python
  for python in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s' "$python"
      return
    fi
    [ -z "${PYTHON:-}" ] || break
  done
  die "no Python 3.11 or later with venv found${PYTHON:+ (PYTHON=$PYTHON)}; fix: install one, or set PYTHON"
}

# choose_constraints PYTHON: sets `constraints` to pip's option for the releases that were tested with
# this Python; to nothing where none were. CONSTRAINTS names another file, or if empty none.
choose_constraints() {
  local file tag
  constraints=()
  if [ -n "${CONSTRAINTS+set}" ]; then
    [ -n "$CONSTRAINTS" ] || return 0
    file=$CONSTRAINTS
    [ -f "$file" ] || die "CONSTRAINTS=$file: no such file; expected one as in constraints/, or nothing"
  else
    tag=$("$1" -c 'import sys; print("py%d%d" % sys.version_info[:2])' 2>/dev/null || echo "$1")
    file=$REPO_DIR/constraints/$tag.txt
    if [ ! -f "$file" ]; then
      say "there is no constraints/$tag.txt: installing the newest releases that setup.py allows, untested"
      return 0
    fi
  fi
  constraints=(--constraint "$file")
}

# choose_extra: sets `extra` to that of the accelerator that is here, unless it is set; "" if there is none.
choose_extra() {
  if [ -z "$extra" ]; then
    if command -v nvidia-smi >/dev/null; then
      extra=cuda
    elif compgen -G "/dev/accel*" >/dev/null || compgen -G "/dev/vfio/[0-9]*" >/dev/null; then
      extra=tpu
    else
      extra=none
    fi
  fi
  case $extra in
    cuda | tpu) ;;
    none) extra="" ;;
    *) die "--extra=$extra (or EXTRA); expected cuda, tpu or none" ;;
  esac
}

# make_venv DIR PYTHON [EXTRA]: an environment with the package and one of its extras, of the releases
# in constraints/. A stamp says what was installed: an interrupted or outdated installation is done again.
make_venv() {
  local dir=$1 python=$2 extra=${3:-} stamp wanted
  need_checkout
  choose_constraints "$python"
  stamp=$dir/igpt_jax${extra:+-$extra}.stamp
  wanted=$(cat "$REPO_DIR/setup.py" ${constraints[1]+"${constraints[1]}"} | cksum)
  [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || return 0
  run "$python" -m venv "$dir"
  run "$dir/bin/pip" install --quiet --disable-pip-version-check ${constraints[@]+"${constraints[@]}"} \
    --editable "${REPO_DIR}${extra:+[$extra]}"
  [ -n "$dry_run" ] || printf '%s\n' "$wanted" >"$stamp"
}

# install_venv DIR: makes the environment of a script that runs the whole of a config on this machine, with
# the extra of EXTRA or else of its accelerator, and says how long that takes.
install_venv() {
  local extra=${EXTRA:-} takes="about a gigabyte, a minute or two"
  choose_extra
  [ -z "$extra" ] || takes="with the $extra extra: some gigabytes, several minutes"
  if [ ! -f "$1/igpt_jax${extra:+-$extra}.stamp" ]; then
    say "installing into $1 ($takes)"
  fi
  make_venv "$1" "$(find_python)" "$extra"
}

# stage JOB ARG…: runs one job of such a script in the environment `venv`. A stop signal is handed on,
# and ends the script as any failure of the job does.
stage() {
  local status
  say "$1"
  run_job "${@:2}"
  [ "$status" -ne 143 ] || stop_here
  [ "$status" -eq 0 ] || exit "$status"
}

# run_job ARG…: runs a job in the environment `venv`, hands a stop signal on, and sets `status`, 143 if it was
# stopped.
run_job() {
  local child="" stopped=""
  # Ctrl-C reaches the job by itself, other signals this script alone.
  trap 'stopped=1' INT
  trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM
  # A shell's background commands ignore Ctrl-C.
  # shellcheck disable=SC2154  # a variable of the scripts that call this
  (trap - INT && PYTHON=$venv/bin/python exec bash "$LAUNCH_DIR/entry.sh" "$@") &
  child=$!
  while :; do
    status=0
    wait "$child" || status=$?
    # A trapped signal ends the wait, not the child.
    kill -0 "$child" 2>/dev/null || break
  done
  trap - INT TERM
  [ -z "$stopped" ] || status=143
}

# Ends a script whose job was told to stop.
stop_here() {
  say "stopped; the same command goes on from here"
  exit 143
}
