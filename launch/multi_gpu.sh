#!/usr/bin/env bash
# Runs a job on every GPU of this host, or on those that CUDA_VISIBLE_DEVICES lists.
#   CONFIG=configs/ph2.py WORKDIR=runs/ph2 bash launch/multi_gpu.sh [--config.data.root=DIR ...]
# PROCESSES=N shares the GPUs among N processes (default 1, which drives them all): more of them
# read and prepare more images a second. EXTRA names the JAX to install (default cuda12),
# PROGRAM=launch.sweep runs a sweep. DRY_RUN=1 prints what it would do.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${CONFIG:?a file in configs/}" "${WORKDIR:?folder of the run}" "${PROCESSES:=1}" "${DRY_RUN:=0}"

if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then # numbers or names; empty and -1 mean none
  IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES#-1}"
else
  mapfile -t gpus < <(nvidia-smi --list-gpus 2>/dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p')
fi
if ((${#gpus[@]} == 0 || ${#gpus[@]} % PROCESSES)); then
  echo "error: PROCESSES=$PROCESSES does not divide ${#gpus[@]} GPUs, the number that nvidia-smi or" \
    "CUDA_VISIBLE_DEVICES lists; without a GPU run python -m launch.run itself" >&2
  exit 2
fi
if [ "$DRY_RUN" = 1 ]; then
  printf '# on %s GPUs\nsource launch/setup.sh %q\n' "${#gpus[@]}" "${EXTRA-cuda12}"
else
  # shellcheck source=launch/setup.sh
  source launch/setup.sh "${EXTRA-cuda12}"
fi
command=(python -m "${PROGRAM:-launch.run}" "--config=$CONFIG" "--workdir=$WORKDIR" "$@")
if ((PROCESSES == 1)); then
  [ "$DRY_RUN" = 1 ] || exec "${command[@]}"
  printf '%q ' "${command[@]}" && echo && exit
fi

port=${PORT:-$((20000 + RANDOM % 10000))}
share=$((${#gpus[@]} / PROCESSES))
# SIGTERM or an interrupt goes on to every process, so that each can save.
pids=() told=0
trap 'told=1; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < PROCESSES; i++)); do
  one=("${command[@]}" "--coordinator_address=127.0.0.1:$port" "--num_processes=$PROCESSES"
    "--process_id=$i")
  visible=$(IFS=,; echo "${gpus[*]:i*share:share}")
  if [ "$DRY_RUN" = 1 ]; then
    printf '%q ' "CUDA_VISIBLE_DEVICES=$visible" "${one[@]}" && echo "&"
    continue
  fi
  CUDA_VISIBLE_DEVICES=$visible "${one[@]}" &
  pids+=($!)
done
[ "$DRY_RUN" != 1 ] || echo wait
status=0
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  if ((told)); then # the signal ended `wait`, not the process
    told=0 code=0
    wait "$pid" || code=$?
  fi
  ((status)) || status=$code
done
exit "$status"
