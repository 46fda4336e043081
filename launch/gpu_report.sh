#!/usr/bin/env bash
# Every figure of this program on the GPU of this machine; needs no network.
#   bash launch/gpu_report.sh [--rehearse] [--ph2=DIR] [--total_seconds=540] OUT [PART ...]
# Writes OUT/report.md, report.jsonl and report.log as the parts end. --rehearse runs every part at
# tiny shapes on the CPU. Where packages are missing they are installed from wheels/, which
# `bash launch/wheels.sh` fills where there is a network, into a folder that is removed at the end.
# PYTHON names the Python (default python3).
set -euo pipefail
start=$PWD
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if ! "$python" -c 'import grain' 2>/dev/null; then
  if ! compgen -G 'wheels/*.whl' >/dev/null; then
    echo "error: grain is not installed and wheels/ is empty; with a network give 'source" \
      "launch/setup.sh cuda12' first, without one run launch/wheels.sh where there is a network" \
      "and carry wheels/ here" >&2
    exit 2
  fi
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
    --target="$site" wheels/*.whl
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
# As launch/setup.sh sets it for the programs: huge pages, and freed memory kept.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=8589934592}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
cd "$start"
"$python" -m rndpo_jax.benchmark.gpu_report "$@"
