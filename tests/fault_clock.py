"""The wall clock jumps by a day while the base trains."""

import glob
import sys
import time

import tensorstore as ts
from fault_runs import PROGRAM, replace, wait_until

# Moves Python's wall clock by argv[1] seconds as soon as the file argv[2] is there.
CLOCK_JUMP = """
import os, runpy, sys, time
real, real_ns = time.time, time.time_ns
seconds, path = int(sys.argv.pop(1)), sys.argv.pop(1)
moved = []
def off():
  if not moved and os.path.exists(path):
    moved.append(seconds)
  return sum(moved)
time.time = lambda: real() + off()
time.time_ns = lambda: real_ns() + off() * 10**9
sys.argv[0] = "launch.run"
runpy.run_module("launch.run", run_name="__main__")
"""
# Debian's package faketime; moves the wall clock of a process for C++ too, file times excepted.
FAKETIME = (
  "/usr/lib/*/faketime/libfaketimeMT.so.1", "/usr/lib*/faketime/libfaketimeMT.so.1",
  "/usr/local/lib/faketime/libfaketimeMT.so.1",
)  # fmt: skip


def clock(campaign):
  """Moves the clock while the base trains: for C++ too of one process, Python's of several.

  libfaketime cannot stand for a clock that moves under several: Abseil, in TensorStore and JAX,
  asks the kernel by a raw futex call to wait until a time of the wall clock, and the kernel's clock
  has not moved. TensorStore's threads were seen to spin so, and two processes to hang.
  """
  if campaign.processes > 1:
    for everywhere in (True, False):
      for seconds in (-86400, 86400):
        python_clock_jump(campaign, seconds, everywhere)
    return campaign.skip("clock jump, C++ too", "libfaketime moves one process alone")
  library = next((path for pattern in FAKETIME for path in glob.glob(pattern)), None)
  if library is None:
    return campaign.skip("clock jump", "needs libfaketime (Debian: faketime)")
  for seconds in (-86400, 86400):
    clock_jump(campaign, library, seconds)


def clock_jump(campaign, library, seconds):
  workdir = campaign.before("base", "clock")
  offset = campaign.folder / "clock.txt"
  offset.write_text("+0")
  moved = (
    "env", f"LD_PRELOAD={library}", f"FAKETIME_TIMESTAMP_FILE={offset}", "NO_FAKE_STAT=1",
    "FAKETIME_NO_CACHE=1", "FAKETIME_DONT_FAKE_MONOTONIC=1", *PROGRAM,
  )  # fmt: skip
  processes = campaign.start(workdir, programs=[moved])
  wait_until(processes, (workdir / "base" / "state" / "20").exists)
  replace(offset, f"{seconds:+d}".encode())
  ended = campaign.end(processes)
  shown = ended.shown()
  ok = seconds > 0 and ended.in_one_line()  # Orbax measures by it how long a write takes
  if not any(ended.codes):
    found = clock_of_state(workdir) - time.time()
    shown += f"; clock at {found / 3600:+.1f} h"
    ok = ended.in_time and abs(found - seconds) < 600
  fault = f"clock jump: a day {'back' if seconds < 0 else 'ahead'}"
  campaign.finish(fault, "base, step 20", shown, workdir, ok=ok)


def python_clock_jump(campaign, seconds, everywhere):
  """Of all processes, or of the last one alone."""
  workdir = campaign.before("base", "clock")
  after = workdir / "base" / "state" / "20"
  moved = (sys.executable, "-c", CLOCK_JUMP, str(seconds), str(after))
  programs = [moved if everywhere else PROGRAM] * (campaign.processes - 1) + [moved]
  ended = campaign.run(workdir, programs=programs)
  fault = f"clock jump: Python's, a day {'back' if seconds < 0 else 'ahead'}"
  which = "" if everywhere else ", of one process"
  ok = not any(ended.codes) or (seconds > 0 and ended.in_one_line())
  campaign.finish(fault + which, "base, step 20", ended.shown(), workdir, ok=ok)


def clock_of_state(workdir):
  """When TensorStore, which is C++, says that it ended the base's last state, in s."""
  latest = max((workdir / "base" / "state").iterdir(), key=lambda path: int(path.name))
  part = ts.KvStore.open(f"file://{latest}/ocdbt.process_0/").result()
  return ts.ocdbt.dump(part).result()["versions"][-1]["commit_time"] / 1e9
