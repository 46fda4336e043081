"""Losses without labels: values by hand, gradients, and what must not weigh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rndpo_jax.losses import consistency

# One image of two pixels, two classes. Student: 1/4, 3/4 and 1/2, 1/2. Teacher: 0.9, 0.1; 0.6, 0.4.
STUDENT = jnp.log(jnp.array([[[0.25, 0.75], [0.5, 0.5]]]))
TEACHER = jnp.log(jnp.array([[[0.9, 0.1], [0.6, 0.4]]]))
WEIGHT = jnp.array([[1.0, 3.0]])


def test_pseudo_labels_by_hand():
  loss, share = consistency.pseudo_label_loss(STUDENT, TEACHER)
  np.testing.assert_allclose(loss, [(np.log(4) + np.log(2)) / 2], rtol=1e-6)
  np.testing.assert_allclose(share, [1.0])
  # The second pixel's teacher is not sure enough: it counts as 0, and in the mean.
  loss, share = consistency.pseudo_label_loss(STUDENT, TEACHER, threshold=0.8)
  np.testing.assert_allclose(loss, [np.log(4) / 2], rtol=1e-6)
  np.testing.assert_allclose(share, [0.5])
  loss, share = consistency.pseudo_label_loss(STUDENT, TEACHER, threshold=0.8, weight=WEIGHT)
  np.testing.assert_allclose(loss, [np.log(4) / 4], rtol=1e-6)
  np.testing.assert_allclose(share, [0.25])


def test_soft_labels_by_hand_and_least_where_the_prediction_is_the_label():
  probs = jnp.exp(TEACHER)
  want = np.mean([0.9 * np.log(4) + 0.1 * np.log(4 / 3), np.log(2)])
  np.testing.assert_allclose(consistency.soft_label_loss(STUDENT, probs), [want], rtol=1e-6)
  gradient = jax.grad(lambda z: consistency.soft_label_loss(z, probs).sum())
  np.testing.assert_allclose(gradient(TEACHER), 0.0, atol=1e-7)
  assert np.abs(gradient(STUDENT)).max() > 0.1


def test_consistency_by_hand():
  loss = consistency.consistency_loss(STUDENT, TEACHER)
  np.testing.assert_allclose(loss, [(0.65**2 + 0.1**2) / 2], rtol=1e-6)
  # Entropies of the teacher: 0.325 and 0.673 nats.
  loss = consistency.consistency_loss(STUDENT, TEACHER, max_entropy=0.5)
  np.testing.assert_allclose(loss, [0.65**2], rtol=1e-6)
  loss = consistency.consistency_loss(STUDENT, TEACHER, max_entropy=0.1)
  np.testing.assert_allclose(loss, [0.0])  # no pixel is sure


def test_entropy_by_hand_and_at_its_bounds():
  want = np.mean([0.25 * np.log(4) + 0.75 * np.log(4 / 3), np.log(2)])
  np.testing.assert_allclose(consistency.entropy_loss(STUDENT), [want], rtol=1e-6)
  np.testing.assert_allclose(consistency.entropy_loss(jnp.zeros((1, 3, 5))), [np.log(5)], rtol=1e-6)
  sure = jnp.array([[[200.0, 0.0]]])  # a probability that is 0 in float32
  value, gradient = jax.value_and_grad(lambda z: consistency.entropy_loss(z).sum())(sure)
  assert value == 0 and np.isfinite(gradient).all()


LOSSES = {
  "pseudo": lambda z, t, w: consistency.pseudo_label_loss(z, t, threshold=0.8, weight=w)[0],
  "soft": lambda z, t, w: consistency.soft_label_loss(
    z, jax.nn.softmax(t.astype(jnp.float32)), weight=w
  ),
  "consistency": lambda z, t, w: consistency.consistency_loss(z, t, weight=w),
  "entropy": lambda z, t, w: consistency.entropy_loss(z, weight=w),
}


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_to_the_teacher_and_none_where_no_pixel_weighs(name):
  def loss(student, teacher, weight):
    return LOSSES[name](student, teacher, weight).sum()

  student, teacher = jax.grad(loss, argnums=(0, 1))(STUDENT, TEACHER, WEIGHT)
  assert np.abs(student).max() > 0 and not np.any(teacher)
  assert loss(STUDENT, TEACHER, 0 * WEIGHT) == 0
  # A pixel without weight may hold anything.
  odd = STUDENT.at[0, 1].set(jnp.nan)
  assert loss(odd, TEACHER, jnp.array([[1.0, 0.0]])) == loss(
    STUDENT, TEACHER, jnp.array([[1.0, 0.0]])
  )


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_summed_in_float32(name):
  shape = (2, 64, 64, 3)
  student, teacher = (
    jax.random.normal(jax.random.key(n), shape).astype(jnp.bfloat16) for n in (0, 1)
  )
  weight = jnp.ones(shape[:-1])
  got = LOSSES[name](student, teacher, weight)
  want = LOSSES[name](student.astype(jnp.float32), teacher.astype(jnp.float32), weight)
  assert got.dtype == jnp.float32 and got.shape == (2,)
  np.testing.assert_allclose(got, want, rtol=1e-6)
