#!/usr/bin/env bash
# Runs the tests, in a virtual environment that it makes if need be.
#
#   bash tests/run.sh                  everything but what is marked slow, and what needs an accelerator
#   bash tests/run.sh fast             the unit tests, for while one works
#   bash tests/run.sh slow             what is marked slow, which the first leaves out
#   bash tests/run.sh tests/unit/data  what follows goes to pytest
#
# VENV, PYTHON and CONSTRAINTS as in launch/local.sh.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch/lib.sh"
# shellcheck source-path=SCRIPTDIR source=../launch/environment.sh
. "$LAUNCH_DIR/environment.sh"

case ${1:-} in
  fast) set -- tests/unit -m "not slow" "${@:2}" ;;
  slow) set -- -m slow "${@:2}" ;;
  "" | -*) set -- -m "not slow" "$@" ;;
esac
cd "$REPO_DIR"
venv=${VENV:-$REPO_DIR/.venv}
python=$(find_python)
make_venv "$venv" "$python" test
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
# Three processes, each file whole in one of them: compiling, which most tests do, keeps one core busy, and
# tests of processes and buckets wait more than they compute.
JAX_PLATFORMS=cpu exec "$venv/bin/python" -m pytest --numprocesses=3 --dist=loadfile "$@"
