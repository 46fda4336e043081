"""Quick start: generated phantom images, 8 of them labelled.

  python -m launch.run --config=configs/quickstart.py --workdir=DIR

That is what launch/quickstart.sh runs: the default recipe with fewer steps, 400 and 200.
"""

from configs import recipes
from rndpo_jax import config as config_lib


def get_config(recipe=recipes.DEFAULT):
  config = config_lib.base_config()
  # Augmented, at the price of a second forward; on PH2 a little better than cached margins.
  config.finetune.augment = True
  config.finetune.reference = "online"
  recipes.apply(config, recipe)
  if config.phases:
    config.finetune.num_steps = 400
    first, *others = config.phases
    config.phases = (first, *({**phase, "finetune.num_steps": 200} for phase in others))
  return config.lock()
