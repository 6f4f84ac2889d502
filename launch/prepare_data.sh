#!/usr/bin/env bash
# Prepares a data set once, so that training reads it without TensorFlow.
#
#   launch/prepare_data.sh -- --config=configs/imagenet32_s.py --workdir=runs/prepare
#
# Makes a virtual environment of its own with the `prepare` extra, which TensorFlow Datasets needs
# for this one job, and runs `python -m igpt_jax.main` with what comes after "--" and
# --config.job=prepare. Run it again after an interruption: what was downloaded is kept, and what is
# ready is left alone. But TFDS writes a data set whole or not at all: a generation that was cut short
# begins anew, so give ImageNet's a machine that stays up, not a Spot one. ImageNet's archives must be
# downloaded by hand first, and the job says where it expects them.
#
# --config.data.data_dir is a local path (of prepared data, of downloads and of what is in the making):
# gs://… is refused, here and in training. Prepare on a disk and copy, or write through a mount.
#
#   --venv=DIR       the virtual environment; default: .venv-prepare in the repository
#   --python=PYTHON  the interpreter that makes it, 3.11 or later; default: python3
#   --dry-run        read the config, which needs a Python with absl-py and ml_collections, print the
#                    commands, run nothing
#   --no-check       with --dry-run: don't read the config
#
# launch/README.md tells how to bring the prepared data to a bucket.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source-path=SCRIPTDIR source=environment.sh
. "$LAUNCH_DIR/environment.sh"

venv=$REPO_DIR/.venv-prepare python=python3
read_options --venv= --python= --no-check -- "$@"
set -- ${main_args[@]+"${main_args[@]}"}
need_option venv "$venv"
check_main_args "$@"
need "$python"
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac

[ -n "$dry_run" ] || "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  die "--python=$python; expected Python 3.11 or later"
[ -z "$dry_run" ] || preflight "" "$@" --config.job=prepare
make_venv "$venv" "$python" prepare
run env PYTHON="$venv/bin/python" bash "$LAUNCH_DIR/entry.sh" "$@" --config.job=prepare
