"""The source of some cases, whatever their files' format: records, and notes on headers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rndpo_jax.data import records
from rndpo_jax.data.sources import cases as cases_lib
from rndpo_jax.data.sources import images, nifti


def make_source(
  data, cases: Mapping[str, cases_lib.Case], class_names: list[str], *, has_ignored=False
) -> records.Source:
  """The source of some cases, with notes on their headers.

  Args:
    data: `config.data`.
    cases: by case id, in the order of the records.
    class_names: one a class, background first.
    has_ignored: whether the id C in a label means `types.IGNORED`.
  """
  known = all(case.spacing is not None for case in cases.values())
  notes = tuple(_notes_of_headers(list(cases.values())))
  if data.spacing and all(_is_picture(case) for case in cases.values()):
    cases = {name: case._replace(spacing=images.SPACING_MM) for name, case in cases.items()}
    notes += (images.SPACING_NOTE,)
  has_spacing = all(case.spacing is not None for case in cases.values())
  entries = [
    entry for name, case in cases.items() for entry in _entries(data, name, case, has_spacing)
  ]

  def read(start: int) -> Iterator[records.Pixels]:
    for name, group in itertools.groupby(entries[start:], key=lambda entry: entry["case_id"]):
      sliced = next(group)["slice"]
      pixels = cases_lib.read_case(cases[name], data.spatial_dims, len(class_names), has_ignored)
      yield from itertools.islice(pixels, max(sliced, 0), None)

  last = {}

  def fingerprint(place: int) -> str:
    name = entries[place]["case_id"]
    if entries[place]["slice"] <= 0 or name not in last:  # else a series counts once a slice
      case = cases[name]
      named = [*case.channels, *([case.label] if case.label else [])]
      files = itertools.chain.from_iterable(map(cases_lib.files_of, named))
      last.clear()
      last[name] = records.file_fingerprint(*files)
    return last[name]

  return records.Source(
    name=data.name,
    num_classes=len(class_names),
    class_names=class_names,
    has_ignored=has_ignored,
    num_channels=next(iter(cases.values())).num_channels,
    spatial_dims=data.spatial_dims,
    spacing_unit="mm" if known else "voxel",
    dtype="uint8" if all(case.eight_bit for case in cases.values()) else "float32",
    records=entries,
    read=read,
    fingerprint=fingerprint,
    notes=notes,
  )


def _is_picture(case: cases_lib.Case) -> bool:
  return cases_lib.split_name(case.channels[0].name)[1].lower() in cases_lib.PICTURES


def _entries(data, name: str, case: cases_lib.Case, has_spacing: bool) -> Iterator[dict[str, Any]]:
  group = records.extract(data.group_pattern, name, "group_pattern")
  dims = data.spatial_dims
  sliced = len(case.shape) > dims
  for index in range(case.shape[2]) if sliced else (-1,):
    yield records.record(
      record_id=f"{name}#z{index:03d}" if sliced else name,
      case_id=name,
      group_id=group,
      slice_index=index,
      shape=case.shape[:dims],
      spacing=case.spacing[:dims] if has_spacing else None,
      slice_spacing=case.spacing[2] if has_spacing and sliced else None,
      has_mask=case.label is not None,
    )


def _notes_of_headers(cases: Sequence[cases_lib.Case]) -> Iterator[str]:
  """What the headers leave open or contradict, each once with its first file."""
  unitless = [case for case in cases if case.unit == "unknown" and case.spacing is not None]
  if unitless:
    yield (
      f"{unitless[0].channels[0]}: the header names no unit ({len(unitless)} of {len(cases)} "
      "cases); taken as mm, as nnU-Net and ITK do"
    )
  unknown = [case for case in cases if case.spacing is None]
  if unknown:
    yield (
      f"{unknown[0].channels[0]}: the header gives no spacing ({len(unknown)} of {len(cases)} "
      "cases); distances of the whole data set are in voxels"
    )
  differ = [case for case in cases if not _agree(case)]
  if differ:
    there = [round(edge, 6) for edge in _affine_spacing(differ[0]).tolist()]
    yield (
      f"{differ[0].channels[0]}: pixdim gives the spacing {list(differ[0].spacing)} mm, the affine "
      f"{there} ({len(differ)} of {len(cases)} cases); pixdim is taken, as ITK does"
    )


def _agree(case: cases_lib.Case) -> bool:
  """Whether pixdim and the affine give the same spacing, up to the rounding of a header."""
  return case.spacing is None or np.allclose(case.spacing, _affine_spacing(case), rtol=1e-3)


def _affine_spacing(case: cases_lib.Case) -> np.ndarray:
  """mm an axis."""
  return np.linalg.norm(case.affine[:3, : len(case.shape)], axis=0) * nifti.MM[case.unit]
