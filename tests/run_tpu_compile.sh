#!/usr/bin/env bash
# Runs the tests that compile for TPUs that aren't there, in an environment of their own (libtpu is
# 0.7 GB). VENV and PYTHON as in launch/local.sh.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch/lib.sh"
# shellcheck source-path=SCRIPTDIR source=../launch/environment.sh
. "$LAUNCH_DIR/environment.sh"

cd "$REPO_DIR"
venv=${VENV:-$REPO_DIR/.venv-tpu}
python=$(find_python)
make_venv "$venv" "$python" tpu
make_venv "$venv" "$python" test
export TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu TPU_ACCELERATOR_TYPE=v5litepod-4 TPU_WORKER_HOSTNAMES=localhost
# Two processes: the TPU's compiler keeps one core busy.
exec "$venv/bin/python" -m pytest --numprocesses=2 --dist=loadfile -m tpu_compile \
  tests/tpu_compile tests/unit/model/test_attention_tpu.py "$@"
