#!/usr/bin/env bash
# Installs into a virtual environment and runs a config whole: pretrain, evaluate, probe, complete.
#
#   bash launch/local.sh                             configs/quickstart.py
#   bash launch/local.sh cifar10_small               any config, by path or name; what follows goes to igpt_jax.main
#
# VENV         the environment (default: .venv in the repository)
# WORKDIR      where everything goes (default: runs/CONFIG)
# PYTHON       the interpreter that makes the environment (default: the first of 3.11 or later)
# EXTRA        cuda, tpu or none (default: that of the accelerator that is here)
# CONSTRAINTS  the releases to install (default: constraints/ of this Python; empty: the newest)
#
# Ctrl-C saves; running it again goes on where it stopped.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source-path=SCRIPTDIR source=environment.sh
. "$LAUNCH_DIR/environment.sh"

answer_help "$@"
config=${1:-configs/quickstart.py}
[ $# -eq 0 ] || shift
case $config in --*) die "$config: expected a config file first, such as configs/quickstart.py" ;; esac
need_checkout
cd "$REPO_DIR"
[ -f "$config" ] || [ ! -f "configs/$config.py" ] || config=configs/$config.py
[ -f "$config" ] || die "$config: no such config; expected a path, or the name of one in configs/"
name=$(basename "$config" .py)
workdir=${WORKDIR:-runs/$name}
venv=${VENV:-$REPO_DIR/.venv}

install_venv "$venv"

for job in pretrain evaluate probe lowdata sample; do
  stage "$job" --config="$config" --workdir="$workdir" "$@" --config.job="$job"
done
printf '\n'
cat "$workdir/summary.md"
printf '\nLook at %s/completions.png, samples.png, probe.png and loss.png\n' "$workdir"
