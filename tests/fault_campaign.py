"""Faults against the whole job, each followed by the same command again; prints a table.

  python tests/fault_campaign.py --workdir=DIR [--kills=20] [--only=kill,sigterm] [--processes=1]

An undisturbed run of `tests/tiny_config.py` comes first (its stages are the starting points), then
each fault. A fault passes if the rerun ends with the same files (SAME), or if it is refused in one
line with exit code 1 and the remedy that the line names leads there, and if all processes are gone
within a minute of the first; where damage must be noticed, also if that is said. Exit code 1 if any
fails. DIR/output has what each run printed.
"""

import argparse
import glob
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import tensorstore as ts
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
STAGES = ("prepare", "base", "mine", "finetune", "evaluate", "report")
# What each stage writes; removing all from a stage on makes a run that stands before it.
WRITES = {
  "prepare": ("data", "splits.json"), "base": ("base",), "mine": ("pairs",),
  "finetune": ("finetune",), "evaluate": ("evaluate", "results.json"), "report": ("report.html",),
}  # fmt: skip
# What must be the same after a fault: results, what they were chosen by, and every pair.
SAME = (
  "results.json", "splits.json", "base/metrics.jsonl", "base/selected.json", "pairs/judges.json",
  "pairs/manifest.json", "finetune/metrics.jsonl",
)  # fmt: skip
SETTINGS = ("--config.base.eval_every_steps=20", "--config.finetune.num_steps=40")
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
PROGRAM = (sys.executable, "-m", "launch.run")
SWEEP = (sys.executable, "-m", "launch.sweep")


class Ended(NamedTuple):
  """How the processes of a run ended: exit codes, what they printed, if all did within a minute."""

  codes: list[int]
  outputs: list[str]
  in_time: bool

  def output(self):
    return "\n".join(self.outputs)

  def shown(self):
    return f"exit {', '.join(map(str, self.codes))}" + ("" if self.in_time else ", HUNG")

  def in_one_line(self):
    """Whether every process ended well, or with one line that says why it did not."""
    clear = (
      code == 0 or (code == 1 and len(errors(text)) == 1)
      for code, text in zip(self.codes, self.outputs, strict=True)
    )
    return self.in_time and all(clear) and "Traceback" not in self.output()


def errors(output):
  return [line for line in output.splitlines() if line.startswith("error: ")]


