r"""Any folder of images/ID.png and masks/ID.png; images without a mask are unlabelled.

  python -m launch.run --config=configs/folder.py --config.data.root=DIR --workdir=OUT \
    [--config.data.num_classes=3] [--config.data.case_pattern='(case\d+)_z\d+']

PNG, JPEG or TIFF, grey or RGB, of any sizes; masks hold class ids 0..C-1, or 0 and 255 for two
classes. Set data.num_labelled, num_val and num_test to what you have, and data.size to what the
structures need; about 5 minutes at 64 x 64 on 2 CPU cores.
"""

from configs import recipes
from rndpo_jax import config as config_lib


def get_config(recipe=recipes.DEFAULT):
  config = config_lib.base_config()
  config.data.source = "folder"
  config.data.name = "folder"
  config.data.num_labelled = 8
  config.data.num_val = 8
  config.data.num_test = 8
  # Augmented, at the price of a second forward; on PH2 a little better than cached margins.
  config.finetune.augment = True
  config.finetune.reference = "online"
  recipes.apply(config, recipe)
  return config.lock()
