"""Overlap and surface measures against hand counts and a brute-force float64 form."""

import jax
import numpy as np
import pytest

from rndpo_jax import types
from rndpo_jax.evaluation import metrics

MASK = np.array([[1, 1, 0], [2, 0, 0]], np.uint8)
LABEL = np.array([[1, 0, 0], [0, 2, 2]], np.uint8)


def test_dice_and_iou_by_hand():
  # Class 1: 1 shared, 2 + 1 pixels. Class 2: 0 shared, 1 + 2. Class 3: empty in both.
  np.testing.assert_allclose(metrics.dice(MASK, LABEL, 4, 2), [2 / 3, 0, 1], rtol=1e-6)
  np.testing.assert_allclose(metrics.iou(MASK, LABEL, 4, 2), [1 / 2, 0, 1], rtol=1e-6)


def test_one_empty_is_zero_and_both_empty_is_one():
  empty, full = np.zeros((2, 2), np.uint8), np.ones((2, 2), np.uint8)
  for measure in (metrics.dice, metrics.iou):
    got = [float(measure(a, b, 2, 2)[0]) for a, b in ((empty, empty), (empty, full), (full, empty))]
    assert got == [1, 0, 0]


def test_leading_axes_broadcast_and_jit():
  rng = np.random.default_rng(0)
  masks = rng.integers(0, 3, (2, 4, 5, 6, 3)).astype(np.uint8)
  labels = rng.integers(0, 3, (2, 1, 5, 6, 3)).astype(np.uint8)
  got = jax.jit(metrics.dice, static_argnums=(2, 3))(masks, labels, 3, 3)
  assert got.shape == (2, 4, 2) and got.dtype == np.float32
  for i in range(2):
    for k in range(4):
      counts = metrics.pixel_counts(masks[i, k], labels[i, 0], 3)
      np.testing.assert_allclose(got[i, k], metrics.overlap(counts)["dice"], rtol=1e-6)


def test_other_rank_is_refused():
  with pytest.raises(ValueError, match="same rank"):
    metrics.dice(np.zeros((2, 4, 5, 5)), np.zeros((2, 5, 5)), 2, 2)


def test_pixel_counts_by_hand():
  counts = metrics.pixel_counts(MASK, LABEL, 4)
  np.testing.assert_array_equal(counts, [[1, 1, 0, 0], [3, 2, 1, 0], [3, 1, 2, 0]])
  got = metrics.overlap(counts)
  np.testing.assert_allclose(got["dice"], [2 / 3, 0, 1])
  np.testing.assert_allclose(got["iou"], [1 / 2, 0, 1])
  np.testing.assert_array_equal(got["mask_empty"], [False, False, True])
  np.testing.assert_array_equal(got["label_empty"], [False, False, True])


def test_counts_of_slices_add_up_to_the_volume():
  rng = np.random.default_rng(1)
  masks, labels = rng.integers(0, 4, (2, 6, 7, 5)).astype(np.uint8)
  slices = sum(metrics.pixel_counts(masks[..., z], labels[..., z], 4) for z in range(5))
  np.testing.assert_array_equal(slices, metrics.pixel_counts(masks, labels, 4))
  # 4 classes in u8: the joint index must not wrap round at 256 for many classes either.
  high = np.full((2, 2), 200, np.uint8)
  assert metrics.pixel_counts(high, high, 201)[:, 200].tolist() == [4, 4, 4]


def _brute_boundary(mask):
  """Foreground pixels with a face neighbour that is background or beyond the image."""
  points = []
  for p in np.argwhere(mask):
    for axis in range(mask.ndim):
      for move in (-1, 1):
        q = p.copy()
        q[axis] += move
        if not 0 <= q[axis] < mask.shape[axis] or not mask[tuple(q)]:
          points.append(tuple(p))
  return np.array(sorted(set(points)), np.float64)


def _brute_surface(mask, label, spacing, tolerance):
  a, b = _brute_boundary(mask) * spacing, _brute_boundary(label) * spacing
  distance = np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=-1))
  to_b, to_a = distance.min(axis=1), distance.min(axis=0)
  near = (to_b <= tolerance).sum() + (to_a <= tolerance).sum()
  return {
    "hd95": max(np.quantile(to_b, 0.95), np.quantile(to_a, 0.95)),
    "hd100": max(to_b.max(), to_a.max()),
    "assd": (to_b.sum() + to_a.sum()) / (len(a) + len(b)),
    "nsd": near / (len(a) + len(b)),
  }


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 2.5), (1.0, 0.5, 4.0)])
def test_surface_metrics_equal_brute_force(spacing):
  rng = np.random.default_rng(2)
  shape = (9, 11, 6)[: len(spacing)]
  for _ in range(5):
    mask, label = rng.random((2, *shape)) < 0.3
    got = metrics.surface_metrics(mask, label, spacing, 1.2)
    want = _brute_surface(mask, label, np.array(spacing), 1.2)
    for name in metrics.SURFACE:
      assert got[name] == pytest.approx(want[name], rel=1e-12), name


