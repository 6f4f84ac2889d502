#!/usr/bin/env bash
# Trains a small model on a folder of your own photos, sized to them and to this machine, and completes
# photos that it hasn't seen. It begins as the model that comes with igpt_jax, unless another is asked for or many
# photos and a fast machine allow a larger one.
#
#   bash launch/photos.sh DIR                             any folder of 20 images or more
#   bash launch/photos.sh DIR --config.sizing.minutes=50  a longer training; any flags of igpt_jax.main
#   bash launch/photos.sh DIR --config.sizing.packaged=False   from random values, however few the photos
#
# VENV     the environment (default: .venv in the repository)
# WORKDIR  where everything goes (default: runs/NAME of the folder)
# PYTHON   the interpreter that makes the environment (default: the first of 3.11 or later)
# EXTRA    cuda, tpu or none (default: that of the accelerator that is here)
#
# While it trains, WORKDIR/progress/STEP.png shows what it makes of photos that are held out. Ctrl-C
# stops it; the same command goes on where it stopped.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source-path=SCRIPTDIR source=environment.sh
. "$LAUNCH_DIR/environment.sh"

answer_help "$@"
case ${1:-} in
  "" | --*) die "${1:-no folder}: expected a folder of photos first, such as ~/Pictures" ;;
esac
[ -d "$1" ] || die "$1: no such folder; expected a folder of photos"
photos=$(cd "$1" && pwd)
shift
need_checkout
cd "$REPO_DIR"
name=${photos##*/}
workdir=${WORKDIR:-runs/${name:-photos}}
venv=${VENV:-$REPO_DIR/.venv}
install_venv "$venv"

# A finished training isn't begun again, but may be made longer.
stage pretrain --config=configs/photos.py --config.data.path="$photos" --workdir="$workdir" "$@"
[ -f "$workdir/training.json" ] || stop_here
for job in evaluate sample; do
  stage "$job" --config="$workdir/config.json" --workdir="$workdir" "$@" --config.job="$job"
done
printf '\n%s\n\n' "$(cat "$workdir/summary.md")"
printf '%s\n' "Look at $workdir/completions.png (held-out photos: given, completed, original), completions.gif," \
  "samples.png, loss.png and progress/. A small model knows colours, light and edges, few things."
