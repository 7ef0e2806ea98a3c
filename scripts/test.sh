#!/usr/bin/env bash
# Lint, types and tests. Every check runs; the exit status tells whether all passed.
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

setup_environment
cd "$repo_root"

status=0
check() {
    echo "== $*"
    "$@" || status=1
}

check "$venv/bin/ruff" check .
check "$venv/bin/ruff" format --check .
check "$venv/bin/pyright"
check "$venv/bin/python" -m pytest test
exit "$status"
