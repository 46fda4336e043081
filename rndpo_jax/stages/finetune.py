"""Stage `finetune`: preference fine-tuning of the base segmenter on mined pairs.

The reference is one margin a pair, read from the pair files, so no reference network runs; with
augmentation on, a frozen second parameter tree gives the margin of the augmented image.
"""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from rndpo_jax import errors, losses, models, types
from rndpo_jax.data import augment, loader
from rndpo_jax.losses import bit_planes
from rndpo_jax.pairs import pair_batches, shards
from rndpo_jax.runtime import files, processes, sharding
from rndpo_jax.stages import base
from rndpo_jax.training import checkpoint, train_loop


def make_loss_fn(
  segmenter: types.Segmenter,
  *,
  num_classes: int,
  size: tuple[int, ...],
  objective_options: dict,
  region_classes: tuple[int, ...] | None = None,
  reference: str = "cached",
  augment_options: dict | None = None,
  anchor: str = "none",
  anchor_weight: float = 0.0,
  dice_weight: float = 0.0,
):
  """(params, batch, key, beta=None) -> (loss, metrics); dropout is off, so h is 0 at step 0.

  A beta given there takes the place of the one in `objective_options`.

  Args:
    segmenter: of the policy, and of the reference where it is online.
    num_classes: C.
    size: S, the model's grid.
    objective_options: keyword arguments of `preference.preference_loss`.
    region_classes: see `margins.region`.
    reference: "cached" (margins in the batch), "online" (reference_params in the batch) or
      "none" (a reference margin of 0).
    augment_options: of `augment.augment`, or None.
    anchor: "none", "chosen" (adds cross-entropy against the chosen masks) or "labelled" (adds the
      supervised loss on labelled images).
    anchor_weight: factor of the anchor.
    dice_weight: of the supervised loss on labelled images.

  The batch holds image f32[B, *S, I], chosen and rejected (packed u8[B, P, bits, bytes]),
  reference_margin, reference_log_prob and weight f32[B, P] (0 where a slot has no pair), and
  voxel_volume f32[B]; with a labelled anchor also labelled, as `base.make_loss_fn` takes it.
  """
  which = {"classes": region_classes}

  def loss_fn(params, batch, key, beta=None):
    options = objective_options if beta is None else {**objective_options, "beta": beta}
    images, packed = batch["image"], [batch["chosen"], batch["rejected"]]
    masks = [bit_planes.unpack(mask, size, num_classes) for mask in packed]
    if augment_options is not None:
      both = jnp.concatenate(masks, axis=1)
      images, both = augment.augment(key, images, both, **augment_options)
      packed, masks = None, jnp.split(both, 2, axis=1)
    logits = segmenter.apply(params, images)
    reference_margin, reference_log_prob = batch["reference_margin"], batch["reference_log_prob"]
    if reference == "online":
      frozen = segmenter.apply(batch["reference_params"], images)
      reference_margin = losses.pair_margin(frozen, *masks, **which)
      reference_log_prob = losses.pair_log_prob(frozen, *masks, **which)
    elif reference == "none":
      reference_margin, reference_log_prob = jnp.zeros((2, *reference_margin.shape))
    # Bit planes, where they still stand for the masks: an eighth of the bytes in both passes.
    source = masks if packed is None else packed
    margin, region_size = losses.margin_and_size(
      logits, *source, packed=packed is not None, **which
    )
    loss, metrics = losses.preference_loss(
      margin,
      reference_margin,
      region_size,
      weight=batch["weight"],
      policy_log_prob=losses.pair_log_prob(logits, *masks, **which),
      reference_log_prob=reference_log_prob,
      voxel_volume=batch["voxel_volume"][:, None],
      **options,
    )
    if anchor == "chosen":
      # Of the pairs that the loss is a mean of, so that parts of a batch add up.
      weight = batch["weight"] * (region_size > 0)
      metrics["anchor"] = _chosen_cross_entropy(logits, masks[0], weight)
    elif anchor == "labelled":
      labelled = batch["labelled"]
      metrics["anchor"], _ = losses.supervised_loss(
        segmenter.apply(params, labelled["image"]), labelled["label"], dice_weight=dice_weight
      )
    return loss + anchor_weight * metrics.get("anchor", 0.0), metrics

  return loss_fn


def _chosen_cross_entropy(logits, chosen, weight):
  """Mean over pairs and pixels of -log softmax(z_p)[y+_p]."""
  entropy = jax.vmap(losses.cross_entropy, in_axes=(None, 1), out_axes=1)(logits, chosen)
  return jnp.sum(entropy * weight) / jnp.maximum(jnp.sum(weight), 1e-12)


