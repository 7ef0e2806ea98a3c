#!/usr/bin/env bash
# A first look at --batchllm, from a bare machine: see scripts/quickstart.py --help for options.
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

setup_environment
# exec, so that signals go to the program that stops the servers.
exec "$venv/bin/python" "$repo_root/scripts/quickstart.py" "$@"
