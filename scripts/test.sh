#!/usr/bin/env bash
# Set up a virtual environment if there is none; check style and types; run the tests, two at a time. Arguments go to
# pytest. The first check that fails ends it; python -m pytest runs tests alone.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
setup test
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest --numprocesses 2 --dist worksteal "$@"
