"""The program's compiled parts for TPU slices that are not here, from a config alone.

The very functions that the stages run are lowered for the devices of a topology and compiled by
libtpu (extra `tpu-aot`), which needs no TPU; what the compiler says is held against the chip's
figures.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from rndpo_jax import config as config_lib
from rndpo_jax import models, types
from rndpo_jax.data import proposal_files
from rndpo_jax.errors import ConfigError
from rndpo_jax.evaluation import predict
from rndpo_jax.losses import bit_planes
from rndpo_jax.mining import fused, given_pairs, judge_gate, judges
from rndpo_jax.mining.program import (
  make_mine_batch,
  make_score,
  used_judges,
  with_keys,
)
from rndpo_jax.runtime import sharding
from rndpo_jax.stages import base, finetune, measure_judges, train_judge
from rndpo_jax.training import image_terms, train_step, validation


class Problem(NamedTuple):
  """What a prepared data set would tell: C, I, the spatial dimensions, S, and `native`.

  The last is the size of the largest grid, axis by axis, that masks are brought to in evaluation.
  """

  num_classes: int
  num_channels: int
  spatial_dims: int
  size: tuple[int, ...]
  native: tuple[int, ...]


def problem_of(config, num_channels: int, num_classes: int) -> Problem:
  """The problem that a config describes, of images that are as large as the model's grid.

  0 classes takes `config.data.num_classes`.

  Raises:
    ConfigError: if neither says how many classes there are.
  """
  classes = num_classes or config.data.num_classes
  if classes < 2:
    raise ConfigError(
      "--num_classes: config.data.num_classes is 0 (a data set would tell); give it, as in "
      "--num_classes=4"
    )
  size = config_lib.input_size(config)
  return Problem(classes, num_channels, config.data.spatial_dims, size, native=size)


def programs(config, problem: Problem, mesh: Mesh, images: dict[str, int]) -> dict[str, Any]:
  """The programs by name, each () -> lowered.

  Args:
    config: the whole config.
    problem: what the data would tell.
    mesh: from `topology.open_topology`.
    images: of each program at once, on all devices together.
  """
  config = copy.deepcopy(config)
  config.model.lanes = models.lanes(config.model, mesh.devices.flat[0].platform)
  segmenter = models.build(
    config.model, num_classes=problem.num_classes, spatial_dims=problem.spatial_dims
  )
  params = jax.eval_shape(segmenter.init, _key(), _batch(problem, 1).images)
  lowers = {
    "base": functools.partial(_base_step, segmenter=segmenter),
    "finetune": functools.partial(_finetune_step, segmenter=segmenter),
    "validate": functools.partial(_validate, segmenter=segmenter),
    "evaluate": functools.partial(_evaluate, segmenter=segmenter),
    "resize": functools.partial(_resize, segmenter=segmenter),
    "mine": functools.partial(_on_own_images, make=_mine),
    "measure": functools.partial(_on_own_images, make=_measure),
    "judge": _judge_step,
  }

  if config.data.preferences:
    lowers["mine"] = _mine_preferences

  def lower(name):
    batch = _batch(problem, images[name])
    return lowers[name](config, problem, mesh, params=params, batch=batch)

  return {name: functools.partial(lower, name) for name in images}


def _mine(config, problem, score):
  # Which judge `auto` takes is not known yet.
  config = judge_gate.with_judge(config, used_judges(config)[0])
  return make_mine_batch(config, problem, score)


def _measure(config, problem, score):
  names = tuple(name for name in used_judges(config) if name != judges.FUSED)
  return measure_judges.make_measure(config, score, names, problem)


def _on_own_images(config, problem, mesh, params, batch, make):
  """A program that mining runs under `jax.pmap`: each device has its own images."""
  count = proposal_files.count(config)
  if count:
    struct, shape = jax.ShapeDtypeStruct, (batch.index.shape[0], count)
    masks = struct((*shape, *problem.size), jnp.uint8)
    files = types.FileProposals(masks, struct(shape, jnp.bool_), struct(shape, jnp.float32))
    batch = batch._replace(files=files)
  ensemble = [params] * (config.base.num_members - 1)
  log_odds = None
  if config.judge.name == judges.FUSED:
    log_odds = jax.ShapeDtypeStruct((len(fused.members(config)),), jnp.float32)
  weights = {"policy": params, "ensemble": ensemble, "learned": None, "log_odds": log_odds}
  learned_apply = None
  if config.judge.name == "learned" or "learned" in config.judge.compare:
    init, learned_apply = train_judge.build(config, problem)
    weights["learned"] = jax.eval_shape(init, _key(), batch.images)
  score = make_score(config, problem, learned_apply)
  return _with_keys(make(config, problem, score), mesh, weights, batch)


def _mine_preferences(config, problem, mesh, params, batch):
  """The same of pairs that come from a file."""
  struct, shape = jax.ShapeDtypeStruct, (batch.index.shape[0], config.mine.pairs_per_image)
  masks = struct((*shape, *problem.size), jnp.uint8)
  rows = given_pairs.Rows(
    batch.index, batch.images, masks, masks, struct(shape, jnp.bool_), batch.valid
  )
  function = given_pairs.make_batch(config, problem)
  return _with_keys(function, mesh, {"policy": params}, rows)


def _with_keys(function, mesh, weights, batch):
  whole, split = sharding.replicated(mesh), sharding.over_all(mesh)
  program = jax.shard_map(
    with_keys(function),
    mesh=mesh,
    in_specs=(whole.spec, whole.spec, split.spec),
    out_specs=split.spec,
    check_vma=False,
  )
  arguments = (_placed(weights, whole), _placed(_key(), whole), _placed(batch, split))
  return jax.jit(program).lower(*arguments)


def _base_step(config, problem, mesh, segmenter, params, batch):
  augment_options = config.augment.to_dict() if config.base.augment else None
  loss_fn = base.make_loss_fn(
    segmenter._replace(apply=sharding.data_parallel(segmenter.apply, mesh)),
    dice_weight=config.base.dice_weight,
    augment_options=augment_options,
  )
  labelled = {"image": batch.images, "label": batch.labels, "index": batch.index}
  arrays = _placed(labelled, sharding.batch_shardings(labelled, mesh))
  optimizer, parts = base.optimizer(config.base), config.base.accumulate_steps
  return _step(config, parts, loss_fn, optimizer, mesh, params, arrays)


def _judge_step(config, problem, mesh, params, batch):
  """That of the judge `learned`, whose network is another."""
  init, apply = train_judge.build(config, problem)
  params = jax.eval_shape(init, _key(), batch.images)
  labelled = {"image": batch.images, "label": batch.labels, "index": batch.index}
  arrays = _placed(labelled, sharding.batch_shardings(labelled, mesh))
  loss_fn = train_judge.make_loss_fn(
    config, sharding.data_parallel(apply, mesh), problem.num_classes
  )
  return _step(
    config, 1, loss_fn, train_judge.optimizer(config.judge.learned), mesh, params, arrays
  )


def _finetune_step(config, problem, mesh, segmenter, params, batch):
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
  arrays = _placed(arrays, sharding.batch_shardings(arrays, mesh))
  reference = _placed_params(config, params, mesh) if finetune.needs_base(config) else None
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


def _rows(count: int, problem: Problem) -> dict:
  """`count` labelled images of a batch of fine-tuning."""
  rows = _batch(problem, count)
  return {"image": rows.images, "label": rows.labels, "index": rows.index}


def _validate(config, problem, mesh, segmenter, params, batch):
  """That of fine-tuning, which runs the reference, too."""
  per_image = validation.make_image_figures(segmenter.apply, problem.num_classes, mesh)
  params = _placed_params(config, params, mesh)
  return per_image.lower(params, params, _placed(batch, sharding.batch_shardings(batch, mesh)))


def _evaluate(config, problem, mesh, segmenter, params, batch):
  """Each device its own images, up to the logits on the model's grid."""
  arguments = (_placed(params, sharding.replicated(mesh)), batch.images)
  return _apart(segmenter.apply, mesh, *arguments)