class Campaign:
  """The folders, the undisturbed results, and the rows of the table."""

  def __init__(self, options):
    self.folder = options.workdir
    self.processes = options.processes
    self.random = random.Random(options.seed)
    self.undisturbed = options.workdir / "undisturbed"
    self.rows = []
    self.seconds = {}
    self.runs = 0
    self.sent = 0.0  # when the last signal was, by the monotonic clock

  def start(self, workdir, *arguments, programs=None):
    """One process, or several on loopback; the list of them. `programs`: of each process."""
    environment = {
      **os.environ,
      "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PLATFORMS": "cpu",
    }
    given = ["--config=tests/tiny_config.py", f"--workdir={workdir}", *SETTINGS, *arguments]
    port = free_port()
    together = [
      f"--coordinator_address=localhost:{port}", f"--num_processes={self.processes}",
    ]  # fmt: skip
    self.runs += 1
    (self.folder / "output").mkdir(exist_ok=True)
    started = []
    for process, program in enumerate(programs or [PROGRAM] * self.processes):
      several = [*together, f"--process_id={process}"] if self.processes > 1 else []
      path = self.folder / "output" / f"{self.runs:03d}-{workdir.name}-process-{process}.txt"
      with path.open("w") as file:
        started.append(
          subprocess.Popen(
            [*program, *given, *several],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
          )
        )
      started[-1].path = path
    return started

  def end(self, processes):
    """Waits for all of them, but a minute at most from the end of the first."""
    last, first = time.monotonic() + 300 + 5 * sum(self.seconds.values()), None
    while any(process.poll() is None for process in processes):
      if first is None and any(process.returncode is not None for process in processes):
        first = time.monotonic()
        last = first + 60
      if time.monotonic() > last:
        break
      time.sleep(0.1)
    in_time = all(process.returncode is not None for process in processes)
    for process in processes:
      process.kill()
    codes = [process.wait() for process in processes]
    return Ended(codes, [process.path.read_text() for process in processes], in_time)

  def run(self, workdir, *arguments, **options):
    return self.end(self.start(workdir, *arguments, **options))

  def before(self, stage, name):
    """A copy of the undisturbed run, standing before `stage`."""
    workdir = self.folder / name
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(self.undisturbed, workdir)
    for later in STAGES[STAGES.index(stage) :]:
      for path in WRITES[later]:
        remove(workdir / path)
    return workdir

  def same(self, workdir, undisturbed=()):
    """Whether the results are those of an undisturbed run, by default of the first one."""

    def content(folder):
      files = [(folder / name).read_bytes() for name in SAME]
      return [*files, *sorted(path.name for path in (folder / "finetune" / "params").iterdir())]

    if not all((workdir / name).exists() for name in SAME):
      return False
    return content(workdir) in [content(path) for path in undisturbed or [self.undisturbed]]

  def add(self, fault, moment, first, again, ok):
    self.rows.append((fault, moment, first, again, "ok" if ok else "FAILED"))
    print(" | ".join(self.rows[-1]), flush=True)

  def skip(self, fault, why):
    self.rows.append((fault, "-", "-", "-", f"skipped: {why}"))
    print(" | ".join(self.rows[-1]), flush=True)

  def finish(self, fault, moment, first, workdir, *arguments, ok=True, undisturbed=(), says=""):
    """Runs again: the same results, or a refusal of one line whose remedy works.

    `says` must be in what that run prints.
    """
    ended = self.run(workdir, *arguments)
    ok = ok and says in ended.output()
    if says not in ended.output():
      print(f"does not say {says!r}:\n{ended.output()}", flush=True)
    again = "same results" if self.same(workdir, undisturbed) else ended.shown()
    if any(ended.codes) and ended.in_one_line():
      # The remedy is with the process that refused, not with those that only lost it.
      lines = [text for text in errors(ended.output()) if "another process of" not in text]
      for path in named_by_remedy(lines[-1]):
        remove(path)
      ended = self.run(workdir, *arguments)
      same = self.same(workdir, undisturbed)
      again = "refused; after its remedy " + ("the same results" if same else "NOT")
    good = not any(ended.codes) and ended.in_time and self.same(workdir, undisturbed)
    self.add(fault, moment, first, again, ok and good)
    if not good:
      print(ended.output(), flush=True)
    shutil.rmtree(workdir)


def named_by_remedy(line):
  """Paths after 'delete' or 'remove' in a refusal; for 'delete it' the file that it is about."""
  remedy = re.split(r"[Dd]elete (?!it\b)|remove (?!it\b)", line, maxsplit=1)[-1]
  return [pathlib.Path(path.rstrip(",;.:")) for path in re.findall(r"/\S+", remedy)]


def remove(path):
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def free_port():
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def flip_a_byte(campaign, path):
  content = bytearray(path.read_bytes())
  written = [place for place, value in enumerate(content) if value]  # ArrayRecord pads with zeros
  content[campaign.random.choice(written)] ^= 1 << campaign.random.randrange(8)
  path.write_bytes(bytes(content))


def flip_checkpoint(campaign, step):
  """In the largest of its files of arrays."""
  files = (step / "ocdbt.process_0" / "d").iterdir()
  flip_a_byte(campaign, max(files, key=lambda path: path.stat().st_size))


def undisturbed(campaign):
  """Runs twice, so that the second one's times are those with compiled programs at hand."""
  for workdir in (campaign.folder / "first", campaign.undisturbed):
    shutil.rmtree(workdir, ignore_errors=True)
    ended = campaign.run(workdir)
    assert not any(ended.codes), ended.output()
  assert campaign.same(campaign.folder / "first"), "two undisturbed runs differ"
  for name in STAGES:
    found = re.search(rf"\[{name}\] ([\d.]+) s", ended.outputs[0])
    campaign.seconds[name] = float(found.group(1))
  print("seconds of the stages:", campaign.seconds, flush=True)


def wait_until(processes, there):
  """Returns when `there()`, or when a process has ended."""
  while not there() and all(process.poll() is None for process in processes):
    time.sleep(0.02)


