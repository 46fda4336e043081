"""DICOM series in images/ID/, a folder each; those without a mask in masks/ are unlabelled.

  python -m launch.run --config=configs/dicom.py --config.data.root=DIR --workdir=OUT

Needs the extra `dicom`. Masks are DICOM segmentations, or NIfTI, .mha or .nrrd on the grid of their
series (masks/ID.nii.gz), with class ids 0..C-1 (--config.data.num_classes=C). Trains on slices; for
volumes add --config.data.spatial_dims=3 --config.data.size='(64,64,32)'.
"""

from configs import nnunet, recipes


def get_config(recipe=recipes.DEFAULT):
  config = nnunet.get_config(recipe).unlock()
  config.data.source = "dicom"
  config.data.name = "dicom"
  config.data.num_classes = 2
  return config.lock()
