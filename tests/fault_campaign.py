"""Faults against the whole job, each followed by the same command again; prints a table.

  python tests/fault_campaign.py --workdir=DIR [--kills=20] [--only=kill,sigterm] [--processes=1]

An undisturbed run of `tests/tiny_config.py` comes first (its stages are the starting points), then
each fault. A fault passes if the rerun ends with the same `results.json`, or if it is refused in
one line with exit code 1 and the remedy that the line names leads there. Exit code 1 if any fails.
"""

import argparse
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

ROOT = pathlib.Path(__file__).parent.parent
STAGES = ("prepare", "base", "mine", "finetune", "evaluate", "report")
# What each stage writes; removing all from a stage on makes a run that stands before it.
WRITES = {
  "prepare": ("data", "splits.json"), "base": ("base",), "mine": ("pairs",),
  "finetune": ("finetune",), "evaluate": ("evaluate", "results.json"), "report": ("report.html",),
}  # fmt: skip
SETTINGS = ("--config.base.eval_every_steps=20", "--config.finetune.num_steps=40")
# Moves the wall clock a day back while the program runs; the job must not care.
CLOCK_JUMP = """
import runpy, sys, time
real, real_ns, start = time.time, time.time_ns, time.monotonic()
late = lambda: 86400 if time.monotonic() - start > 12 else 0
time.time = lambda: real() - late()
time.time_ns = lambda: real_ns() - late() * 10**9
sys.argv = ["launch.run", *sys.argv[1:]]
runpy.run_module("launch.run", run_name="__main__")
"""


class Campaign:
  """The folders, the undisturbed results, and the rows of the table."""

  def __init__(self, options):
    self.folder = options.workdir
    self.processes = options.processes
    self.random = random.Random(options.seed)
    self.undisturbed = options.workdir / "undisturbed"
    self.rows = []
    self.seconds = {}

  def start(self, workdir, *arguments, prefix=("-m", "launch.run")):
    """One process, or several on loopback; the list of them."""
    environment = {
      **os.environ,
      "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PLATFORMS": "cpu",
    }
    command = [
      sys.executable, *prefix, "--config=tests/tiny_config.py", f"--workdir={workdir}", *SETTINGS,
      *arguments,
    ]  # fmt: skip
    port = free_port()
    together = [
      f"--coordinator_address=localhost:{port}", f"--num_processes={self.processes}",
    ]  # fmt: skip
    started = []
    for process in range(self.processes):
      several = [*together, f"--process_id={process}"] if self.processes > 1 else []
      started.append(
        subprocess.Popen(
          [*command, *several],
          cwd=ROOT,
          env=environment,
          stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT,
          text=True,
        )
      )
    return started

  def run(self, workdir, *arguments, **options):
    """(exit code of process 0, all output) of a run to its end."""
    processes = self.start(workdir, *arguments, **options)
    outputs = [process.communicate(timeout=1200)[0] for process in processes]
    return processes[0].returncode, "\n".join(outputs)

  def before(self, stage, name):
    """A copy of the undisturbed run, standing before `stage`."""
    workdir = self.folder / name
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(self.undisturbed, workdir)
    for later in STAGES[STAGES.index(stage) :]:
      for path in WRITES[later]:
        remove(workdir / path)
    return workdir

  def same(self, workdir):
    ours, theirs = workdir / "results.json", self.undisturbed / "results.json"
    return ours.exists() and ours.read_bytes() == theirs.read_bytes()

  def add(self, fault, moment, first, again, ok):
    self.rows.append((fault, moment, first, again, "ok" if ok else "FAILED"))
    print(" | ".join(self.rows[-1]), flush=True)

  def finish(self, fault, moment, first, workdir):
    """Runs again: the same results, or a refusal of one line whose remedy works."""
    code, output = self.run(workdir)
    again = "same results" if code == 0 and self.same(workdir) else f"exit {code}"
    if code == 1 and "Traceback" not in output:
      lines = [text for text in output.splitlines() if text.startswith("error: ")]
      # The remedy is with the process that refused, not with those that only lost it.
      line = [text for text in lines if "another process of this run" not in text][-1]
      for path in named_by_remedy(line):
        remove(path)
      code, output = self.run(workdir)
      again = "refused; after its remedy " + ("the same results" if self.same(workdir) else "NOT")
    ok = code == 0 and self.same(workdir)
    self.add(fault, moment, first, again, ok)
    if not ok:
      print(output, flush=True)
    shutil.rmtree(workdir)


