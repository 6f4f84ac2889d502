#!/usr/bin/env bash
# Writes the table of docs/scale.md: which model fits which TPU slice, and how fast it should train there.
#
#   bash tests/benchmarks/scale.sh runs/scale
#
# Needs the tpu extra and no TPU; PYTHON is the interpreter. A row takes one to two minutes of two cores. Meshes and
# batches are those that `--config.compile.plan=True` preferred, or their neighbours.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
workdir=${1:?a directory for the table}
images=128000000 # the paper's number, whatever the batch

row() { # config topology data fsdp batch remat
  "${PYTHON:-python}" -m igpt_jax.main --config="configs/$1.py" --workdir="$workdir" --config.job=compile \
    --config.compile.topology="$2" --config.mesh.data="$3" --config.mesh.fsdp="$4" --config.train.batch_size="$5" \
    --config.train.steps=$((images / $5)) --config.train.warmup_steps=0 --config.model.remat="$6" \
    --config.sample.samples=0
}

row imagenet32_s v5e:4x4 2 8 256 names
row imagenet32_m v5e:4x4 2 8 256 names
row imagenet32_l v5e:4x4 2 8 128 names
row imagenet48_l v5e:8x8 8 8 128 names
row imagenet64_xl v5e:16x16 8 32 256 full
row imagenet32_s v5p:2x2x4 2 8 256 names
row imagenet32_m v5p:2x2x4 2 8 256 names
row imagenet32_l v5p:2x2x4 2 8 256 names
row imagenet48_l v5p:2x4x4 4 8 256 names
row imagenet64_xl v5p:4x4x4 2 32 256 names
row imagenet64_xl v5p:8x8x8 16 32 1024 names
row imagenet32_s v6e:4x4 2 8 256 names
row imagenet32_m v6e:4x4 2 8 256 names
row imagenet32_l v6e:4x4 2 8 256 names
row imagenet48_l v6e:4x4 2 8 128 names
row imagenet64_xl v6e:16x16 8 32 512 names
cat "$workdir/scale.md"
