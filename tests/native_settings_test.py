"""What the native mode takes from the labelled cases: spacing, schemes, CT's percentiles."""

import nibabel
import numpy as np
import pytest

from configs import nnunet as nnunet_config
from rndpo_jax import errors
from rndpo_jax.data import native_settings, records, sources
from tests import native_data


def _config(**changes):
  config = nnunet_config.get_config("")
  with config.unlocked():
    values = {"spacing": (1.5, 0.0), "patch_size": (8, 8)} | changes
    config.update_from_flattened_dict({f"data.{k}": v for k, v in values.items()})
  return config


def test_what_is_measured_is_of_the_labelled_cases(tmp_path, monkeypatch):
  """The median spacing and CT's percentiles; other cases' pixels count for nothing."""
  monkeypatch.setattr(native_settings, "_NUM_INTENSITIES", 4 * 10**5)
  root = native_data.write(tmp_path, num_cases=4, channel="CT")
  config = _config(root=str(root), spacing=(0.0, 1.0))
  labelled = ["c00", "c02"]
  source = sources.SOURCES[config.data.source].open(config)
  found, notes = native_settings.choose(config, source, labelled)
  assert found.spacing == (1.5, 1.0) and found.schemes == ("ct",) and not notes
  pools = []
  for case in labelled:
    image, mask = (
      np.asarray(nibabel.load(root / f"{part}/{case}{end}.nii.gz").dataobj)
      for part, end in (("imagesTr", "_0000"), ("labelsTr", ""))
    )
    pools.append(image[mask > 0])
  means = [np.mean(pool) for pool in pools]  # equal weight, however many pixels
  (statistics,) = found.statistics
  assert abs(statistics["mean"] - np.mean(means)) < 0.2
  low = np.percentile(np.concatenate([np.resize(p, 10**5) for p in pools]), 0.5)
  assert abs(statistics["percentile_00_5"] - low) <= 1
  (root / "labelsTr" / "c01.nii.gz").write_bytes(b"no NIfTI any more")
  assert native_settings.choose(config, source, labelled).native == found


def _source(kept, channel_names, sliced):
  """Cases of 4 x 5 x 50 voxels of which the crop keeps so many slices, or pixels of a picture."""
  entries, pixels = [], []
  for case, count in enumerate(kept):
    image = np.zeros((4, 50, 5, len(channel_names)), np.float32)
    image[0, :count, 0], image[3, count - 1, 4] = 7, 9
    parts = np.moveaxis(image, 2, 0) if sliced else [image[:, :, 0] + image[:, :, 4]]
    for number, part in enumerate(parts):
      entries.append(
        records.record(
          record_id=f"{case}#{number}", case_id=str(case), group_id=str(case),
          slice_index=number if sliced else -1, shape=(4, 50), has_mask=True, spacing=(1.0, 1.0),
          slice_spacing=3.0 if sliced else None,
        )
      )  # fmt: skip
      pixels.append(records.Pixels(part, np.ones((4, 50), np.uint8), np.eye(4)))
  return records.Source(
    name="made", num_classes=2, class_names=["background", "a"], num_channels=len(channel_names),
    spatial_dims=2, spacing_unit="mm", dtype="float32", records=entries, fingerprint=str,
    read=lambda start: iter(pixels[start:]), channel_names=channel_names,
  )  # fmt: skip


MASKED = ("zscore_in_mask",)


@pytest.mark.parametrize(
  "kept,channel_names,schemes,wanted,ratio",
  [
    ((2, 37, 50), ("MR",), (), MASKED, "0.740"),  # the median, not the mean
    ((10, 38, 50), ("MR",), (), ("zscore",), "0.760"),
    ((37, 38), ("MR",), (), ("zscore",), "0.750"),  # nnU-Net's rule is 'less than'
    ((10, 20, 30), ("", ""), (), MASKED * 2, "0.400"),
    ((10,), ("T1", "CT", "noNorm", "rescale_to_0_1", "rgb_to_0_1"), (),
     (*MASKED, "ct", "none", "zero_to_one", "rgb"), "0.200"),
    ((10,), ("CT", "noNorm"), (), ("ct", "none"), None),
    ((10,), ("MR",), ("zscore",), ("zscore",), None),  # as given
    ((50,), ("MR",), MASKED, MASKED, None),
  ],
)  # fmt: skip
def test_z_scores_are_of_the_mask_where_zeros_fill_much_of_a_case(
  kept, channel_names, schemes, wanted, ratio, monkeypatch
):
  monkeypatch.setattr(native_settings, "_NUM_INTENSITIES", 100)
  source = _source(kept, channel_names, sliced=True)
  labelled = [str(case) for case in range(len(kept))]
  found, notes = native_settings.choose(_config(schemes=schemes), source, labelled)
  assert found.schemes == wanted
  assert [one is not None for one in found.statistics] == [one == "ct" for one in wanted]
  assert [f"keeps {ratio} of a labelled case" in note for note in notes] == [True] * bool(ratio)


def test_only_labelled_cases_and_each_picture_count():
  source = _source((50, 30, 50, 36), ("R", "G", "B"), sliced=False)
  assert native_settings.choose(_config(), source, ["1", "3"]).native.schemes == MASKED * 3
  assert native_settings.choose(_config(), source, ["0", "1", "2"]).native.schemes[0] == "zscore"


def test_a_labelled_case_that_cannot_be_used_raises():
  source = _source((10, 20), ("MR",), sliced=True)
  source.records[5]["shape"] = [4, 49]
  with pytest.raises(errors.DataError, match="its header says"):
    native_settings.choose(_config(), source, ["1"])
