"""The sources of images: one row here and one module make a new one.

A module has `open_source(config) -> records.Source`, which looks at names and headers alone and
raises errors.DataError on what it cannot read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from rndpo_jax.data import records
from rndpo_jax.data.sources import dicom_folder, folder, nnunet, phantom


class Row(NamedTuple):
  """A source, and the keys of `config.data` that only some sources read, this one among them."""

  open: Callable[..., records.Source]
  options: tuple[str, ...]


SOURCES = {
  "phantom": Row(phantom.open_source, options=("phantom",)),
  "folder": Row(folder.open_source, options=("root", "case_pattern")),
  "dicom": Row(dicom_folder.open_source, options=("root",)),
  "nnunet": Row(nnunet.open_source, options=("root",)),
}
