#!/usr/bin/env bash
# Measures the project's models on this machine in about 10 minutes, for a report to send back in an issue.
#
#   bash launch/first_contact.sh                 a GPU, a TPU of one host, or a CPU (with a tiny model)
#   bash launch/first_contact.sh -- --config.first_contact.minutes=20 --config.model.remat=full
#
# It needs no data and no checkpoint. In the work directory it leaves first_contact.md, a table, and
# first_contact.json, which name no host, user or path: time of a training step, memory and MFU of iGPT-S, M
# and L as their configs are shipped, sampling, input, and on TPUs the forecast beside. What doesn't fit or
# fails is a line of the table. Run it again for what was left out for time or failed.
#
# A TPU slice of several hosts: launch/tpu_vm.sh … -- --config=configs/first_contact.py --workdir=…, or
# this script on every host at once with -- --distributed; the first host writes the report.
#
#   --workdir=DIR  where the report goes; default: runs/first_contact in the repository
#   --venv=DIR     the virtual environment; default: .venv in the repository
#   --extra=EXTRA  what it is for: cuda, tpu or none; default: the accelerator that is here
#   --dry-run      print the commands, run nothing
#
# What comes after "--" goes to igpt_jax.main. PYTHON names the interpreter that makes the environment.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source-path=SCRIPTDIR source=environment.sh
. "$LAUNCH_DIR/environment.sh"

# Starts, at most: a part that ends the process is tried twice, and the others all the same.
STARTS=10

workdir=$REPO_DIR/runs/first_contact venv=$REPO_DIR/.venv extra=""
read_options --workdir= --venv= --extra= -- "$@"
choose_extra
for name in workdir venv; do
  need_option "$name" "${!name}"
  case ${!name} in /* | gs://*) ;; *) printf -v "$name" %s "$PWD/${!name}" ;; esac
done

make_venv "$venv" "$(find_python)" "$extra"

job=(--config=configs/first_contact.py --workdir="$workdir" ${main_args[@]+"${main_args[@]}"})
if [ -n "$dry_run" ]; then
  run env PYTHON="$venv/bin/python" bash "$LAUNCH_DIR/entry.sh" "${job[@]}"
  exit 0
fi
for ((start = 1; start <= STARTS; start++)); do
  run_job "${job[@]}"
  # A signal of its own ended it (a driver's abort, a compiler's fault), not one from outside.
  case $status in
    132 | 134 | 135 | 136 | 137 | 139) say "a part ended the program with status $status; going on with the rest" ;;
    143) stop_here ;;
    *) exit "$status" ;;
  esac
done
exit "$status"
