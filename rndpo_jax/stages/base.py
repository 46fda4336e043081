"""Stage `base`: the base segmenter, trained on the labelled split or imported from nnU-Net."""

from __future__ import annotations

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from rndpo_jax import losses, models, provenance, seeds, types
from rndpo_jax.data import augment, split_batches
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.errors import ConfigError
from rndpo_jax.nnunet import imported
from rndpo_jax.runtime import files, multihost, sharding
from rndpo_jax.training import (
  checkpoint,
  checkpoint_manager,
  metric_writer,
  train_loop,
  train_step,
  validation,
)


def optimizer(config) -> optax.GradientTransformation:
  """AdamW with linear warm-up, cosine decay to zero, clipped if clip_norm is above 0."""
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=min(config.warmup_steps, config.num_steps - 1),
    decay_steps=config.num_steps,
  )
  adam = optax.adamw(schedule, weight_decay=config.weight_decay)
  if config.clip_norm > 0:
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)
  return adam


def make_loss_fn(
  segmenter: types.Segmenter,
  *,
  dice_weight: float,
  augment_options: dict | None,
  has_ignored: bool = False,
):
  """(params, batch {"image", "label"}, StepInputs) -> (loss, metrics), with dropout on."""

  def loss_fn(params, batch, inputs):
    augment_key, dropout_key = jax.random.split(inputs.key)
    images, labels = batch["image"], batch["label"]
    if augment_options is not None:
      images, labels = augment.augment(augment_key, images, labels[:, None], **augment_options)
      labels = labels[:, 0]
    logits = segmenter.apply(params, images, dropout_key)
    return losses.supervised_loss(logits, labels, dice_weight=dice_weight, has_ignored=has_ignored)

  return loss_fn


def run(config, workdir: os.PathLike) -> None:
  """Trains `config.base.num_members` segmenters and selects a checkpoint of each.

  Writes `base/` (the first member: the base segmenter) and `base/member-N/`, each with `params/`,
  `metrics.jsonl` and `selected.json`; keeps the selected and the last parameters. With
  `config.base.workdir` the members of that work directory are copied; with
  `config.base.nnunet_folder` they are the folds of that model, and `base/nnunet/` keeps what the
  first one came as.

  Raises:
    training.TrainingError, checkpoint.CheckpointError, config.ConfigError.
    errors.DataError, errors.FileError: if a model of nnU-Net cannot be used for these data.
  """
  if config.base.workdir:
    _copy_members(config, workdir)
    return
  make_member = _import_member if config.base.nnunet_folder else _train_member
  # The first member comes last: its selected.json is the sign that the stage is done.
  for member in reversed(range(config.base.num_members)):
    make_member(config, workdir, member)


def load(workdir: os.PathLike, dataset, member: int = 0) -> types.Params:
  """The selected parameters of a member, a numpy tree; the first is the base segmenter.

  Raises:
    errors.CheckpointError: if they cannot be read.
    errors.ProvenanceError: if they were trained on other data than `dataset`.
  """
  directory = member_directory(workdir, member)
  selected = files.read_json(directory / "selected.json", step=int)
  provenance.check(
    directory,
    selected.get("fingerprints"),
    {"data": dataset.fingerprint},
    "an image or split that it has not seen could be taken for one that it has: bring those data "
    "back, or start in a new --workdir",
  )
  return checkpoint.restore_params(
    directory / "params", selected["step"], stage_directory=directory
  )


def mirror_axes(config, workdir: os.PathLike, spatial_dims: int) -> tuple[int, ...]:
  """Spatial axes along which the base's training flipped images, that of an imported one too."""
  home = epath.Path(workdir) / "base" / imported.KEPT
  if home.exists():
    model = imported.read_kept(home)
    axes = model.checkpoint.mirroring_axes
    return tuple(n for n, axis in enumerate(model.plans.axes) if axis in axes)
  # Older ones do not say it.
  by_config = config.base.augment and config.augment.flip > 0
  selected = files.read_json(home.parent / "selected.json")
  return tuple(range(spatial_dims)) if selected.get("flipped", by_config) else ()


def member_directory(workdir: os.PathLike, member: int) -> epath.Path:
  """`base/` for the first member, `base/member-N/` for the others."""
  directory = epath.Path(workdir) / "base"
  return directory if member == 0 else directory / f"member-{member}"


def _train_member(config, workdir, member: int) -> None:
  directory = member_directory(workdir, member)
  if multihost.broadcast((directory / "selected.json").exists):
    return
  mesh = sharding.make_mesh(fsdp=config.mesh.fsdp, space=config.mesh.space)
  dataset = dataset_lib.open_dataset(config, workdir)
  segmenter = models.build(
    config.model, num_classes=dataset.num_classes, spatial_dims=dataset.spatial_dims
  )
  init_key, fit_key = jax.random.split(seeds.base_key(config.seed, member))
  images = jnp.zeros((1, *dataset.size, dataset.num_channels))
  params = jax.jit(segmenter.init)(init_key, images)
  loss_fn = make_loss_fn(
    segmenter._replace(apply=sharding.data_parallel(segmenter.apply, mesh)),
    dice_weight=config.base.dice_weight,
    augment_options=(
      {**config.augment.to_dict(), "in_mask": dataset.in_mask} if config.base.augment else None
    ),
    has_ignored=dataset.has_ignored,
  )
  transformation, min_size = optimizer(config.base), config.mesh.fsdp_min_size
  train_loop.fit(
    train_step.make_train_step(
      loss_fn, transformation, mesh, config.base.accumulate_steps, fsdp_min_size=min_size
    ),
    train_step.make_state(params, transformation, mesh, fsdp_min_size=min_size),
    split_batches.labelled_batches(
      config,
      shown_to(config, dataset, member),
      mesh,
      batch_size=config.base.batch_size,
      seed=seeds.base_order(config.seed, member),
    ),
    train_loop.Schedule(
      config.base.num_steps, config.base.log_every_steps, config.base.eval_every_steps
    ),
    key=fit_key,
    checkpoints=checkpoint_manager.CheckpointManager(
      directory,
      description="base" if member == 0 else f"base, member {member}",
      fingerprints={"data": dataset.fingerprint},
      keep_checkpoints=config.base.keep_checkpoints,
      keep_params="best",
      minutes=config.base.checkpoint_minutes,
    ),
    metrics=metric_writer.MetricWriter(directory),
    validate=make_validate(config, dataset, segmenter, mesh),
  )
  if multihost.is_first():
    _select(config, directory, dataset.fingerprint)


