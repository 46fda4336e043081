"""The validation split's pairs, as mining measured them, and their margins under a checkpoint."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np
from etils import epath

from rndpo_jax import config as config_lib
from rndpo_jax import errors, losses, models, types
from rndpo_jax.evaluation import predict
from rndpo_jax.runtime import files, preemption, sharding

FILE = "validation.npz"
FIELDS = (
  "index", "masks", "truth", "chosen", "rejected", "score_gap", "region_size", "valid",
)  # fmt: skip
# Written if pairs of whole images are cut into tiles, i32[N, P]: |D| of the image.
IMAGE_REGION_SIZE = "image_region_size"


def write(
  path: epath.Path,
  index: np.ndarray,
  masks: np.ndarray,
  truth: np.ndarray,
  pairs: types.Pairs,
  image_region_size: np.ndarray | None = None,
) -> None:
  """Writes FIELDS as .npz.

  Args:
    path: `pairs/validation.npz`.
    index: i32[N], records of the images, or tiles.
    masks: u8[N, K, bits, bytes], their proposals by `bit_planes.pack`.
    truth: f32[N, K], true Dice of each.
    pairs: of the judge that mines.
    image_region_size: as IMAGE_REGION_SIZE says; None if the pairs are not of tiles of images.
  """
  arrays = {"index": np.asarray(index, np.int32), "masks": masks, "truth": truth}
  arrays |= {name: value for name, value in pairs._asdict().items() if name in FIELDS}
  if image_region_size is not None:
    arrays[IMAGE_REGION_SIZE] = np.asarray(image_region_size, np.int32)
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)
  files.write_bytes(path, buffer.getvalue())


def read(path: epath.Path) -> dict[str, np.ndarray]:
  """Reads FIELDS, and IMAGE_REGION_SIZE if it is there.

  Raises:
    FileError: if it cannot be read, or lacks a field.
  """
  try:
    with np.load(io.BytesIO(epath.Path(path).read_bytes())) as content:
      more = {IMAGE_REGION_SIZE}.intersection(content)
      return {name: content[name] for name in (*FIELDS, *more)}
  except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
    raise errors.FileError(
      f"{path}: cannot be read ({error}); delete it and run the same command again"
    ) from error


def gain(pairs: dict[str, np.ndarray]) -> np.ndarray:
  """True Dice of the chosen mask minus that of the rejected one, f32[N, P]; from `read`."""
  truth = pairs["truth"]
  better, worse = (np.take_along_axis(truth, pairs[name], 1) for name in ("chosen", "rejected"))
  return better - worse


def share(pairs: dict[str, np.ndarray]) -> np.ndarray:
  """Of a tile in the image's |D|, f64[N, P], 1 if the pairs are not of tiles; from `read`."""
  size = pairs["region_size"]
  if IMAGE_REGION_SIZE not in pairs:
    return np.ones(size.shape)
  return size / np.maximum(pairs[IMAGE_REGION_SIZE], 1)


def margins(
  config, evaluation: predict.Evaluation, pairs: dict[str, np.ndarray], steps: Sequence[int]
) -> np.ndarray:
  """Margins of the pairs under each checkpoint, f64[T, N, P], on the images as they are.

  Args:
    config: the whole config.
    evaluation: its parameters and batches are used.
    pairs: from `read`.
    steps: T checkpoints.
  """
  dataset = evaluation.dataset
  segmenter = models.build(
    config.model, num_classes=dataset.num_classes, spatial_dims=dataset.spatial_dims
  )
  classes = config_lib.region_classes(config)

  def margin(params, arguments):
    images, chosen, rejected = arguments
    logits = segmenter.apply(params, images)
    return losses.pair_margin(logits, chosen, rejected, packed=True, classes=classes)

  program = sharding.over_local_devices(margin)
  indices = tuple(map(int, pairs["index"]))
  found = np.zeros((len(steps), *pairs["chosen"].shape), np.float64)
  for at, step in enumerate(steps):
    placed = sharding.put_on_local_devices(evaluation.params(step))
    start = 0
    for batch in evaluation.batches(indices):
      preemption.check("evaluate: measured checkpoints are kept")
      # The last batch is filled up with images that do not count.
      rows = np.minimum(np.arange(start, start + len(batch.index)), len(indices) - 1)
      masks = [pairs["masks"][rows[:, None], pairs[name][rows]] for name in ("chosen", "rejected")]
      values = np.asarray(program(placed, (batch.images, *masks)))[batch.valid]
      found[at, start : start + len(values)] = values
      start += len(values)
  return found
