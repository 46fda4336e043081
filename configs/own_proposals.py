r"""Masks and scores that you already have, for images as in folder.py.

  python -m launch.run --config=configs/own_proposals.py --config.data.root=DATA \
    --config.data.proposals=DIR --config.proposals.mix=file:4 --workdir=OUT

DIR holds NAME/ID.png, a folder for each generator (another model, a fold, an older version), and
scores.csv with the columns image,proposal,score; file:COUNT gives the number of folders. Masks and
scores of validation images belong to it, for the judge is measured there. Without scores add
--config.judge.name=agreement; an nnU-Net folder instead of images is --config.data.source=nnunet
--config.data.num_classes=0. Patches at a spacing in mm work too (data.spacing and data.patch_size,
see configs/nnunet.py), and a trained nnU-Net as the base (--config.base.nnunet_folder). More:
rndpo_jax/pairs/README.md.
"""

from configs import recipes
from rndpo_jax import config as config_lib


def get_config(recipe=""):
  config = config_lib.base_config()
  config.data.source = "folder"
  config.data.name = "own proposals"
  config.data.num_labelled = 8
  config.data.num_val = 8
  config.data.num_test = 8
  config.data.proposals = "proposals"  # a folder; give yours
  config.proposals.mix = "file:4"
  config.judge.name = "file"
  config.judge.compare = ("agreement", "confidence")
  config.mine.pairs_per_image = 3  # of four proposals, the best against each other one
  # Augmented, at the price of a second forward; on PH2 a little better than cached margins.
  config.finetune.augment = True
  config.finetune.reference = "online"
  recipes.apply(config, recipe)
  return config.lock()
