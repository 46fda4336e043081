"""Stage `mine`: proposals, judging and pair mining in one `jax.pmap` program a batch.

Each device samples, scores, mines and computes reference margins for its own images: there is no
communication between devices and no host round trip inside, except that a judge of your own that
JAX cannot trace runs on the host, between two such programs. Random keys are folded from the
seed and the image's index, so that the pairs do not depend on devices, processes or batch size.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from etils import epath

from rndpo_jax import provenance, seeds, types
from rndpo_jax.checks import config_validation
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import loader, proposal_files, tiles
from rndpo_jax.mining import given_pairs, judges, user_judges
from rndpo_jax.mining.program import (
  Scored,
  host_judges,
  make_mine_batch,
  make_mine_scored,
  make_propose_batch,
  make_score,
  used_judges,
  with_keys,
)
from rndpo_jax.mining.ranked import Ranked, make_rule_ranked
from rndpo_jax.pairs import manifest, shards
from rndpo_jax.runtime import multihost, preemption, progress, sharding, threads
from rndpo_jax.stages import (
  base,
  examples,
  judge_to_mine,
  measure_judges,
  phases,
  prepare,
  tile_pairs,
  train_judge,
  whole_images,
)
from rndpo_jax.training import image_terms

_KEPT = "mine: finished shards are kept"
_MEASURED = ("judges.json", "proposals.json", "validation.npz")


def run(config, workdir: os.PathLike, folder: os.PathLike | None = None) -> None:
  """Mines the unlabelled split; writes `pairs/`.

  Args:
    config: of the phase, see `phases`.
    workdir: with the data, the base and the phases before.
    folder: where `pairs/` is written; None for the work directory.

  Finished shards are kept, so an interrupted run goes on, with any number of processes: shard i is
  of process i mod N, and process 0 writes all that is not a shard. First the judges are measured
  against the truth of the validation and the labelled split (`judges.json`); `manifest.json`
  comes last. If no term of fine-tuning reads pairs, no more is done than that; nor if the judge
  does not pass `config.judge.gate` in a phase after the first, which is left out then.

  Raises:
    errors.MiningError: if no pair is left, naming the filters that took them, or if the judge does
      not pass the gate in the first phase.
    errors.DataError: if the judge needs truth that unlabelled images lack.
  """
  directory = epath.Path(workdir if folder is None else folder) / "pairs"
  directory.mkdir(parents=True, exist_ok=True)
  dataset = tiles.view(dataset_lib.open_dataset(config, workdir))
  if not len(dataset.splits["val"]):  # the data of a base's work directory
    config_validation.check_without_cases(config)
  is_whole = config.mine.whole_images
  judged = whole_images.images(dataset) if is_whole else dataset
  shards.check_num_shards(config, len(judged.splits["unlabelled"]))
  prepare.check_truth(config, judged.records, judged.splits["unlabelled"])
  with preemption.together(_KEPT):
    proposed = prepare.open_proposals(config, dataset)
  weights, score = make_scorer(config, workdir, dataset)
  shards.claim(directory, _fingerprints(dataset, weights, proposed))
  load_files = proposed and proposal_files.make_load(proposed, judged)
  place, go_through = on_local_devices, functools.partial(run_batches, config, dataset)
  if is_whole:
    place, go_through = whole_images.on_one_device, whole_images.make_run(config, judged, weights)
  batches = functools.partial(go_through, load_files=load_files)
  hosted = host_judges(config, dataset)
  if multihost.is_first():
    for name, reason in hosted.items():
      progress.say(f"judge {name!r} runs on the host, which is slower: {reason}")
  with preemption.together(_KEPT):
    if multihost.is_first() and not all((directory / name).exists() for name in _MEASURED):
      measure = _measure_program(config, dataset, weights, score, hosted, place)
      _measure_judges(config, directory, dataset, judged, batches, measure)
  config, reason = judge_to_mine.pass_gate(config, directory)
  weights["log_odds"] = judge_to_mine.read_log_odds(config, directory)
  program = _mine_program(config, dataset, weights, score, hosted, place)
  with_labels = judges.needs(config.judge.name, "labels")
  mined = functools.partial(batches, program=program, with_labels=with_labels)
  if multihost.is_first() and not (directory / "examples.npz").exists():
    outputs = mined(examples.indices(judged))
    outputs = tile_pairs.examples(dataset, outputs) if is_whole else outputs
    examples.write(directory / "examples.npz", judged, outputs)
  if reason is not None or "pairs" not in image_terms.reads_of(config):
    if multihost.is_first():
      manifest.write_empty(config, directory, left_out=reason or "")
    return
  _write_shards(config, directory, dataset, judged, weights, mined)
  if multihost.is_first():
    manifest.write_manifest(config, directory)


def check_same_files(config, workdir: os.PathLike) -> None:
  """Refuses finished pairs of a job whose proposals from files have changed since.

  A folder of proposals that is gone has done its work.

  Raises:
    errors.ProvenanceError: with what to delete.
    errors.DataError: as `run` does, on proposals that cannot be used.
  """
  if (
    not proposal_files.count(config)
    or not pathlib.Path(config.data.proposals).expanduser().exists()
  ):
    return
  dataset = dataset_lib.open_dataset(config, workdir)
  here = proposal_files.fingerprint(proposal_files.open_files(config, dataset.records))
  shards.check_same_files(epath.Path(workdir) / "pairs", "proposals", here)


def _measure_judges(
  config, directory, dataset, judged, batches: Callable, measure: Callable
) -> None:
  """Writes what `_MEASURED` names; `measure` is run on the splits whose truth is known."""
  outputs = {
    split: batches(judged.splits[split], measure, with_labels=True)
    for split in measure_judges.SPLITS
  }
  by_tiles = None
  if config.mine.whole_images:
    outputs, by_tiles = tile_pairs.of_measuring(config, dataset, outputs)
  measure_judges.write_reliability(config, directory, judged, outputs, by_tiles)


def _write_shards(config, directory, dataset, judged, weights, mined: Callable) -> None:
  """Writes this process's shards, but for those that are finished."""
  write, indices = functools.partial(_write, config), judged.splits["unlabelled"]
  if config.mine.whole_images:
    policy = {"policy": weights["policy"]}
    margins = on_local_devices(given_pairs.make_batch(config, dataset), policy)
    write = functools.partial(tile_pairs.write, config, dataset, margins)
  with preemption.together(_KEPT):
    for shard, part in enumerate(np.array_split(indices, config.mine.num_shards)):
      path = shards.shard_path(directory, shard, config.mine.num_shards)
      if shard % jax.process_count() == jax.process_index() and not manifest.is_finished(path):
        write(path, part, mined)


