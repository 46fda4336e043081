"""Odd `dataset.json` files, folders and config values, for `odd_inputs`."""

import gzip
import os

import numpy as np
from odd_inputs import CASE, Row
from odd_volumes import LABELS, MASK, config_of, folder, nifti


def _described(ok=False, text=None, files=None, then=None, changes=None, **described):
  def make(root):
    folder(root, text, files, **described)
    if then:
      then(root)
    return config_of(root, **(changes or {})), (
      {"image": MASK[..., :1], "mask": MASK[..., 0]} if ok else None
    )

  return make


def _in_place_of(make_it):
  """Puts something that is no regular file in the place of `dataset.json`."""

  def then(root):
    (root / "dataset.json").unlink()
    make_it(root / "dataset.json")

  return then


def _nnunet(**changes):
  """A config on a whole nnU-Net folder that cannot work."""
  return _described(changes={key.replace("__", "."): value for key, value in changes.items()})


def _endless(root):
  """A pattern that takes exponential time on the name of a case."""
  folder(root, files={f"imagesTr/{'a' * 40}_0000.nii.gz": _PLAIN})
  return config_of(root, **{"data.group_pattern": r"(?:[a-z]+)+Z|(\d|odd)"}), None


def _folder_as_label(root):
  (root / "labelsTr/0.nii.gz").unlink()
  (root / "labelsTr/0.nii.gz").mkdir()


def _fifo_as_image(root):
  (root / _IMAGE).unlink()
  os.mkfifo(root / _IMAGE)


def _link_to_zeros(path):
  path.symlink_to("/dev/zero")


def _set(**changes):
  """A config on the phantom that cannot work."""
  return lambda root: ({key.replace("__", "."): value for key, value in changes.items()}, None)


_IMAGE = f"imagesTr/{CASE}_0000.nii.gz"
_PLAIN = gzip.compress(nifti(MASK))
_IGNORED = gzip.compress(nifti(np.where(np.arange(2) == 1, 2, MASK).astype(np.uint8)))


def _listed(**entries):
  whole = {
    n: {"images": [f"imagesTr/{n}_0000.nii.gz"], "label": f"labelsTr/{n}.nii.gz"} for n in "01234"
  }
  own = {CASE: {"images": [_IMAGE], "label": f"labelsTr/{CASE}.nii.gz"}}
  return {**whole, **own, **entries}


