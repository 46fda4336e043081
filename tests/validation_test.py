"""validation: the same figures on every mesh, and of labelled images alone."""

import jax
import numpy as np
from mesh_problem import CLASSES, MIN_SIZE, PLANE, mesh_of, network, problem

from rndpo_jax import types
from rndpo_jax.runtime import sharding
from rndpo_jax.training import validation


def test_validation_on_eight_devices_is_that_of_one():
  params, batch = problem(PLANE)
  other = jax.tree.map(lambda x: 0.9 * x, params)
  batch = types.Batch(
    *batch.labelled.values(), np.arange(4, dtype=np.int32), np.array([True] * 3 + [False])
  )
  results = []
  for axes in ((1, 1, 1), (2, 2, 2)):
    mesh = mesh_of(*axes)
    validate = validation.make_validate(
      network(2).apply, CLASSES, lambda: [batch], mesh, other, MIN_SIZE
    )
    results.append(validate(sharding.put_params(params, mesh, MIN_SIZE)))
  assert results[0].keys() == {"val_dice", "val_kl", "val_entropy"} and results[0]["val_kl"] > 1e-3
  for name, value in results[0].items():
    np.testing.assert_allclose(results[1][name], value, rtol=1e-5, err_msg=name)


def test_an_image_whose_label_is_all_ignored_is_not_validated_on():
  params, batch = problem(PLANE)
  images, labels = batch.labelled["image"], np.array(batch.labelled["label"])
  validate = [
    validation.make_validate(network(2).apply, CLASSES, lambda b=b: [b], mesh_of(1, 1, 1))
    for b in (
      types.Batch(images, labels, np.arange(4, dtype=np.int32), np.array([True] * 3 + [False])),
      types.Batch(
        images, np.where(np.arange(4)[:, None, None] == 3, types.IGNORED, labels).astype(np.uint8),
        np.arange(4, dtype=np.int32), np.ones(4, bool),
      ),
    )
  ]  # fmt: skip
  assert validate[0](params) == validate[1](params)
