"""Boxes: inside the image, of the share asked for, one key one box; pasting moves whole pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rndpo_jax.data import mixing


@pytest.mark.parametrize("size", [(32, 48), (12, 10, 8)])
def test_boxes_are_boxes_of_the_share_asked_for(size):
  inside = np.asarray(mixing.boxes(jax.random.key(0), 200, size, low=0.1, high=0.4))
  shares = inside.mean(axis=tuple(range(1, inside.ndim)))
  for one in inside:
    places = np.argwhere(one)
    extent = places.max(0) - places.min(0) + 1
    assert extent.prod() == len(places)  # a full box
  assert 0.05 < shares.min() and shares.max() < 0.5
  assert abs(shares.mean() - 0.25) < 0.02
  for axis in range(1, inside.ndim):  # boxes reach both ends of every axis
    along = inside.any(axis=tuple(a for a in range(inside.ndim) if a != axis))
    assert along.all()


def test_a_box_does_not_depend_on_the_batch():
  many = mixing.boxes(jax.random.key(1), 5, (16, 16), low=0.2, high=0.2)
  few = mixing.boxes(jax.random.key(1), 2, (16, 16), low=0.2, high=0.2)
  np.testing.assert_array_equal(many[:2], few)
  assert len({box.tobytes() for box in np.asarray(many)}) == 5
  whole = mixing.boxes(jax.random.key(1), 2, (4, 4), low=1.0, high=1.0)
  assert np.asarray(whole).mean() > 0.5


def test_paste_takes_the_inside_of_one_and_the_outside_of_the_other():
  inside = jnp.zeros((2, 3, 4), bool).at[0, 1, 2].set(True)
  images = {"image": jnp.ones((2, 3, 4, 2)), "mask": jnp.full((2, 3, 4), 7, jnp.uint8)}
  others = jax.tree.map(jnp.zeros_like, images)
  out = mixing.paste(inside, images, others)
  assert out["image"].sum() == 2 and (out["image"][0, 1, 2] == 1).all()
  assert out["mask"].sum() == 7 and out["mask"].dtype == jnp.uint8
