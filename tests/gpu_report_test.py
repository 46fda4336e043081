"""The GPU report: how it goes on, and its parts rehearsed at tiny shapes; never how fast."""

import json
import os
import pathlib
import subprocess
import sys
import time
import types

import pytest
import quick_xla

from rndpo_jax import config as config_lib
from rndpo_jax.benchmark import gpu_jobs, gpu_parts, gpu_profile, gpu_report, gpu_rows, gpu_table

MACHINE = {
  "versions": {"jax": "1.2"}, "device_kind": "H100", "num_devices": 1, "processor": "x",
  "num_cores": 16, "platform": "gpu",
}  # fmt: skip
PARTS = {part.name: part for part in gpu_table.PARTS}


def part(name, limit_seconds=60.0):
  return gpu_table.Part(name, f"what {name} does", "", limit_seconds, {}, {})


def run(tmp_path, programs, total_seconds=100.0, limit_seconds=60.0):
  """Runs a Python program for each part; (how each ended, report.jsonl)."""
  report = tmp_path / "report.jsonl"
  gpu_rows.write(report, "machine", **MACHINE, rehearsed=False)
  parts = [part(name, limit_seconds) for name in programs]

  def command(p):
    return [sys.executable, "-c", programs[p.name]]

  return gpu_report.run_parts(parts, command, report, total_seconds, dict(os.environ)), report


def environment():
  """As a user's, but that programs are compiled sooner and come from the tests' cache."""
  made = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
  made |= {"XLA_FLAGS": quick_xla.FLAGS, "PYTHON": sys.executable}
  return made | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def launch(*arguments):
  return subprocess.run(
    ["bash", "launch/gpu_report.sh", *arguments], env=environment(), capture_output=True, text=True
  )


class TestRunner:
  def test_a_part_that_fails_is_named_with_its_last_lines_and_the_others_go_on(
    self, tmp_path, capsys
  ):
    ended, report = run(
      tmp_path,
      {
        "first": "print('much'); raise SystemExit('the cause')",
        "second": "print('fine')",
        "third": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
      },
    )
    assert ended == {"first": "failed", "second": "ok", "third": "failed"}
    text = report.with_suffix(".md").read_text()
    assert "## first: failed, its last lines\n\n```\nmuch\nthe cause\nexit code 1\n```" in text
    assert "exit code -11" in text and "## second" not in text
    shown = capsys.readouterr().out
    assert "[first] failed" in shown and "  | the cause" in shown and "[second] ok" in shown

  def test_a_part_that_hangs_is_ended_with_its_children_and_keeps_its_rows(
    self, tmp_path, monkeypatch
  ):
    monkeypatch.setattr(gpu_report, "GRACE_SECONDS", 0.2)
    report, child = tmp_path / "report.jsonl", tmp_path / "child"
    hangs = f"""
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
from rndpo_jax.benchmark import gpu_rows
gpu_rows.write(pathlib.Path({str(report)!r}), "figure", part="hangs", figure="speed", setting="s",
               value=3.0, unit="x", note="", goal=[">=", 2.0], met=True)
started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
pathlib.Path({str(child)!r}).write_text(str(started.pid))
print("before it hangs", flush=True)
time.sleep(100)
"""
    ended, _ = run(tmp_path, {"hangs": hangs, "next": ""}, limit_seconds=5.0)
    assert ended == {"hangs": "timed out", "next": "ok"}
    text = report.with_suffix(".md").read_text()
    assert "before it hangs\nended at its limit of 5 s" in text
    assert "| hangs | speed | s | 3 x | >= 2 | met |" in text
    state = pathlib.Path("/proc", child.read_text(), "stat")
    for _ in range(100):  # a killed process stays until the system has taken it away
      if not state.exists() or state.read_text().split()[2] == "Z":
        return
      time.sleep(0.05)
    raise AssertionError("the child is still there")

  def test_what_there_is_no_time_for_is_said(self, tmp_path, capsys):
    ended, report = run(tmp_path, {"a": "", "b": ""}, total_seconds=gpu_report.LEAST_SECONDS - 1)
    assert ended == {"a": "left out", "b": "left out"}
    assert "left out, 9 s being over: a b; ask for them by name" in capsys.readouterr().out
    assert "| a | what a does | left out |" in report.with_suffix(".md").read_text()

  def test_exit_code(self, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "look", lambda environment: MACHINE)
    monkeypatch.setattr(gpu_report.signal, "signal", lambda *_: None)
    ends = dict.fromkeys(PARTS, "ok")
    monkeypatch.setattr(gpu_report, "run_parts", lambda *_: ends)
    assert gpu_report.main([str(tmp_path)]) == 0
    ends["job"] = "left out"  # not among the essential ones
    assert gpu_report.main([str(tmp_path)]) == 0
    assert gpu_report.main([str(tmp_path), "job"]) == 1
    ends["loss"] = "left out"
    assert gpu_report.main([str(tmp_path)]) == 1
    ends |= {"loss": "ok", "job": "timed out"}
    assert gpu_report.main([str(tmp_path)]) == 1


