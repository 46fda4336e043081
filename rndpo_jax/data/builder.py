"""A TFDS data set of any source: ArrayRecord files, written without TensorFlow."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import tempfile
from typing import Any

import jax
import tensorflow_datasets as tfds
from etils import epath

from rndpo_jax import errors
from rndpo_jax.data import reader, records, writer
from rndpo_jax.runtime import files, multihost, preemption, progress

# Of a file's images and masks, before ArrayRecord compresses them.
FILE_BYTES = 4 << 30


def build(source: records.Source, directory: epath.Path) -> list[dict[str, Any]]:
  """Reads every pixel of the source and writes it under `directory`, local or remote.

  The records go straight into the files. TFDS's own writer sorts them first: beyond 1 GB with the
  help of TensorFlow, and, as the order is ours, all of them at once in memory.

  Every process calls it, and writes file i where i mod N is its index; process 0 writes what is
  beside them. A run that is killed, or that meets a broken image, leaves the files that it
  finished, and the next one keeps those that it would write again just so. In an object store
  process 0 does all, and starts again.

  Returns:
    What `writer.write` says of each file; on process 0, else nothing.

  Raises:
    records.DataError: whatever reading the source finds wrong, or if no mask has foreground, or
      where another process listed other records.
    OSError: if the files cannot be written, the disk being full for one.
    preemption.Preempted: on every process, after a signal to any.
  """
  remote, written = files.is_remote(directory), []
  with contextlib.ExitStack() as stack, preemption.together(writer.KEPT):
    if remote and multihost.is_first():  # ArrayRecord writes local files alone
      here = epath.Path(stack.enter_context(tempfile.TemporaryDirectory()))
      _start(source, here)
      _write_files(source, here, 0, 1)
      written = _finish(source, here)
      if reader.folder(directory).exists():
        reader.folder(directory).rmtree()
      files.copy(reader.folder(here), reader.folder(directory))
  if remote:
    return written
  if multihost.is_first():
    _start(source, directory)
  multihost.barrier("prepare")
  with preemption.together(writer.KEPT):
    _write_files(source, directory, jax.process_index(), jax.process_count())
  if multihost.is_first():
    written = _finish(source, directory)
  return written


def _incomplete(directory: epath.Path) -> epath.Path:
  return reader.folder(directory) / f"{reader.VERSION}.incomplete"


def _paths(source, directory: epath.Path) -> list[epath.Path]:
  count = len(file_lengths(source))
  names = (
    f"{reader.NAME}-{reader.SPLIT}.array_record-{i:05d}-of-{count:05d}" for i in range(count)
  )
  return [_incomplete(directory) / name for name in names]


def _start(source, directory: epath.Path) -> None:
  """Makes of what an earlier run left a folder to go on in; removes all else beside it."""
  folder, target = _incomplete(directory), reader.folder(directory) / reader.VERSION
  if target.exists():  # it ended before it said what it had prepared
    if folder.exists():
      folder.rmtree()
    target.replace(folder)
  folder.mkdir(parents=True, exist_ok=True)
  keep = {folder, *(name for path in _paths(source, directory) for name in (path, _summary(path)))}
  for other in [*folder.parent.iterdir(), *folder.iterdir()]:
    if other not in keep:
      other.rmtree() if other.is_dir() else other.unlink()


def _write_files(source, directory: epath.Path, first: int, step: int) -> None:
  """Writes those files `first`, `first + step`, ... that are not there yet, each by rename."""
  own = list(zip(_paths(source, directory), _spans(source), strict=True))[first::step]
  missing = [(path, span) for path, span in own if not _is_kept(source, path, span)]
  total, left = (sum(end - start for _, (start, end) in part) for part in (own, missing))
  features = writer.features(source)
  examples = progress.track(
    itertools.chain.from_iterable(writer.examples(source, span) for _, span in missing),
    total=total,
    description="prepare",
    unit="records",
    done=total - left,
  )
  for path, span in missing:
    _summary(path).unlink(missing_ok=True)  # of other pixels
    # Before the pixels are read, in case they change in between.
    of_source = _source_fingerprint(source, span)
    summary = writer.write(path, features, itertools.islice(examples, span[1] - span[0]))
    of_records = _records_fingerprint(source, span)
    files.write_json(
      _summary(path),
      {"source_fingerprint": of_source, "records_fingerprint": of_records, **summary},
    )
  next(examples, None)  # ends its progress


def _finish(source, directory: epath.Path) -> list[dict[str, Any]]:
  """Checks all, makes the files a data set of TFDS, and returns each file's summary."""
  folder = _incomplete(directory)
  files.refresh(folder)
  paths = _paths(source, directory)
  # One that lists so many more has other names for its files.
  written = [files.read_json(s) if (s := _summary(path)).exists() else None for path in paths]
  for path, span, one in zip(paths, _spans(source), written, strict=True):
    if one is None or one["records_fingerprint"] != _records_fingerprint(source, span):
      raise errors.DataError(
        f"{path}: its process listed other records of {source.name} than process 0 has for this "
        "file; the source changed meanwhile, or the hosts see different ones; let it rest, and "
        "run the same command again"
      )
  if not any(one["has_foreground"] for one in written):
    raise errors.DataError(
      f"{source.name}: every mask is empty, there is nothing to learn; check the masks and "
      "config.data.num_classes"
    )
  template = tfds.core.ShardedFileTemplate(
    data_dir=folder,
    dataset_name=reader.NAME,
    split=reader.SPLIT,
    filetype_suffix="array_record",
  )
  split = tfds.core.SplitInfo(
    name=reader.SPLIT,
    shard_lengths=file_lengths(source),
    num_bytes=sum(one["num_bytes"] for one in written),
    filename_template=template,
  )
  with reader.quiet():
    tfds.folder_dataset.write_metadata(
      data_dir=folder,
      features=writer.features(source),
      split_infos=[split],
      version=reader.VERSION,
      check_data=False,  # by TensorFlow
      disable_shuffling=True,
    )
  folder.replace(reader.folder(directory) / reader.VERSION)
  return written