def _write(config, path, part, mined: Callable) -> None:
  """Writes a shard of images, as they are mined."""
  outputs = mined(part, stays=("masks",))
  manifest.write(path, len(part), -(-len(part) // _batch_size(config)), outputs)


def _fingerprints(dataset, weights, proposed=None) -> dict[str, str]:
  """Of the data, of what `make_scorer` loads, and of proposals from files."""
  of = {"base": weights["policy"], "ensemble": weights["ensemble"], "judge": weights["learned"]}
  return {
    "data": dataset.fingerprint,
    **({"proposals": proposal_files.fingerprint(proposed)} if proposed else {}),
    **{name: provenance.fingerprint(tree) for name, tree in of.items()},
  }


def make_scorer(config, workdir, dataset) -> tuple[dict, Callable]:
  """Loads what scoring needs and returns it with the pure function that uses it.

  Returns:
    (weights, score): `score` from `make_score`.
  """
  others = [base.load(workdir, dataset, n) for n in range(1, config.base.num_members)]
  policy = phases.start(config, workdir, dataset)
  weights = {"policy": policy, "ensemble": others, "learned": None, "log_odds": None}
  learned_apply = None
  if "learned" in (config.judge.name, *config.judge.compare):
    learned_apply, weights["learned"] = train_judge.train(config, workdir, dataset)
  return weights, make_score(config, dataset, learned_apply)


def _measure_program(config, dataset, weights, score, hosted: Mapping, place: Callable) -> Callable:
  """(key, batch) -> what `measure_judges.make_measure` says, of all judges."""
  names = used_judges(config)
  here = [name for name in names if name in hosted]
  there = tuple(name for name in names if name not in hosted and name != judges.FUSED)
  function = measure_judges.make_measure(config, score, there, dataset, bool(here))
  measure = place(function, weights)
  if not here:
    return measure
  finish = place(make_rule_ranked(config), None)

  def program(key, batch: types.Batch):
    out = dict(measure(key, batch))
    proposed = out.pop("masks"), out.pop("probs")
    there = out["present"]
    scores = {name: _score_on_host(name, batch.images, *proposed) for name in here}
    mined = {
      name: finish(key, Ranked(batch.index, out["region_sizes"], scores[name], there))
      for name in here
    }
    return {**out, "scores": {**out["scores"], **scores}, "mined": {**out["mined"], **mined}}

  return program


def _mine_program(config, dataset, weights, score, hosted: Mapping, place: Callable) -> Callable:
  """(key, batch) -> what `make_mine_batch` says, in one program, or two with the host between."""
  if config.judge.name not in hosted:
    return place(make_mine_batch(config, dataset, score), weights)
  propose = place(make_propose_batch(score), weights)
  finish = place(make_mine_scored(config, dataset), None)

  def program(key, batch: types.Batch):
    out = propose(key, batch)
    scores = _score_on_host(config.judge.name, batch.images, out["masks"], out["probs"])
    proposed = out["masks"], out["base_logits"], scores, out["probs"], out["present"]
    return finish(key, Scored(batch.index, *proposed))

  return program


def _score_on_host(name: str, images, masks, probs) -> np.ndarray:
  """f32[D, b, K] of arrays [D, b, ...]; a call has the images of one device, however many there
  are, so that the scores do not depend on that."""
  judge = user_judges.on_host(name)
  parts = zip(*map(sharding.parts_of_local_devices, (images, masks, probs)), strict=True)
  return np.stack([judge(*part) for part in parts])


def on_local_devices(function: Callable, weights) -> Callable:
  """Runs (weights, keys [b, 3], batch [b, ...]) on each device's own images.

  The devices are those of this process, so that no process waits for another.

  Returns:
    program: (key, batch [D, b, ...]) -> pytree of arrays [D, b, ...].
  """

  program = jax.pmap(with_keys(function), in_axes=(None, None, 0), devices=jax.local_devices())
  # Else every batch would send them to every device again.
  return functools.partial(program, sharding.put_on_local_devices(weights))


def run_batches(
  config, dataset, indices, program: Callable, with_labels: bool, stays: tuple[str, ...] = (),
  load_files: Callable[[int], types.FileProposals] | None = None,
) -> Iterator:  # fmt: skip
  """Yields (batch, output) of a pmap program over batches of records, both as numpy arrays.

  The devices have the next batch to work on while one is fetched and written.

  Args:
    program: from `on_local_devices`.
    with_labels: whether the masks of the records are read.
    stays: entries of the output that never leave the devices.
    load_files: from `proposal_files.make_load`, if the mix takes proposals from files.
  """
  key = seeds.mining_key(config.seed)

  def start(batch):
    preemption.check(_KEPT)
    out = program(key, sharding.split_over_local_devices(batch))
    return batch, {name: value for name, value in out.items() if name not in stays}

  loaded = loader.batches(
    dataset,
    indices,
    batch_size=_batch_size(config),
    with_labels=with_labels,
    num_workers=config.data.num_workers,
  )
  if load_files is not None:
    loaded = _with_files(loaded, load_files)
  for batch, out in loader.prefetch(loaded, start, depth=1):
    yield batch, sharding.join_local_devices(out)


def _with_files(loaded: Iterator, load: Callable) -> Iterator:
  """Batches with their proposals from files, which one thread reads ahead."""

  def add(batch: types.Batch) -> types.Batch:
    rows = [load(int(index)) for index in batch.index]
    return batch._replace(files=jax.tree.map(lambda *xs: np.stack(xs), *rows))

  return threads.in_order(add, loaded, count=1)


def _batch_size(config) -> int:
  """Images of all local devices. Each device's share is the config's, so that its program, and so
  the pairs, do not depend on how many there are: where XLA adds up on other threads, margins but
  for rounding (a 3D network in patches on 4 CPU devices, by 2e-5)."""
  return config.mine.batch_size * jax.local_device_count()
