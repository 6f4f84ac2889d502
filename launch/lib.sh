# shellcheck shell=bash
# What the launch scripts share: messages, quoting, dry runs, arguments. It is sourced, never run,
# and knows no platform: what one script alone needs stays in that script.

# gcsfuse renames a directory of at most so many entries in a bucket without folders of its own;
# checkpoints are written under another name and renamed.
# shellcheck disable=SC2034  # for the scripts that source this
RENAME_LIMIT=100000

# One second, the unit of every wait; tests make it shorter.
TICK=${LAUNCH_TICK:-1}
dry_run="" no_check=""
LAUNCH_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck disable=SC2034  # for the scripts that source this
REPO_DIR=$(dirname "$LAUNCH_DIR")
# Those of an installed package have no checkout around them: paths are taken from where one stands.
[ -f "$REPO_DIR/setup.py" ] || REPO_DIR=$PWD

# Prints the comment at the head of the script: it is the script's manual.
usage() {
  awk 'NR > 1 { if (!/^#( |$)/) exit; sub(/^# ?/, ""); print }' "$0"
}

# answer_help ARG…: prints the manual and ends the script if the first argument asks for it.
answer_help() {
  case ${1:-} in
    --help | -h)
      usage
      exit 0
      ;;
  esac
}

say() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
}

# A mistake of the caller: nothing has been done yet.
die() {
  say "error: $*"
  exit 2
}

# literally TEXT FROM TO: prints TEXT with every FROM replaced. ${text//from/to} gives backslashes and
# ampersands a meaning that differs between versions of bash.
literally() {
  local rest=$1 out=""
  while [[ $rest == *"$2"* ]]; do
    out=$out${rest%%"$2"*}$3
    rest=${rest#*"$2"}
  done
  printf '%s' "$out$rest"
}

# Prints the words so that any POSIX shell reads back exactly the same ones.
shell_quote() {
  local word line=""
  for word in "$@"; do
    case $word in
      "" | *[!A-Za-z0-9_./:=@%+,-]*) line="$line '$(literally "$word" "'" "'\\''")'" ;;
      *) line="$line $word" ;;
    esac
  done
  printf '%s\n' "${line# }"
}

# Prints the words as one JSON string each, separated by commas (YAML reads them too).
json_strings() {
  local word line=""
  for word in "$@"; do
    word=$(literally "$word" "\\" "\\\\")
    word=$(literally "$word" '"' '\"')
    word=$(literally "$word" $'\t' '\t')
    line="$line, \"$word\""
  done
  printf '%s\n' "${line#, }"
}

# Runs a command, or in a dry run prints it.
run() {
  if [ -n "$dry_run" ]; then shell_quote "$@"; else "$@"; fi
}

need() {
  local tool
  [ -z "$dry_run" ] || return 0
  for tool in "$@"; do
    command -v "$tool" >/dev/null ||
      die "missing tool: $tool; expected on PATH; fix: install it, see launch/README.md"
  done
}

# setting_of PROGRAM ARG…: prints what `PROGRAM config ARG…` does, which asks no server; nothing if that is
# unset, or in a dry run, which needs no such program.
setting_of() {
  [ -n "$dry_run" ] || "$1" config "${@:2}" 2>/dev/null </dev/null || true
}

# need_option NAME VALUE: an option that has no default.
need_option() {
  [ -n "$2" ] || die "missing option: --$1=…; see --help"
}

need_count() {
  case $2 in
    "" | *[!0-9]*) die "--$1=$2; expected a whole number, 0 or more" ;;
  esac
}

need_name() {
  [[ $2 =~ ^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$ ]] ||
    die "--$1=$2; expected lower-case letters, digits and dashes, a letter first, at most 63"
}

need_checkout() {
  [ -f "$REPO_DIR/setup.py" ] || die "$REPO_DIR has no setup.py; expected a checkout of igpt_jax, which" \
    "this script installs; fix: clone it and use its launch/, or here: igpt_jax --config NAME"
}