def named_by_remedy(line):
  """Paths after 'delete' or 'remove' in a refusal."""
  remedy = re.split(r"[Dd]elete|remove ", line, maxsplit=1)[-1]
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
  content[campaign.random.randrange(len(content))] ^= 1 << campaign.random.randrange(8)
  path.write_bytes(bytes(content))


def undisturbed(campaign):
  """Runs twice, so that the second one's times are those with compiled programs at hand."""
  for workdir in (campaign.folder / "first", campaign.undisturbed):
    shutil.rmtree(workdir, ignore_errors=True)
    code, output = campaign.run(workdir)
    assert code == 0, output
  assert campaign.same(campaign.folder / "first"), "two undisturbed runs differ"
  for name in STAGES:
    found = re.search(rf"\[{name}\] ([\d.]+) s", output)
    campaign.seconds[name] = float(found.group(1))
  print("seconds of the stages:", campaign.seconds, flush=True)


def signal_during(campaign, stage, number, name):
  """Sends `number` to every process at a random moment of a stage; the row's middle entries."""
  workdir = campaign.before(stage, name)
  processes = campaign.start(workdir)
  for line in processes[0].stdout:
    if f"[{stage}]" in line:
      break
  delay = campaign.random.uniform(0, campaign.seconds[stage])
  time.sleep(delay)
  for process in processes:
    process.send_signal(number)
  codes = [process.communicate(timeout=600) and process.returncode for process in processes]
  return workdir, f"{stage} + {delay:.1f} s", f"exit {', '.join(map(str, codes))}", codes


def kills(campaign, count):
  for turn in range(count):
    stage = STAGES[turn % len(STAGES)]
    workdir, moment, first, _ = signal_during(campaign, stage, signal.SIGKILL, f"kill-{turn}")
    campaign.finish("kill -9", moment, first, workdir)


def one_killed(campaign):
  """Kills one of several processes in each stage; the others must stop within a minute, by name."""
  for turn, stage in enumerate(STAGES):
    workdir = campaign.before(stage, f"one-{stage}")
    processes = campaign.start(workdir, "--heartbeat_seconds=15")
    for line in processes[0].stdout:
      if f"[{stage}]" in line:
        break
    delay = campaign.random.uniform(0, campaign.seconds[stage])
    time.sleep(delay)
    lost = turn % len(processes)
    processes[lost].kill()
    start = time.monotonic()
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    seconds = time.monotonic() - start
    codes = [process.returncode for process in processes]
    moment = f"{stage} + {delay:.1f} s, process {lost}"
    first = f"exit {', '.join(map(str, codes))} after {seconds:.0f} s"
    # A process may have been over and done when the other died.
    stopped = all(code for code in codes) or campaign.same(workdir)
    named = [text for i, text in enumerate(outputs) if i != lost and codes[i]]
    clear = all("another process" in text or "another task died" in text for text in named)
    if seconds > 60 or not stopped or not clear:
      campaign.add(
        "one process killed", moment, first, "expected the others to stop by name", False
      )
      print("\n".join(outputs), flush=True)
    campaign.finish("one process killed", moment, first, workdir)


def sigterms(campaign):
  for stage in STAGES:
    workdir, moment, first, codes = signal_during(campaign, stage, signal.SIGTERM, f"term-{stage}")
    # 0 where the job was over before the signal was looked at.
    if not all(code in (0, 75) for code in codes):
      campaign.add("SIGTERM", moment, first, "expected exit 75", False)
    campaign.finish("SIGTERM", moment, first, workdir)


def full_disk(campaign):
  """A tmpfs of a few sizes, so that it fills in other stages; then the same, made larger."""
  for kilobytes in (100, 400, 1200, 2500):
    workdir = campaign.folder / f"disk-{kilobytes}"
    workdir.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(workdir)]
    if subprocess.run(mount, capture_output=True).returncode:
      return campaign.add("full disk", "-", "skipped: mounting is not allowed here", "-", True)
    try:
      code, output = campaign.run(workdir / "run")
      before = output
      clear = code == 1 and "error: the disk is full" in output
      stage = re.findall(r"^\[(\w+)\]", output, re.MULTILINE)[-1:] or ["start"]
      subprocess.run(["mount", "-o", "remount,size=1g", str(workdir)], check=True)
      code, output = (code, output) if not clear else campaign.run(workdir / "run")
      ok = clear and code == 0 and campaign.same(workdir / "run")
      first = "refused: the disk is full" if clear else f"exit {code}"
      if "Traceback" in before:
        first += ", beside tracebacks of libraries"
      again = "same results" if ok else "NOT the same"
      campaign.add(f"disk of {kilobytes} kB", stage[0], first, again, ok)
      if not ok:
        print(output)
    finally:
      subprocess.run(["umount", str(workdir)], check=True)


