#!/usr/bin/env bash
# Sets up .venv and runs the main job on generated phantom data, on whatever device is there.
#   bash launch/quickstart.sh [--config.seed=1 ...]
# WORKDIR names the folder of the run (default: runs/quickstart), EXTRA the JAX to install (cuda12,
# cuda13, tpu; default: that for the CPU). DRY_RUN=1 prints what it would do.
set -euo pipefail
cd "$(dirname "$0")/.."
command=(python -m launch.run --config=configs/quickstart.py
  "--workdir=${WORKDIR:-runs/quickstart}" "$@")
if [ "${DRY_RUN:-0}" = 1 ]; then
  printf 'source launch/setup.sh %q\n' "${EXTRA-}"
  printf '%q ' "${command[@]}" && echo
  exit
fi
# shellcheck source=launch/setup.sh
source launch/setup.sh "${EXTRA-}"
exec "${command[@]}"
