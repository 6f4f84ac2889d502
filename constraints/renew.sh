#!/usr/bin/env bash
# Writes constraints/pyXY.txt: the releases that pip chooses today for the extra `test`.
#
#   bash constraints/renew.sh python3.11 python3.12 python3.13
#
# It downloads what pip must read, and installs nothing. What it has chosen is tested only once
# `bash .ci/run` has passed with each of them.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch/lib.sh"

answer_help "$@"
[ $# -gt 0 ] || die "no interpreter is named; see --help"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python; do
  "$python" -m venv --clear "$folder/venv"
  "$folder/venv/bin/pip" install --quiet --dry-run --ignore-installed --report="$folder/report.json" \
    "${REPO_DIR}[test]"
  "$folder/venv/bin/python" - "$folder/report.json" "$REPO_DIR/constraints" <<'PYTHON'
import json, pathlib, sys

report, target = map(pathlib.Path, sys.argv[1:])
packages = [package["metadata"] for package in json.loads(report.read_text())["install"]]
pins = {f"{package['name']}=={package['version']}" for package in packages}
lines = sorted((pin for pin in pins if not pin.startswith("igpt_jax==")), key=str.lower)
path = target / "py{}{}.txt".format(*sys.version_info)
path.write_text("\n".join(lines) + "\n")
print(f"{path}: {len(lines)} releases")
PYTHON
done
