# Sourced by the scripts beside it. `setup_environment` makes .venv in the repository root, with
# this package (editable) and its test tools in it, from nothing but Python and PyPI.
#
# Variables of the environment choose others: PYTHON the interpreter to make it from, VENV its
# folder, and SGLANG the release of SGLang, without which it is the newest that is supported.
# shellcheck shell=bash

repo_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${VENV:-$repo_root/.venv}"

# A server imports thousands of modules in each of its processes: without saved bytecode, which
# containers often turn off, it takes twice as long to start.
unset PYTHONDONTWRITEBYTECODE

setup_environment() {
    # What the installation depends on; a moved repository breaks an editable install.
    local wanted stamp="$venv/.installed-for"
    wanted="$repo_root"$'\n'"${SGLANG:-}"$'\n'"$(<"$repo_root/pyproject.toml")"
    if [[ -x "$venv/bin/python" && -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
        return
    fi

    echo "Setting up $venv (the first time, SGLang and PyTorch come from PyPI: several GB) ..."
    local uv
    uv="$(find_uv)"
    if [[ ! -x "$venv/bin/python" ]]; then
        if [[ -n "$uv" ]]; then
            # Without a suitable Python here, uv looks further and may fetch one.
            "$uv" venv --quiet --python "$(find_python || echo 3.12)" "$venv"
        else
            make_venv_without_uv
        fi
    fi
    if [[ -z "$uv" ]]; then
        install_uv
        uv="$venv/bin/uv"
    fi
    "$uv" pip install --quiet --python "$venv/bin/python" --editable "${repo_root}[test]" \
        ${SGLANG:+"sglang==$SGLANG"}
    printf '%s\n' "$wanted" >"$stamp"
}

find_uv() {
    local candidate
    for candidate in uv "$venv/bin/uv"; do
        # A version manager's stand-in may exist and not work.
        if "$candidate" --version >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
}

# find_python [MINOR...]: the path of a Python 3.MINOR that works, of 3.11 or 3.12 by default.
find_python() {
    local candidate minor
    local check='import sys; sys.exit(sys.version_info[:2] != (3, int(sys.argv[1])))'
    [[ $# -gt 0 ]] || set -- 12 11
    for candidate in ${PYTHON:+"$PYTHON"} python3 \
        python3.{12,11} "$HOME"/.pyenv/versions/3.{12,11}.*/bin/python3; do
        for minor in "$@"; do
            if "$candidate" -c "$check" "$minor" >/dev/null 2>&1; then
                command -v "$candidate"
                return
            fi
        done
    done
    return 1
}

make_venv_without_uv() {
    local python
    if ! python="$(find_python)"; then
        echo "error: this needs Python 3.11 or 3.12 as python3, python3.12 or python3.11." >&2
        return 1
    fi
    # Debian's Python cannot put pip into a venv unless python3-venv is installed.
    "$python" -m venv "$venv" >/dev/null 2>&1 ||
        "$python" -m venv --clear --without-pip "$venv"
}

# Into .venv itself: pip refuses to install into a system Python that the system manages.
install_uv() {
    if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        "$venv/bin/python" -m pip install --quiet uv
    else
        "$(find_python)" -m pip --python "$venv/bin/python" install --quiet uv
    fi
}
