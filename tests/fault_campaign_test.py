"""A short form of the fault campaign: kills, and damaged states that must be noticed."""

import os
import pathlib
import re
import subprocess
import sys

CAMPAIGN = pathlib.Path(__file__).parent / "fault_campaign.py"


def test_a_short_campaign(tmp_path):
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  done = subprocess.run(
    [sys.executable, CAMPAIGN, f"--workdir={tmp_path}", "--kills=1", "--only=kill,states"],
    env=environment, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr
  rows = re.findall(r"^([^|\n]+) \|.*\| ok$", done.stdout, re.M)
  assert rows == [
    "kill -9", "flipped byte, base state", "flipped byte, state",
    "flipped byte, only base state",
  ]  # fmt: skip
  assert "4 faults, 0 failed, 0 skipped" in done.stdout