def wait_for_stage(processes, stage):
  wait_until(processes, lambda: f"[{stage}]" in processes[0].path.read_text())


def signal_during(campaign, stage, number, name):
  """Sends `number` to every process at a random moment of a stage; the row's middle entries."""
  workdir = campaign.before(stage, name)
  processes = campaign.start(workdir)
  wait_for_stage(processes, stage)
  delay = campaign.random.uniform(0, campaign.seconds[stage])
  time.sleep(delay)
  campaign.sent = time.monotonic()
  for process in processes:
    process.send_signal(number)
  ended = campaign.end(processes)
  return workdir, f"{stage} + {delay:.1f} s", ended


def kills(campaign, count):
  for turn in range(count):
    stage = STAGES[turn % len(STAGES)]
    workdir, moment, ended = signal_during(campaign, stage, signal.SIGKILL, f"kill-{turn}")
    # Some of them, or all, may have been over and done.
    ok = -signal.SIGKILL in ended.codes or (workdir / "report.html").exists()
    campaign.finish("kill -9", moment, ended.shown(), workdir, ok=ok)


def frozen(campaign):
  """Stops one of several processes, as a host that hangs; the others must end, and name it."""
  for lost in (0, campaign.processes - 1):
    for stage in ("base", "mine"):
      workdir = campaign.before(stage, f"frozen-{stage}")
      processes = campaign.start(workdir, "--heartbeat_seconds=20")
      wait_for_stage(processes, stage)
      time.sleep(campaign.random.uniform(0, campaign.seconds[stage] / 2))
      processes[lost].send_signal(signal.SIGSTOP)
      stopped = time.monotonic()
      others = [process for process in processes if process is not processes[lost]]
      wait_until(others, lambda: time.monotonic() > stopped + 90)  # noqa: B023, called here
      seconds = time.monotonic() - stopped
      processes[lost].kill()
      ended = campaign.end(processes)
      named = all(
        f"(process {lost}" in text or f"heartbeats):\n{lost}\n" in text
        for i, text in enumerate(ended.outputs)
        if i != lost
      )
      moment = f"{stage}, process {lost}"
      shown = f"{ended.shown()} after {seconds:.0f} s"
      ok = seconds < 60 and (named or campaign.same(workdir))
      campaign.finish("one process frozen", moment, shown, workdir, ok=ok)


def early_sigterm(campaign):
  """While the program imports, and meets the others: nothing is lost, and it is started again."""
  workdir = campaign.before("prepare", "early")
  began = time.monotonic()
  processes = campaign.start(workdir)
  wait_for_stage(processes, "prepare")
  seconds = time.monotonic() - began
  campaign.end(processes)
  for turn in range(3):
    workdir = campaign.before("prepare", f"early-{turn}")
    processes = campaign.start(workdir)
    delay = campaign.random.uniform(1.0, max(1.1, seconds - 0.5))  # Python itself takes a moment
    time.sleep(delay)
    for process in processes:
      process.send_signal(signal.SIGTERM)
    ended = campaign.end(processes)
    ok = ended.in_time and set(ended.codes) == {75}
    campaign.finish("SIGTERM", f"start + {delay:.1f} s", ended.shown(), workdir, ok=ok)


def one_killed(campaign):
  """Kills one of several processes in each stage; the others must stop within a minute, by name."""
  for turn, stage in enumerate(STAGES):
    workdir = campaign.before(stage, f"one-{stage}")
    processes = campaign.start(workdir, "--heartbeat_seconds=15")
    wait_for_stage(processes, stage)
    delay = campaign.random.uniform(0, campaign.seconds[stage])
    time.sleep(delay)
    lost = turn % len(processes)
    processes[lost].kill()
    ended = campaign.end(processes)
    moment = f"{stage} + {delay:.1f} s, process {lost}"
    # A process may have been over and done when the other died.
    stopped = all(ended.codes) or campaign.same(workdir)
    named = [text for i, text in enumerate(ended.outputs) if i != lost and ended.codes[i]]
    # Ours; JAX's where the heartbeats stop; JAX's where its own service goes with process 0.
    names = [f"(process {lost}", f"heartbeats):\n{lost}\n", *(["the leader"] if lost == 0 else [])]
    clear = all(any(name in text for name in names) for text in named)
    ok = ended.in_time and stopped and clear
    campaign.finish("one process killed", moment, ended.shown(), workdir, ok=ok)


