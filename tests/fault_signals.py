"""Faults of processes: killed, frozen, told to end."""

import signal
import sys
import time

from fault_runs import STAGES, wait_for_stage, wait_until

SWEEP = (sys.executable, "-m", "launch.sweep")


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
