"""Every figure of this program on a GPU, by one command: `bash launch/gpu_report.sh OUT`.

Each part runs in a process of its own with a time limit and appends its rows to OUT/report.jsonl
as they come; after each the table OUT/report.md is written again. A part that fails or takes too
long is named with its last lines, and the others go on. This module needs no JAX, so that the
GPU's memory is the part's alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from rndpo_jax.benchmark import gpu_rows
from rndpo_jax.benchmark.gpu_table import PARTS, Part

TOTAL_SECONDS = 540.0
# A part is not begun with less time than this left.
LEAST_SECONDS = 10.0
# Between SIGTERM and SIGKILL.
GRACE_SECONDS = 5.0
LAST_LINES = 12
ROOT = pathlib.Path(__file__).parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the parts asked for; 0 if all ran, 1 if one failed or, if asked for, was left out.

  Ends with code 2 and one line on an unknown part, where there is no GPU, or where OUT cannot be
  written.
  """
  given = _parse(arguments)
  parts = choose(given.parts, given.rehearse)
  report = given.out / "report.jsonl"
  try:
    given.out.mkdir(parents=True, exist_ok=True)
    with report.open("a"):
      pass
  except OSError as error:
    _end(f"OUT: {given.out} cannot be written ({error.strerror}); name another folder")
  environment = make_environment(os.environ, given.rehearse)
  machine = look(environment)
  if machine["platform"] != "gpu" and not given.rehearse:
    _end("no GPU; --rehearse runs it on the CPU")
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part in hand ends too
  gpu_rows.write(report, "machine", **machine, rehearsed=given.rehearse)

  def command(part):
    flags = ["--rehearse"] * given.rehearse + [f"--ph2={given.ph2}"] * bool(given.ph2)
    return [sys.executable, "-m", "rndpo_jax.benchmark.gpu_parts", part.name, str(report), *flags]

  ended = run_parts(parts, command, report, given.total_seconds, environment)
  print(f"written: {report.with_suffix('.md')}", flush=True)
  wanted = [p for p in parts if p.essential or given.parts]
  return int(any(s in ("failed", "timed out") for s in ended.values())
             or any(ended[p.name] == "left out" for p in wanted))  # fmt: skip


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="gpu_report.sh", description=__doc__.splitlines()[0])
  parser.error = _end
  parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
  parser.add_argument("--ph2", default="", help="folder of PH2 for `job`; without it a phantom")
  parser.add_argument("--total_seconds", type=float, default=TOTAL_SECONDS, help="for all parts")
  parser.add_argument("out", type=pathlib.Path, help="folder for report.md, .jsonl and .log")
  names = ", ".join(part.name for part in PARTS)
  parser.add_argument("parts", nargs="*", help=f"some of {names}; default: all, while time is left")
  return parser.parse_args(arguments)


def _end(message: str) -> NoReturn:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(2)


def choose(names: Sequence[str], rehearse: bool = False) -> list[Part]:
  """The parts by name, in the order asked for; all without names, or all code in a rehearsal."""
  known = {part.name: part for part in PARTS}
  if rehearse:  # two cores compile slowly
    known = {name: p._replace(limit_seconds=2 * p.limit_seconds) for name, p in known.items()}
  for name in names:
    if name not in known:
      _end(f"unknown part {name!r}; known: {', '.join(known)}")
  return [known[name] for name in dict.fromkeys(names)] or [
    part for part in known.values() if not (rehearse and part.same_code_as)
  ]


def make_environment(environment: Mapping[str, str], rehearse: bool) -> dict[str, str]:
  """For the parts: numpy's threads as in the programs; every program compiled, none from a cache.

  In a rehearsal, where no time counts, compiling is quick, and a cache that is named is used.
  """
  made = {"OPENBLAS_NUM_THREADS": "1", **environment}
  if not rehearse:
    return {**made, "JAX_ENABLE_COMPILATION_CACHE": "false"}
  made |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  made["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  return made


def look(environment: Mapping[str, str]) -> dict[str, Any]:
  """Versions and devices, as a process with JAX sees them."""
  code = "from rndpo_jax.benchmark import gpu_parts; gpu_parts.print_machine()"
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
  )
  if done.returncode:
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    _end(f"JAX does not start here ({last})")
  return json.loads(done.stdout.splitlines()[-1])


def run_parts(
  parts: Sequence[Part], command, report: pathlib.Path, total_seconds: float, environment
) -> dict[str, str]:
  """Runs the parts in turn; part -> "ok", "failed", "timed out" or "left out".

  Args:
    parts: in their order.
    command: part -> the command line that runs it.
    report: the file of rows; table and log go beside it.
    total_seconds: for all of them.
    environment: of the commands.
  """
  end, ended = time.monotonic() + total_seconds, {}
  for part in parts:
    left = end - time.monotonic()
    start = time.monotonic()
    gpu_rows.write(report, "part", part=part.name, what=part.what, status="started")
    if left < LEAST_SECONDS:
      outcome = {"status": "left out", "last_lines": [f"{total_seconds:.0f} s were over"]}
    else:
      print(f"[{part.name}] {part.what}", flush=True)
      limit = min(part.limit_seconds, left)
      outcome = run_part(command(part), limit, report.with_suffix(".log"), environment)
    ended[part.name] = outcome["status"]
    seconds = time.monotonic() - start
    gpu_rows.write(report, "part", part=part.name, what=part.what, seconds=seconds, **outcome)
    rows = gpu_rows.read(report)
    gpu_rows.write_whole(report.with_suffix(".md"), gpu_rows.markdown(rows))
    for line in gpu_rows.describe(rows, part.name):
      print(f"  {line}", flush=True)
    print(f"[{part.name}] {outcome['status']}, {seconds:.1f} s", flush=True)
    if outcome["status"] not in ("ok", "left out"):
      print("\n".join(f"  | {line}" for line in outcome["last_lines"]), flush=True)
  out = [name for name, status in ended.items() if status == "left out"]
  if out:
    print(f"left out, {total_seconds:.0f} s being over: {' '.join(out)}; ask for them by name")
  return ended


def run_part(
  command: Sequence[str], limit_seconds: float, log: pathlib.Path, environment
) -> dict[str, Any]:
  """Runs one command in a process group of its own, which is ended at the limit.

  Returns:
    status ("ok", "failed" or "timed out") and, unless it is ok, the last lines of its output.
  """
  with log.open("ab") as output:
    place = output.tell()
    process = subprocess.Popen(
      command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
      stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
      status = "ok" if process.wait(timeout=limit_seconds) == 0 else "failed"
    except subprocess.TimeoutExpired:
      status = "timed out"
    finally:
      _end_group(process)
  if status == "ok":
    return {"status": status}
  with log.open("rb") as output:
    output.seek(place)
    lines = output.read().decode(errors="replace").splitlines()
  reason = (
    f"ended at its limit of {limit_seconds:.0f} s"
    if status == "timed out"
    else f"exit code {process.returncode}"
  )
  return {"status": status, "last_lines": [*lines[-LAST_LINES:], reason]}


def _end_group(process: subprocess.Popen) -> None:
  """SIGTERM to what is left of the group, and SIGKILL to what does not follow it."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(timeout=GRACE_SECONDS)
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


if __name__ == "__main__":
  sys.exit(main())