JSON = (
  ("as it should be", _described(True)), ("no JSON", _described(text=b"{")),
  ("empty file", _described(text=b" ")), ("a list", _described(text=b"[]")),
  ("null", _described(text=b"null")), ("no UTF-8", _described(text=b'{"a": "\xff"}')),
  ("UTF-16", _described(text='{"a": 1}'.encode("utf-16"))),
  ("a number of 10^4 digits", _described(text=b'{"labels": ' + b"9" * 10**4 + b"}")),
  ("nested 10^5 deep", _described(text=b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}")),
  ("FIFO", _described(then=_in_place_of(os.mkfifo))),
  ("symlink loop", _described(then=_in_place_of(lambda path: path.symlink_to(path.name)))),
  ("symlink to /dev/zero", _described(then=_in_place_of(_link_to_zeros))),
  ("folder", _described(then=_in_place_of(lambda path: path.mkdir()))),
  ("labels null", _described(labels=None)), ("labels a list", _described(labels=["a", "b"])),
  ("one label", _described(labels={"background": 0})),
  ("regions", _described(labels={"background": 0, "a": [1, 2], "b": 2})),
  ("labels with a gap", _described(labels={"background": 0, "a": 2})),
  ("labels of true", _described(labels={"background": 0, "a": True})),
  ("labels of 0.0 and 1.0", _described(labels={"background": 0.0, "a": 1.0})),
  ("labels as text", _described(True, labels={"background": "0", "a": "1"})),
  ("labels of version 1", _described(True, labels={"0": "background", "1": "a"})),
  ("labels with digits of no number", _described(labels={"\u00b2": "background", "\u00b3": "a"})),
  ("labels with NaN", _described(labels={"background": 0, "a": float("nan")})),
  ("line break in a label", _described(labels={"background": 0, "a\nb": 1})),
  ("half a surrogate in a label", _described(labels={"background": 0, "\ud800": 1})),
  ("300 labels", _described(labels={"background": 0, **{f"c{n}": n for n in range(1, 300)}})),
  ("ignore label", _described(True, labels={**LABELS, "ignore": 2},
                              files={f"labelsTr/{CASE}.nii.gz": _IGNORED})),
  ("ignore label below another", _described(labels={"background": 0, "ignore": 1, "a": 2})),
  ("channels a text", _described(channel_names="MR")),
  ("channels a number", _described(channel_names=3)),
  ("channels a list", _described(True, channel_names=["MR"])),
  ("channels without 0", _described(True, channel_names={"1": "MR"})),
  ("two channels, one file", _described(channel_names={"0": "a", "1": "b"})),
  ("CT", _described(True, channel_names={"0": "CT"})),
  ("channel name null", _described(True, channel_names={"0": None})),
  ("ending null", _described(file_ending=None)), ("ending .mha", _described(file_ending=".mha")),
  ("ending a list", _described(file_ending=[".nii.gz"])),
  ("ending empty", _described(file_ending="")),
  ("dataset a list", _described(dataset=[])), ("dataset null", _described(dataset=None)),
  ("dataset as it should be", _described(True, dataset=_listed())),
  ("a case that is a text", _described(dataset=_listed(a="x"))),
  ("a case without images", _described(dataset=_listed(a={"label": "x"}))),
  ("a listed file that is not there", _described(dataset=_listed(a={"images": ["x.nii.gz"]}))),
  ("a listed file that is no NIfTI", _described(dataset=_listed(a={"images": ["dataset.json"]}))),
  ("one file in two cases", _described(dataset=_listed(a={"images": ["./" + _IMAGE]}))),
  ("a case with two channels of one", _described(dataset=_listed(a={"images": [_IMAGE] * 2}))),
  ("line break in a case", _described(dataset=_listed(**{"a\nb": {"images": [_IMAGE]}}))),
  ("folds", _described(True, files={"../source/splits_final.json": b"[]"})),
  ("image without channel", _described(files={"imagesTr/a.nii.gz": _PLAIN})),
  ("label without image", _described(files={"labelsTr/a.nii.gz": _PLAIN})),
  ("line break in a file's name", _described(files={"imagesTr/a\nb_0000.nii.gz": _PLAIN})),
  ("channel in Arabic digits", _described(files={f"imagesTr/a_{4 * chr(0x660)}.nii.gz": _PLAIN})),
  ("FIFO as image", _described(then=_fifo_as_image)),
  ("folder as label", _described(then=_folder_as_label)),
)  # fmt: skip
CONFIG = (
  ("pattern without end", _endless, "takes more than"),
  ("pattern without group", _set(data__group_pattern="a")),
  ("pattern that is none", _set(data__group_pattern="(")),
  ("size of 0", _set(data__size=(0, 16))),
  ("size of 10^5 squared", _set(data__size=(10**5, 10**5))),
  ("size of NaN", _set(data__size=(float("nan"), 16))),
  ("size of text", _set(data__size=("a", "b"))),
  ("crop of three", _set(data__crop=(1, 1, 1))), ("crop below 0", _set(data__crop=(-8, 8))),
  ("10^12 cases", _set(data__phantom__num_cases=10**12)),
  ("phantom of 10^5 squared", _set(data__phantom__size=(10**5, 10**5))),
  ("noise of NaN", _set(data__phantom__noise=float("nan"))),
  ("contrast of infinity", _set(data__phantom__contrast=float("inf"))),
  ("more labels than cases", _set(data__num_labelled=10**6)),
  ("seed of 2^40", _set(data__split_seed=2**40)), ("256 classes", _set(data__num_classes=256)),
  ("unknown source", _set(data__source="s3")), ("no root", _nnunet(data__root="")),
  ("root in a bucket", _nnunet(data__root="gs://a/b")),
  ("root with a line break", _nnunet(data__root="a\nb")),
  ("root with a null byte", _nnunet(data__root="a\0b")),
  ("split file that is not there", _set(data__split_file="/nowhere/x.json")),
  ("split file that is a folder", _set(data__split_file="/tmp")),
  ("split file that is a device", _set(data__split_file="/dev/zero")),
  ("fold of a file that is not there",
   _set(data__split_file="/nowhere/x.json", data__split_fold=0)),
  ("fold below -1", _set(data__split_file="/nowhere/x.json", data__split_fold=-2)),
  ("fold of text", _set(data__split_fold="all")),
  ("split file in a bucket", _set(data__split_file="s3://a/b.json")),
)  # fmt: skip


def rows() -> list[Row]:
  return [*(Row("json", *entry) for entry in JSON), *(Row("config", *entry) for entry in CONFIG)]
