"""Six images in a folder, for the tests of prepare."""

import numpy as np
from PIL import Image

from rndpo_jax import config as config_lib


def config_of(root):
  config = config_lib.base_config()
  config.data.update({
    "source": "folder", "root": str(root), "size": (8, 8), "num_labelled": 1, "num_val": 1,
    "num_test": 1,
  })  # fmt: skip
  config.mine.num_shards = 1  # there are few unlabelled images
  return config


def write(folder):
  """Six images of several sizes, the last without mask; returns the folder."""
  for part in ("images", "masks"):
    (folder / part).mkdir(parents=True)
  for n in range(6):
    image = np.random.default_rng(n).integers(0, 255, (8 + n, 9), dtype=np.uint8)
    Image.fromarray(image).save(folder / "images" / f"{n}.png")
    if n < 5:
      Image.fromarray((image > 100).astype(np.uint8)).save(folder / "masks" / f"{n}.png")
  return folder


def files_of(path):
  return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