class TestBadInput:
  @pytest.mark.parametrize(
    "arguments, message",
    [
      (("OUT", "los"), "error: unknown part 'los'; known: device, loss, step, "),
      (("OUT",), "error: no GPU; --rehearse runs it on the CPU"),
      (("/proc/report",), "error: OUT: /proc/report cannot be written ("),
      ((), "error: the following arguments are required: out, parts"),
      (("OUT", "--fast"), "error: unrecognized arguments: --fast"),
    ],
  )
  def test_one_line_and_code_2(self, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(gpu_report, "look", lambda environment: {**MACHINE, "platform": "cpu"})
    given = [str(tmp_path / "out") if a == "OUT" else a for a in arguments]
    with pytest.raises(SystemExit) as ended:
      gpu_report.main(given)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(message)

  def test_the_program_says_so_too(self, tmp_path):
    done = launch(str(tmp_path / "out"), "device")
    assert (done.returncode, done.stderr) == (2, "error: no GPU; --rehearse runs it on the CPU\n")


class TestRows:
  def test_goals(self, tmp_path):
    report = gpu_parts.Report(
      tmp_path / "r", "p", {"a": ("<=", 1.1), "b": (">=", 4), "c": ("is", 1)}
    )
    for name, value in (("a", 1.1), ("a", 1.11), ("b", 4.0), ("b", 3.9), ("c", 1), ("c", 0)):
      gpu_parts.figure(report, name, "s", value)
    gpu_parts.figure(report, "b", "s", None, note="skipped: why")
    gpu_parts.figure(report, "other", "s", 2.0)
    met = [row["met"] for row in gpu_rows.read(report.path)]
    assert met == [True, False, True, False, True, False, None, None]

  def test_of_a_part_that_ran_twice_the_later_counts_and_half_a_line_does_not(self, tmp_path):
    path = tmp_path / "report.jsonl"
    gpu_rows.write(path, "machine", **MACHINE, rehearsed=False)
    for value in (1.0, 2.0):
      gpu_rows.write(path, "part", part="p", what="w", status="started")
      gpu_parts.figure(gpu_parts.Report(path, "p", {}), "speed", "s", value, "GB/s")
    with path.open("a") as file:
      file.write('{"kind": "figu')
    text = gpu_rows.markdown(gpu_rows.read(path))
    assert "2 GB/s" in text and "1 GB/s" not in text
    assert "| p | w | cut off |  |" in text  # started, and nothing told of its end

  def test_a_rehearsal_says_so(self):
    assert "Rehearsed, not measured" in gpu_rows.markdown(
      [{"kind": "machine", **MACHINE, "rehearsed": True}]
    )


def test_what_is_measured_is_compiled_afresh():
  assert gpu_report.make_environment({}, False)["JAX_ENABLE_COMPILATION_CACHE"] == "false"
  given = {"JAX_ENABLE_COMPILATION_CACHE": "true"}
  assert gpu_report.make_environment(given, False)["JAX_ENABLE_COMPILATION_CACHE"] == "false"


def test_every_goal_of_the_table_is_of_a_figure_that_its_part_says(rehearsal):
  rows, _ = rehearsal
  said = {(row["part"], row["figure"]) for row in rows if row["kind"] == "figure"}
  goals = {(name, figure) for name, part in PARTS.items() for figure in part.goals}
  assert {goal for goal in goals if goal[0] in REHEARSED} <= said


# `step3d` and the like are `step` at other shapes, and `smoke` is `job` with another config.
REHEARSED = ("device", "loss", "step", "mine", "population", "determinism", "job", "input")


# Parts in one process, since each would import JAX again; of the four runs of `determinism` one.
TOGETHER = """
import functools, sys
from rndpo_jax.benchmark import gpu_jobs, gpu_parts
train = functools.cache(functools.partial(gpu_jobs._train_apart, flag=gpu_jobs.FLAG))
gpu_jobs._train_apart = lambda given, flag: train(given)
report, *names = sys.argv[1:]
for name in names:
  sys.argv = ["gpu_parts", name, report, "--rehearse"]
  gpu_parts.main()
"""


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
  """(rows, files) of a rehearsal, a part by the command; no PyTorch, which compiles slowly."""
  out = tmp_path_factory.mktemp("gpu_report")
  first, *others = REHEARSED
  done = launch("--rehearse", str(out), first)
  assert done.returncode == 0, done.stdout + done.stderr
  done = subprocess.run(
    [sys.executable, "-c", TOGETHER, str(out / "report.jsonl"), *others],
    env=gpu_report.make_environment(environment(), True), capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr
  return gpu_rows.read(out / "report.jsonl"), sorted(path.name for path in out.iterdir())


def test_every_part_rehearsed(rehearsal):
  rows, names = rehearsal
  assert names == ["loss_programs.txt", "report.jsonl", "report.log", "report.md"]
  ends = {r["part"]: r["status"] for r in rows if r["kind"] == "part" and r["status"] != "started"}
  assert ends == {REHEARSED[0]: "ok"}
  figures = [row for row in rows if row["kind"] == "figure"]
  assert {row["part"] for row in figures} == set(REHEARSED)
  assert all(row["met"] is None for row in figures)  # a rehearsal meets no goal
  missing = {row["note"] for row in figures if row["value"] is None}
  assert missing <= {gpu_parts.NO_TORCH, gpu_parts.NO_KERNELS, "not told on this device"}
  equal = [row["value"] for row in figures if row["figure"].startswith("equal bits")]
  assert equal == [1, 1]
  stages = {r["figure"].split()[-1] for r in figures if r["figure"].startswith("stage ")}
  assert stages == set(config_lib.STAGES)


def test_kernels_are_those_on_the_streams_of_gpus():
  def plane(name, **lines):
    made = [
      types.SimpleNamespace(
        name=line.replace("_", " "),
        events=[types.SimpleNamespace(duration_ns=float(ns)) for ns in durations],
      )
      for line, durations in lines.items()
    ]
    return types.SimpleNamespace(name=name, lines=made)

  planes = [
    plane("/host:CPU", Stream_1=[1e9]),
    plane("/device:GPU:0", Stream_7=[2000, 3000], XLA_Ops=[5000], Stream_9=[500]),
  ]
  seconds, count = gpu_profile.kernels(planes)
  assert count == 3 and seconds == pytest.approx(5.5e-6)


def test_seconds_of_stages_and_of_compiling():
  lines = ["[prepare]", "[prepare] 1.5 s", "compiled in 0.25 s", "base: 4/4 in 2.0 s",
           "compiled in 1e-1 s", "[base] 12.0 s", "[mine] 3.0 s"]  # fmt: skip
  stages, compiling = gpu_jobs.read_stages(lines)
  assert stages == {"prepare": 1.5, "base": 12.0, "mine": 3.0}
  assert compiling == {"prepare": 0.0, "base": 0.35, "mine": 0.0}


def test_images_of_stages(tiny_run):
  config, workdir = tiny_run
  splits = json.loads((workdir / "splits.json").read_text())
  images = gpu_jobs.images_of_stages(workdir)
  assert images["prepare"] == config.data.phantom.num_cases == 30
  assert images["base"] == 40 * 8 and images["finetune"] == 8 * 8
  assert images["mine"] == len(splits["unlabelled"]) == 20
  assert images["evaluate"] == 6 * len(json.loads((workdir / "results.json").read_text())["curve"])


def test_images_of_stages_are_those_of_the_last_phase(tiny_run, tmp_path):
  _, workdir = tiny_run
  for name in ("splits.json", "results.json"):
    (tmp_path / name).write_bytes((workdir / name).read_bytes())
  content = json.loads((workdir / "config.json").read_text())
  content["config"]["phases"] = [{}, {"finetune.num_steps": 3}]
  (tmp_path / "config.json").write_text(json.dumps(content))
  images = gpu_jobs.images_of_stages(tmp_path)
  assert images["finetune"] == 3 * 8 and "mine" not in images  # that stage trained the first phase


def test_ph2_and_platform_reach_the_program(monkeypatch, tmp_path):
  seen = []
  monkeypatch.setattr(gpu_jobs, "_job", lambda report, setting, flags, platform: seen.append(
    (setting, " ".join(flags), platform)))  # fmt: skip
  gpu_jobs.job(gpu_parts.Report(tmp_path, "job", {}, str(tmp_path)), size=256, width=32)
  gpu_jobs.smoke(gpu_parts.Report(tmp_path, "smoke_cpu", {}), platform="cpu")
  (ph2, flags, _), (_, quick, platform) = seen
  assert ph2 == "PH2, 256 x 256, width 32" and platform == "cpu"
  assert f"--config=configs/ph2.py:rn_dpo --config.data.root={tmp_path}" in flags
  assert quick == "--config=configs/quickstart.py"
