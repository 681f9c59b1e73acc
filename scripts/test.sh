#!/usr/bin/env bash
# Set up a virtual environment if there is none, and run the tests, two at a time. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
setup test
exec "$PYTHON" -m pytest --numprocesses 2 --dist worksteal "$@"
