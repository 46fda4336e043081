"""How many voxels a file may have: whole-body CT, and what is counted in int32."""

import nibabel
import numpy as np
import pytest

from rndpo_jax import errors
from rndpo_jax.data.sources import cases, volume


def test_a_header_of_whole_body_ct_is_taken(tmp_path):
  """512 x 512 x 1300 voxels, of which none is read."""
  header = nibabel.Nifti1Header()
  header.set_data_dtype(np.int16)
  header.set_data_shape((512, 512, 1300))
  header.set_zooms((1.0, 1.0, 1.5))
  header.set_data_offset(352)
  header["magic"] = b"n+1"
  with (tmp_path / "ct.nii").open("wb") as file:
    file.write(header.binaryblock + bytes(4))
    file.truncate(352 + 2 * 512 * 512 * 1300)  # no blocks on the disk
  assert cases.open_case([tmp_path / "ct.nii"], None, 3).shape == (512, 512, 1300)


def test_the_limit_is_that_of_counts_in_int32(tmp_path):
  """Metrics add the voxels of two masks, each at most the whole."""
  largest = (2**10, 2**10, 2**10 - 1)
  volume.check_shape(tmp_path, largest)
  assert 2 * volume._MAX_VOXELS <= np.iinfo(np.int32).max
  for shape in ((2**10, 2**10, 2**10), (2000, 2000, 2000)):
    with pytest.raises(errors.DataError, match="more than 1,073,741,823 voxels; crop or split it"):
      volume.check_shape(tmp_path, shape)
