"""Runs a study: a grid of jobs on shared bases, its records, tables and figures.

  python -m launch.study --study=configs/studies/main.py --records=configs/results/main \
      --workdir=DIR --roots=ph2=DIR_OF_PH2,acdc=DIR_OF_ACDC [--dry_run] [--only=SUBSTRING]
  python -m launch.study --study=configs/studies/main.py --records=configs/results/main --report

The same command goes on after an end of any kind, and further processes that are started with it
share the cells that are left. See rndpo_jax/study/README.md.
"""

import pathlib
import sys

from absl import app, flags

from launch import cache_flag, common

_STUDY = flags.DEFINE_string("study", None, "Python file with get_study().")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of bases and of cells at work.")
_RECORDS = flags.DEFINE_string("records", None, "Folder of the records, tables and figures.")
_ROOTS = flags.DEFINE_list("roots", [], "NAME=DIR,...: the folder of each data set's files.")
_ONLY = flags.DEFINE_string("only", "", "Runs only cells with this in their key.")
_KEEP = flags.DEFINE_list(
  "keep", [], "What of a finished cell's folder stays, as finetune,results.json; or 'all'."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Says what is left to do; writes nothing.")
_REPORT = flags.DEFINE_bool("report", False, "Makes tables and figures from the records alone.")


def main(argv):
  common.start(argv)
  # Libraries that start worker processes read absl flags when imported: import after parsing.
  from configs import recipes
  from rndpo_jax.errors import ConfigError
  from rndpo_jax.runtime import progress
  from rndpo_jax.study import grid, study_loop, study_page, study_plan

  with common.one_line_errors():
    study = grid.load_file(_STUDY.value, "get_study")()
    cells = grid.expand(study, recipes.apply, roots(), _ONLY.value)
    name = pathlib.Path(_STUDY.value).stem
    if _REPORT.value:
      everything = grid.expand(study, recipes.apply, roots())
      study_page.write(_RECORDS.value, name, everything)
      progress.say(f"{_RECORDS.value}/study.md, study.csv and study.html are written")
      return
    study_loop.check(cells)
    if _DRY_RUN.value:
      lines = study_plan.describe(cells, _WORKDIR.value, _RECORDS.value)
      progress.say("\n".join(lines))
      return
    if not _WORKDIR.value:
      raise ConfigError("--workdir: found none, expected a folder for bases and cells at work")
    common.take_signals()
    cache_flag.use()
    failed = study_loop.run(cells, _WORKDIR.value, _RECORDS.value, _KEEP.value)
    progress.say(f"\n{len(cells) - len(failed)} of {len(cells)} cells have a record")
    for key in failed:
      progress.say(f"failed: {key}; see {_RECORDS.value}/failures.jsonl")
    if len(failed) < len(cells):
      everything = grid.expand(study, recipes.apply, roots())
      study_page.write(_RECORDS.value, name, everything)
    if failed:
      sys.exit(1)


def roots():
  """Data set -> folder, from --roots."""
  from rndpo_jax.errors import ConfigError

  pairs = [text.partition("=") for text in _ROOTS.value]
  for name, sign, folder in pairs:
    if not (name and sign and folder):
      raise ConfigError(f"--roots: found {name + sign + folder!r}, expected NAME=DIR,NAME=DIR")
  return {name: folder for name, _, folder in pairs}


if __name__ == "__main__":
  flags.mark_flags_as_required(["study", "records"])
  app.run(main, flags_parser=common.parse)