def run(config, workdir: os.PathLike) -> None:
  """Fine-tunes to `config.finetune.num_steps`; writes `finetune/`, `done.json` last.

  Raises:
    training.TrainingError, checkpoint.CheckpointError, pairs.PairsError, config.ConfigError.
  """
  directory = epath.Path(workdir) / "finetune"
  mesh = sharding.make_mesh(fsdp=config.mesh.fsdp, space=config.mesh.space)
  dataset = loader.open_dataset(config, workdir)
  segmenter = models.build(
    config.model, num_classes=dataset.num_classes, spatial_dims=dataset.spatial_dims
  )
  params = base.load(config, workdir, dataset)[0]
  shards.check_origin(epath.Path(workdir) / "pairs", dataset, params)
  if processes.agree((directory / "done.json").exists):
    check_made_of(directory, "done.json", dataset, params)
    return
  loss_fn = make_loss_fn(
    segmenter._replace(apply=sharding.spread(segmenter.apply, mesh)),
    num_classes=dataset.num_classes,
    size=dataset.size,
    **loss_options(config),
  )
  transformation, large = optimizer(config.finetune), config.mesh.large_parameter
  reference = None
  if config.finetune.reference == "online":
    reference = sharding.put_params(params, mesh, large)
  train_loop.fit(
    train_loop.make_train_step(
      loss_fn,
      transformation,
      mesh,
      config.finetune.accumulate_steps,
      config.finetune.ema_decay,
      large,
    ),
    train_loop.make_state(params, transformation, mesh, config.finetune.ema_decay > 0, large),
    pair_batches.on_devices(config, workdir, dataset, mesh, reference),
    num_steps=config.finetune.num_steps,
    key=run_key(config.seed),
    directory=directory,
    description="finetune",
    log_every_steps=config.finetune.log_every_steps,
    eval_every_steps=config.finetune.eval_every_steps,
    validate=base.make_validate(config, dataset, segmenter, mesh, reference=params),
    origin=origin(dataset, params),
    keep_checkpoints=config.finetune.keep_checkpoints,
    checkpoint_minutes=config.finetune.checkpoint_minutes,
  )
  if processes.is_first():
    made_of = bytes(origin(dataset, params)).hex()
    files.write_json(
      directory / "done.json", {"step": config.finetune.num_steps, "origin": made_of}
    )


def origin(dataset, params: types.Params) -> np.ndarray:
  """What a fine-tuning is of: data, and the base that it starts from and is relative to."""
  return checkpoint.digest({"base": params, "data": dataset.digest})


def check_made_of(directory: epath.Path, name: str, dataset, params: types.Params) -> None:
  """Refuses a fine-tuning or a sweep of another base or other data, which would stand beside these.

  Args:
    directory: `finetune/` or `sweep/`.
    name: of the file in it whose `origin` is what it was made of.
    dataset: that is here.
    params: of the base that is here.

  Raises:
    checkpoint.CheckpointError: naming the folder to delete.
  """
  here = bytes(origin(dataset, params)).hex()
  there = files.read_json(directory / name).get("origin")
  if there != here:
    raise errors.CheckpointError(
      f"{directory} was trained from other data or another base: SHA-256 {str(there)[:12]}, now "
      f"{here[:12]}; delete that folder and run the same command again"
    )


def run_key(seed: int) -> jax.Array:
  """The key of a fine-tuning with this seed."""
  return jax.random.fold_in(jax.random.key(seed), 2)


def loss_options(config) -> dict:
  """Keyword arguments of `make_loss_fn` that the config gives."""
  options = config.finetune
  return {
    "objective_options": {
      "objective": options.objective,
      "beta": options.beta,
      "normalization": options.normalization or None,
      "exponent": options.power_exponent,
      "floor": options.power_floor,
      "label_smoothing": options.label_smoothing,
      "temperature": options.discopop_temperature,
    },
    "region_classes": region_classes(config),
    "reference": options.reference,
    "augment_options": config.augment.to_dict() if options.augment else None,
    "anchor": options.anchor,
    "anchor_weight": options.anchor_weight,
    "dice_weight": config.base.dice_weight,
  }


def region_classes(config) -> tuple[int, ...] | None:
  """The class ids whose pixels count in D; None for all."""
  return tuple(config.finetune.region_classes) or None


def optimizer(config) -> optax.GradientTransformation:
  """AdamW (Adam without weight decay), clipped by global norm where clip_norm is above 0."""
  rate = config.learning_rate
  if config.schedule == "cosine":
    rate = optax.cosine_decay_schedule(rate, config.num_steps)
  adam = optax.adamw(rate, weight_decay=config.weight_decay)
  if config.clip_norm > 0:
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)
  return adam
