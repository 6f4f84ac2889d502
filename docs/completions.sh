#!/usr/bin/env bash
# Draws docs/completions.png, the README's first image: photographs completed by the packaged model.
#
#   bash docs/completions.sh                                    by the model that comes with igpt_jax
#   bash docs/completions.sh --config.checkpoint=WORKDIR        any flags of igpt_jax.main
#
# PYTHON   the interpreter of an environment with igpt_jax (default: python)
# TARGET   the file to write (default: docs/completions.png)
#
# The photographs are those of igpt_jax/demo/examples that are in colour: scikit-image's, in the public domain
# or CC0. The completions are the first four of seed 0, none is picked.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=${TARGET:-docs/completions.png}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/photographs"
for name in astronaut cat coffee rocket; do
  cp "igpt_jax/demo/examples/$name.jpg" "$work/photographs"
done
"${PYTHON:-python}" -m igpt_jax.main --config=configs/complete.py --workdir="$work/out" \
  --config.complete.images="$work/photographs" --config.complete.n=4 \
  --config.sample.top_p=0.95 --config.sample.scale=6 "$@"
cp "$work/out/grid.png" "$target"
echo "wrote $target"