def sigterms(campaign):
  """Every process must end with 75 within seconds, or with 0 where the job was in its last ones."""
  for stage in STAGES:
    workdir, moment, ended = signal_during(campaign, stage, signal.SIGTERM, f"term-{stage}")
    seconds = time.monotonic() - campaign.sent
    report = workdir / "report.html"
    over = report.exists() and report.stat().st_mtime < time.time() - seconds + 3
    codes = set(ended.codes)
    ok = ended.in_time and seconds < 60 and (codes == {75} or (over and codes == {0}))
    campaign.finish("SIGTERM", moment, f"{ended.shown()} after {seconds:.0f} s", workdir, ok=ok)


def sweeps(campaign):
  """Kills, SIGTERM and the loss of one process in a sweep; the rerun's table must be the same."""

  def start(workdir):
    programs = [SWEEP] * campaign.processes
    return campaign.start(workdir, "--betas=3,30", "--seeds=0,1", programs=programs)

  def found(workdir):
    return workdir / "sweep" / "sweep.json"

  whole = campaign.before("finetune", "sweep-undisturbed")
  began = time.monotonic()
  ended = campaign.end(start(whole))
  assert not any(ended.codes), ended.output()
  faults = [("kill -9", signal.SIGKILL, 0), ("SIGTERM", signal.SIGTERM, 0)]
  if campaign.processes > 1:
    faults.append(("one process killed", signal.SIGKILL, campaign.processes - 1))
  seconds = time.monotonic() - began
  for turn, (fault, number, first) in enumerate(3 * faults):
    workdir = campaign.before("finetune", f"sweep-{turn}")
    processes = start(workdir)
    wait_until(processes, (workdir / "sweep" / "grid.json").exists)
    delay = campaign.random.uniform(0, seconds / 2)  # it starts and compiles in the other half
    time.sleep(delay)
    for process in processes[first:]:
      process.send_signal(number)
    ended = campaign.end(processes)
    again = campaign.end(start(workdir))
    same = found(workdir).exists() and found(workdir).read_bytes() == found(whole).read_bytes()
    ok = ended.in_time and same and not any(again.codes)
    ok = ok and (number == signal.SIGKILL or set(ended.codes) <= {0, 75})
    shown = "same results" if same else again.shown()
    campaign.add(f"{fault} in a sweep", f"sweep + {delay:.1f} s", ended.shown(), shown, ok)
    if not ok:
      print(ended.output(), again.output(), flush=True)


def full_disk(campaign):
  """A tmpfs of a few sizes, so that it fills in other stages; then the same, made larger."""
  for kilobytes in (100, 400, 1200, 2500):
    workdir = campaign.folder / f"disk-{kilobytes}"
    workdir.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(workdir)]
    if subprocess.run(mount, capture_output=True).returncode:
      return campaign.skip("full disk", "mounting is not allowed here")
    try:
      ended = campaign.run(workdir / "run")
      stages = [name for name in STAGES if f"[{name}]" in ended.outputs[0]] or ["start"]
      subprocess.run(["mount", "-o", "remount,size=1g", str(workdir)], check=True)
      first, ok = of_full_disk(ended)
      campaign.finish(f"disk of {kilobytes} kB", stages[-1], first, workdir / "run", ok=ok)
    finally:
      subprocess.run(["umount", str(workdir)], check=True)


def of_full_disk(ended):
  """The row's entry, and whether a process said that the disk is full and the others stopped."""
  said = re.search(r"^error: (process \d+: )?the disk is full", ended.output(), re.MULTILINE)
  clear = ended.in_one_line() and said is not None
  return f"{ended.shown()}: the disk is full" if clear else ended.shown(), clear


