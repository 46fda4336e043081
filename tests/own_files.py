"""Proposals and preferences as a user brings them, for the tiny phantom: masks that are drawn."""

import csv

import numpy as np
from PIL import Image

SIZE = (20, 18)


def mask(top, left, height, width):
  """u8 of SIZE: a box of class 1."""
  drawn = np.zeros(SIZE, np.uint8)
  drawn[top : top + height, left : left + width] = 1
  return drawn


def write_mask(path, drawn):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(drawn).save(path)
  return path


def write_rows(path, head, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("w", newline="") as file:
    csv.writer(file).writerows([head, *rows])
  return path


def proposals(root, ids, names=("a", "b", "c"), missing=(), scores=True):
  """Masks NAME/ID.png: box n of an image is n + 2 pixels high; its score is 0.1 of that."""
  rows = []
  for place, image in enumerate(ids):
    for n, name in enumerate(names):
      if (image, name) in missing:
        continue
      write_mask(root / name / f"{image}.png", mask(4, 3 + place % 4, n + 2, 5))
      rows.append((image, name, 0.1 * (n + 2)))
  if scores:
    write_rows(root / "scores.csv", ("image", "proposal", "score"), rows)
  return root
