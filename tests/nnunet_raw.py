"""Folders as nnU-Net's raw data, for the tests of what reads them."""

import json

import nibabel
import numpy as np
import pytest

from rndpo_jax import config as config_lib
from rndpo_jax import errors
from rndpo_jax.data import records
from rndpo_jax.data.sources import nnunet

SHAPE = (5, 6, 3)


LABELS = {"background": 0, "wall": 2, "pool": 1}


SPACING = (2, 1.5, 8)


def affine_of(spacing=SPACING):
  affine = np.diag([*spacing, 1]).astype(float)
  affine[:3, 3] = (10, 20, 30)
  return affine


def save(path, array, spacing=SPACING, unit="mm", slope=None, affine=None):
  path.parent.mkdir(parents=True, exist_ok=True)
  affine = affine_of(spacing) if affine is None else affine
  image = nibabel.Nifti1Image(array, affine)
  if unit:
    image.header.set_xyzt_units(unit)
  if slope:
    image.header.set_slope_inter(*slope)
  nibabel.save(image, path)


def describe(root, **changes):
  info = {"labels": LABELS, "channel_names": {"0": "MR"}, "file_ending": ".nii.gz"}
  root.mkdir(parents=True, exist_ok=True)
  (root / "dataset.json").write_text(json.dumps({**info, **changes}))


def image(seed, shape=SHAPE):
  return np.random.default_rng(seed).integers(0, 200, shape).astype(np.uint8)


def label(seed, shape=SHAPE):
  return (np.random.default_rng(seed).integers(0, 3, shape)).astype(np.uint8)


def write(root):
  """Cases p1, p2 with labels, p3 without, p4 in imagesTs; returns the folder."""
  describe(root)
  for n in (1, 2, 3):
    save(root / "imagesTr" / f"p{n}_0000.nii.gz", image(n))
  save(root / "imagesTs" / "p4_0000.nii.gz", image(4))
  for n in (1, 2):
    save(root / "labelsTr" / f"p{n}.nii.gz", label(n))
  return root


def open_source(root, **changes):
  config = config_lib.base_config()
  config.data.update({"source": "nnunet", "root": str(root), "num_classes": 0, **changes})
  return nnunet.open_source(config)


def read(root, **changes):
  source = open_source(root, **changes)
  pixels = list(source.read(0))
  for entry, one in zip(source.records, pixels, strict=True):
    records.check_pixels(one, entry, source.num_classes)
  return source, pixels


def refused(root, message, **changes):
  with pytest.raises(errors.DataError, match=message):
    read(root, **changes)
