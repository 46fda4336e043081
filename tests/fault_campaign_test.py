"""A short form of the fault campaign: a kill, and a damaged state with its remedy."""

import re
import shutil
import sys

import fault_campaign
import fault_files
import fault_runs
import fault_signals
import pytest


def test_a_short_campaign(tiny_run, tmp_path, monkeypatch, capsys):
  """On the run of these tests, whose programs are compiled."""

  def undisturbed(campaign):
    shutil.copytree(tiny_run[1], campaign.undisturbed)
    campaign.seconds = dict.fromkeys(fault_runs.STAGES, 1.0)

  monkeypatch.setattr(fault_campaign, "undisturbed", undisturbed)
  monkeypatch.setattr(fault_runs, "SETTINGS", ())
  monkeypatch.setattr(fault_signals, "STAGES", ("evaluate",))
  monkeypatch.setattr(fault_files, "STATES", fault_files.STATES[-1:])
  given = ["fault_campaign", f"--workdir={tmp_path}", "--kills=1", "--only=kill,states"]
  monkeypatch.setattr(sys, "argv", given)
  with pytest.raises(SystemExit) as end:
    fault_campaign.main()
  output = capsys.readouterr().out
  assert not end.value.code, output
  rows = re.findall(r"^([^|\n]+) \|.*\| ([^|\n]+) \| ok$", output, re.M)
  assert rows == [
    ("kill -9", "same results"),
    ("flipped byte, only base state", "refused; after its remedy the same results"),
  ]
  assert "2 faults, 0 failed, 0 skipped" in output
