#!/usr/bin/env bash
# Writes the table of docs/scale.md: which model fits which TPU slice, and how fast it should train there.
#
#   bash tests/benchmarks/scale.sh runs/scale
#
# Needs the tpu extra and no TPU; PYTHON is the interpreter. A row takes one to two minutes of two cores. Every row is
# a config as it is shipped, on the mesh and with the remat that it chooses.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
workdir=${1:?a directory for the table}

row() { # config topology
  "${PYTHON:-python}" -m igpt_jax.main --config="configs/$1.py" --workdir="$workdir" --config.job=compile \
    --config.compile.topology="$2" --config.sample.samples=0
}

row imagenet32_s v5e:4x4
row imagenet32_s_fast v5e:4x4
row imagenet32_m v5e:4x4
row imagenet32_m_fast v5e:4x4
row imagenet32_l v5e:4x4
row imagenet48_l v5e:8x8
row imagenet64_xl_fast v5e:16x16
row imagenet32_s v5p:2x2x4
row imagenet32_s_fast v5p:2x2x4
row imagenet32_m v5p:2x2x4
row imagenet32_m_fast v5p:2x2x4
row imagenet32_l v5p:2x2x4
row imagenet32_l_fast v5p:2x2x4
row imagenet48_l v5p:2x4x4
row imagenet64_xl v5p:4x4x4
row imagenet64_xl_fast v5p:4x4x4
row imagenet32_s v6e:4x4
row imagenet32_s_fast v6e:4x4
row imagenet32_m v6e:4x4
row imagenet32_m_fast v6e:4x4
row imagenet32_l v6e:4x4
row imagenet32_l_fast v6e:4x4
row imagenet48_l v6e:4x4
row imagenet64_xl_fast v6e:16x16
row imagenet32_s tpu7x:2x2x2
row imagenet32_m tpu7x:2x2x2
row imagenet32_l tpu7x:2x2x2
row imagenet64_xl_fast tpu7x:4x4x4
cat "$workdir/scale.md"
