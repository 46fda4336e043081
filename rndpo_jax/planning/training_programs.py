"""The training steps among the programs that `programs` lowers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rndpo_jax import config as config_lib
from rndpo_jax import types
from rndpo_jax.losses import bit_planes
from rndpo_jax.planning import program_inputs
from rndpo_jax.runtime import sharding
from rndpo_jax.stages import base, finetune, train_judge
from rndpo_jax.training import image_terms, train_step


def base_step(config, problem, mesh, segmenter, params, batch):
  """That of the base, lowered."""
  augment_options = config.augment.to_dict() if config.base.augment else None
  loss_fn = base.make_loss_fn(
    segmenter._replace(apply=sharding.data_parallel(segmenter.apply, mesh)),
    dice_weight=config.base.dice_weight,
    augment_options=augment_options,
  )
  labelled = {"image": batch.images, "label": batch.labels, "index": batch.index}
  arrays = program_inputs.placed(labelled, sharding.batch_shardings(labelled, mesh))
  optimizer, parts = base.optimizer(config.base), config.base.accumulate_steps
  return _step(config, parts, loss_fn, optimizer, mesh, params, arrays)


def judge_step(config, problem, mesh, params, batch):
  """That of the judge `learned`, whose network is another."""
  init, apply = train_judge.build(config, problem)
  params = jax.eval_shape(init, program_inputs.key(), batch.images)
  labelled = {"image": batch.images, "label": batch.labels, "index": batch.index}
  arrays = program_inputs.placed(labelled, sharding.batch_shardings(labelled, mesh))
  loss_fn = train_judge.make_loss_fn(
    config, sharding.data_parallel(apply, mesh), problem.num_classes
  )
  return _step(
    config, 1, loss_fn, train_judge.optimizer(config.judge.learned), mesh, params, arrays
  )


def finetune_step(config, problem, mesh, segmenter, params, batch):
  """That of fine-tuning."""
  apply = sharding.data_parallel(segmenter.apply, mesh)
  loss_fn = finetune.make_loss_fn(config, apply, num_classes=problem.num_classes)
  pairs = (batch.index.shape[0], config.mine.pairs_per_image)
  masks = jax.ShapeDtypeStruct((*pairs, *problem.size), jnp.uint8)
  packed = jax.eval_shape(
    lambda x: bit_planes.pack(x, problem.num_classes, problem.spatial_dims), masks
  )
  number = jax.ShapeDtypeStruct(pairs, jnp.float32)
  on_pairs = types.PairBatch(
    images=batch.images,
    chosen=packed,
    rejected=packed,
    reference_margin=number,
    reference_log_prob=number,
    weight=number,
    voxel_volume=jax.ShapeDtypeStruct(pairs[:1], jnp.float32),
    smoothing=None if config.finetune.pair_smoothing == "none" else number,
    top_score=jax.ShapeDtypeStruct(pairs[:1], jnp.float32)
    if config_lib.weighs_images(config)
    else None,
  )
  read = image_terms.reads_of(config)
  labelled, unlabelled = (
    _rows(_share(config, name, pairs[0], mesh), problem) for name in ("labelled", "unlabelled")
  )
  del unlabelled["label"]
  parts = {"pairs": on_pairs, "labelled": labelled, "unlabelled": unlabelled}
  arrays = types.FinetuneBatch(**{name: part for name, part in parts.items() if name in read})
  arrays = program_inputs.placed(arrays, sharding.batch_shardings(arrays, mesh))
  reference = (
    program_inputs.placed_params(config, params, mesh) if finetune.needs_base(config) else None
  )
  if "partner" in read:
    params = types.Partners(params, params)
  optimizer, parts = finetune.optimizer(config.finetune), config.finetune.accumulate_steps
  ema_decay, every = config.finetune.ema_decay, config.finetune.log_every_steps
  return _step(config, parts, loss_fn, optimizer, mesh, params, arrays, ema_decay, every, reference)


def _share(config, name: str, images: int, mesh: Mesh) -> int:
  """Images of a part of a batch beside `images` with pairs, as many more or fewer as in the config.

  Rounded up to what the devices can share.
  """
  options, parts = config.finetune, sharding.num_batch_parts(mesh)
  count = images * options[f"{name}_batch_size"] / options.batch_size
  return parts * math.ceil(count / parts)


def _rows(count: int, problem: program_inputs.Problem) -> dict:
  """`count` labelled images of a batch of fine-tuning."""
  rows = program_inputs.batch(problem, count)
  return {"image": rows.images, "label": rows.labels, "index": rows.index}


def _step(
  config, accumulate_steps, loss_fn, optimizer, mesh, params, arrays, ema_decay=0.0,
  log_every_steps=1, reference=None,
):  # fmt: skip
  min_size = config.mesh.fsdp_min_size
  state = jax.eval_shape(
    lambda p: train_step.make_state(p, optimizer, mesh, ema_decay > 0, min_size), params
  )
  step = train_step.make_train_step(
    loss_fn, optimizer, mesh, accumulate_steps, ema_decay, min_size, log_every_steps
  )
  key = program_inputs.placed(program_inputs.key(), sharding.replicated(mesh))
  return step.lower(program_inputs.placed_params(config, state, mesh), arrays, key, reference)
