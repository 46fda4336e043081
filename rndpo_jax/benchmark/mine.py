"""K proposals of each image from one encoder pass, against K whole forward passes; and mining.

The least that must be moved: parameters and images read once, K masks written once.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rndpo_jax import types
from rndpo_jax.benchmark import network, step, timing
from rndpo_jax.benchmark.options import Options
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.mining import proposals
from rndpo_jax.mining.program import make_mine_batch
from rndpo_jax.runtime import sharding
from rndpo_jax.stages import mine

K = 8
FULL = f"{K} dropout forward passes"
DROPOUT_MIX = f"mc_dropout:{K}"
NUM_INPUTS = 8


def run(options: Options, peers: Any | None) -> list[dict[str, Any]]:
  """Times sampling and the whole mining program.

  Args:
    options: of "mine".
    peers: the module `benchmark.torch_losses`, or None.

  Raises:
    BenchmarkError: if PyTorch's U-Net does not give our logits.
  """
  mesh = sharding.make_mesh()
  sharding.check_batch_size("--shape", options.shape[0], mesh.size)
  config = network.make_config(options)
  segmenter, params = network.make(options)
  images = make_images(options, mesh)
  pixels = math.prod(options.shape)
  moved = network.num_bytes(params) + pixels * (4 * network.CHANNELS + K)
  work = timing.Work(images=options.shape[0], pairs=0, pixels=pixels, bytes_at_least=moved)
  params = jax.device_put(params, sharding.replicated(mesh))
  variants = [
    step.copy_of_64_mib(),
    forward_variant(segmenter, params, images, work),
    *(
      sampling_variant(segmenter, params, images, work, config, mix)
      for mix in (DROPOUT_MIX, config.proposals.mix)
    ),
    *(
      program_variant(config, params, images, work, mix)
      for mix in (DROPOUT_MIX, config.proposals.mix)
    ),
  ]
  if peers is not None:
    from rndpo_jax.benchmark import torch_unet

    variants += [
      torch_unet.sampling_variant(
        options, segmenter, params, images, work, count=K, compiled=compiled
      )
      for compiled in (False, True)
    ]
  return timing.rows(
    variants,
    baseline=FULL,
    repeats=options.repeats,
    setup={**network.setup("mine", options), "proposals": K},
  )


def make_images(options: Options, mesh) -> list[jax.Array]:
  """Random images f32[B, *S, 1] to rotate through."""

  def draw(key):
    return jax.random.normal(key, (*options.shape, network.CHANNELS))

  draw = jax.jit(draw, out_shardings=sharding.batch_sharding(mesh))
  return [draw(key) for key in jax.random.split(jax.random.key(1), NUM_INPUTS)]


def forward_variant(segmenter: types.Segmenter, params, images, work) -> timing.Variant:
  """K calls of one compiled network with dropout: nothing can be shared between them."""

  def forward(params, images, key):
    return jnp.argmax(segmenter.apply(params, images, key), axis=-1).astype(jnp.uint8)

  keys = list(jax.random.split(jax.random.key(2), K))
  compiled = timing.compile_ahead(forward, params, images[0], keys[0])

  def run(turn):
    return [compiled.call(params, images[turn % len(images)], key) for key in keys]

  return timing.compiled_variant(FULL, work, compiled, run, calls=K)


def sampling_variant(segmenter, params, images, work, config, mix: str) -> timing.Variant:
  """`proposals.sample`: the masks of K proposals by `mix`, in one program."""
  numbers = {name: value for name, value in config.proposals.items() if name != "mix"}

  def masks(params, images, keys):
    mixed = proposals.parse_mix(mix)
    return proposals.sample(segmenter, params, images, keys, mix=mixed, **numbers).masks

  keys = jax.random.split(jax.random.key(2), images[0].shape[0])
  inputs = [(params, batch, keys) for batch in images]
  return timing.jax_variant(f"sampling, {mix}", work, masks, inputs)


def program_variant(config, params, images, work, mix: str) -> timing.Variant:
  """The program of the stage `mine`: sampling, judging, mining, reference margins."""
  program, (key, batches) = make_program(config, params, images, mix)
  compiled = timing.compile_ahead(program.func, *program.args, key, batches[0])
  pairs = images[0].shape[0] * config.mine.pairs_per_image
  return timing.compiled_variant(
    f"mining program, {mix}",
    work._replace(pairs=pairs),
    compiled,
    lambda turn: compiled.call(*program.args, key, batches[turn % len(batches)]),
  )


def make_program(config, params, images, mix: str) -> tuple[Callable, tuple]:
  """The mining program with random weights, and its arguments: (key, batches [D, b, ...])."""
  config = config.copy_and_resolve_references()
  config.proposals.mix = mix
  config.judge.compare = (config.judge.name,)
  dataset = dataset_lib.Dataset(
    fingerprint="",
    source=None, blind_source=None, class_names=[], num_channels=network.CHANNELS,
    spacing_unit="voxel", records=[], splits={}, crop=(), normalization="zscore",
    num_classes=config.data.num_classes, spatial_dims=config.data.spatial_dims,
    size=config.data.size,
  )  # fmt: skip
  with tempfile.TemporaryDirectory() as workdir:
    network.save_as_base(params, workdir)
    weights, score = mine.make_scorer(config, workdir, dataset)
  program = mine.on_local_devices(make_mine_batch(config, dataset, score), weights)
  to_devices = jax.pmap(lambda batch: batch)
  count = images[0].shape[0]

  def batch(number, image):
    rows = types.Batch(
      images=np.asarray(image),
      labels=np.zeros(image.shape[:-1], np.uint8),
      index=np.arange(count, dtype=np.int32) + number * count,
      valid=np.ones(count, bool),
    )
    return to_devices(sharding.split_over_local_devices(rows))

  batches = [batch(number, image) for number, image in enumerate(images)]
  return program, (jax.random.key(3), batches)
