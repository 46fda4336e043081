"""ACDC, cine cardiac MR (Bernard et al., IEEE TMI 2018): 5 labelled patients, slices in 2D.

  python -m launch.run --config=configs/acdc.py --config.data.root=DIR --workdir=OUT

DIR is an nnU-Net raw folder (dataset.json, imagesTr, labelsTr) with cases patientNNN_frameMM;
both frames of a patient stand in the same split. Takes about 10 minutes on 2 CPU cores;
test Dice of the last checkpoint 0.705, of the base 0.700 (seed 0, judge agreement).
"""

from rndpo_jax import config as config_lib


def get_config():
  config = config_lib.base_config()
  config.data.source = "nnunet"
  config.data.name = "ACDC"
  config.data.num_classes = 0
  config.data.group_pattern = r"(patient\d+)"
  config.data.crop = (192, 192)
  config.data.size = (64, 64)
  config.data.num_labelled = 5
  config.data.num_val = 10
  config.data.num_test = 30
  # Thin structures in few labelled patients: twice the width, one channel a norm, a higher rate.
  config.model.width = 16
  config.model.norm = "instance"
  config.base.learning_rate = 1e-2
  config.base.num_steps = 600
  # Augmented fine-tuning generalises further than cached margins do; it costs a second forward.
  config.finetune.augment = True
  config.finetune.reference = "online"
  return config.lock()
