"""A small nnU-Net folder whose volumes have spacings, and a border of zeros, each of its own."""

import json

import nibabel
import numpy as np

SPACINGS = ((1.0, 1.25, 4.0), (1.5, 1.25, 4.0), (2.0, 1.25, 5.0))


def volume(seed, shape, num_classes=3):
  """(image i16, mask u8): boxes within boxes in noise, zeros around, an empty first slice."""
  rng = np.random.default_rng(seed)
  mask = np.zeros(shape, np.uint8)
  image = np.zeros(shape, np.int16)
  low = rng.integers(1, 4, 3)
  high = np.array(shape) - rng.integers(0, 3, 3)
  body = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
  image[body] = 200 + rng.integers(0, 40, image[body].shape)
  for c in range(1, num_classes):
    inner = tuple(slice(a + 2 * c, b - 2 * c) for a, b in zip(low[:2], high[:2], strict=True))
    part = (*inner, slice(low[2], high[2]))
    mask[part] = c
    image[part] += 100
  return image, mask


def write(root, num_cases=12, shape=(20, 18, 6), channel="MR"):
  """Cases c00, c01, ... in `root`; their spacings take turns."""
  for part in ("imagesTr", "labelsTr"):
    (root / part).mkdir(parents=True)
  labels = {"background": 0, "a": 1, "b": 2}
  description = {"labels": labels, "channel_names": {"0": channel}, "file_ending": ".nii.gz"}
  (root / "dataset.json").write_text(json.dumps(description))
  for case in range(num_cases):
    grown = (shape[0] + case % 3, *shape[1:])
    image, mask = volume(case, grown)
    affine = np.diag([*SPACINGS[case % 3], 1.0])
    for array, path in ((image, f"imagesTr/c{case:02d}_0000"), (mask, f"labelsTr/c{case:02d}")):
      made = nibabel.Nifti1Image(array, affine)
      made.header.set_xyzt_units("mm")
      nibabel.save(made, root / f"{path}.nii.gz")
  return root
