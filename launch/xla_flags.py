"""What XLA, BLAS and XLA's CPU backend read once, at their start: to be set before jax is imported.

Values that the user has set stay. `launch/setup.sh` sets what the C library reads when a process
starts.
"""

import importlib.metadata
import os

# XLA ends the program on flags it does not know, so no other version is told.
_FLAGS = {
  # jaxlib 0.10 hands convolutions on the CPU to YNNPACK by default. Without it a training step of
  # the U-Net takes 4/5 of the time.
  "--xla_cpu_experimental_ynn_fusion_type": ("", ("0.10.",)),
  # Of several processes on CPUs one may wait hours for another's shards, a week at most; after half
  # an hour the wait would fail. The heartbeats tell if one is dead.
  "--xla_cpu_collective_timeout_seconds": ("604800", ("0.10.", "0.11.")),
}


def tune() -> None:
  """Sets the environment variables; does nothing to what accelerators run."""
  # Resizing multiplies small matrices in loader threads: threads of BLAS beside them only compete
  # for the cores that compute.
  os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
  flags = os.environ.get("XLA_FLAGS", "")
  version = importlib.metadata.version("jaxlib")
  for name, (value, known_to) in _FLAGS.items():
    if name not in flags and version.startswith(known_to):
      flags = f"{flags} {name}={value}".strip()
  if flags:
    os.environ["XLA_FLAGS"] = flags
