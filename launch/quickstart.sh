#!/usr/bin/env bash
# Sets up .venv and runs the main job on generated phantom data, on whatever device is there.
#   bash launch/quickstart.sh [--config.seed=1 ...]
# WORKDIR names the folder of the run (default: runs/quickstart).
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh
python -m launch.run --config=configs/quickstart.py --workdir="${WORKDIR:-runs/quickstart}" "$@"
