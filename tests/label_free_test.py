"""label_free: figures against their formulas, and the stop that a limit of KL gives."""

import jax
import numpy as np

from rndpo_jax.evaluation import label_free, metrics


def test_figures_of_each_image():
  rng = np.random.default_rng(0)
  logits, base = rng.normal(size=(2, 2, 4, 4, 3)).astype(np.float32)
  teacher = np.asarray(jax.nn.softmax(base + logits))
  found = label_free.figures(logits, base, teacher, 3)
  p, q = (np.asarray(jax.nn.softmax(x), np.float64) for x in (logits, base))
  np.testing.assert_allclose(found["kl"], np.mean(np.sum(p * np.log(p / q), -1), (1, 2)), rtol=1e-5)
  for row in range(2):
    masks = [np.argmax(x[row], -1) for x in (logits, teacher)]
    np.testing.assert_allclose(
      found["agreement"][row], metrics.dice(*masks, 3, 2).mean(), rtol=1e-6
    )
  same = label_free.figures(base, base, q, 3)
  np.testing.assert_allclose(same["kl"], 0.0, atol=1e-6)
  np.testing.assert_array_equal(same["agreement"], 1.0)


def test_the_last_checkpoint_below_the_limit_or_the_base():
  kl, dice = (0.0, 0.02, 0.005, 0.2), (0.8, 0.83, 0.83, 0.7)
  points = [{"step": 5 * n, "kl": x, "agreement": 1.0} for n, x in enumerate(kl)]
  curve = [{"step": 5 * n, "val_dice": 0.0, "test_dice": x} for n, x in enumerate(dice)]
  found = label_free.stops(points, curve)
  assert [(row["max_kl"], row["step"]) for row in found["by_kl"]] == [
    (0.003, 0), (0.01, 10), (0.03, 10), (0.1, 10), (0.3, 15),
  ]  # fmt: skip
  assert [row["test_dice"] for row in found["by_kl"]] == [0.8, 0.83, 0.83, 0.83, 0.7]
  assert found["oracle"] == {"step": 5, "test_dice": 0.83}
