"""What the fault campaign is made of: runs of the whole job, and what came out of them."""

import os
import pathlib
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
STAGES = ("prepare", "base", "mine", "finetune", "evaluate", "report")
# What each stage writes; removing all from a stage on makes a run that stands before it.
WRITES = {
  "prepare": ("data", "splits.json"), "base": ("base",), "mine": ("pairs",),
  "finetune": ("finetune",), "evaluate": ("evaluate", "delivered", "results.json"),
  "report": ("report.html",),
}  # fmt: skip
# What must be the same after a fault: results, what they were chosen by, and every pair.
SAME = (
  "results.json", "splits.json", "base/metrics.jsonl", "base/selected.json", "pairs/judges.json",
  "pairs/manifest.json", "finetune/metrics.jsonl",
)  # fmt: skip
SETTINGS = ("--config.finetune.num_steps=40",)
PROGRAM = (sys.executable, "-m", "launch.run")


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
    """The whole job in one process, or several; the list of them. `programs`: of each process."""
    given = ["--config=tests/tiny_config.py", f"--workdir={workdir}", *SETTINGS, *arguments]
    return self.start_programs(workdir.name, given, programs or [PROGRAM] * self.processes)

  def start_programs(self, name, given, programs):
    """A process of each program, on loopback if several, all with the arguments `given`."""
    environment = {
      "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
      **os.environ,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PLATFORMS": "cpu",
    }
    port = free_port()
    together = [
      f"--coordinator_address=localhost:{port}", f"--num_processes={self.processes}",
    ]  # fmt: skip
    self.runs += 1
    (self.folder / "output").mkdir(exist_ok=True)
    started = []
    for process, program in enumerate(programs):
      several = [*together, f"--process_id={process}"] if self.processes > 1 else []
      path = self.folder / "output" / f"{self.runs:03d}-{name}-process-{process}.txt"
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


def replace(path, content):
  new = path.with_suffix(".new")
  new.write_bytes(content)
  new.replace(path)
