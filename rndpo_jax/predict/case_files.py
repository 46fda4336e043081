"""What is written of a case: its masks, probabilities, and last the file that says it is done."""

from __future__ import annotations

import gzip
import io
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import nibabel
import numpy as np
from etils import epath
from PIL import Image

from rndpo_jax import errors
from rndpo_jax.data.sources import cases, itk
from rndpo_jax.predict import inputs
from rndpo_jax.runtime import files

FOLDER = "scores"  # of the files that say what is done, `ID.json`


class Predicted(NamedTuple):
  """A case, predicted.

  Attributes:
    source: where it came from.
    stamp: of its files.
    mask: u8[*S] class ids on the case's own grid.
    probabilities: f16[*S, C], or None.
    scores: name -> number; empty where none are asked for.
  """

  source: inputs.Input
  stamp: str
  mask: np.ndarray
  probabilities: np.ndarray | None
  scores: Mapping[str, float]


def write(
  output: epath.Path,
  case: Predicted,
  segmentation: Callable[[pathlib.Path, np.ndarray], bytes] | None = None,
) -> None:
  """Writes a case's files, each by rename.

  Args:
    output: folder.
    case: predicted.
    segmentation: (folder of a series, mask) -> a DICOM segmentation to be written as well.

  Raises:
    errors.DataError: if the case's format cannot hold the mask.
  """
  name = case.source.mask_name
  files.write_bytes(output / name, _encode(case.source, case.mask))
  if case.probabilities is not None:
    content = io.BytesIO()
    np.savez_compressed(content, probabilities=case.probabilities)
    files.write_bytes(output / _npz(case.source), content.getvalue())
  if segmentation is not None:
    files.write_bytes(output / _seg(case.source), segmentation(case.source.files[0], case.mask))
  files.write_json(
    _done(output, case.source),
    {
      "case_id": case.source.case_id,
      "mask": name,
      "input": case.stamp,
      "foreground_pixels": int(np.count_nonzero(case.mask)),
      "scores": dict(case.scores),
    },
    flushed=False,  # the mask is: a case whose file a crash has emptied is predicted again
  )


def is_done(
  output: epath.Path, source: inputs.Input, *, probabilities: bool, with_dicom_seg: bool = False
) -> bool:
  """Whether all of a case is written, of the files that it has now."""
  path = _done(output, source)
  if not path.exists() or not (output / source.mask_name).exists():
    return False
  if probabilities and not (output / _npz(source)).exists():
    return False
  if with_dicom_seg and not (output / _seg(source)).exists():
    return False
  try:
    return files.read_json(path, input=str, scores=dict)["input"] == inputs.stamp(source)
  except errors.RndpoError:
    return False  # it is predicted again, or named as gone


def read_done(output: epath.Path, source: inputs.Input) -> dict:
  """What `write` said of a case that is done."""
  return files.read_json(_done(output, source), mask=str, scores=dict)


def read_others(output: epath.Path, case_ids: Collection[str]) -> list[dict]:
  """What `write` said of the cases whose masks are there, but for those of `case_ids`."""
  found = []
  for path in sorted((output / FOLDER).glob("*.json")):
    try:
      entry = {} if path.stem in case_ids else files.read_json(path, mask=str, scores=dict)
    except errors.RndpoError:  # a crash has emptied it: its case is predicted again when asked for
      continue
    if entry and (output / entry["mask"]).exists():
      found.append(entry)
  return found


def _done(output: epath.Path, source: inputs.Input) -> epath.Path:
  return output / FOLDER / f"{source.case_id}.json"


def _npz(source: inputs.Input) -> str:
  return f"{source.case_id}.npz"


def _seg(source: inputs.Input) -> str:
  return f"{source.case_id}.dcm"


def _encode(source: inputs.Input, mask: np.ndarray) -> bytes:
  """The mask's file, in the input's format."""
  if source.is_picture:
    return _picture(source, mask)
  if source.ending.lower() in cases.ITK:
    return itk.encode_mask(source.files[0], mask, source.mask_ending)
  return _nifti_of_series(source, mask) if source.is_series else _nifti(source, mask)


def _picture(source: inputs.Input, mask: np.ndarray) -> bytes:
  content = io.BytesIO()
  kind = Image.registered_extensions()[source.mask_ending.lower()]  # of Pillow's own writers
  Image.fromarray(mask).save(content, format=kind)
  return content.getvalue()


def _nifti(source: inputs.Input, mask: np.ndarray) -> bytes:
  """The mask under the image's own header: affines, codes, units and extensions stay."""
  image = nibabel.load(source.files[0])
  header = image.header.copy()
  header.set_data_dtype(np.uint8)
  # Of the image's values: a viewer would show the mask black, or scaled.
  header["scl_slope"], header["scl_inter"] = 1, 0
  header["cal_min"], header["cal_max"] = 0, 0
  content = type(image)(mask.reshape(image.shape), None, header).to_bytes()
  return gzip.compress(content, 1, mtime=0) if source.ending.lower() == ".nii.gz" else content


def _nifti_of_series(source: inputs.Input, mask: np.ndarray) -> bytes:
  """A NIfTI file on the grid of a DICOM series."""
  image = nibabel.Nifti1Image(mask, cases.open_file(source.files[0]).affine)
  image.header.set_xyzt_units("mm")
  image.set_qform(image.affine, code=1)
  image.set_sform(image.affine, code=1)
  return gzip.compress(image.to_bytes(), 1, mtime=0)
