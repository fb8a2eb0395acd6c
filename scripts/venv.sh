# Sourced by the other scripts: makes .venv with Python 3.11 or newer and installs the project into it.
# Usage: prepare_venv '' | 'test'   (which extra to install)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or newer was found: install one, or name it in the variable PYTHON" >&2
    return 1
}

prepare_venv() {
    local target=".${1:+[$1]}" stamp=".venv/.installed${1:+-$1}" python
    if [ ! -x .venv/bin/python ]; then
        python=$(find_python)
        echo "making .venv with $("$python" --version)" >&2
        "$python" -m venv .venv
    fi
    # pyproject.toml names everything that is installed, so its content tells whether the installation is current
    if ! cmp -s pyproject.toml "$stamp"; then
        echo "installing wsi-engine and what it needs (a few minutes the first time)" >&2
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable "$target"
        cp pyproject.toml "$stamp"
    fi
}
