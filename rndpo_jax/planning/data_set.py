"""The data set that a run would be of, prepared or as the headers of its files tell it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from rndpo_jax import config as config_lib
from rndpo_jax.checks import config_validation
from rndpo_jax.data import dataset as dataset_lib
from rndpo_jax.data import (
  native,
  native_settings,
  reader,
  records,
  sources,
  splits,
  tiles,
  unpacked,
)
from rndpo_jax.errors import ConfigError
from rndpo_jax.evaluation import predict, sliding_window
from rndpo_jax.mining import judges
from rndpo_jax.planning import program_inputs
from rndpo_jax.stages import prepare


class Data(NamedTuple):
  """The data set of a config.

  Attributes:
    problem: what programs are compiled for.
    num_images: of each split; tiles in the native mode.
    num_stored: records, also those of no split.
    num_bytes: of them on their own grids, before compression if they are not prepared.
    dataset: the prepared set, if the stage 'prepare' has run.
    source: else.
    num_evaluated: images that the network sees to evaluate a checkpoint once; None for those of
      validation and test, which the native mode sees in overlapping tiles.
    num_unpacked: bytes of the large images that the native mode writes once more, see
      `data.unpacked`.
  """

  problem: program_inputs.Problem
  num_images: dict[str, int]
  num_stored: int
  num_bytes: int
  dataset: dataset_lib.Dataset | None
  source: records.Source | None
  num_evaluated: int | None = None
  num_unpacked: int = 0


def describe_data(config, workdir: os.PathLike) -> Data:
  """The prepared data set if there is one, else what the source's file headers tell."""
  home = epath.Path(config.base.workdir or workdir)
  if prepare.is_done(home):
    dataset, source = dataset_lib.open_dataset(config, workdir), None
    facts, entries, parts = dataset._asdict(), dataset.records, dataset.splits
    stored = [path.stat() for path in reader.folder(home / "data").glob("*/*") if path.is_file()]
    num_bytes = sum(stat.length for stat in stored)
  else:
    dataset, source = None, sources.SOURCES[config.data.source].open(config)
    facts, entries = source._asdict(), source.records
    cases = prepare.split_cases(config.data, entries)
    split_of = {case: name for name, ids in cases.items() for case in ids}
    parts = {name: [] for name in splits.NAMES}
    for index, entry in enumerate(entries):
      parts.get(split_of.get(entry["case_id"]), []).append(index)
    num_bytes = sum(records.num_bytes(source, entry) for entry in entries)
  if not len(parts["val"]):
    config_validation.check_without_cases(config)
  shown = [entries[i]["shape"] for name in predict.SPLITS for i in parts[name]]
  shown = shown or [entry["shape"] for entry in entries]  # then no mask is brought to such a grid
  problem = program_inputs.Problem(
    facts["num_classes"],
    facts["num_channels"],
    facts["spatial_dims"],
    config_lib.input_size(config),
    native=tuple(int(n) for n in np.max(shown, axis=0)),
  )
  counts = {name: len(parts[name]) for name in splits.NAMES}
  data = Data(problem, counts, len(entries), num_bytes, dataset, source)
  return _in_tiles(config, data, entries, parts) if config.data.spacing else data


def _in_tiles(config, data: Data, entries, parts: Mapping[str, Sequence[int]]) -> Data:
  """The counts of the native mode; what is not prepared is taken to be cropped to nothing less."""
  size = data.problem.size
  if data.dataset is not None:
    spacing, boxes = data.dataset.native.spacing, data.dataset.boxes
  else:
    labelled = {entries[i]["case_id"] for i in parts["labelled"]}
    spacing, boxes = native_settings.spacing_of(config, entries, labelled), None

  def shape(index: int) -> tuple[int, ...]:
    entry = entries[index]
    box = np.array([(0, n) for n in entry["shape"]]) if boxes is None else boxes[index]
    return native.model_shape(box, entry["spacing"], spacing)

  counts = {
    name: sum(len(tiles.starts(shape(i), size)) for i in part) for name, part in parts.items()
  }
  shapes = [shape(i) for name in predict.SPLITS for i in parts[name]]
  seen = [[max(n, m) for n, m in zip(one, size, strict=True)] for one in shapes if all(one)]
  num_evaluated = sum(len(sliding_window.positions(one, size)) for one in seen)
  with_labels = {"labelled", "val"}  # what training, or measuring judges, reads the labels of
  if judges.needs(config.judge.name, "labels"):
    with_labels.add("unlabelled")
  num_unpacked = sum(
    unpacked.num_bytes(shape(i), data.problem.num_channels, with_labels=name in with_labels)
    for name, part in parts.items()
    for i in part
  )
  return data._replace(num_images=counts, num_evaluated=num_evaluated, num_unpacked=num_unpacked)


def with_unlabelled(data: Data, count: int) -> Data:
  """The data set with another number of unlabelled images, of the mean size of what is stored.

  Raises:
    ConfigError: in the native mode, where an image has as many tiles as its size asks for.
  """
  if data.num_evaluated is not None:
    raise ConfigError(
      "--num_unlabelled: with config.data.spacing it is not known how many tiles so many images "
      "have; leave the flag out, or put the images into config.data.root"
    )
  num_stored = data.num_stored - data.num_images["unlabelled"] + count
  return data._replace(
    num_images={**data.num_images, "unlabelled": count},
    num_stored=num_stored,
    num_bytes=data.num_bytes * num_stored // data.num_stored,
  )
