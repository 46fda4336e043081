"""What a run will leave in its work directory, and whether the disk has room for it."""

from __future__ import annotations

import math
import os
import pathlib
import shutil

import jax
from etils import epath
from flax import serialization

from rndpo_jax import config as config_lib
from rndpo_jax import pipeline, types
from rndpo_jax.planning import cost
from rndpo_jax.training import image_terms

# The stage that fills each folder of a `cost.Storage`; any that reads a large image unpacks it.
_STAGE_OF = {"data": "prepare", "base": "base", "pairs": "mine", "finetune": "finetune"}


def planned(config, data, params: types.Params, record) -> cost.Storage:
  """Bytes of data, pairs and checkpoints; compression makes the first two smaller.

  Args:
    config: of the last phase, which has those before it.
    data: of `data_set.describe_data`.
    params: of the network, or their shapes.
    record: a mined image as it is written.
  """
  size = num_bytes(params)
  base = config.base
  finetune = sum(_finetune_bytes(own.finetune, size) for own in config_lib.every_phase(config))
  member = cost.checkpoint_bytes(
    size, 3 * size, base.num_steps, base.eval_every_steps, base.keep_checkpoints, best=True
  )
  if not config_lib.trains_base(config):
    member = size  # its selected parameters are copied
  mined = data.num_images["unlabelled"] * len(serialization.msgpack_serialize(record))
  mined *= num_minings(config)
  # Those of another work directory stay there.
  stored, unpacked = (0, 0) if base.workdir else (data.num_bytes, data.num_unpacked)
  return cost.Storage(stored, unpacked, base.num_members * member, mined, finetune)


def _finetune_bytes(tuned, size: int) -> int:
  states = (3 + (tuned.ema_decay > 0)) * size
  return cost.checkpoint_bytes(
    size, states, tuned.num_steps, tuned.eval_every_steps, tuned.keep_checkpoints, best=False
  )


def num_minings(config) -> int:
  """How often a job mines pairs: once a phase, if any of its terms reads them."""
  return sum("pairs" in image_terms.reads_of(own) for own in config_lib.every_phase(config))


def to_come(storage: cost.Storage, workdir: os.PathLike) -> cost.Storage:
  """What a run has yet to write: of a stage that is done nothing, of another less what is there.

  Args:
    storage: from `planned`.
    workdir: a local folder, or none yet.
  """

  def left(name: str, planned: int) -> int:
    if name in _STAGE_OF and pipeline.is_done(_STAGE_OF[name], epath.Path(workdir)):
      return 0
    places = [f"{name}/**/*", f"phase-*/{name}/**/*"]
    places = ["data/unpacked-*/*"] if name == "unpacked" else places
    there = [path for place in places for path in workdir.glob(place) if path.is_file()]
    return max(0, planned - sum(path.stat().st_size for path in there))

  workdir = pathlib.Path(workdir)
  return cost.Storage(**{name: left(name, size) for name, size in storage._asdict().items()})


def free_bytes(workdir: os.PathLike) -> int:
  """Of the disk that the work directory is on, or would be."""
  folder = epath.Path(workdir).absolute()
  while not folder.exists():
    folder = folder.parent
  return shutil.disk_usage(folder).free


def num_bytes(tree) -> int:
  """Of all arrays in a tree, or of their shapes."""
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
