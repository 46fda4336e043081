#!/usr/bin/env bash
# Runs a job on a Cloud TPU VM slice: creates or uses it, installs, runs on all workers, fetches.
#   NAME=slice ZONE=us-west4-a CONFIG=configs/ph2.py WORKDIR=/shared/ph2 bash launch/tpu_vm.sh [flags]
# TYPE (default v5litepod-16) and VERSION (its runtime) are for a slice that is not there yet;
# DELETE=1 deletes it at the end. A slice of several workers needs a WORKDIR that all of them see,
# such as an NFS mount. The result lands in runs/NAME here. DRY_RUN=1 prints what it would do.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${NAME:?name of the TPU VM}" "${ZONE:?its zone}"
: "${CONFIG:?a file in configs/}" "${WORKDIR:?folder that all workers see}"
tpu=(gcloud compute tpus tpu-vm)

run() {
  if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on_all() {
  run "${tpu[@]}" ssh "$NAME" "--zone=$ZONE" --worker=all "--command=$1"
}

if [ "${DRY_RUN:-0}" = 1 ] || ! "${tpu[@]}" describe "$NAME" "--zone=$ZONE" >/dev/null 2>&1; then
  run "${tpu[@]}" create "$NAME" "--zone=$ZONE" "--accelerator-type=${TYPE:-v5litepod-16}" \
    "--version=${VERSION:-v2-alpha-tpuv5-lite}"
fi

archive=$(mktemp -d)/rndpo_jax.tar.gz
trap 'rm -rf "$(dirname "$archive")"' EXIT
run git archive --output="$archive" HEAD
run "${tpu[@]}" scp "$archive" "$NAME:rndpo_jax.tar.gz" "--zone=$ZONE" --worker=all
# The runtime's Ubuntu comes with Python 3.10.
on_all "mkdir -p rndpo_jax && tar -xzf rndpo_jax.tar.gz -C rndpo_jax && sudo apt-get -qq update && \
sudo apt-get -qq install -y python3.11 python3.11-venv && cd rndpo_jax && \
PYTHON=python3.11 bash -c 'source launch/setup.sh tpu'"

flags=$(printf ' %q' "--config=$CONFIG" "--workdir=$WORKDIR" "$@")
status=0
on_all "cd rndpo_jax && .venv/bin/python -m launch.run --distributed$flags" || status=$?

if [ "$status" = 0 ]; then
  run mkdir -p "runs/$NAME"
  for file in results.json report.html config.json; do
    run "${tpu[@]}" scp "$NAME:$WORKDIR/$file" "runs/$NAME/$file" "--zone=$ZONE" --worker=0
  done
fi
if [ "${DELETE:-0}" = 1 ]; then
  run "${tpu[@]}" delete "$NAME" "--zone=$ZONE" --quiet
fi
exit "$status"
