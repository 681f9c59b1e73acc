# Sourced by the other scripts: a virtual environment with the package and the extras named in $@. What is there already,
# whoever installed it, is used as it is. Sets PYTHON. The folder is .venv unless VENV names another.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"
PYTHON="$VENV/bin/python"
setup() {
    if [ ! -x "$PYTHON" ]; then
        local base
        base="$(command -v python3 || command -v python)" || { echo "setup: no python3 found; install Python 3.10 or newer" >&2; exit 2; }
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "setup: $("$base" --version) is too old; Python 3.10 or newer is needed" >&2; exit 2; }
        echo "setup: making $VENV"
        "$base" -m venv "$VENV"
    fi
    if ! "$PYTHON" scripts/installed.py "$@" > /dev/null; then
        echo "setup: installing (PyTorch is large: minutes and some 5 GB on first use)"
        local extras="$*"
        "$PYTHON" -m pip install --disable-pip-version-check --progress-bar off --quiet -e ".${extras:+[${extras// /,}]}"
    fi
}
