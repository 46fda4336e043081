#!/usr/bin/env bash
# Sets up .venv with the project and its test extra, then runs the tests.
#   bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh test
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" tests
