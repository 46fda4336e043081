#!/usr/bin/env bash
# Runs a job on every GPU of this host.
#   CONFIG=configs/ph2.py WORKDIR=runs/ph2 bash launch/multi_gpu.sh [--config.data.root=DIR ...]
# PROCESSES=N shares the GPUs among N processes (default 1, which drives them all): more of them
# read and prepare more images a second. EXTRA names the JAX to install (default cuda12).
# DRY_RUN=1 prints what it would do.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${CONFIG:?a file in configs/}" "${WORKDIR:?folder of the run}"
processes=${PROCESSES:-1}
dry_run=${DRY_RUN:-0}

gpus=${GPUS:-$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)}
if ((gpus % processes)); then
  echo "error: PROCESSES=$processes does not divide $gpus GPUs" >&2
  exit 2
fi
if [ "$dry_run" != 1 ]; then
  # shellcheck source=launch/setup.sh
  source launch/setup.sh "${EXTRA-cuda12}"
fi
command=(python -m launch.run "--config=$CONFIG" "--workdir=$WORKDIR" "$@")
if ((processes == 1)); then
  if [ "$dry_run" = 1 ]; then
    echo "on $gpus GPUs: ${command[*]}"
    exit
  fi
  exec "${command[@]}"
fi

port=${PORT:-$((20000 + RANDOM % 10000))}
share=$((gpus / processes))
pids=()
# SIGTERM or an interrupt goes on to every process, so that each can save.
told=0
trap 'told=1; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < processes; i++)); do
  one=("${command[@]}" "--coordinator_address=127.0.0.1:$port" "--num_processes=$processes"
    "--process_id=$i")
  visible=$(seq -s, $((i * share)) $((i * share + share - 1)))
  if [ "$dry_run" = 1 ]; then
    echo "CUDA_VISIBLE_DEVICES=$visible ${one[*]}"
    continue
  fi
  CUDA_VISIBLE_DEVICES=$visible "${one[@]}" &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  if ((told)); then # the signal ended `wait`, not the process
    told=0
    code=0
    wait "$pid" || code=$?
  fi
  ((status)) || status=$code
done
exit "$status"
