#!/usr/bin/env bash
# Lint, types and tests, or the tests that are named alone: scripts/test.sh test/engine
# Every check runs; the exit status tells whether all passed.
#
# With SGLang 0.5.17, whose figures were measured on GPUs; SGLANG=0.5.23 takes the newer one.
set -euo pipefail
export SGLANG="${SGLANG:-0.5.17}"
export VENV="${VENV:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv-$SGLANG}"
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

setup_environment
cd "$repo_root"

status=0
check() {
    echo "== $*"
    "$@" || status=1
}

if [[ $# -eq 0 ]]; then
    check "$venv/bin/ruff" check .
    check "$venv/bin/ruff" format --check .
    check "$venv/bin/pyright"
    set -- test
fi
check "$venv/bin/python" -m pytest "$@"
exit "$status"
