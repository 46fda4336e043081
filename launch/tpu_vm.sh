#!/usr/bin/env bash
# Runs a job on a Cloud TPU VM slice: creates or uses it, installs, runs on all workers, fetches.
#   NAME=slice ZONE=us-west4-a CONFIG=configs/ph2.py WORKDIR=/nfs/ph2 bash launch/tpu_vm.sh [flags]
# WORKDIR: an absolute path that all workers see, or gs://BUCKET/FOLDER. config.data.root: a folder
# that all workers see, never gs://. A new slice has no mounts: CREATE holds further flags of
# `gcloud compute tpus tpu-vm create`, such as --spot, --network=NET and, for a script that mounts,
# --metadata-from-file=startup-script=mount.sh; give it in every call. TYPE and VERSION (runtime)
# are for a missing slice; one that was preempted is made again as it was. What runs is git's HEAD.
# For several workers gcloud needs its key in an agent: ssh-add ~/.ssh/google_compute_engine.
# The result lands in runs/NAME; DELETE=1 deletes the slice then. DRY_RUN=1 prints what it would do.
# The job outlives this script, the same command watches on; it starts again after exit code 75, and
# kill -- -$(cat rndpo_jax/job.pid) on all workers stops it. PROGRAM=launch.sweep runs a sweep.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${NAME:?of the slice}" "${ZONE:?its zone}" "${CONFIG:?config file}" "${WORKDIR:?folder}"
# shellcheck source=launch/tpu_slice.sh
source launch/tpu_slice.sh
results=(results.json report.html config.json)
[ "${PROGRAM:=launch.run}" = launch.run ] || results=(sweep/sweep.json)
case $WORKDIR in
  gs://*) extra=tpu,gcs copy=(gcloud storage cp) from=$WORKDIR ;;
  /*) extra=tpu copy=("${tpu[@]}" scp "--zone=$ZONE" --worker=0) from=$NAME:$WORKDIR ;;
  *) echo "error: WORKDIR=$WORKDIR: expected an absolute path or gs://BUCKET/FOLDER" >&2; exit 2 ;;
esac
have_slice
running="cd rndpo_jax && { kill -0 \"\$(cat job.pid)\"; } 2>/dev/null" # from an earlier call
if [ "$DRY_RUN" = 1 ] || ! on 0 "$running"; then
  [ -z "$(git status --porcelain)" ] || echo "warning: what is not committed stays here" >&2
  archive=$(mktemp -d)/rndpo_jax.tar.gz && trap 'rm -rf "$(dirname "$archive")"' EXIT
  run git archive --output="$archive" HEAD
  run "${tpu[@]}" scp "$archive" "$NAME:rndpo_jax.tar.gz" "--zone=$ZONE" --worker=all
  # The runtime's Ubuntu has Python 3.10, and a release candidate of 3.11: uv fetches a release.
  # Without lingering, a logout removes shared memory.
  on all "mkdir -p rndpo_jax && tar -xzf rndpo_jax.tar.gz -C rndpo_jax && cd rndpo_jax && \
sudo loginctl enable-linger \"\$USER\" && { .venv/bin/python -m pip --version >/dev/null 2>&1 || \
{ rm -rf .venv && python3 -m pip install --quiet --user uv && \
python3 -m uv venv --quiet --seed --python=3.12 .venv; }; } && \
PYTHON=.venv/bin/python bash -c 'source launch/setup.sh $extra'"
fi
# All are installed and start within seconds of each other: a minute is enough to meet in.
flags=$(printf ' %q' "--connect_seconds=${CONNECT_SECONDS:-60}" "--config=$CONFIG" \
  "--workdir=$WORKDIR" "$@")
job="code=75; while [ \$code = 75 ]; do .venv/bin/python -m $PROGRAM --distributed$flags; \
code=\$?; done; echo \$code >job.code"
# gcloud repeats a command whose connection broke: it must not start a second job.
on all "$running || { rm -f job.code; setsid nohup bash -c $(printf %q "$job") \
>job.log 2>&1 </dev/null & echo \$! >job.pid; }"
watch="cd rndpo_jax; tail -n 20 -f --pid=\"\$(cat job.pid)\" job.log >&2; cat job.code || echo 75"
if [ "$DRY_RUN" = 1 ]; then on 0 "$watch" && status=0; else
  until status=$(on 0 "$watch"); do # until an answer comes through
    [[ ! $(state) =~ PREEMPTED|TERMINATED|STOP|NOT_FOUND ]] || { status=75; break; }; sleep 30
  done
fi
case $status in
  75) echo "error: $NAME or its job went away; the same command goes on" >&2; exit 75 ;;
  0) run mkdir -p "runs/$NAME"
    for file in "${results[@]}"; do run "${copy[@]}" "$from/$file" "runs/$NAME/${file##*/}"; done ;;
esac
[ "${DELETE:-0}" != 1 ] || slice delete --quiet
exit "$status"