def shown_to(config, dataset, member: int) -> dataset_lib.Dataset:
  """The data set with the labelled groups that a member is trained on.

  The first sees all, each other one a share `config.base.member_labels` of its own, one group at
  least: bagging (Breiman, "Bagging predictors", Machine Learning 1996), drawn without replacement.
  """
  labelled = dataset.splits["labelled"]
  groups = np.array([dataset.records[index]["group_id"] for index in labelled])
  names = np.unique(groups)
  count = max(1, round(config.base.member_labels * len(names)))
  if member == 0 or count == len(names):
    return dataset
  rng = np.random.default_rng(seeds.base_order(config.seed, member))
  own = labelled[np.isin(groups, rng.choice(names, count, replace=False))]
  return dataset._replace(splits={**dataset.splits, "labelled": own})


def _import_member(config, workdir, member: int) -> None:
  directory = member_directory(workdir, member)
  if multihost.broadcast((directory / "selected.json").exists):
    return
  fold = imported.folds(config)[member]
  dataset = dataset_lib.open_dataset(config, workdir)
  params = imported.read(config, fold, dataset).params
  segmenter = models.build(
    config.model, num_classes=dataset.num_classes, spatial_dims=dataset.spatial_dims
  )
  mesh = sharding.make_mesh(fsdp=config.mesh.fsdp, space=config.mesh.space)
  validate = make_validate(config, dataset, segmenter, mesh)
  figures = None if validate is None else validate(params)
  checkpoint.save(directory / "params", 0, params)
  if not multihost.is_first():
    return
  came_from = imported.keep(config, fold, directory) if member == 0 else {"fold": fold}
  row, lines = {"step": 0, "val_dice": None}, ""
  if figures is not None:
    row = {"step": 0, "kind": "val", **figures}
    lines = json.dumps(row) + "\n"
  files.write_text(directory / "metrics.jsonl", lines)
  _write_selected(config, directory, row, "imported", dataset.fingerprint, nnunet=came_from)


def make_validate(
  config,
  dataset,
  segmenter: types.Segmenter,
  mesh: Mesh,
  reference: types.Params | None = None,
):
  """`validation.make_validate` on the validation split; None if there is none."""
  if not len(dataset.splits["val"]):
    return None
  batches = split_batches.validation_batches(config, dataset)
  return validation.make_validate(
    segmenter.apply, dataset.num_classes, batches, mesh, reference, config.mesh.fsdp_min_size
  )


def _select(config, directory: epath.Path, data: str) -> None:
  """Writes selected.json by `config.base.select`, then deletes the parameters of other steps."""
  rows = metric_writer.read_rows(directory, "val")
  last, rule = {"step": config.base.num_steps, "val_dice": None}, "last"
  if rows:
    last, rule = rows[-1], config.base.select
  chosen = checkpoint_manager.best_row(rows) if rule == "best" else last
  _write_selected(config, directory, chosen, rule, data)
  checkpoint.keep_only(directory / "params", (chosen["step"], last["step"]))


def _write_selected(config, directory: epath.Path, row: dict, rule: str, data: str, **more) -> None:
  files.write_json(
    directory / "selected.json",
    {
      "step": row["step"],
      "rule": rule,
      "val_dice": row["val_dice"],
      "seed": config.seed,
      "flipped": config.base.augment and config.augment.flip > 0,
      "fingerprints": {"data": data},
      **more,
    },
  )


def _copy_members(config, workdir) -> None:
  """Copies every member's selected parameters and metrics from `config.base.workdir`."""
  for member in reversed(range(config.base.num_members)):
    source = member_directory(config.base.workdir, member)
    target = member_directory(workdir, member)
    if multihost.broadcast((target / "selected.json").exists):
      continue
    if not (source / "selected.json").exists():
      raise ConfigError(
        f"config.base.workdir: {source / 'selected.json'} is missing; run the stages prepare and "
        f"base there first, with config.base.num_members at least {member + 1}"
      )
    selected = files.read_json(source / "selected.json", step=int)
    params = checkpoint.restore_params(source / "params", selected["step"], stage_directory=source)
    checkpoint.save(target / "params", selected["step"], params)
    if not multihost.is_first():
      continue
    if (source / imported.KEPT).exists():
      files.copy(source / imported.KEPT, target / imported.KEPT)
    files.write_text(target / "metrics.jsonl", (source / "metrics.jsonl").read_text())
    files.write_json(target / "selected.json", selected)