def _resize(config, problem, mesh, segmenter, params, batch):
  """What evaluation does then: masks on the records' own grids.

  A program of its own, since grids differ, and the network is then not compiled again for each.
  """
  count = batch.index.shape[0]
  logits = jax.ShapeDtypeStruct((count, *problem.size, problem.num_classes), jnp.float32)
  resize = [
    jax.ShapeDtypeStruct((count, predict.padded(n), size), jnp.float32)
    for n, size in zip(problem.native, problem.size, strict=True)
  ]
  return _apart(lambda _, rows: predict.native_masks(*rows), mesh, (), (logits, resize))


def _apart(function, mesh, whole, rows):
  """A program in which each device works on its own rows."""
  specs = (sharding.replicated(mesh).spec, sharding.over_all(mesh).spec)
  program = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[1], check_vma=False)
  return jax.jit(program).lower(whole, _placed(rows, sharding.over_all(mesh)))


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
  key = _placed(_key(), sharding.replicated(mesh))
  return step.lower(_placed_params(config, state, mesh), arrays, key, reference)


def _batch(problem: Problem, size: int) -> types.Batch:
  struct = jax.ShapeDtypeStruct
  return types.Batch(
    images=struct((size, *problem.size, problem.num_channels), jnp.float32),
    labels=struct((size, *problem.size), jnp.uint8),
    index=struct((size,), jnp.int32),
    valid=struct((size,), jnp.bool_),
  )


def _key():
  return jax.eval_shape(lambda: jax.random.key(0))


def _placed_params(config, tree, mesh):
  return _placed(tree, sharding.param_shardings(tree, mesh, config.mesh.fsdp_min_size))


def _placed(tree, shardings):
  """`tree` with one sharding, or with a tree of them."""
  if isinstance(shardings, NamedSharding):
    shardings = jax.tree.map(lambda _: shardings, tree)
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
  )