def damage(campaign, fault, stage, harm):
  """`harm` changes files of a run that stands before `stage`."""
  workdir = campaign.before(stage, "damage")
  what = harm(workdir)
  campaign.finish(fault, f"before {stage}", what, workdir)


def damages(campaign):
  def shard(workdir):
    return sorted((workdir / "pairs").glob("*.array_record"))[0]

  def truncate(workdir):
    os.truncate(shard(workdir), shard(workdir).stat().st_size // 2)
    return shard(workdir).name

  def flip_shard(workdir):
    flip_a_byte(campaign, shard(workdir))
    return shard(workdir).name

  def flip_checkpoint(folder, unfinished=()):
    def harm(workdir):
      for name in unfinished:
        remove(workdir / name)
      latest = max((workdir / folder).iterdir(), key=lambda path: int(path.name))
      path = max((latest / "ocdbt.process_0" / "d").iterdir(), key=lambda path: path.stat().st_size)
      flip_a_byte(campaign, path)
      return f"{folder}/{latest.name}"

    return harm

  def lose_manifest(workdir):
    (workdir / "pairs" / "manifest.json").unlink()
    return "pairs/manifest.json"

  def age(workdir):
    for number, path in enumerate(sorted(workdir.rglob("*"))):
      os.utime(path, (0, 0) if number % 2 else (4e9, 4e9))
    return "times of 1970 and 2096"

  damage(campaign, "truncated shard", "finetune", truncate)
  damage(campaign, "flipped byte in a shard", "finetune", flip_shard)
  damage(campaign, "flipped byte, base params", "mine", flip_checkpoint("base/params"))
  started = ("base/selected.json",)
  damage(campaign, "flipped byte, base state", "mine", flip_checkpoint("base/state", started))
  tuned = ("finetune/done.json",)
  flip = flip_checkpoint("finetune/state", tuned)
  damage(campaign, "flipped byte, state", "evaluate", flip)
  damage(campaign, "flipped byte, params", "evaluate", flip_checkpoint("finetune/params"))
  damage(campaign, "manifest lost", "finetune", lose_manifest)
  damage(campaign, "clock jump: file times", "finetune", age)


def clock(campaign):
  workdir = campaign.before("base", "clock")
  code, _ = campaign.run(workdir, prefix=("-c", CLOCK_JUMP))
  campaign.finish("clock jump: a day back", "12 s after start", f"exit {code}", workdir)


def deleted_input(campaign):
  """Removes the prepared records while the base trains; the files are open, or read again."""
  for stage in ("base", "evaluate"):
    workdir = campaign.before(stage, "deleted")
    processes = campaign.start(workdir)
    for line in processes[0].stdout:
      if f"[{stage}]" in line:
        break
    remove(workdir / "data")
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    first = f"exit {processes[0].returncode}"
    if any("Traceback" in output for output in outputs):
      first += ", with a traceback"
    campaign.finish("data/ deleted while running", stage, first, workdir)


FAULTS = {
  "kill": lambda campaign, options: kills(campaign, options.kills),
  "one": lambda campaign, _: one_killed(campaign),
  "sigterm": lambda campaign, _: sigterms(campaign),
  "disk": lambda campaign, _: full_disk(campaign),
  "damage": lambda campaign, _: damages(campaign),
  "clock": lambda campaign, _: clock(campaign),
  "deleted": lambda campaign, _: deleted_input(campaign),
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
  # One process has none beside it to lose.
  names = [name for name in FAULTS if name != "one" or options.processes > 1]
  for name in options.only.split(",") if options.only else names:
    FAULTS[name](campaign, options)
  head = ("fault", "moment", "what happened", "the same command again", "")
  table = [head, *campaign.rows]
  widths = [max(len(row[i]) for row in table) for i in range(len(head))]
  print()
  for row in table:
    print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
  failed = sum(row[-1] == "FAILED" for row in campaign.rows)
  print(f"\n{len(campaign.rows)} faults, {failed} failed")
  sys.exit(1 if failed else 0)


if __name__ == "__main__":
  main()
