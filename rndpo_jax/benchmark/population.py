"""Fine-tunings of a sweep as one program, against the same runs one after another.

A call is one step of every member. One after another means the ordinary step of each, on all
devices together, its batch on them already; each such run compiles a program of its own, so its
compile time counts once a member, and its memory is that of one run.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from rndpo_jax.benchmark import network, step, timing
from rndpo_jax.benchmark.options import Options
from rndpo_jax.runtime import sharding
from rndpo_jax.stages import finetune
from rndpo_jax.sweep import population
from rndpo_jax.training.train_step import make_state, make_train_step

APART = "one run after another"
TOGETHER = {form: f"one program, {form}" for form in population.FORMS}


def run(options: Options, peers: Any | None) -> list[dict[str, Any]]:
  """Times the steps of `options`; rows have `member_steps_per_second` besides.

  Args:
    options: of "population".
    peers: not read; there is no such thing to compare with.
  """
  del peers
  mesh = sharding.make_mesh()
  batches = step.make_batches(jax.random.key(1), options, options.pairs, mesh)
  variants = [step.copy_of_64_mib(), apart(options, batches, mesh)]
  variants += [together(options, batches, form) for form in population.FORMS]
  setup = {name: getattr(options, name) for name in ("disagreement", "pairs", "members", "seeds")}
  rows = timing.rows(
    variants,
    baseline=APART,
    repeats=options.repeats,
    setup={**network.setup("population", options), **setup},
  )
  for row in rows:
    if row["variant"] != timing.COPY:
      row["member_steps_per_second"] = options.members / row["seconds_median"]
  return rows


def apart(options: Options, batches: list[dict], mesh: jax.sharding.Mesh) -> timing.Variant:
  """A step of each run in turn, as `train_step.make_train_step` compiles it."""
  segmenter, params = network.make(options)
  optimizer = finetune.optimizer(network.make_config(options).finetune)
  states = [make_state(params, optimizer, mesh) for _ in range(options.members)]
  train_step = make_train_step(
    step.preference_loss_fn(segmenter, options, "cached"), optimizer, mesh
  )
  key, share = jax.random.key(2), options.members // options.seeds
  compiled = timing.compile_ahead(train_step, states[0], batches[0], key)

  def run(turn):
    aux = []
    for number, state in enumerate(states):
      batch = batches[(turn + number // share) % len(batches)]
      states[number], metrics = compiled.call(state, batch, key)
      aux.append(metrics)
    return aux

  # Each of them compiles its own.
  compiled = compiled._replace(seconds=options.members * compiled.seconds)
  return _variant(options, APART, run, compiled, states, batches, options.members)


def together(options: Options, batches: list[dict], form: str) -> timing.Variant:
  """A step of all members, as `sweep.sweep` takes it."""
  segmenter, params = network.make(options)
  share = options.members // options.seeds
  mesh = sharding.make_population_mesh(options.seeds, share)
  config = network.make_config(options).finetune
  config.learning_rate = 1.0
  optimizer = finetune.optimizer(config)
  state = population.make_state(params, optimizer, options.seeds, share, mesh)
  train_step = population.make_step(
    step.preference_loss_fn(segmenter, options, "cached"), optimizer, mesh, form=form
  )
  host = jax.device_get(batches)
  stacked = [
    population.put_batches(
      {i: host[(n + i) % len(host)] for i in range(options.seeds)}, options.seeds, mesh
    )
    for n in range(len(host))
  ]
  keys = jax.random.split(jax.random.key(2), options.seeds)
  settings = population.grid(np.geomspace(3.0, 30.0, share), [1e-3])
  compiled = timing.compile_ahead(train_step, state, stacked[0], keys, settings)

  def run(turn):
    nonlocal state  # its buffers are donated: the next step takes what this one leaves
    state, metrics = compiled.call(state, stacked[turn % len(stacked)], keys, settings)
    return metrics

  return _variant(options, TOGETHER[form], run, compiled, state, batches)


def _variant(options, name, run, compiled, state, batches, calls=1) -> timing.Variant:
  """At least every member's state is read and written once, and every seed's batch read once."""
  moved = 2 * network.num_bytes(state) + options.seeds * network.num_bytes(batches[0])
  images = options.members * options.shape[0]
  work = timing.Work(
    images=images,
    pairs=images * options.pairs,
    pixels=images * math.prod(options.shape[1:]),
    bytes_at_least=moved,
  )
  return timing.compiled_variant(name, work, compiled, run, calls)
