"""ACDC, cine cardiac MR (Bernard et al., IEEE TMI 2018): 5 labelled patients, slices in 2D.

  python -m launch.run --config=configs/acdc.py --config.data.root=DIR --workdir=OUT

DIR is an nnU-Net raw folder (dataset.json, imagesTr, labelsTr) with cases patientNNN_frameMM;
both frames of a patient are in the same split. Takes about 25 minutes on 2 CPU cores;
test Dice of the last checkpoint 0.763, of the base 0.694 (seed 0, judge agreement).
"""

from configs import nnunet, recipes


def get_config(recipe=recipes.DEFAULT):
  config = nnunet.get_config("")
  config.data.name = "ACDC"
  config.data.group_pattern = r"(patient\d+)"
  config.data.crop = (192, 192)
  config.data.num_labelled = 5
  config.data.num_val = 10
  config.data.num_test = 30
  recipes.apply(config, recipe)
  return config
