"""Fine-tuning steps a second with real input, against one batch that lies on the device.

The input is that of the stage `finetune`: images of a prepared data set and mined pairs, read,
shuffled and put on the device while the step before computes.
"""

from __future__ import annotations

import functools
import os
import tempfile
from typing import Any

from rndpo_jax.benchmark import network, step, timing
from rndpo_jax.benchmark.options import Options
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.pairs import pair_batches
from rndpo_jax.runtime import sharding
from rndpo_jax.stages import finetune, mine, prepare

RESIDENT = "one batch on the device"
READ = "batches as they are read"
STEPS = 20  # of a sample
# Not timed before each sample: more than the batches that lie ready while nobody takes one.
SETTLE_STEPS = 10


def run(options: Options, peers: Any | None) -> list[dict[str, Any]]:
  """Times both; the data set is a phantom, prepared and mined in a folder that is removed."""
  del peers  # nothing of PyTorch's is timed here
  mesh = sharding.make_mesh()
  sharding.check_batch_size("--shape", options.shape[0], mesh.size)
  with tempfile.TemporaryDirectory() as workdir:
    config = make_workdir(options, workdir)
    dataset = dataset_lib.open_dataset(config, workdir)
    stream = pair_batches.on_devices(config, os.path.join(workdir, "pairs"), dataset, mesh)(0)
    segmenter, params = network.make(options)
    batch = next(stream)
    make = functools.partial(
      step.step_variant,
      loss_fn=step.preference_loss_fn(segmenter, options, "cached"),
      options=options,
      pairs=options.pairs,
      optimizer=finetune.optimizer(config.finetune),
      mesh=mesh,
      params=params,
    )
    resident = make(RESIDENT, batch_of=lambda turn: batch)
    real = make(READ, batch_of=lambda turn: next(stream))
    variants = [step.copy_of_64_mib(), resident, settled(real)]
    return timing.rows(
      variants,
      baseline=RESIDENT,
      repeats=options.repeats,
      calls=STEPS,
      setup={**network.setup("input", options), "workers": options.workers},
    )


def make_workdir(options: Options, workdir: os.PathLike) -> Any:
  """Prepares a phantom and mines pairs with random weights; returns the config."""
  config = network.make_config(options)
  unlabelled = 4 * options.shape[0]
  config.data.num_labelled = config.data.num_val = config.data.num_test = 2
  config.data.phantom.num_cases = 6 + unlabelled
  config.data.phantom.size = config.data.size
  config.mine.pairs_per_image = options.pairs
  config.mine.batch_size = config.finetune.batch_size = options.shape[0]
  config.judge.compare = (config.judge.name,)
  config.judge.gate.action = "off"  # the base is random
  prepare.run(config, workdir)
  data = dataset_lib.open_dataset(config, workdir).fingerprint
  network.save_as_base(network.make(options)[1], workdir, data)
  mine.run(config, workdir)
  config.data.num_workers = options.workers  # not before: every shard would start its own
  return config


def settled(variant: timing.Variant) -> timing.Variant:
  """The variant with some steps before each sample, so that no batch lies ready when it starts."""

  def settle():
    variant.wait([variant.run(0) for _ in range(SETTLE_STEPS)])

  return variant._replace(settle=settle)
