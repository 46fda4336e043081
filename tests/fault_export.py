"""Kills of launch.export: the output is whole or not there, and the same command makes it."""

import os
import shutil
import subprocess
import sys
import time

from fault_runs import ROOT

FORMATS = ("safetensors",)  # the tiny network is none of nnU-Net's


def kills(campaign):
  """At random moments, and three times as soon as a file is being written."""
  for name in FORMATS:
    wanted = _content(_whole(campaign, name))
    for turn in range(6):
      output = campaign.folder / f"export-{name}-{turn}"
      temporary = output.parent / f".{output.name}.tmp"
      process = _start(campaign, name, output)
      if turn < 3:
        while process.poll() is None and not temporary.exists():
          pass
        moment = f"{name}, writing"
      else:
        delay = campaign.random.uniform(0, campaign.seconds["export"])
        time.sleep(delay)
        moment = f"{name} + {delay:.1f} s"
      process.kill()
      first = f"exit {process.wait()}"
      ok = not output.exists() or _content(output) == wanted
      again = "whole before"
      if not output.exists():
        code = _start(campaign, name, output).wait()
        ok = ok and code == 0 and _content(output) == wanted and not temporary.exists()
        again = "same files" if ok else f"exit {code}"
      campaign.add("kill -9, export", moment, first, again, ok)
      shutil.rmtree(output)


def _whole(campaign, name):
  """An undisturbed export; its time is noted."""
  output = campaign.folder / f"export-{name}"
  shutil.rmtree(output, ignore_errors=True)
  began = time.monotonic()
  assert _start(campaign, name, output).wait() == 0
  campaign.seconds["export"] = time.monotonic() - began
  return output


def _start(campaign, name, output):
  flags = (f"--workdir={campaign.undisturbed}", f"--format={name}", f"--output={output}")
  command = [sys.executable, "-m", "launch.export", *flags]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def _content(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}
