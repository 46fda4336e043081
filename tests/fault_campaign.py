"""Faults against the whole job, each followed by the same command again; prints a table.

  python tests/fault_campaign.py --workdir=DIR [--kills=20] [--only=kill,sigterm] [--processes=1]

An undisturbed run of `tests/tiny_config.py` comes first (its stages are the starting points), then
each fault. A fault passes if the rerun ends with the same files (SAME), or if it is refused in one
line with exit code 1 and the remedy that the line names leads there, and if all processes are gone
within a minute of the first; where damage must be noticed, also if that is said. Exit code 1 if any
fails. DIR/output has what each run printed.
"""

import argparse
import pathlib
import sys

import fault_clock
import fault_export
import fault_files
import fault_predict
import fault_signals
import fault_sources
from fault_runs import Campaign, undisturbed

FAULTS = {
  "kill": lambda campaign, options: fault_signals.kills(campaign, options.kills),
  "one": lambda campaign, _: fault_signals.one_killed(campaign),
  "frozen_one": lambda campaign, _: fault_signals.frozen(campaign),
  "early": lambda campaign, _: fault_signals.early_sigterm(campaign),
  "sigterm": lambda campaign, _: fault_signals.sigterms(campaign),
  "sweep": lambda campaign, _: fault_signals.sweeps(campaign),
  "disk": lambda campaign, _: fault_files.full_disk(campaign),
  "disk_of_one": lambda campaign, _: fault_files.disk_of_one(campaign),
  "checkpoint_of_one": lambda campaign, _: fault_files.checkpoint_of_one(campaign),
  "damage": lambda campaign, _: fault_files.damages(campaign),
  "states": lambda campaign, _: fault_files.damaged_states(campaign),
  "clock": lambda campaign, _: fault_clock.clock(campaign),
  "source": lambda campaign, _: fault_sources.source_changed(campaign),
  "predict": lambda campaign, _: fault_predict.predictions(campaign),
  "export": lambda campaign, _: fault_export.kills(campaign),
  "deleted": lambda campaign, _: fault_sources.deleted(campaign),
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
