"""A fine-tuning step against a supervised one: same U-Net, images and optimiser.

Supervised means cross-entropy alone, without dropout or augmentation. The least that must be
moved by a step: parameters and both moments of Adam read and written once, the batch read once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rndpo_jax import losses, types
from rndpo_jax.benchmark import loss, network, timing
from rndpo_jax.benchmark.options import Options
from rndpo_jax.losses import bit_planes
from rndpo_jax.runtime import sharding
from rndpo_jax.stages import finetune
from rndpo_jax.training import train_step

NUM_BATCHES = 8
SUPERVISED = "supervised, cross-entropy"
ONLINE = "RN-DPO, 1 pair, online"


def run(options: Options, peers: Any | None, online: bool = True) -> list[dict[str, Any]]:
  """Times the steps of `options`.

  Args:
    options: of "step".
    peers: the module `benchmark.torch_losses`, or None.
    online: whether the step with an online reference is timed too.

  Raises:
    BenchmarkError: if PyTorch's loss or gradient norm is not ours.
  """
  mesh = sharding.make_mesh()
  segmenter, params = network.make(options)
  optimizer = finetune.optimizer(network.make_config(options).finetune)
  variants, torch_variants = [copy_of_64_mib()], []

  def add(name, loss_fn, batches, pairs, torch_forms=(), reference=None):
    variant = step_variant(
      name,
      loss_fn=loss_fn,
      batch_of=lambda turn: batches[turn % len(batches)],
      options=options,
      pairs=pairs,
      optimizer=optimizer,
      mesh=mesh,
      params=params,
      reference=reference,
    )
    variants.append(variant)
    if peers is not None and torch_forms:
      from rndpo_jax.benchmark import torch_unet

      first = variant.run(0)  # with the parameters that both start from
      torch_variants.extend(
        torch_unet.step_variant(options, params, batches, variant.work, first, form == "compiled")
        for form in torch_forms
      )

  supervised = make_batches(jax.random.key(1), options, 0, mesh)
  add(SUPERVISED, supervised_loss_fn(segmenter), supervised, 0, ("eager", "compiled"))
  for pairs in sorted({1, options.pairs}):
    batches = make_batches(jax.random.key(1), options, pairs, mesh)
    cached = preference_loss_fn(segmenter, options, "cached")
    forms = ("compiled",) if pairs == options.pairs else ()
    add(cached_name(pairs), cached, batches, pairs, forms)
    if pairs == 1 and online:
      frozen = jax.device_put(params, sharding.replicated(mesh))
      loss_fn = preference_loss_fn(segmenter, options, "online")
      add(ONLINE, loss_fn, batches, pairs, reference=frozen)
  return timing.rows(
    variants + torch_variants,
    baseline=SUPERVISED,
    repeats=options.repeats,
    setup={**network.setup("step", options), "disagreement": options.disagreement},
  )


def cached_name(pairs: int) -> str:
  """The variant of so many pairs an image, its reference cached."""
  return f"RN-DPO, {pairs} pair{'s' if pairs > 1 else ''}, cached"


def copy_of_64_mib() -> timing.Variant:
  """The limit where no array of the work itself is to be copied; more arrays than a cache holds."""
  each = 64 << 20
  arrays = [jnp.full(each // 4, float(n)) for n in range(timing.num_inputs(each))]
  return timing.copy_variant(arrays)


def make_batches(
  key: jax.Array, options: Options, pairs: int, mesh
) -> list[dict[str, jax.Array]] | list[types.FinetuneBatch]:
  """Random batches on the devices: of labels without `pairs`, else as `stages.finetune` takes them.

  Masks are bit-packed, as they travel.
  """
  sharding.check_batch_size("--shape", options.shape[0], mesh.size)
  batch, *space = options.shape

  def draw(key):
    image_key, label_key, pair_key, margin_key = jax.random.split(key, 4)
    image = jax.random.normal(image_key, (*options.shape, network.CHANNELS))
    if not pairs:
      labels = jax.random.randint(label_key, options.shape, 0, options.classes, jnp.uint8)
      return {"image": image, "label": labels}
    masks = loss.draw_pair(pair_key, (batch, pairs), space, options.classes, options.disagreement)
    chosen, rejected = (bit_planes.pack(mask, options.classes, len(space)) for mask in masks)
    pair_batch = types.PairBatch(
      images=image,
      chosen=chosen,
      rejected=rejected,
      reference_margin=jax.random.normal(margin_key, (batch, pairs)),
      reference_log_prob=jnp.zeros((batch, pairs)),
      weight=jnp.ones((batch, pairs)),
      voxel_volume=jnp.ones(batch),
    )
    return types.FinetuneBatch(pairs=pair_batch)

  draw = jax.jit(draw, out_shardings=sharding.batch_sharding(mesh))
  return [draw(jax.random.fold_in(key, number)) for number in range(NUM_BATCHES)]


def supervised_loss_fn(segmenter: types.Segmenter) -> train_step.LossFn:
  """(params, batch, inputs) -> (mean cross-entropy, no metrics): as little as a step can do."""

  def loss_fn(params, batch, inputs):
    del inputs
    logits = segmenter.apply(params, batch["image"])
    return jnp.mean(losses.cross_entropy(logits, batch["label"])), {}

  return loss_fn


def preference_loss_fn(
  segmenter: types.Segmenter, options: Options, reference: str
) -> train_step.LossFn:
  """The loss of the stage `finetune`, its metrics among it, with the default objective."""
  config = network.make_config(options)
  config.finetune.reference = reference
  return finetune.make_loss_fn(config, segmenter.apply, num_classes=options.classes)


def step_variant(
  name: str,
  *,
  loss_fn: train_step.LossFn,
  batch_of: Callable[[int], Any],
  options: Options,
  pairs: int,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  params: types.Params,
  reference: types.Params | None = None,
) -> timing.Variant:
  """Training steps in a row, each from the state that the one before left.

  Every `config.finetune.log_every_steps`-th is a logged one, as in training.

  Args:
    name: in tables.
    loss_fn: as `train_step.make_train_step` takes it.
    batch_of: (turn) -> the batch of that step, on the devices.
    options: for the work of a step.
    pairs: of each image, 0 if there are none.
    optimizer: of the step.
    mesh: from `sharding.make_mesh`.
    params: to start from.
    reference: parameters of an online reference.
  """
  state = train_step.make_state(params, optimizer, mesh)
  key, batch = jax.random.key(2), batch_of(0)
  every = network.make_config(options).finetune.log_every_steps
  step = train_step.make_train_step(loss_fn, optimizer, mesh, log_every_steps=every)
  compiled = timing.compile_ahead(step, state, batch, key, reference)
  moved = 2 * network.num_bytes(state) + network.num_bytes((batch, reference))

  def run(turn):
    nonlocal state  # its buffers are donated: the next step takes what this one leaves
    state, metrics = compiled.call(state, batch_of(turn), key, reference)
    return metrics

  work = timing.Work(
    images=options.shape[0],
    pairs=options.shape[0] * pairs,
    pixels=math.prod(options.shape),
    bytes_at_least=moved,
  )
  return timing.compiled_variant(name, work, compiled, run)
