"""Stage `finetune`: training on mined pairs, labelled and unlabelled images, from the base on.

The reference is one margin a pair, read from the pair files, so no reference network runs; with
augmentation on, a frozen second parameter tree gives the margin of the augmented image.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import optax
from etils import epath
from jax.sharding import Mesh

from rndpo_jax import config as config_lib
from rndpo_jax import models, provenance, seeds, types
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.models import mirroring
from rndpo_jax.pairs import pair_batches, shards
from rndpo_jax.runtime import files, multihost, progress, sharding
from rndpo_jax.stages import base, phases, reliable
from rndpo_jax.training import (
  checkpoint_manager,
  image_terms,
  loss_fns,
  metric_writer,
  pair_terms,
  term_inputs,
  train_loop,
  train_step,
)


def run(config, workdir: os.PathLike, folder: os.PathLike | None = None) -> None:
  """Fine-tunes to `config.finetune.num_steps`; writes `finetune/`, `done.json` last.

  Of a phase that mining has left out `done.json` is all, with step 0.

  Args:
    config: of the phase, see `phases`.
    workdir: with the data, the base and the phases before.
    folder: with the phase's `pairs/`, where `finetune/` is written; None for the work directory.

  Raises:
    training.TrainingError, checkpoint.CheckpointError, pairs.PairsError, config.ConfigError.
  """
  folder = epath.Path(workdir if folder is None else folder)
  directory, pairs = folder / "finetune", folder / "pairs"
  mesh = sharding.make_mesh(fsdp=config.mesh.fsdp, space=config.mesh.space)
  dataset = dataset_lib.open_dataset(config, workdir)
  segmenter = models.build(
    config.model, num_classes=dataset.num_classes, spatial_dims=dataset.spatial_dims
  )
  params = phases.start(config, workdir, dataset)
  if "pairs" in image_terms.reads_of(config):
    shards.check_made_of(pairs, dataset, params)
  fingerprints = made_of(config, workdir, pairs, dataset, params)
  if multihost.broadcast((directory / "done.json").exists):
    check_made_of(directory, "done.json", fingerprints)
    return
  if multihost.broadcast(lambda: bool(shards.left_out(pairs))):
    if multihost.is_first():
      progress.say("the phase is left out, for its judge was refused")
      directory.mkdir(parents=True, exist_ok=True)
      files.write_json(directory / "done.json", {"step": 0, "fingerprints": fingerprints})
    return
  train_loop.fit(
    _make_step(config, dataset, segmenter, mesh, params),
    train_step.make_state(
      with_partner(config, workdir, dataset, params),
      optimizer(config.finetune),
      mesh,
      config.finetune.ema_decay > 0,
      config.mesh.fsdp_min_size,
    ),
    pair_batches.on_devices(
      config, pairs, reliable.shown_to(config, workdir, directory, dataset), mesh
    ),
    schedule(config.finetune),
    key=seeds.finetuning_key(config.seed, config_lib.num_phases(config)),
    checkpoints=checkpoint_manager.CheckpointManager(
      directory,
      description="finetune",
      fingerprints=fingerprints,
      keep_checkpoints=config.finetune.keep_checkpoints,
      minutes=config.finetune.checkpoint_minutes,
    ),
    metrics=metric_writer.MetricWriter(directory),
    validate=base.make_validate(config, dataset, segmenter, mesh, reference=params),
  )
  if multihost.is_first():
    files.write_json(
      directory / "done.json", {"step": config.finetune.num_steps, "fingerprints": fingerprints}
    )


def _make_step(config, dataset, segmenter: types.Segmenter, mesh: Mesh, params: types.Params):
  """(state, batch, key) -> (state, metrics), with the frozen base on the devices if it needs it."""
  loss_fn = make_loss_fn(
    config,
    sharding.data_parallel(segmenter.apply, mesh),
    num_classes=dataset.num_classes,
    has_ignored=dataset.has_ignored,
    in_mask=dataset.in_mask,
  )
  min_size = config.mesh.fsdp_min_size
  reference = sharding.put_params(params, mesh, min_size) if needs_base(config) else None
  step = train_step.make_train_step(
    loss_fn,
    optimizer(config.finetune),
    mesh,
    config.finetune.accumulate_steps,
    config.finetune.ema_decay,
    min_size,
    config.finetune.log_every_steps,
  )
  return lambda state, batch, key: step(state, batch, key, reference)


def made_of(config, workdir, pairs: epath.Path, dataset, params: types.Params) -> dict[str, str]:
  """Fingerprints of all that a fine-tuning of `config` is made of, by name.

  Args:
    config: of the phase.
    workdir: with the base.
    pairs: the folder of its pairs.
    dataset: the prepared data.
    params: that it starts from.

  Raises:
    errors.PairsError: if it reads pairs and none are mined.
  """
  found, read = provenance.of_finetuning(dataset, params), image_terms.reads_of(config)
  if "pairs" in read:
    found["pairs"] = shards.fingerprint(pairs)
  if "partner" in read:
    found["partner"] = provenance.fingerprint(base.load(workdir, dataset, member=1))
  return found


def check_made_of(directory: epath.Path, name: str, here: dict[str, str]) -> None:
  """Checks that a fine-tuning or a sweep is of what is here.

  Args:
    directory: `finetune/` or `sweep/`.
    name: of the file in it that keeps the fingerprints of what it was made of.
    here: from `made_of`.

  Raises:
    errors.ProvenanceError: naming the folder to delete.
  """
  there = files.read_json(directory / name)
  remedy = "delete that folder and run the same command again"
  provenance.check(directory, there.get("fingerprints"), here, remedy)


def make_loss_fn(
  config,
  apply: Callable,
  *,
  num_classes: int,
  has_ignored: bool = False,
  in_mask: tuple[bool, ...] = (),
) -> train_step.LossFn:
  """That of the config's terms.

  Args:
    config: the whole config.
    apply: of the segmenter, (params, images, key=None) -> logits.
    num_classes: C.
    has_ignored: whether labels may hold `types.IGNORED`.
    in_mask: of `augment`.
  """
  options, dice_weight = config.finetune, config.base.dice_weight
  weak, strong = (
    {**part.to_dict(), "in_mask": in_mask} for part in (config.augment, config.strong)
  )
  pairs = pair_terms.Settings(
    apply=apply,
    num_classes=num_classes,
    size=config_lib.input_size(config),
    objective={
      "objective": options.objective,
      "objective_weights": tuple(options.objective_weights),
      "beta": options.beta,
      "normalization": options.normalization or None,
      "exponent": options.power_exponent,
      "floor": options.power_floor,
      "label_smoothing": options.label_smoothing,
      "temperature": options.discopop_temperature,
    },
    region_classes=config_lib.region_classes(config),
    reference=options.reference,
    augment=weak if options.augment else None,
    strong=strong if options.strong else None,
    dropout=options.dropout,
    dice_weight=dice_weight,
  )
  images = term_inputs.Settings(
    apply=apply,
    num_classes=num_classes,
    dice_weight=dice_weight,
    has_ignored=has_ignored,
    augment=weak if config.base.augment else None,
    strong=strong,
    teach=mirroring.TEACHER_VIEWS[options.teacher_views](apply),
    objective=pairs.objective,
    region_classes=pairs.region_classes,
  )
  terms = config_lib.active_terms(config)
  return loss_fns.make_loss_fn(pairs, images, terms, weak=weak, ramp_steps=options.ramp_steps)


def batch_sizes(config) -> dict[str, int]:
  """Images a step of each part that its terms read, by the key of the config that says so."""
  keys = {
    "pairs": "finetune.batch_size",
    "labelled": "finetune.labelled_batch_size",
    "unlabelled": "finetune.unlabelled_batch_size",
  }
  read, values = image_terms.reads_of(config), config_lib.leaves(config)
  return {key: values[key] for part, key in keys.items() if part in read}


def needs_base(config) -> bool:
  """Whether a step of fine-tuning runs the frozen base."""
  terms = config_lib.active_terms(config)
  online = "preference" in terms and config.finetune.reference == "online"
  return online or "base" in image_terms.reads(terms)


def with_partner(config, workdir, dataset, params: types.Params) -> types.Params | types.Partners:
  """The parameters to train: the policy's, with the base's second member if a term needs it."""
  if "partner" not in image_terms.reads_of(config):
    return params
  return types.Partners(params, base.load(workdir, dataset, member=1))


def schedule(options) -> train_loop.Schedule:
  """That of `config.finetune`."""
  return train_loop.Schedule(options.num_steps, options.log_every_steps, options.eval_every_steps)


def optimizer(config) -> optax.GradientTransformation:
  """AdamW (Adam without weight decay), clipped by global norm where clip_norm is above 0."""
  rate = config.learning_rate
  if config.schedule == "cosine":
    rate = optax.cosine_decay_schedule(rate, config.num_steps)
  adam = optax.adamw(rate, weight_decay=config.weight_decay)
  if config.clip_norm > 0:
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)
  return adam
