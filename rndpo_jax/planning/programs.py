"""The program's compiled parts for TPU slices that are not here, from a config alone.

The very functions that the stages run are lowered for the devices of a topology and compiled by
libtpu (extra `tpu-aot`), which needs no TPU; what the compiler says is held against the chip's
figures.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rndpo_jax import models, types
from rndpo_jax.data import proposal_files
from rndpo_jax.evaluation import predict
from rndpo_jax.mining import fused, given_pairs, judge_gate, judges
from rndpo_jax.mining.program import (
  make_mine_batch,
  make_score,
  used_judges,
  with_keys,
)
from rndpo_jax.planning import program_inputs, training_programs
from rndpo_jax.runtime import sharding
from rndpo_jax.stages import measure_judges, train_judge
from rndpo_jax.training import validation


def programs(
  config, problem: program_inputs.Problem, mesh: Mesh, images: dict[str, int]
) -> dict[str, Any]:
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
  params = jax.eval_shape(
    segmenter.init, program_inputs.key(), program_inputs.batch(problem, 1).images
  )
  lowers = {
    "base": functools.partial(training_programs.base_step, segmenter=segmenter),
    "finetune": functools.partial(training_programs.finetune_step, segmenter=segmenter),
    "validate": functools.partial(_validate, segmenter=segmenter),
    "evaluate": functools.partial(_evaluate, segmenter=segmenter),
    "resize": functools.partial(_resize, segmenter=segmenter),
    "mine": functools.partial(_on_own_images, make=_mine),
    "measure": functools.partial(_on_own_images, make=_measure),
    "judge": training_programs.judge_step,
  }

  if config.data.preferences:
    lowers["mine"] = _mine_preferences

  def lower(name):
    batch = program_inputs.batch(problem, images[name])
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
    weights["learned"] = jax.eval_shape(init, program_inputs.key(), batch.images)
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
  arguments = (
    program_inputs.placed(weights, whole),
    program_inputs.placed(program_inputs.key(), whole),
    program_inputs.placed(batch, split),
  )
  return jax.jit(program).lower(*arguments)


def _validate(config, problem, mesh, segmenter, params, batch):
  """That of fine-tuning, which runs the reference, too."""
  per_image = validation.make_image_figures(segmenter.apply, problem.num_classes, mesh)
  params = program_inputs.placed_params(config, params, mesh)
  return per_image.lower(
    params, params, program_inputs.placed(batch, sharding.batch_shardings(batch, mesh))
  )


def _evaluate(config, problem, mesh, segmenter, params, batch):
  """Each device its own images, up to the logits on the model's grid."""
  arguments = (program_inputs.placed(params, sharding.replicated(mesh)), batch.images)
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
  return jax.jit(program).lower(whole, program_inputs.placed(rows, sharding.over_all(mesh)))
