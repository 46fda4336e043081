#!/usr/bin/env bash
# Runs a job on a Cloud TPU VM slice: creates or uses it, installs, runs on all workers, fetches.
#   NAME=slice ZONE=us-west4-a CONFIG=configs/ph2.py WORKDIR=/nfs/ph2 bash launch/tpu_vm.sh [flags]
# WORKDIR: an absolute path that all workers see, such as an NFS mount, or gs://BUCKET/FOLDER. TYPE
# and VERSION (its runtime) are for a slice that is missing or was preempted. The result lands in
# runs/NAME; DELETE=1 deletes the slice then. DRY_RUN=1 prints what it would do. The job outlives
# this script, the same command watches on; it starts again after exit code 75, and kill --
# -$(cat rndpo_jax/job.pid) on all workers stops it. PROGRAM=launch.sweep runs a sweep.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${NAME:?of the slice}" "${ZONE:?its zone}" "${CONFIG:?config file}" "${WORKDIR:?folder}"
new=("--accelerator-type=${TYPE:-v5litepod-16}" "--version=${VERSION:-v2-alpha-tpuv5-lite}")
results=(results.json report.html config.json)
[ "${PROGRAM:=launch.run}" = launch.run ] || results=(sweep/sweep.json)
tpu=(gcloud compute tpus tpu-vm)
case $WORKDIR in
  gs://*) extra=tpu,gcs copy=(gcloud storage cp) from=$WORKDIR ;;
  /*) extra=tpu copy=("${tpu[@]}" scp "--zone=$ZONE" --worker=0) from=$NAME:$WORKDIR ;;
  *) echo "error: WORKDIR=$WORKDIR: expected an absolute path or gs://BUCKET/FOLDER" >&2; exit 2 ;;
esac
run() { if [ "$DRY_RUN" = 1 ]; then printf '%q ' "$@" && echo; else "$@"; fi; }
on() { run "${tpu[@]}" ssh "$NAME" "--zone=$ZONE" "--worker=$1" "--command=$2"; }
slice() { run "${tpu[@]}" "$1" "$NAME" "--zone=$ZONE" "${@:2}"; }
state() { "${tpu[@]}" describe "$NAME" "--zone=$ZONE" "--format=value(state)" 2>&1 || true; }
found=NOT_FOUND && { [ "${DRY_RUN:=0}" = 1 ] || found=$(state); }
[[ ! $found =~ PREEMPTED|TERMINATED ]] || { slice delete --quiet; found=NOT_FOUND; }
[[ ! $found =~ NOT_FOUND ]] || { slice create "${new[@]}"; found=READY; }
[[ ! $found =~ STOPPED ]] || { slice start; found=READY; }
[[ $found =~ READY ]] || { echo "error: $NAME: found '$found', expected READY" >&2; exit 1; }
running="cd rndpo_jax && { kill -0 \"\$(cat job.pid)\"; } 2>/dev/null" # from an earlier call
if [ "$DRY_RUN" = 1 ] || ! on 0 "$running"; then
  archive=$(mktemp -d)/rndpo_jax.tar.gz
  trap 'rm -rf "$(dirname "$archive")"' EXIT
  run git archive --output="$archive" HEAD
  run "${tpu[@]}" scp "$archive" "$NAME:rndpo_jax.tar.gz" "--zone=$ZONE" --worker=all
  # The runtime's Ubuntu comes with Python 3.10. Without lingering, a logout removes shared memory.
  on all "mkdir -p rndpo_jax && tar -xzf rndpo_jax.tar.gz -C rndpo_jax && \
sudo apt-get -qq update && sudo apt-get -qq install -y python3.11 python3.11-venv && \
sudo loginctl enable-linger \"\$USER\" && cd rndpo_jax && \
PYTHON=python3.11 bash -c 'source launch/setup.sh $extra'"
fi
flags=$(printf ' %q' --connect_seconds=600 "--config=$CONFIG" "--workdir=$WORKDIR" "$@")
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
