#!/usr/bin/env bash
# Set up a virtual environment if there is none, and run the demo. Arguments go to `openclip-ext demo`.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
setup
exec "$PYTHON" -m openclip_ext demo --out runs/demo "$@"