# read_options SPEC… -- ARG…: reads the launch options of ARG…, up to "--"; `main_args` is what follows.
# --NAME= sets a variable of that name (with underscores), --NAME+= adds to an array, --NAME sets it to
# 1, and "*" adds what is none of these to the array `others`. Every script has --dry-run and --help.
read_options() {
  local specs=" --dry-run " option variable
  while [ "$1" != -- ]; do
    specs="$specs$1 "
    shift
  done
  shift
  main_args=() others=()
  while [ $# -gt 0 ]; do
    answer_help "$1"
    case $1 in
      --)
        shift
        # shellcheck disable=SC2034  # for the scripts that source this
        main_args=("$@")
        return
        ;;
    esac
    option=${1%%=*} variable=${1%%=*}
    variable=${variable#--} variable=${variable//-/_}
    [[ $option =~ ^--[a-z-]+$ ]] || option=none
    [ "$option" = "$1" ] || option="$option="
    case $specs in
      *" $option "*)
        if [[ $option == *= ]]; then printf -v "$variable" %s "${1#*=}"; else printf -v "$variable" 1; fi
        ;;
      *" ${option%=}+= "*) eval "$variable+=(\"\${1#*=}\")" ;;
      *" * "*) others+=("$1") ;;
      *) die "unknown option: $1; launch options are written --name=value and come before \"--\"," \
        "igpt_jax's own (--config=… --workdir=…) after it; see --help" ;;
    esac
    shift
  done
}

# Checks what goes to igpt_jax.main and sets `workdir`.
check_main_args() {
  local config="" arg previous=""
  workdir=""
  for arg in "$@"; do
    case $arg in
      *$'\n'*) die "an argument has a line break in it: $arg" ;;
      --config=*) config=${arg#*=} ;;
      --workdir=*) workdir=${arg#*=} ;;
    esac
    case $previous in
      --config) config=$arg ;;
      --workdir) workdir=$arg ;;
    esac
    previous=$arg
  done
  [ -n "$config" ] || die "missing argument: --config=…; for example -- --config=configs/imagenet32_s.py"
  [ -n "$workdir" ] || die "missing argument: --workdir=…; the directory the run lives in"
  case $workdir in
    gs://[!/]*) ;;
    gs:* | *://*) die "--workdir=$workdir; expected a directory, or a bucket's address, gs://BUCKET/RUN" ;;
  esac
}

# nap N: sleeps N ticks, in steps, so that a signal is answered within one.
nap() {
  local i
  for ((i = 0; i < $1; i++)); do sleep "$TICK"; done
}

# check_mounts OPTION [NAME:DIR…]
check_mounts() {
  local option=$1 mount
  shift
  for mount in "$@"; do
    [[ $mount =~ ^[^:]+:/.+$ ]] || die "--$option=$mount; expected NAME:/DIRECTORY"
  done
}

# check_lasting_workdir [NAME:DIR…]: refuses a work directory that goes when the machines go. Only one in
# a bucket, or under something mounted, outlives them and is the same on every host.
check_lasting_workdir() {
  local mount
  case $workdir in gs://*) return 0 ;; esac
  for mount in "$@"; do
    case $workdir/ in "${mount#*:}"/*) return 0 ;; esac
  done
  die "--workdir=$workdir would be deleted with the machines; fix: a bucket's address, gs://BUCKET/RUN," \
    "or a directory under what --mount (xpk.sh: --storage) mounts"
}

# --- Before anything is asked for -----------------------------------------------------------------

# find_reader: prints an interpreter that can read a config here: $PYTHON if set, else that of the
# repository's environment, else one on PATH. It needs neither jax nor the rest of the package's.
find_reader() {
  local python
  for python in ${PYTHON:+"$PYTHON"} "$REPO_DIR/.venv/bin/python" python3 python; do
    if (cd "$REPO_DIR" && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))
import absl, ml_collections, igpt_jax') >/dev/null 2>&1; then
      printf '%s' "$python"
      return
    fi
    [ -z "${PYTHON:-}" ] || break
  done
  die "no Python 3.11 or later that can read the config here${PYTHON:+ (PYTHON=$PYTHON)}; fix: python3 -m" \
    "venv $REPO_DIR/.venv && $REPO_DIR/.venv/bin/pip install absl-py ml_collections (with jax it says" \
    "more: --editable $REPO_DIR), or PYTHON=…, or --no-check, which asks for machines unchecked"
}

needed_grace=0  # seconds that the run needs to save, by preflight

# preflight SLICE ARG…: ends the script with 2 if igpt_jax.main would refuse the arguments, or SLICE (a
# type, KIND:TOPOLOGY, or "") doesn't exist or doesn't suit them. It prints what they would take.
preflight() {
  local slice=$1 python report line
  shift
  [ -z "$no_check" ] || return 0
  python=$(find_reader) || exit 2
  # Relative paths are taken from where entry.sh runs.
  report=$(cd "$REPO_DIR" && "$python" -m igpt_jax.main "$@" --check="$slice") || exit 2
  needed_grace=$(sed -n 's/^grace: \([0-9]*\) s.*/\1/p' <<<"$report")
  needed_grace=${needed_grace:-0}
  # A babysitter's first look has said it already.
  [ -z "${BABYSITTER:-}" ] || return 0
  while read -r line; do say "$line"; done <<<"$report"
}

