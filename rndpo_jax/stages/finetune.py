"""Stage `finetune`: preference fine-tuning of the base segmenter on mined pairs.

The reference is one margin a pair, read from the pair files, so no reference network runs; with
augmentation on, a frozen second parameter tree gives the margin of the augmented image.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh

from rndpo_jax import files, losses, models, packing, parallel, training, types
from rndpo_jax.data import augment, pipeline
from rndpo_jax.stages import base, pairs


def make_loss_fn(
  segmenter: types.Segmenter,
  *,
  num_classes: int,
  size: tuple[int, ...],
  objective: str,
  beta: float,
  augment_options: dict | None,
):
  """(params, batch, key) -> (loss, metrics); policy dropout is off, so h is 0 at step 0.

  The batch holds image f32[B, *S, I], chosen and rejected (packed u8[B, P, bits, bytes]),
  reference_margin, reference_log_prob (of chosen) and valid f32[B, P]; and, with an online
  reference, reference_params.
  """

  def loss_fn(params, batch, key):
    images = batch["image"]
    masks = [packing.unpack(batch[name], size, num_classes) for name in ("chosen", "rejected")]
    num_pairs = masks[0].shape[1]
    if augment_options is not None:
      images, both = augment.augment(key, images, jnp.concatenate(masks, axis=1), **augment_options)
      masks = [both[:, :num_pairs], both[:, num_pairs:]]
    chosen, rejected = masks
    logits = segmenter.apply(params, images)
    policy_margin = losses.pair_margin(logits, chosen, rejected)
    reference_margin, reference_log_prob = batch["reference_margin"], batch["reference_log_prob"]
    if "reference_params" in batch:
      frozen = segmenter.apply(batch["reference_params"], images)
      reference_margin = losses.pair_margin(frozen, chosen, rejected)
      reference_log_prob = log_prob(frozen, chosen)
    region = losses.region_size(chosen, rejected, spatial_dims=len(size))
    loss, metrics = losses.preference_loss(
      policy_margin,
      reference_margin,
      region,
      objective=objective,
      beta=beta,
      weight=batch["valid"],
    )
    chosen_log_ratio = log_prob(logits, chosen) - reference_log_prob
    rejected_log_ratio = chosen_log_ratio - (policy_margin - reference_margin)
    count = jnp.maximum(jnp.sum(batch["valid"]), 1.0)
    metrics["chosen_log_ratio"] = jnp.sum(chosen_log_ratio * batch["valid"]) / count
    metrics["rejected_log_ratio"] = jnp.sum(rejected_log_ratio * batch["valid"]) / count
    quantiles = jnp.nanquantile(
      jnp.where(batch["valid"] > 0, region.astype(jnp.float32), jnp.nan),
      jnp.array([0.05, 0.5, 0.95]),
    )
    for name, value in zip(("p5", "p50", "p95"), quantiles, strict=True):
      metrics[f"region_size_{name}"] = value
    return loss, metrics

  return loss_fn


def log_prob(logits: types.Array, masks: types.Array) -> jax.Array:
  """log pi(y|x) = sum over all pixels of log softmax(z_p)[y_p].

  Args:
    logits: f[B, *S, C].
    masks: u8[B, P, *S].

  Returns:
    f32[B, P].
  """
  pixels = masks[0, 0].size
  mean = jax.vmap(losses.cross_entropy, in_axes=(None, 1), out_axes=1)(logits, masks)
  return -pixels * mean


def run(config, workdir: os.PathLike) -> None:
  """Fine-tunes to `config.finetune.num_steps`; writes `finetune/`.

  Raises:
    training.TrainingError, checkpoint.CheckpointError, pairs.PairsError, config.ConfigError.
  """
  directory = epath.Path(workdir) / "finetune"
  mesh = parallel.make_mesh()
  dataset = pipeline.open_dataset(config, workdir)
  segmenter = models.build(
    config.model, num_classes=dataset.num_classes, spatial_dims=dataset.spatial_dims
  )
  params = base.load(config, workdir)[0]
  loss_fn = make_loss_fn(
    segmenter,
    num_classes=dataset.num_classes,
    size=dataset.size,
    objective=config.finetune.objective,
    beta=config.finetune.beta,
    augment_options=config.augment.to_dict() if config.finetune.augment else None,
  )
  transformation = optimizer(config.finetune)
  reference = None
  if config.finetune.reference == "online":
    reference = jax.device_put(params, parallel.replicated(mesh))
  training.fit(
    training.make_train_step(loss_fn, transformation, mesh),
    training.make_state(params, transformation, mesh),
    pair_batches(config, workdir, dataset, mesh, reference),
    num_steps=config.finetune.num_steps,
    key=jax.random.fold_in(jax.random.key(config.seed), 2),
    directory=directory,
    description="finetune",
    log_every_steps=config.finetune.log_every_steps,
    eval_every_steps=config.finetune.eval_every_steps,
    validate=base.validation(config, dataset, segmenter),
  )
  files.write_json(directory / "done.json", {"step": config.finetune.num_steps})


def optimizer(config) -> optax.GradientTransformation:
  """AdamW (Adam without weight decay), clipped by global norm where clip_norm is above 0."""
  rate = config.learning_rate
  if config.schedule == "cosine":
    rate = optax.cosine_decay_schedule(rate, config.num_steps)
  adam = optax.adamw(rate, weight_decay=config.weight_decay)
  if config.clip_norm > 0:
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)
  return adam


def pair_batches(
  config, workdir, dataset, mesh: Mesh, reference: types.Params | None
) -> Callable[[int], Iterator[dict]]:
  """Start step -> endless batches of images with their pairs, on device; see `make_loss_fn`."""
  table = pairs.read(epath.Path(workdir) / "pairs")

  def load(row: int) -> dict:
    record = table[row]
    example = pipeline.load_example(dataset, int(record["index"]), with_labels=False)
    return {
      "image": example["image"],
      **{name: record[name] for name in pairs.TRAINING_FIELDS},
    }

  def put(batch):
    batch = parallel.put_batch(batch, mesh)
    return batch if reference is None else {**batch, "reference_params": reference}

  def batches(start_step: int):
    stream = pipeline.stream(
      range(len(table)),
      pipeline.cached(load),
      batch_size=config.finetune.batch_size,
      seed=config.seed,
      start_step=start_step,
      num_workers=config.data.num_workers,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    return pipeline.prefetch(stream, put, config.data.prefetch)

  return batches
