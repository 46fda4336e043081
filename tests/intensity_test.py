"""data.intensity and data.nonzero: schemes and crops by hand."""

import numpy as np
import pytest

from rndpo_jax.data import intensity, nonzero

CT = {"mean": 2.0, "std": 4.0, "percentile_00_5": -4.0, "percentile_99_5": 6.0}
VALUES = np.array([[0, 2], [4, 10]], np.float32)


@pytest.mark.parametrize(
  "scheme, want",
  [
    ("zscore", (VALUES - 4) / np.sqrt(14)),
    # Of 2, 4 and 10: mean 16/3, variance 104/9.
    ("zscore_in_mask", np.where(VALUES > 0, (VALUES - 16 / 3) / np.sqrt(104 / 9), 0)),
    ("ct", [[-0.5, 0], [0.5, 1]]),
    ("none", VALUES),
    ("zero_to_one", VALUES / 10),
    ("rgb", VALUES / 255),
  ],
)
def test_schemes_by_hand(scheme, want):
  image = np.stack([VALUES, VALUES], axis=-1)
  got = intensity.normalize(image, [scheme, "none"], [CT, None], VALUES > 0)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got[..., 0], want, rtol=1e-6)
  np.testing.assert_array_equal(got[..., 1], VALUES)


def test_constant_channels_and_large_offsets():
  for scheme in ("zscore", "zero_to_one"):
    got = intensity.normalize(np.full((3, 4, 1), 7.0), [scheme], [None], None)
    np.testing.assert_array_equal(got, 0)
  far = (np.arange(1000).reshape(10, 100, 1) + 1e6).astype(np.float32)
  want = (far.astype(np.float64) - far.mean(dtype=np.float64)) / far.std(dtype=np.float64)
  np.testing.assert_allclose(intensity.normalize(far, ["zscore"], [None], None), want, atol=1e-5)


def test_names_of_channels_give_the_scheme():
  names = {"CT": "ct", "noNorm": "none", "rescale_to_0_1": "zero_to_one", "RGB_to_0_1": "rgb"}
  for name, scheme in {**names, "cineMRI": "zscore", "T1": "zscore", "zscore": "zscore"}.items():
    assert intensity.scheme_of_channel(name) == scheme


@pytest.mark.parametrize(
  "scheme, statistics, message",
  [
    ("ct", None, "'ct' needs 'mean'"),
    ("rgb", None, "found values from -1 to 300"),
    ("zscore_in_mask", None, "needs the mask"),
    ("robust", None, "'robust' is unknown; known: zscore"),
  ],
)
def test_what_a_scheme_lacks_raises(scheme, statistics, message):
  image = np.array([-1, 300], np.float32).reshape(1, 2, 1)
  with pytest.raises(ValueError, match=message):
    intensity.normalize(image, [scheme], [statistics], None)


def test_the_box_holds_all_channels_and_the_mask_fills_holes():
  image = np.zeros((7, 6, 5, 2), np.float32)
  image[1:6, 1:4, 1:4, 0] = -3
  image[3, 2, 2, 0] = 0  # a hole
  image[2, 5, 3, 1] = 1
  assert nonzero.box(image) == (slice(1, 6), slice(1, 6), slice(1, 4))
  want = np.zeros((7, 6, 5), bool)
  want[1:6, 1:4, 1:4] = want[2, 5, 3] = True
  np.testing.assert_array_equal(nonzero.mask(image), want)
  # nnU-Net takes a picture for one slice, whose holes are open to both sides.
  np.testing.assert_array_equal(nonzero.mask(image[:, :, 2]), image[:, :, 2].any(-1))
  assert nonzero.box(image[:, :, 2]) == (slice(1, 6), slice(1, 4))
  assert nonzero.box(np.zeros((3, 4, 1))) == (slice(0, 3), slice(0, 4))