def last_sees(campaign, mount):
  """The programs of the processes, the last of which sees a mount of its own."""
  alone = ("unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *PROGRAM)
  return [PROGRAM] * (campaign.processes - 1) + [alone]


def disk_of_one(campaign):
  """Only the last process meets a full disk: it sees a small tmpfs where the shards are."""
  workdir = campaign.before("mine", "disk-of-one")
  (workdir / "pairs").mkdir()
  programs = last_sees(campaign, f"mount -t tmpfs -o size=8k none {workdir}/pairs")
  first, ok = of_full_disk(campaign.run(workdir, programs=programs))
  campaign.finish("disk full for one process", "mine", first, workdir, ok=ok)


def checkpoint_of_one(campaign):
  """Only the last process sees flipped bytes: in the latest state, in all, in the parameters."""
  last = campaign.processes - 1
  for folder, count in (("base/state", 1), ("base/state", None), ("base/params", None)):
    workdir = campaign.before("mine", "checkpoint-of-one")
    if folder == "base/state":
      (workdir / "base" / "selected.json").unlink()  # so that the base goes on
    damaged = campaign.folder / "damaged"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(workdir / folder, damaged)
    there = sorted((path.name for path in damaged.iterdir()), key=int)
    harmed = there[-count:] if count else there
    for step in harmed:
      flip_checkpoint(campaign, damaged / step)
    mounts = [f"mount --bind {damaged}/{step} {workdir}/{folder}/{step}" for step in harmed]
    ended = campaign.run(workdir, programs=last_sees(campaign, " && ".join(mounts)))
    if count:
      said = f"cannot be read by process {last}; going back to that of step {there[-2]}"
      ok = not any(ended.codes) and campaign.same(workdir)
      ok = ok and all(said in text for text in ended.outputs)
    else:
      ok = all(ended.codes) and ended.in_one_line() and "cannot be read" in ended.outputs[last]
    moment = f"{folder}/{', '.join(harmed)}"
    campaign.finish("checkpoint unreadable for one process", moment, ended.shown(), workdir, ok=ok)


def damage(campaign, fault, stage, harm, says=""):
  """`harm` changes files of a run that stands before `stage`."""
  workdir = campaign.before(stage, "damage")
  what = harm(workdir)
  campaign.finish(fault, f"before {stage}", what, workdir, says=says)


def flip_latest(campaign, folder, unfinished=()):
  """A harm: flips a byte of the latest checkpoint, after the files `unfinished` are gone."""

  def harm(workdir):
    for name in unfinished:
      remove(workdir / name)
    latest = max((workdir / folder).iterdir(), key=lambda path: int(path.name))
    flip_checkpoint(campaign, latest)
    return f"{folder}/{latest.name}"

  return harm


def damaged_states(campaign):
  """Of a latest state that is not read the one before serves; without that, training is refused."""
  back, no = "going back to that of step", "cannot be read"
  rows = (
    ("flipped byte, base state", "mine", "base/state", ("base/selected.json",), back),
    ("flipped byte, state", "evaluate", "finetune/state", ("finetune/done.json",), back),
    (
      "flipped byte, only base state", "mine", "base/state",
      ("base/selected.json", "base/state/100", "base/params/100"), no,
    ),
  )  # fmt: skip
  for fault, stage, folder, unfinished, says in rows:
    damage(campaign, fault, stage, flip_latest(campaign, folder, unfinished), says)


def damages(campaign):
  def shard(workdir):
    return sorted((workdir / "pairs").glob("*.array_record"))[0]

  def truncate(workdir):
    os.truncate(shard(workdir), shard(workdir).stat().st_size // 2)
    return shard(workdir).name

  def flip_shard(workdir):
    flip_a_byte(campaign, shard(workdir))
    return shard(workdir).name

  def lose_manifest(workdir):
    (workdir / "pairs" / "manifest.json").unlink()
    return "pairs/manifest.json"

  def age(workdir):
    for number, path in enumerate(sorted(workdir.rglob("*"))):
      os.utime(path, (0, 0) if number % 2 else (4e9, 4e9))
    return "times of 1970 and 2096"

  def flip_data(workdir):
    files = (workdir / "data").rglob("*array_record*")
    flip_a_byte(campaign, max(files, key=lambda path: path.stat().st_size))
    return "the records"

  def exchange(workdir):
    """A case that was trained on is now one that is tested."""
    parts = json.loads((workdir / "splits.json").read_text())
    parts["labelled"][0], parts["test"][0] = parts["test"][0], parts["labelled"][0]
    (workdir / "splits.json").write_text(json.dumps(parts))
    return "splits.json"

  def lose_rows(workdir):
    """Of a base whose training goes on: they say which step was the best."""
    for name in ("selected.json", "metrics.jsonl", "state/100", "params/100"):
      remove(workdir / "base" / name)
    return "base/metrics.jsonl"

  def lose_judges(workdir):
    (workdir / "pairs" / "judges.json").write_text('{"agreement": {')
    return "pairs/judges.json"

  unread, corrupt = "cannot be read", "is corrupt"
  damage(campaign, "flipped byte in data/", "base", flip_data, "error: ")
  damage(campaign, "splits exchanged", "mine", exchange, "is not what the stage 'prepare' wrote")
  damage(campaign, "metrics lost", "mine", lose_rows, "holds the validations of steps []")
  damage(campaign, "truncated shard", "finetune", truncate, corrupt)
  damage(campaign, "flipped byte in a shard", "finetune", flip_shard, corrupt)
  damage(
    campaign, "flipped byte, base params", "mine", flip_latest(campaign, "base/params"), unread
  )
  damaged_states(campaign)
  flip = flip_latest(campaign, "finetune/params")
  damage(campaign, "flipped byte, params", "evaluate", flip, unread)
  damage(campaign, "half of judges.json", "evaluate", lose_judges, "no valid JSON")
  damage(campaign, "manifest lost", "finetune", lose_manifest)
  damage(campaign, "clock jump: file times", "finetune", age)


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


def replace(path, content):
  new = path.with_suffix(".new")
  new.write_bytes(content)
  new.replace(path)


def clock_of_state(workdir):
  """When TensorStore, which is C++, says that it ended the base's last state, in s."""
  latest = max((workdir / "base" / "state").iterdir(), key=lambda path: int(path.name))
  part = ts.KvStore.open(f"file://{latest}/ocdbt.process_0/").result()
  return ts.ocdbt.dump(part).result()["versions"][-1]["commit_time"] / 1e9


# (stage, what is deleted, the file after which it is, further settings): what a stage has open, or
# reads again, or reads in worker processes, or what a later stage needs.
DELETED = (
  ("base", "data", None, ()),
  ("base", "data", "base/state/20", ()),
  ("mine", "data", "pairs/judges.json", ()),
  ("mine", "data", "pairs/judges.json", ("--config.data.num_workers=1",)),
  ("mine", "base", "pairs/judges.json", ()),
  ("finetune", "data", "finetune/state/20", ("--config.data.num_workers=1",)),
  ("finetune", "pairs", "finetune/state/20", ()),
  ("finetune", "finetune", "finetune/state/20", ()),
  ("evaluate", "data", None, ()),
)


def deleted(campaign):
  """Removes a folder while a stage runs."""
  for stage, folder, after, settings in DELETED:
    workdir = campaign.before(stage, "deleted")
    processes = campaign.start(workdir, *settings)
    if after:
      wait_until(processes, (workdir / after).exists)
    else:
      wait_for_stage(processes, stage)
    shutil.rmtree(workdir / folder, ignore_errors=True)
    ended = campaign.end(processes)
    moment = f"{stage}, {after or 'start'}" + (", workers" if settings else "")
    # What Orbax says where the checkpoint being written goes is not always one line.
    ok = ended.in_one_line() or (folder == stage and ended.in_time)
    fault = f"{folder}/ deleted"
    campaign.finish(fault, moment, ended.shown(), workdir, *settings, ok=ok)


def source_changed(campaign):
  """Deletes, adds or replaces an image while a folder is prepared.

  What was deleted is back at the rerun. One that was added or replaced may or may not belong to
  what is prepared: the results are those of the folder before or after that.
  """
  folder, others = campaign.folder / "source", campaign.folder / "others"
  write_images(folder, 3000)
  write_images(others, 1, seed=1)
  (there,) = os.listdir(others / "images")
  last = max(os.listdir(folder / "images"))
  settings = (
    "--config.data.source=folder", f"--config.data.root={folder}",
    "--config.data.num_unlabelled=20", "--config.data.phantom.num_cases=152",
    "--config.data.phantom.size=(72,80)",
  )  # fmt: skip
  kept = {part: (folder / part / last).read_bytes() for part in ("images", "masks")}
  other = {part: (others / part / there).read_bytes() for part in ("images", "masks")}
  faults = {"deleted": (last, None), "added": (f"a{last}", other), "replaced": (last, other)}

  def put(name, content):
    for part in ("images", "masks"):
      remove(folder / part / name)
      if content is not None:
        replace(folder / part / name, content[part])

  def restore():
    put(f"a{last}", None)
    put(last, kept)

  undisturbed = {}
  for state in ("added", "replaced", "deleted"):
    put(*(faults[state] if state != "deleted" else (last, kept)))
    undisturbed[state] = campaign.folder / f"source-{state}"
    ended = campaign.run(undisturbed[state], *settings)
    assert not any(ended.codes), ended.output()
    restore()
  seconds = float(re.search(r"\[prepare\] ([\d.]+) s", ended.outputs[0]).group(1))
  for state in 3 * tuple(faults):
    workdir = campaign.folder / "source-run"
    processes = campaign.start(workdir, *settings)
    wait_for_stage(processes, "prepare")
    delay = campaign.random.uniform(0, seconds)
    time.sleep(delay)
    put(*faults[state])
    ended = campaign.end(processes)
    if state == "deleted":
      restore()
    campaign.finish(
      f"image {state} in the source", f"prepare + {delay:.1f} s", ended.shown(), workdir, *settings,
      ok=ended.in_one_line(), undisturbed=[undisturbed["deleted"], undisturbed[state]],
    )  # fmt: skip
    restore()


def write_images(folder, count, seed=0):
  """Noise with a brighter rectangle, which the mask shows."""
  shutil.rmtree(folder, ignore_errors=True)
  for part in ("images", "masks"):
    (folder / part).mkdir(parents=True)
  draw = np.random.default_rng(seed)
  for number in range(count):
    image = draw.integers(0, 100, (40, 48), dtype=np.uint8)
    top, left = draw.integers(0, 20, 2)
    mask = np.zeros_like(image)
    mask[top : top + 16, left : left + 20] = 1
    for part, pixels in (("images", image + 90 * mask), ("masks", mask)):
      Image.fromarray(pixels).save(folder / part / f"{number:05d}.png")


FAULTS = {
  "kill": lambda campaign, options: kills(campaign, options.kills),
  "one": lambda campaign, _: one_killed(campaign),
  "frozen_one": lambda campaign, _: frozen(campaign),
  "early": lambda campaign, _: early_sigterm(campaign),
  "sigterm": lambda campaign, _: sigterms(campaign),
  "sweep": lambda campaign, _: sweeps(campaign),
  "disk": lambda campaign, _: full_disk(campaign),
  "disk_of_one": lambda campaign, _: disk_of_one(campaign),
  "checkpoint_of_one": lambda campaign, _: checkpoint_of_one(campaign),
  "damage": lambda campaign, _: damages(campaign),
  "states": lambda campaign, _: damaged_states(campaign),
  "clock": lambda campaign, _: clock(campaign),
  "source": lambda campaign, _: source_changed(campaign),
  "deleted": lambda campaign, _: deleted(campaign),
}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--only")
  parser.add_argument("--processes", type=int, default=1)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  options.workdir = options.workdir.resolve()
  options.workdir.mkdir(parents=True, exist_ok=True)
  campaign = Campaign(options)
  undisturbed(campaign)
  # One process has none beside it; `states` are part of `damage`.
  names = [name for name in FAULTS if "one" not in name or options.processes > 1]
  names.remove("states")
  for name in options.only.split(",") if options.only else names:
    FAULTS[name](campaign, options)
  head = ("fault", "moment", "what happened", "the same command again", "")
  table = [head, *campaign.rows]
  widths = [max(len(row[i]) for row in table) for i in range(len(head))]
  print()
  for row in table:
    print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
  failed = sum(row[-1] == "FAILED" for row in campaign.rows)
  skipped = sum(row[-1].startswith("skipped") for row in campaign.rows)
  print(f"\n{len(campaign.rows) - skipped} faults, {failed} failed, {skipped} skipped")
  sys.exit(1 if failed else 0)


if __name__ == "__main__":
  main()
