"""Pair files: ArrayRecord shards, one record an image, checked against the manifest's sums."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from array_record.python import array_record_data_source, array_record_module
from etils import epath
from flax import serialization

from rndpo_jax import config as config_lib
from rndpo_jax import errors, provenance
from rndpo_jax.runtime import files, multihost, preemption, threads


class Field(NamedTuple):
  """A field of a record; `trained` if fine-tuning takes it as it is."""

  dtype: type
  axes: tuple[str, ...]
  trained: bool = False


# A record: one image with P slots for pairs. Masks are packed by `losses.bit_planes`.
FIELDS = {
  "index": Field(np.int32, ()),  # of the image's record in the data set
  "chosen": Field(np.uint8, ("P", "bits", "bytes"), trained=True),
  "rejected": Field(np.uint8, ("P", "bits", "bytes"), trained=True),
  "reference_margin": Field(np.float32, ("P",), trained=True),
  "reference_log_prob": Field(np.float32, ("P",), trained=True),
  "valid": Field(np.float32, ("P",)),  # 1, or 0 if the slot has no pair
  "score_gap": Field(np.float32, ("P",)),
}
# Also there if a term of fine-tuning reads them.
CONSENSUS = "consensus"  # the mean of the proposals' probabilities, in 255ths, u8[*S, C]
TOP_SCORE = "top_score"  # the highest that the judge gave one of the proposals, f32[]
REGION_SIZES = "region_sizes"  # |D| in the tile and in the image judged as a whole, f32[2, P]
OPTIONAL = (CONSENSUS, TOP_SCORE, REGION_SIZES)
TRAINING_FIELDS = tuple(name for name, field in FIELDS.items() if field.trained)


def shard_path(directory: os.PathLike, shard: int, num_shards: int) -> epath.Path:
  """`pairs-00003-of-00008.array_record`."""
  return epath.Path(directory) / f"pairs-{shard:05d}-of-{num_shards:05d}.array_record"


def check_num_shards(config, num_images: int) -> None:
  """Checks that there are not more shards than unlabelled images.

  The default number is taken for any number of images: with few of them some shards are empty.

  Raises:
    errors.ConfigError: if there are more shards than images, and than by default.
  """
  if config.mine.num_shards > max(num_images, config_lib.base_config().mine.num_shards):
    raise errors.ConfigError(
      f"config.mine.num_shards: found {config.mine.num_shards}, but there are {num_images} "
      "unlabelled images; set it to at most that"
    )


def summary_path(shard: os.PathLike) -> epath.Path:
  """The JSON beside a finished shard: checksum, counts, sizes in bytes and pixels."""
  return epath.Path(shard).with_suffix(".json")


def write_shard(path: os.PathLike, records: Iterable[dict[str, np.ndarray]], summary: dict) -> None:
  """Writes a shard and its summary, both by rename; the summary last, as the sign of the whole.

  Args:
    path: from `shard_path`.
    records: dicts of numpy arrays as `FIELDS` says, encoded with msgpack.
    summary: entries of the summary besides file, sha256, count and num_bytes; read after the
      records are exhausted, so that it may be filled while they are made.
  """
  path = epath.Path(path)
  with contextlib.ExitStack() as stack:
    folder = path.parent
    if files.is_remote(path):  # ArrayRecord writes local files alone
      folder = epath.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    temporary = folder / f".{path.name}.tmp"
    count, num_bytes = _write_records(temporary, path, records)
    files.flush(temporary)
    checksum = files.sha256(temporary)
    if files.is_remote(path):
      files.copy(temporary, path)
    else:
      temporary.replace(path)
  files.write_json(
    summary_path(path),
    {
      "file": path.name,
      "sha256": checksum,
      "count": count,
      "num_bytes": num_bytes,
      **summary,
    },
  )


def _write_records(temporary: epath.Path, path: epath.Path, records) -> tuple[int, int]:
  """Writes `records` and returns how many and their bytes; if that fails nothing is left.

  The bytes are those handed to ArrayRecord, which compresses them and fills blocks of 64 KiB: the
  size of a small file says little of what a large one needs.
  """
  count = num_bytes = 0
  try:
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
    for record in records:
      _check_fields(record)
      encoded = serialization.msgpack_serialize(record)
      writer.write(encoded)
      count, num_bytes = count + 1, num_bytes + len(encoded)
    writer.close()
  except RuntimeError as error:  # ArrayRecord's, when it cannot write
    temporary.unlink(missing_ok=True)
    if not files.is_full_disk(error):
      raise
    raise OSError(errno.ENOSPC, f"{path} cannot be written: {error}") from error
  return count, num_bytes


def _check_fields(record: dict[str, np.ndarray]) -> None:
  if record.keys() - {*OPTIONAL} != FIELDS.keys():
    raise ValueError(f"a record holds {', '.join(record)}, expected {', '.join(FIELDS)}")
  for name, field in FIELDS.items():
    value = record[name]
    if value.dtype != field.dtype or value.ndim != len(field.axes):
      raise ValueError(
        f"field {name!r} of a record: found {value.dtype} of {value.ndim} axes, expected "
        f"{np.dtype(field.dtype)} of the axes {field.axes}"
      )


def claim(directory: os.PathLike, fingerprints: dict[str, str]) -> None:
  """Writes `fingerprints.json`, or checks that what is there already was mined from the same.

  Margins in the pairs are those of one base on images of one data set: pairs of another would be
  wrong and look right.

  Args:
    directory: of the pairs.
    fingerprints: of the `data` and of every weight that mining reads, by name.

  Raises:
    errors.ProvenanceError: naming what differs.
    errors.PairsError: if there are pairs of which nothing says what they were mined from.
  """
  directory = epath.Path(directory)
  path = directory / "fingerprints.json"
  if path.exists():
    provenance.check(directory, files.read_json(path), fingerprints, _mine_again(directory))
  elif multihost.is_first():
    if (directory / "judges.json").exists():
      raise errors.PairsError(
        f"{path} is missing: nothing says of which data and base {directory} is; delete that "
        "folder and run the same command again"
      )
    files.write_json(path, fingerprints)


def check_same_files(directory: os.PathLike, name: str, here: str) -> None:
  """Checks that pairs were made of the files that are here.

  Args:
    directory: of the pairs.
    name: what the files are, as `claim` was told.
    here: their fingerprint.

  Raises:
    errors.ProvenanceError: with what to delete.
  """
  directory = epath.Path(directory)
  there = files.read_json(directory / "fingerprints.json")
  provenance.check(directory, there, {name: here}, _mine_again(directory))


def check_made_of(directory: os.PathLike, dataset, params: Any) -> None:
  """Checks that pairs are of these data and this base: their margins are the reference.

  Raises:
    errors.PairsError: if nothing is mined there.
    errors.ProvenanceError: naming what differs.
  """
  directory = epath.Path(directory)
  path = directory / "manifest.json"
  if not path.exists():
    raise _not_mined(path)
  there, here = files.read_json(path).get("fingerprints"), provenance.of_finetuning(dataset, params)
  provenance.check(directory, there, here, _mine_again(directory))


def fingerprint(directory: os.PathLike) -> str:
  """SHA-256 of all pairs that the manifest lists, in hexadecimal.

  Raises:
    errors.PairsError: if nothing is mined there.
  """
  path = epath.Path(directory) / "manifest.json"
  if not path.exists():
    raise _not_mined(path)
  sums = [entry["sha256"] for entry in files.read_json(path, shards=list)["shards"]]
  return hashlib.sha256(" ".join(sums).encode()).hexdigest()


def left_out(directory: os.PathLike) -> str:
  """Why the phase of these pairs is not trained: its judge was refused. Empty if it is trained, or
  if nothing is mined there."""
  path = epath.Path(directory) / "manifest.json"
  return files.read_json(path).get("left_out", "") if path.exists() else ""


def _mine_again(directory: epath.Path) -> str:
  return (
    f"delete the folders {directory} and {directory.parent / 'finetune'}, and run the same command "
    "again"
  )


def _not_mined(path: epath.Path) -> errors.PairsError:
  return errors.PairsError(f"{path} is missing; run the stage 'mine' first")


def read(directory: os.PathLike) -> Sequence[dict[str, Any]]:
  """Opens every shard for random access, after checking each against the manifest.

  All processes call it together, for each checks its share, shard i being that of process i mod N.

  Returns:
    A sequence of records, dicts of numpy arrays, in the order of the shards.

  Raises:
    errors.PairsError: if the manifest or a shard is missing, or a checksum differs; of several
      processes, on the one that finds a checksum to differ.
    errors.FileError: if this host does not let a process open so many.
    preemption.Preempted: after a signal.
  """
  directory = epath.Path(directory)
  if not (directory / "manifest.json").exists():
    raise _not_mined(directory / "manifest.json")
  manifest = files.read_json(directory / "manifest.json", shards=list)
  shards = [(directory / entry["file"], entry) for entry in manifest["shards"]]
  for path, _ in shards:
    if not path.exists():
      raise errors.PairsError(f"{path} is missing; {_rebuild(path)}")
  with preemption.together("the shards of pairs are checked again"):
    _check(shards[jax.process_index() :: jax.process_count()])
  files.allow_open(len(shards), directory)
  return _Records([os.fspath(files.local_copy(path)) for path, entry in shards if entry["count"]])


def _check(shards: Sequence[tuple[epath.Path, dict[str, Any]]]) -> None:
  """Compares (path, entry of the manifest) with the files; raises as `read`."""
  checksums = threads.in_order(files.sha256, [path for path, _ in shards])
  for (path, entry), checksum in zip(shards, checksums, strict=True):
    preemption.check("the shards of pairs are checked again")
    if checksum != entry["sha256"]:
      raise errors.PairsError(
        f"{path} is corrupt: its SHA-256 is not that of the manifest; {_rebuild(path)}"
      )


def _rebuild(path: epath.Path) -> str:
  return (
    f"delete {path}, {summary_path(path)} and {path.parent / 'manifest.json'}, then run the same "
    "command again: the stage 'mine' rebuilds this shard alone"
  )


class _Records(Sequence):
  """Decodes records on access; opens files on first use, so that workers can take a copy."""

  def __init__(self, paths: list[str]):
    self._source = array_record_data_source.ArrayRecordDataSource(paths)

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index: int):
    if not 0 <= index < len(self):
      raise IndexError(f"pair record {index} of {len(self)}")
    return serialization.msgpack_restore(self._source[index])
