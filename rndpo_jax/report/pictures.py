"""Picture rows of the report, from `pairs/examples.npz` and `evaluate/gallery.npz`."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from rndpo_jax import errors
from rndpo_jax.evaluation import results
from rndpo_jax.report import figures, tables

MAX_IMAGES = 3  # whose proposals are all drawn; pairs are drawn of every example
MAX_PROPOSALS = 8


def examples(path: epath.Path) -> dict[str, list[dict[str, Any]]]:
  """Rows of proposals with their scores, and the pairs made of them.

  Args:
    path: `pairs/examples.npz`: image f32[n, *S, I], masks u8[n, K, *S], scores f32[n, K], chosen
      and rejected i32[n] (-1: no pair), record_id.
  """
  if not path.exists():
    return {"proposals": [], "pairs": []}
  content = _load(path)
  proposals, pairs = [], []
  for n, record_id in enumerate(content["record_id"]):
    image, masks = flat(content["image"][n], content["masks"][n])
    chosen, rejected = int(content["chosen"][n]), int(content["rejected"][n])
    scores = content["scores"][n]
    if n < MAX_IMAGES:
      parts = _proposals(image, masks, scores, chosen, rejected)
      proposals.append({"record_id": str(record_id), "parts": parts})
    if chosen >= 0:
      pairs.append(
        {
          "record_id": str(record_id),
          "image": _pair(image, masks[chosen], masks[rejected]),
          "text": (
            f"{_score_text(scores[chosen], scores[rejected])}"
            f"{int((content['masks'][n][chosen] != content['masks'][n][rejected]).sum())} pixels"
          ),
        }
      )
  return {"proposals": proposals, "pairs": pairs}


def _score_text(chosen: float, rejected: float) -> str:
  return "" if np.isnan(chosen) else f"scores {chosen:.3f} and {rejected:.3f}, "


def _proposals(image, masks, scores, chosen: int, rejected: int) -> list[dict[str, str]]:
  """The image, then proposals by falling score; the pair's two are always among them."""
  known = ~np.isnan(scores)
  # One without a score is missing, or not this judge's to score; readers' pairs have none at all.
  drawn = np.flatnonzero(known if known.any() else ~known).tolist()
  order = sorted(drawn, key=lambda k: (-scores[k] if known[k] else 0.0, k))
  pair = [k for k in (chosen, rejected) if k >= 0]
  others = [k for k in order if k not in pair]
  shown = set(pair + others[: MAX_PROPOSALS - len(pair)])
  parts = [{"image": figures.tile(image), "alt": "image", "text": "image", "badge": ""}]
  for k in (k for k in order if k in shown):
    outlines = _outlines(masks[k], None, "solid")
    badge = "chosen" if k == chosen else "rejected" if k == rejected else ""
    text = f"score {scores[k]:.3f}" if known[k] else ""
    alt = f"proposal {k}, {text}" if text else f"mask {k}"
    parts.append({"image": figures.tile(image, outlines), "alt": alt, "text": text, "badge": badge})
  return parts


def _pair(image, chosen, rejected) -> str:
  outlines = _outlines(chosen, figures.BLUE, "solid") + _outlines(rejected, figures.RED, "solid")
  return figures.tile(image, outlines, fill=(chosen != rejected, figures.YELLOW))


def cases(path: epath.Path, class_names: Sequence[str]) -> dict[str, list]:
  """Rows of test cases: image, base and fine-tuned mask with the true outline, and the legend.

  Args:
    path: `evaluate/gallery.npz`, see `evaluation.gallery.write`.
    class_names: of the data set, background first.
  """
  legend = [(name, figures.class_color(c)) for c, name in enumerate(class_names[1:], 1)]
  if not path.exists():
    return {"cases": [], "legend": legend}
  content = _load(path)
  rows = []
  for n, case_id in enumerate(content["case_id"]):
    names = ("image", "label", "base", "finetuned")
    arrays = {name: content[f"{name}_{n}"] for name in names}
    box = window([arrays[name] for name in names[1:]])
    image, label, *_ = cut = [arrays[name][box] for name in names]
    before, after = float(content["base_dice"][n]), float(content["finetuned_dice"][n])
    truth = _outlines(label, "white", "dashed")
    masks = (
      (cut[2], "base", f"Dice {tables.show(before)}"),
      (cut[3], "fine-tuned", f"Dice {tables.show(after)} ({tables.signed(after - before)})"),
    )
    parts = [
      {"image": figures.tile(image), "alt": "image", "text": "image"},
      {
        "image": figures.tile(image, _outlines(label, None, "solid")),
        "alt": "truth",
        "text": "truth",
      },
    ]
    for mask, shown, text in masks:
      outlines = _outlines(mask, None, "solid") + truth
      parts.append(
        {"image": figures.tile(image, outlines), "alt": shown, "text": f"{shown}, {text}"}
      )
    rows.append({"case_id": str(case_id), "why": str(content["why"][n]), "parts": parts})
  return {"cases": rows, "legend": legend}


def window(masks: Sequence[np.ndarray]) -> tuple[slice, slice]:
  """The part of the image to show: half as much again as what the masks [H, W] take up.

  Never less than a third of an axis, so that the surroundings can be recognised, and all of the
  image where the masks are empty.
  """
  foreground = np.any([mask > 0 for mask in masks], axis=0)
  if not foreground.any():
    return (slice(None), slice(None))
  box = []
  for axis, length in enumerate(foreground.shape):
    taken = np.flatnonzero(foreground.any(axis=1 - axis))
    middle = (taken[0] + taken[-1] + 1) / 2
    size = min(length, max(1.5 * (taken[-1] + 1 - taken[0]), length / 3))
    start = int(np.clip(round(middle - size / 2), 0, length - round(size)))
    box.append(slice(start, start + round(size)))
  return tuple(box)


def _outlines(mask: np.ndarray, color: str | None, style: str) -> list:
  """One outline a foreground class that is there; in `color`, or in the class's own if None."""
  return [
    (mask == c, color or figures.class_color(int(c)), style) for c in np.unique(mask) if c > 0
  ]


def flat(image: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """[H, W, I] and [K, H, W] of an image; of a volume, of its slice with the most foreground."""
  if masks.ndim == 3:
    return image, masks
  z = results.fullest_slice(masks)
  return image[:, :, z], masks[..., z]


def _load(path: epath.Path) -> dict[str, np.ndarray]:
  try:
    with np.load(io.BytesIO(path.read_bytes())) as content:
      return dict(content)
  except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    if isinstance(error, FileNotFoundError):
      raise
    raise errors.FileError(
      f"{path}: cannot be read ({error}); delete it and run the same command again"
    ) from error
