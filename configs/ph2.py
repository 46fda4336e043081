"""PH2, dermoscopy of melanocytic lesions (Mendonça et al., EMBC 2013): 10 labelled images.

  python -m launch.run --config=configs/ph2.py --config.data.root=DIR --workdir=OUT

DIR holds images/ID.png (RGB) and masks/ID.png (0 or 255), 200 of each. Takes about 5 minutes on 2
CPU cores; test Dice of the last checkpoint 0.931, of the base 0.905 (seed 0, judge agreement).
"""

from configs import recipes
from rndpo_jax import config as config_lib


def get_config(recipe=recipes.DEFAULT):
  config = config_lib.base_config()
  config.data.source = "folder"
  config.data.name = "PH2"
  config.data.size = (64, 64)
  config.data.num_labelled = 10
  config.data.num_val = 30
  config.data.num_test = 50
  # Augmented, at the price of a second forward; on PH2 a little better than cached margins.
  config.finetune.augment = True
  config.finetune.reference = "online"
  recipes.apply(config, recipe)
  return config.lock()
