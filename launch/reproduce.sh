#!/usr/bin/env bash
# Evaluates OpenAI's released models on their own tokens, and compares with what they published.
#
#   launch/reproduce.sh                  small, medium and large
#   launch/reproduce.sh small medium     these
#
# For each size it fetches the checkpoint (0.3, 1.8, 5.4 GB) and ImageNet's 50,000 held-out images as
# tokens, evaluates every image once in float32, and prints a line: pass or FAIL, nats per token as
# measured, as published, and the tolerance. Ends with 0 if all sizes pass, with 1 if one doesn't. It
# wants a network and an accelerator: on two CPU cores small takes more than a day.
#
# Run it again after an interruption: what was fetched or evaluated is kept.
#
#   --directory=DIR  where the files go; default: downloads in the repository
#   --workdir=DIR    where results go; default: runs/reproduce in the repository
#   --url=URL        a mirror of the release's files
#   --venv=DIR       the virtual environment; default: .venv in the repository
#   --extra=EXTRA    what it is for: cuda, tpu or none; default: the accelerator that is here
#   --dry-run        print the commands, run nothing
#
# What comes after "--" goes to igpt_jax.main, such as --config.evaluate.batch_size=16 if memory is
# short. PYTHON names the interpreter that makes the environment.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source-path=SCRIPTDIR source=environment.sh
. "$LAUNCH_DIR/environment.sh"

# The published figures have four decimals, and are of 49,984 of the 50,000 images: the original leaves
# out a last batch that isn't full. Both are worth 0.0001.
TOLERANCE=0.0005
STEP=1000000

directory=$REPO_DIR/downloads workdir=$REPO_DIR/runs/reproduce url="" venv=$REPO_DIR/.venv extra=""
read_options --directory= --workdir= --url= --venv= --extra= "*" -- "$@"
sizes=(${others[@]+"${others[@]}"})
[ ${#sizes[@]} -gt 0 ] || sizes=(small medium large)
for size in "${sizes[@]}"; do
  case $size in
    small | medium | large) ;;
    *) die "$size: no such size; expected small, medium or large (XL was not released)" ;;
  esac
done
choose_extra
for name in directory workdir venv; do
  need_option "$name" "${!name}"
  case ${!name} in /*) ;; *) printf -v "$name" %s "$PWD/${!name}" ;; esac
done

python=$(find_python)
make_venv "$venv" "$python" "$extra"

# job NAME CONFIG ARG…: runs a job; ends the script if it was stopped. JAX would multiply float32 in fewer
# bits on accelerators.
job() {
  local status=0
  run env PYTHON="$venv/bin/python" JAX_DEFAULT_MATMUL_PRECISION=highest \
    bash "$LAUNCH_DIR/entry.sh" --config="$2" --config.job="$1" "${@:3}" || status=$?
  [ "$status" -lt 128 ] || exit "$status"
  return "$status"
}

# compare SIZE PUBLISHED EVALUATION: prints the line of a size.
compare() {
  "$venv/bin/python" - "$@" "$TOLERANCE" <<'END'
import json, sys

size, published, path, tolerance = sys.argv[1:]
with open(path, encoding="utf-8") as file:
  values = json.load(file)
nats = values["nats_per_token"]
good = abs(nats - float(published)) <= float(tolerance)
print(
  f"{'pass' if good else 'FAIL'}  {size:6}  measured {nats:.4f} nats/token of {values['images']:,} images, "
  f"expected {published}, tolerance {tolerance}"
)
sys.exit(not good)
END
}

lines=() failed=0
for size in "${sizes[@]}"; do
  case $size in
    small) published=2.0895 ;;
    medium) published=2.0614 ;;
    large) published=2.0466 ;;
  esac
  letter=${size:0:1}
  config=configs/openai_${letter}_eval.py results=$workdir/$size
  # A result is kept if made with the same settings, limits such as evaluate.images too, on the same folder.
  decides=$results/made_with.txt made_with=$(printf '%s\n' "$directory" ${main_args[@]+"${main_args[@]}"})
  if [ ! -f "$results/evaluation.json" ] || [ "$made_with" != "$(cat "$decides" 2>/dev/null)" ]; then
    say "$size: fetching into $directory"
    fetched=0
    job download "$config" --workdir="$results" --config.download.directory="$directory" \
      --config.download.url="$url" || fetched=$?
    if [ "$fetched" -ne 0 ]; then
      lines+=("FAIL  $size  not fetched: job download ended with status $fetched") failed=1
      continue
    fi
    say "$size: evaluating"
    evaluated=0
    [ -n "$dry_run" ] || rm -f "$decides"
    job evaluate "$config" --workdir="$results" \
      --config.checkpoint="$directory/igpt-$letter-$STEP/model.ckpt-$STEP" \
      --config.data.path="$directory/datasets/imagenet_teX.npy" \
      ${main_args[@]+"${main_args[@]}"} || evaluated=$?
    if [ "$evaluated" -ne 0 ]; then
      lines+=("FAIL  $size  not evaluated: job evaluate ended with status $evaluated") failed=1
      continue
    fi
  fi
  [ -z "$dry_run" ] || continue
  printf '%s\n' "$made_with" >"$decides"
  line=$(compare "$size" "$published" "$results/evaluation.json") || failed=1
  lines+=("${line:-FAIL  $size  $results/evaluation.json is unreadable; fix: remove it}")
done
[ -n "$dry_run" ] || printf '%s\n' "${lines[@]}"
exit "$failed"
