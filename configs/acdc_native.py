"""ACDC at a finer grid, in patches, instead of 64 x 64 crops; 5 labelled patients, slices in 2D.

  python -m launch.run --config=configs/acdc_native.py --config.data.root=DIR --workdir=OUT

DIR as of configs/acdc.py. Cases are cropped to what is not zero, normalised one by one and brought
to 1.5 mm a pixel; the network sees patches of 96 x 96, and masks are put together by sliding window
on the cases' own grids. Test Dice of the last checkpoint 0.731, of the base 0.727, with 0.705 and
0.700 of configs/acdc.py:rn_dpo (seed 0, judge agreement); on validation it is 0.761 after 0.754,
which is not enough to tell them apart, so the base is delivered. That copy of ACDC had lost its
spacing (1 mm in every header): the grid was of 1.5 of its pixels, that of configs/acdc.py of 3.
Steps and proposals are few, for CPUs: 15 minutes on one busy core. With weak_to_strong_rn_dpo,
400 + 400 steps, it ends at 0.738, after 0.744 at the end of the first phase.
"""

from configs import acdc, recipes


def get_config(recipe=""):
  config = acdc.get_config("")
  with config.unlocked():
    config.data.crop = ()
    config.data.spacing = (1.5, 1.5)
    config.data.patch_size = (96, 96)
    config.base.num_steps = 400
    config.proposals.mix = "base:1,tta+threshold:3"
    config.mine.pairs_per_image = 3
    config.finetune.num_steps = 100
    config.finetune.batch_size = 8
    config.finetune.eval_every_steps = 100
    recipes.apply(config, recipe)
  return config.lock()
