"""Trains the learned judge: image and mask -> predicted Dice, from the labelled split alone."""

from __future__ import annotations

import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from etils import epath

from rndpo_jax import models, seeds, types
from rndpo_jax.data import augment, split_batches
from rndpo_jax.mining import corruptions, quality
from rndpo_jax.runtime import sharding
from rndpo_jax.training import checkpoint_manager, metric_writer, train_loop, train_step


def build(config, dataset) -> tuple[Callable, Callable]:
  """(init, apply) of `mining.quality`; of `dataset` num_classes and spatial_dims are read."""
  return quality.build(
    width=config.judge.learned.width,
    depth=config.model.depth,
    dropout=config.model.dropout,
    num_classes=dataset.num_classes,
    spatial_dims=dataset.spatial_dims,
    lanes=models.lanes(config.model),
  )


def make_loss_fn(
  config, apply: Callable, num_classes: int, in_mask: tuple[bool, ...] = ()
) -> Callable:
  """(params, batch {"image", "label"}, StepInputs) -> (loss, metrics), on masks from the labels.

  Args:
    config: the whole config.
    apply: from `build`.
    num_classes: C.
    in_mask: of `augment`.
  """
  augment_options = {**config.augment.to_dict(), "in_mask": in_mask}
  masks_per_image = config.judge.learned.masks_per_image

  def loss_fn(params, batch, inputs):
    augment_key, corrupt_key, dropout_key = jax.random.split(inputs.key, 3)
    images, labels = augment.augment(
      augment_key, batch["image"], batch["label"][:, None], **augment_options
    )
    images, masks, targets = corruptions.training_batch(
      corrupt_key, images, labels[:, 0], num_classes, masks_per_image
    )
    return quality.quality_loss(params, apply, images, masks, targets, dropout_key)

  return loss_fn


def optimizer(options) -> optax.GradientTransformation:
  """That of `config.judge.learned`."""
  return optax.adam(optax.cosine_decay_schedule(options.learning_rate, options.num_steps))


def train(config, workdir: os.PathLike, dataset) -> tuple[Callable, types.Params]:
  """Trains on synthetic bad masks of the labelled images, or goes on where an earlier run stopped.

  The base segmenter is nearly right on the images that it was trained on, so its own proposals
  there would teach the judge nothing; corrupted labels cover all of Dice's range.

  Args:
    config: the whole config; `config.judge.learned` holds the options.
    workdir: writes `pairs/judge/`.
    dataset: from `dataset.open_dataset`.

  Returns:
    (apply, params) of `mining.quality`.
  """
  options = config.judge.learned
  mesh = sharding.make_mesh(fsdp=config.mesh.fsdp, space=config.mesh.space)
  min_size = config.mesh.fsdp_min_size
  init, apply = build(config, dataset)
  init_key, fit_key = jax.random.split(seeds.judge_key(config.seed))
  images = jnp.zeros((1, *dataset.size, dataset.num_channels))
  params = jax.jit(init)(init_key, images)
  loss_fn = make_loss_fn(
    config, sharding.data_parallel(apply, mesh), dataset.num_classes, dataset.in_mask
  )
  transformation = optimizer(options)
  directory = epath.Path(workdir) / "pairs" / "judge"
  state = train_loop.fit(
    train_step.make_train_step(loss_fn, transformation, mesh, fsdp_min_size=min_size),
    train_step.make_state(params, transformation, mesh, fsdp_min_size=min_size),
    split_batches.labelled_batches(
      config, dataset, mesh, batch_size=options.batch_size, seed=seeds.judge_order(config.seed)
    ),
    train_loop.Schedule(options.num_steps, config.base.log_every_steps, options.num_steps),
    key=fit_key,
    checkpoints=checkpoint_manager.CheckpointManager(
      directory,
      description="learned judge",
      fingerprints={"data": dataset.fingerprint},
      minutes=config.base.checkpoint_minutes,
    ),
    metrics=metric_writer.MetricWriter(directory),
  )
  return apply, sharding.fetch(state.params)
