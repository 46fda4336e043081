"""Which unlabelled images are reliable: those on which stored checkpoints agree.

The stability of an image is the mean Dice of the masks of the phase's earlier checkpoints with that
of its last: Yang et al., "ST++: Make Self-training Work Better for Semi-supervised Semantic
Segmentation", CVPR 2022 (who add up mean IoUs).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from rndpo_jax import models, types
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import loader
from rndpo_jax.mining import overlap
from rndpo_jax.runtime import files, multihost, preemption, sharding
from rndpo_jax.stages import phases
from rndpo_jax.training import checkpoint

FILE = "reliable.json"


def shown_to(config, workdir: os.PathLike, directory: epath.Path, dataset) -> dataset_lib.Dataset:
  """The data set with the unlabelled images that a phase is shown, by `finetune.reliable_share`.

  The checkpoints are those of the phase before. Process 0 writes the stability of every image to
  FILE, and all read it there.

  Args:
    config: of the phase.
    workdir: of the job.
    directory: `finetune/` of the phase.
    dataset: the prepared data.
  """
  share = config.finetune.reliable_share
  if share == 1:
    return dataset
  path, indices = directory / FILE, dataset.splits["unlabelled"]
  with preemption.together("finetune: it begins again"):
    if multihost.is_first() and not path.exists():
      found = _measure(config, dataset, phases.kept_before(config, workdir))
      directory.mkdir(parents=True, exist_ok=True)
      files.write_json(path, {"stability": found.tolist()})
  files.refresh(directory)
  found = np.array(files.read_json(path, stability=list)["stability"])
  return dataset._replace(
    splits={**dataset.splits, "unlabelled": most_stable(indices, found, share)}
  )


def most_stable(indices: np.ndarray, found: np.ndarray, share: float) -> np.ndarray:
  """Of `indices` the share with the highest values, one at least, in their old order."""
  count = max(1, round(share * len(indices)))
  return indices[np.sort(np.argsort(-found, kind="stable")[:count])]


def stability(apply: Callable, params: Sequence[types.Params], images, num_classes: int):
  """Mean foreground Dice of each model's masks but the last with those of the last.

  Args:
    apply: (params, images) -> logits f32[b, *S, C].
    params: of two or more checkpoints, in their order.
    images: f32[b, *S, I].
    num_classes: C.

  Returns:
    f32[b].
  """
  masks = [jnp.argmax(apply(one, images), axis=-1).astype(jnp.uint8) for one in params]
  *earlier, last = masks
  dice = overlap.pairwise_dice(jnp.stack(earlier, axis=1), last[:, None], num_classes)
  return jnp.mean(dice, axis=(1, 2))


def _measure(config, dataset, kept: tuple[epath.Path, Sequence[int]]) -> np.ndarray:
  """Of each unlabelled image, f32[N], on the devices of this process."""
  directory, steps = kept
  segmenter = models.build(
    config.model, num_classes=dataset.num_classes, spatial_dims=dataset.spatial_dims
  )
  params = [
    checkpoint.restore_params(directory / "params", step, stage_directory=directory)
    for step in steps
  ]
  program = sharding.over_local_devices(
    lambda whole, images: stability(segmenter.apply, whole, images, dataset.num_classes)
  )
  placed = sharding.put_on_local_devices(params)
  parts = []
  for batch in loader.batches(
    dataset,
    dataset.splits["unlabelled"],
    batch_size=config.mine.batch_size * jax.local_device_count(),
    with_labels=False,
    num_workers=config.data.num_workers,
  ):
    preemption.check("finetune: it begins again")
    parts.append(np.asarray(program(placed, batch.images))[batch.valid])
  return np.concatenate(parts)
