"""Quick start: generated phantom images, 8 of them labelled.

  python -m launch.run --config=configs/quickstart.py --workdir=runs/quickstart

Takes about 3 minutes on 2 CPU cores.
"""

from rndpo_jax import config as config_lib


def get_config():
  config = config_lib.base_config()
  # Augmented fine-tuning generalises further than cached margins do; it costs a second forward.
  config.finetune.augment = True
  config.finetune.reference = "online"
  return config.lock()
