"""What a study ends with, from its records alone: study.md, study.csv and study.html."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence

import jinja2
from etils import epath

from rndpo_jax import errors
from rndpo_jax.runtime import files
from rndpo_jax.study import cell_records, grid, study_figures, study_groups, study_tables

_TEMPLATE = pathlib.Path(__file__).parent / "study.html.j2"


def write(records: os.PathLike, name: str, cells: Sequence[grid.Cell]) -> None:
  """Writes the three files beside the records.

  Args:
    records: folder of `records.jsonl`.
    name: of the study, for the title.
    cells: of the study; records of others are left out, and cells without a record are counted.

  Raises:
    FileError: if there is no record of a cell.
  """
  records = epath.Path(records)
  keys = {cell.key for cell in cells}
  found = cell_records.read(records / cell_records.FILE)
  failed = cell_records.read(records / cell_records.FAILURES)
  used = [record for key, record in found.items() if key in keys]
  failed = [line for key, line in failed.items() if key in keys]
  if not used:
    raise errors.FileError(
      f"{records / cell_records.FILE}: found {len(found)} records, none of a cell of this study; "
      "run it first (without --report)"
    )
  title = f"Study {name}"
  notes = _notes(used, failed, len(keys), len(found) - len(used))
  tables = study_tables.all_tables(used)
  pictures = study_figures.all_figures(study_groups.groups(used))
  files.write_text(records / "study.md", study_tables.markdown(title, tables, notes))
  files.write_text(records / "study.csv", study_tables.csv_text(used))
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_TEMPLATE.parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  context = {"title": title, "notes": notes, "tables": tables, "figures": pictures}
  page = environment.get_template(_TEMPLATE.name).render(**context)
  files.write_text(records / "study.html", page)


def _notes(
  used: Sequence[Mapping], failed: Sequence[Mapping], num_cells: int, num_others: int
) -> list[str]:
  """What a reader must know of the records, a sentence each."""
  devices = ", ".join(sorted({record["device"] for record in used}))
  versions = ", ".join(sorted({record["versions"]["jax"] for record in used}))
  hours = sum(sum(record["seconds"].values()) for record in used) / 3600
  notes = [
    f"{len(used)} of {num_cells} cells have a record, made with JAX {versions} on {devices}; "
    f"{hours:.1f} hours of cells, each with its base.",
    "Intervals: 95%, hierarchical paired bootstrap over draws of patients, seeds and patients. A "
    "claim is made only where the interval of several draws excludes zero. Of few draws intervals "
    "are too narrow (of three, 5 to 25% of claims where there is no difference); test sets of "
    "draws overlap; many comparisons are shown, and no correction is made for their number.",
  ]
  if num_others:
    notes.append(f"{num_others} further records are of cells that the study no longer has.")
  notes += [f"Failed: {line['key']}: {line['error']}" for line in failed]
  return notes
