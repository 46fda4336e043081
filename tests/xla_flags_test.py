"""What launch/xla_flags.py sets, and what it leaves alone."""

import importlib.metadata

import pytest

from launch import xla_flags

FLAG = "--xla_cpu_experimental_ynn_fusion_type="
WAIT = "--xla_cpu_collective_timeout_seconds="
WEEK = f"{WAIT}604800"


@pytest.mark.parametrize(
  "version,before,after",
  [
    ("0.10.2", None, f"{FLAG} {WEEK}"),
    ("0.10.2", "--xla_a=1", f"--xla_a=1 {FLAG} {WEEK}"),
    ("0.10.2", f"{FLAG}SOME {WAIT}5", f"{FLAG}SOME {WAIT}5"),
    ("0.11.2", "--xla_a=1", f"--xla_a=1 {WEEK}"),
    ("0.12.0", "--xla_a=1", "--xla_a=1"),
    ("0.12.0", None, None),
  ],
)
def test_flag_of_xla(monkeypatch, version, before, after):
  monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
  monkeypatch.delenv("XLA_FLAGS")
  if before is not None:
    monkeypatch.setenv("XLA_FLAGS", before)
  xla_flags.tune()
  assert xla_flags.os.environ.get("XLA_FLAGS") == after


def test_threads_of_blas_that_the_user_set_stay(monkeypatch):
  monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
  xla_flags.tune()
  assert xla_flags.os.environ["OPENBLAS_NUM_THREADS"] == "7"