def _spans(source: records.Source) -> list[tuple[int, int]]:
  """First record of each file, and the one after its last."""
  ends = list(itertools.accumulate(file_lengths(source)))
  return list(zip([0, *ends[:-1]], ends, strict=True))


def _summary(path: epath.Path) -> epath.Path:
  number = path.name.rpartition("record-")[2]
  return path.parent / f"summary-{number}.json"


def _is_kept(source, path: epath.Path, span: tuple[int, int]) -> bool:
  """Whether the file is there, and is what would be written now."""
  try:
    summary = files.read_json(_summary(path), num_bytes_on_disk=int, source_fingerprint=str)
  except (FileNotFoundError, errors.FileError):
    return False
  whole = path.exists() and path.stat().length == summary["num_bytes_on_disk"]
  return whole and summary["source_fingerprint"] == _source_fingerprint(source, span)


def _source_fingerprint(source: records.Source, span: tuple[int, int]) -> str:
  """SHA-256 of what a file is made from: its records, and the files that hold their pixels."""
  facts = [source.num_classes, source.num_channels, source.spatial_dims, source.dtype]
  facts += [] if source.native is None else [source.native]
  content = hashlib.sha256(json.dumps(facts).encode())
  for index in range(*span):
    content.update(json.dumps([source.records[index], source.fingerprint(index)]).encode())
  return content.hexdigest()


def _records_fingerprint(source: records.Source, span: tuple[int, int]) -> str:
  """SHA-256 of the records of a file, without what differs between copies of a source."""
  return _fingerprint([source.records[index] for index in range(*span)])


def _fingerprint(content: Any) -> str:
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def file_lengths(source: records.Source) -> list[int]:
  """Records of each file, in their order: up to 4 GiB of pixels, or a single one."""
  counts, used = [], FILE_BYTES
  for entry in source.records:
    size = records.num_bytes(source, entry)
    if used + size > FILE_BYTES:
      counts.append(0)
      used = 0
    counts[-1] += 1
    used += size
  return counts
