"""weak_to_strong on zoomed and rotated images too: for data in which organs differ in size."""

from configs.recipes import weak_to_strong

# Labelled and unlabelled images alike; zooms from 0.67 to 1.5. The base keeps its own augmentation.
FIRST = {"augment.affine": 0.5, "augment.affine_zoom": 0.4}


def apply(config):
  weak_to_strong.apply(config)
  config.phases = (FIRST,)
