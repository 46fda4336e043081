"""Random patches: where they lie, their foreground, and that they depend on seed and row alone."""

import numpy as np
import pytest

from rndpo_jax import types
from rndpo_jax.data import loader, patches

SIZE = (4, 5)


def _examples():
  """Three records of other shapes; record 2 has foreground in two classes, record 1 ignores one."""
  shapes = [(9, 7), (3, 12), (8, 8)]
  found = []
  for index, shape in enumerate(shapes):
    label = np.zeros(shape, np.uint8)
    image = 100.0 * index + np.arange(label.size, dtype=np.float32).reshape(*shape, 1)
    found.append({"image": image, "label": label, "index": np.int32(index)})
  found[1]["label"][0, 0] = types.IGNORED
  found[2]["label"][0, 7], found[2]["label"][5, 2] = 1, 3
  return found


def _draw(seed=0, batch_size=6, with_foreground=(2,)):
  return patches.drawer(
    (0, 1, 2), _examples().__getitem__, SIZE,
    batch_size=batch_size, seed=seed, with_foreground=with_foreground,
  )  # fmt: skip


def test_a_cut_beyond_the_image_is_zero():
  array = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
  np.testing.assert_array_equal(patches.cut(array, (0, 1), (2, 2)), [[2, 3], [5, 6]])
  np.testing.assert_array_equal(
    patches.cut(array, (-1, 1), (4, 3)), [[0, 0, 0], [2, 3, 0], [5, 6, 0], [0, 0, 0]]
  )


@pytest.mark.parametrize(
  "start,length,count,expected",
  [(-3, 10, 4, 0), (5, 10, 4, 5), (9, 10, 4, 6), (2, 4, 4, 0), (7, 3, 8, -2)],
)
def test_a_patch_stays_in_the_image_or_has_it_in_the_middle(start, length, count, expected):
  assert patches.clamp(start, length, count) == expected


def test_random_places_are_all_those_inside():
  rng = np.random.default_rng(0)
  found = {tuple(patches.random_start(rng, (9, 3), SIZE)) for _ in range(200)}
  assert found == {(first, -1) for first in range(6)}


def test_foreground_is_drawn_by_class_then_by_pixel():
  label = np.zeros((9, 9), np.uint8)
  label[0:2, 0:6] = 1  # twelve pixels
  label[8, 8] = 2
  label[4, 4] = types.IGNORED
  rng = np.random.default_rng(0)
  found = [tuple(patches.foreground_start(rng, label, (3, 3))) for _ in range(400)]
  assert 160 < found.count((6, 6)) < 240  # the one pixel of class 2, at the image's corner
  assert set(found) - {(6, 6)} == {(0, column) for column in range(5)}


def test_places_do_not_hang_on_how_a_label_is_counted(monkeypatch):
  label = (
    np.random.default_rng(3).choice([0, 0, 0, 1, 4, types.IGNORED], (9, 4, 3)).astype(np.uint8)
  )
  for seed in range(40):
    rng = np.random.default_rng(seed)
    wanted = np.flatnonzero(label == (1, 4)[rng.integers(2)])
    middle = np.unravel_index(wanted[rng.integers(len(wanted))], label.shape)
    for pixels in (1, 30, 2**16):  # blocks of 1, 2 and all rows
      monkeypatch.setattr(patches, "_BLOCK_PIXELS", pixels)
      start = patches.foreground_start(np.random.default_rng(seed), label, (1, 1, 1))
      assert tuple(start) == middle


@pytest.mark.parametrize("batch_size,forced", [(1, 0), (2, 1), (3, 1), (6, 2), (8, 3), (16, 5)])
def test_a_third_of_a_batch_is_sure_of_foreground(batch_size, forced):
  assert patches.num_forced(batch_size) == forced
  draw = _draw(batch_size=batch_size)
  for step in range(20):
    rows = [draw(step * batch_size + row) for row in range(batch_size)]
    assert all((row["label"] > 0).any() for row in rows[batch_size - forced :])
    assert all(row["index"] == 2 for row in rows[batch_size - forced :])
  # The rows of a batch are drawn apart, also those of one record.
  places = [{draw(step * 6 + row)["image"].tobytes() for row in (4, 5)} for step in range(20)]
  assert batch_size != 6 or max(map(len, places)) == 2


def test_free_rows_go_through_all_records_and_cut_image_and_label_alike():
  draw, whole = _draw(), _examples()
  free = [draw(step * 6 + row) for step in range(6) for row in range(4)]
  for turn in range(8):  # every pass over three records has each once
    assert sorted(int(row["index"]) for row in free[3 * turn : 3 * turn + 3]) == [0, 1, 2]
  for row in free:
    source = whole[row["index"]]
    places = {v: p for p, v in np.ndenumerate(source["image"][..., 0])}
    inside = [(at, places[v]) for at, v in np.ndenumerate(row["image"][..., 0]) if v]
    assert inside and all(row["label"][at] == source["label"][place] for at, place in inside)
    assert row["image"].shape == (*SIZE, 1) and row["label"].shape == SIZE


def test_rows_are_a_pure_function_of_seed_and_number():
  expected = [_draw()(number) for number in range(12)]
  options = {"batch_size": 6, "num_workers": 0, "process_count": 2}
  parts = [
    loader.stream_of_rows(_draw(), start_step=1, process_index=index, **options) for index in (0, 1)
  ]
  later = [next(part) for part in parts]  # batch 1, by two processes
  for name in ("image", "label", "index"):
    rows = np.concatenate([part[name] for part in later])
    np.testing.assert_array_equal(rows, np.stack([row[name] for row in expected[6:]]))
  other = [_draw(seed=1)(number) for number in range(12)]
  assert any(
    a["image"].tobytes() != b["image"].tobytes() for a, b in zip(expected, other, strict=True)
  )