# choose_grace LEAST [NOTICE]: sets `grace`, unless it is set, to the seconds that the run needs to save,
# at least LEAST; and says if it gets less, or the machines go NOTICE seconds after they are told.
choose_grace() {
  local notice=${2:-}
  [ -n "$grace" ] || grace=$((needed_grace > $1 ? needed_grace : $1))
  [ "$grace" -ge "$needed_grace" ] ||
    say "--grace=$grace: to save, the run needs $needed_grace s: more may be lost than its last two steps"
  [ -z "$notice" ] || [ "$needed_grace" -le "$notice" ] ||
    say "a preemption comes with $notice s of notice, to save takes $needed_grace s: what was trained since" \
      "the last checkpoint is lost then; fix: a smaller --config.train.checkpoint_every"
}

# choose_slices: reads the option `slices`, and sets `main_args` to "$@", for so many.
choose_slices() {
  main_args=("$@")
  [ -n "$slices" ] || slices=1
  need_count slices "$slices"
  [ "$slices" -gt 0 ] || die "--slices=0; expected 1 or more"
  [ "$slices" -eq 1 ] || main_args+=("--config.mesh.slices=$slices")
}

# check_watch: reads the options `watch` and `watch_on`, and `name`; sets `watched` to the jobs.
# shellcheck disable=SC2154  # the options are those of the scripts that call this
check_watch() {
  local job
  watched=()
  [ -n "$watch" ] || return 0
  IFS=, read -r -a watched <<<"$watch"
  for job in "${watched[@]}"; do
    case $job in
      evaluate | probe | sample | quality) ;;
      *) die "--watch=$watch; expected some of evaluate, probe, sample, quality, with commas between them" ;;
    esac
    need_name name "$name-$job"
  done
  need_option watch-on "$watch_on"
}

# watch_args JOB ARG…: sets `job_args` to the arguments of a job that evaluates each checkpoint of the run
# with ARG…, from the first, for which it waits a day, until the run ends.
watch_args() {
  local job=$1
  shift
  # shellcheck disable=SC2034  # for the scripts that source this
  job_args=("$@" "--config.job=$job" --config.watch=True --config.watch_patience=86400)
}

# read_env NAME[=VALUE]…: sets `variables` to NAME=VALUE…; NAME alone has the value that it has here.
read_env() {
  local variable key
  variables=()
  for variable in "$@"; do
    key=${variable%%=*}
    [[ $key =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || die "--env=$key; expected NAME, or NAME=VALUE"
    if [ "$key" = "$variable" ]; then
      [ -n "${!key+set}" ] || die "--env=$key: not set here; expected a variable of this environment; fix:" \
        "export $key, or --env=$key=VALUE"
      variable=$key=${!key}
    fi
    case $variable in *$'\n'*) die "--env=$key: its value has a line break in it" ;; esac
    variables+=("$variable")
  done
}
