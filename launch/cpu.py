"""What XLA, BLAS and XLA's CPU backend read once, at their start: to be set before jax is imported.

Values that the user has set stay. `launch/setup.sh` sets what the C library reads when a process
starts.
"""

import importlib.metadata
import os

# jaxlib 0.10 hands convolutions on the CPU to YNNPACK by default. Without it a training step of the
# U-Net takes 4/5 of the time. XLA ends the program on flags it does not know, so no other version
# is told.
_FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def tune() -> None:
  """Sets the environment variables; does nothing to what accelerators run."""
  # Resizing multiplies small matrices in loader threads: threads of BLAS beside them only compete
  # for the cores that compute.
  os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
  flags = os.environ.get("XLA_FLAGS", "")
  if _FLAG not in flags and importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}=".strip()
