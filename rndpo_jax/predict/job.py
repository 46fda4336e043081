"""What the two kinds of prediction share: what is asked for, and what a network can do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from rndpo_jax import errors, types
from rndpo_jax.predict import case_files, inputs
from rndpo_jax.runtime import threads

Case = TypeVar("Case")
KEPT = "predict: finished cases are kept"  # said when a signal ends it


class Options(NamedTuple):
  """What is asked for; see `launch.predict`.

  Attributes:
    mirror: whether predictions are averaged over flips.
    probabilities: whether they are written.
    scores: whether `scores.csv` is.
    workers: threads that read; 0 for one a processor.
    dicom_seg: whether masks of DICOM series are written as DICOM segmentations, too.
  """

  mirror: bool = False
  probabilities: bool = False
  scores: bool = True
  workers: int = 0
  dicom_seg: bool = False


class Job(NamedTuple):
  """A network, ready to predict as the options ask.

  Attributes:
    num_channels: I.
    class_names: one a class, background first.
    title: what the network is, in words.
    settings: what the masks of one folder must have in common, besides parameters and options.
    params: a numpy tree.
    predicted: (inputs, on_broken(input, error)) -> each case that can be read, in order.
  """

  num_channels: int
  class_names: tuple[str, ...]
  title: str
  settings: Mapping[str, Any]
  params: types.Params
  predicted: Callable[..., Iterator[case_files.Predicted]]


def read_ahead(
  read: Callable[[inputs.Input], Case],
  sources: Iterable[inputs.Input],
  workers: int,
  on_broken: Callable[[inputs.Input, errors.DataError], None],
) -> Iterator[Case]:
  """The cases that can be read, in order, a few of them read ahead."""

  def read_or_error(one: inputs.Input):
    try:
      return one, read(one), None
    except errors.DataError as error:
      return one, None, error

  for one, case, error in threads.in_order(read_or_error, sources, workers):
    if error is not None:
      on_broken(one, error)
    else:
      yield case
    del case  # before the next one is waited for