def test_surface_metrics_by_hand():
  # A filled 5 x 5 square against itself moved by 2 columns of 3 mm: the interior does not count.
  mask, label = np.zeros((2, 9, 12), bool)
  mask[2:7, 2:7] = True
  label[2:7, 4:9] = True
  got = metrics.surface_metrics(mask, label, (1.0, 3.0), 0.0)
  # Of 16 boundary pixels a side, 6 (3 of the top row, 3 of the bottom) lie on the other boundary;
  # the outer column is 6 mm from the other square's, the inner one has nearer pixels in its rows.
  want = _brute_surface(mask, label, np.array([1.0, 3.0]), 0.0)
  assert got["nsd"] == want["nsd"] == 12 / 32
  assert got["hd95"] == 6.0
  assert got["assd"] == pytest.approx(want["assd"])


def test_surface_metrics_of_a_shifted_line_by_hand():
  # Two rows of 4 pixels, 2 apart, 1.5 mm a row: every distance is 3 mm.
  mask, label = np.zeros((2, 6, 6), bool)
  mask[1, 1:5] = True
  label[3, 1:5] = True
  got = metrics.surface_metrics(mask, label, (1.5, 1.0), 2.9)
  assert got == {"hd95": 3.0, "hd100": 3.0, "assd": 3.0, "nsd": 0.0}
  assert metrics.surface_metrics(mask, label, (1.5, 1.0), 3.0)["nsd"] == 1.0
  found = metrics.surface_metrics(mask, label, None, 2.0)
  assert found == {"hd95": 2.0, "hd100": 2.0, "assd": 2.0, "nsd": 1.0}


@pytest.mark.parametrize(
  "spacing,voxels,tolerance", [(0.4, 5, 2.0), (0.2, 10, 2.0), (2 / 3, 3, 2.0)]
)
def test_a_distance_of_the_tolerance_is_within_it(spacing, voxels, tolerance):
  """Spacings as files hold them, in float32: 5 of 0.4 mm are 2.0000000298 mm."""
  mask, label = np.zeros((2, 3, 16), bool)
  mask[1, 1], label[1, 1 + voxels] = True, True
  spacing = float(np.float32(spacing))
  got = metrics.surface_metrics(mask, label, (spacing, spacing), tolerance)
  assert got["nsd"] == 1.0
  assert metrics.surface_metrics(mask, label, (spacing, spacing), 0.999 * tolerance)["nsd"] == 0.0


def test_hd95_is_the_larger_direction():
  # The label has a far spot that the mask misses: only the direction label -> mask sees it.
  mask, label = np.zeros((2, 5, 30), bool)
  mask[2, :3] = label[2, :3] = True
  label[2, 29] = True
  to_mask = [0, 0, 0, 27]
  got = metrics.surface_metrics(mask, label, None, 0.0)
  assert got["hd95"] == pytest.approx(np.percentile(to_mask, 95))
  assert got == metrics.surface_metrics(label, mask, None, 0.0)


def test_ignored_pixels_count_nowhere():
  label = np.where(np.eye(6, 8, dtype=bool), types.IGNORED, np.arange(8) // 3).astype(np.uint8)
  mask = np.random.default_rng(0).integers(0, 3, (6, 8)).astype(np.uint8)
  known = label != types.IGNORED
  for measure in (metrics.dice, metrics.iou):
    rest = measure(mask[known][None], label[known][None], 3, 2)
    np.testing.assert_array_equal(jax.jit(measure, static_argnums=(2, 3))(mask, label, 3, 2), rest)
  counts = metrics.pixel_counts(mask, label, 3)
  np.testing.assert_array_equal(counts, metrics.pixel_counts(mask[known], label[known], 3))
  assert counts[1].sum() == known.sum()
  np.testing.assert_allclose(metrics.overlap(counts)["dice"], metrics.dice(mask, label, 3, 2))
  for one, other in zip(metrics.without_ignored(mask, label), (mask, label), strict=True):
    np.testing.assert_array_equal(one, np.where(known, other, 0))


def test_surface_metrics_of_empty_masks():
  empty, spot = np.zeros((2, 3, 4), bool)
  spot[0, 0] = True
  found = metrics.surface_metrics(empty, empty, (1, 1), 1)
  assert found == {"hd95": 0, "hd100": 0, "assd": 0, "nsd": 1}
  for pair in ((empty, spot), (spot, empty)):
    got = metrics.surface_metrics(*pair, (2.0, 2.0), 1.0)
    assert got == {"hd95": 10.0, "hd100": 10.0, "assd": 10.0, "nsd": 0.0}  # 6 mm by 8 mm


@pytest.mark.parametrize("spacing", [(1.0,), (1.0, 0.0), (1.0, -1.0)])
def test_bad_spacing_is_refused(spacing):
  with pytest.raises(ValueError, match="spacing"):
    metrics.surface_metrics(np.ones((2, 2), bool), np.ones((2, 2), bool), spacing, 1.0)


def test_entropy_and_divergence_by_hand():
  # Class probabilities (1/4, 3/4) against (1/2, 1/2), and equal ones beside them.
  logits = np.log(np.array([[[[1.0, 3.0], [1.0, 1.0]]]], np.float32))
  reference = np.zeros_like(logits)
  expected = 0.25 * np.log(0.5) + 0.75 * np.log(1.5)
  np.testing.assert_allclose(metrics.kl_divergence(logits, reference), [expected / 2], rtol=1e-5)
  entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75)) + np.log(2)
  np.testing.assert_allclose(metrics.entropy(logits), [entropy / 2], rtol=1e-6)
