"""label_free: figures against their formulas, and the stops that they give, by hand."""

import jax
import numpy as np
import pytest

from rndpo_jax.evaluation import label_free, metrics


def test_figures_of_each_image():
  rng = np.random.default_rng(0)
  logits, base = rng.normal(size=(2, 2, 4, 4, 3)).astype(np.float32)
  teacher = np.asarray(jax.nn.softmax(base + logits))
  found = label_free.figures(logits, base, teacher, 3)
  p, q = (np.asarray(jax.nn.softmax(x), np.float64) for x in (logits, base))
  np.testing.assert_allclose(found["kl"], np.mean(np.sum(p * np.log(p / q), -1), (1, 2)), rtol=1e-5)
  for row in range(2):
    mask, *others = (np.argmax(x[row], -1) for x in (logits, teacher, base))
    for name, other in zip(("agreement", "dice_to_base"), others, strict=True):
      np.testing.assert_allclose(found[name][row], metrics.dice(mask, other, 3, 2).mean(), 1e-6)
  same = label_free.figures(base, base, q, 3)
  np.testing.assert_allclose(same["kl"], 0.0, atol=1e-6)
  np.testing.assert_array_equal(same["agreement"], 1.0)
  np.testing.assert_array_equal(same["dice_to_base"], 1.0)


def test_labelled_images_count_their_known_pixels():
  logits = np.array([[[[1.0, 0.0], [0.0, 1.0]]], [[[0.0, 1.0], [0.0, 1.0]]]], np.float32)
  found = label_free.labelled_figures(logits, np.array([[[1, 1]], [[1, 255]]], np.uint8), 2)
  np.testing.assert_allclose(found["labelled_dice"], [2 / 3, 1.0])
  none = label_free.labelled_figures(logits, np.full((2, 1, 2), 255, np.uint8), 2)
  assert found["known"].all() and not none["known"].any()


BASE = {"step": 0, "kl": 0.0, "dice_to_base": 1.0, "agreement": 1.0, "labelled_dice": 0.9}
NEAR = {**BASE, "step": 5, "kl": 0.01, "dice_to_base": 0.95, "labelled_dice": 0.85}
CHOICES = [
  ([NEAR, {**NEAR, "step": 10}], 10, "step 10 is delivered, the last that is near"),
  ([NEAR, {**NEAR, "step": 10, "kl": 0.05}], 5, "step 5 is delivered"),
  ([{**NEAR, "kl": 0.06}], 0, "step 5: KL to the base 0.0600, below 0.05 asked"),
  ([{**NEAR, "dice_to_base": 0.7}], 0, "Dice 0.700 with the base's masks, 0.75 asked"),
  ([{**NEAR, "labelled_dice": 0.8}], 0, "labelled images 0.800 after 0.900, 0.9 of it asked"),
  ([{**NEAR, "labelled_dice": 0.81}], 5, "nobody knows whether it is better"),
  ([{**NEAR, "kl": float("nan")}], 0, "KL to the base nan"),
  ([], 0, "there is no checkpoint"),
]


@pytest.mark.parametrize("others,step,reason", CHOICES)
def test_the_last_checkpoint_that_is_near_the_base_and_keeps_the_labelled(others, step, reason):
  found = label_free.choose([BASE, *others], max_kl=0.05)
  assert found["step"] == step and found["is_base"] == (step == 0)
  assert reason in found["reason"] and found["chosen_by"] == "label_free"
  assert label_free.choose([BASE, *others], max_kl=0.0)["is_base"]


def test_without_labelled_pixels_the_other_figures_choose():
  points = [{**BASE, "labelled_dice": None}, {**NEAR, "labelled_dice": None}]
  assert label_free.choose(points, max_kl=0.05)["step"] == 5


def test_stops_beside_the_oracle():
  kl, dice = (0.0, 0.02, 0.005, 0.2), (0.8, 0.83, 0.82, 0.7)
  points = [{**NEAR, "step": 5 * n, "kl": x} for n, x in enumerate(kl)]
  curve = [{"step": 5 * n, "val_dice": 0.0, "test_dice": x} for n, x in enumerate(dice)]
  found = label_free.stops(points, curve, max_kl=0.05)
  assert [(row["max_kl"], row["step"]) for row in found["by_kl"]] == [
    (0.003, 0), (0.01, 10), (0.03, 10), (0.1, 10), (0.3, 15),
  ]  # fmt: skip
  assert [row["test_dice"] for row in found["by_kl"]] == [0.8, 0.82, 0.82, 0.82, 0.7]
  assert found["chosen"] == {"max_kl": 0.05, "step": 10, "test_dice": 0.82}
  assert found["oracle"] == {"step": 5, "test_dice": 0.83}
  unknown = [{**point, "test_dice": None} for point in curve]
  assert label_free.stops(points, unknown, max_kl=0.05)["oracle"] is None
