r"""Any nnU-Net raw folder (dataset.json, imagesTr, labelsTr, perhaps imagesTs), in 2D or 3D.

  python -m launch.run --config=configs/nnunet.py --config.data.root=DIR --workdir=OUT

Trains on slices; for volumes add --config.data.spatial_dims=3 --config.data.size='(64,64,32)'.
Cases without a label file are unlabelled. With
--config.data.group_pattern='(patient\d+)' the cases of a patient are in one split.
"""

from configs import recipes
from rndpo_jax import config as config_lib


def get_config(recipe=recipes.DEFAULT):
  config = config_lib.base_config()
  config.data.source = "nnunet"
  config.data.name = "nnunet"
  config.data.num_classes = 0
  config.data.num_labelled = 8
  config.data.num_val = 8
  config.data.num_test = 8
  # Several thin structures in few cases: twice the width, one channel a norm, a higher rate.
  config.model.width = 16
  config.model.norm = "instance"
  config.base.learning_rate = 1e-2
  config.base.num_steps = 600
  config.finetune.augment = True
  config.finetune.reference = "online"
  recipes.apply(config, recipe)
  return config.lock()
