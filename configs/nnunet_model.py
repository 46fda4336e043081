r"""A trained nnU-Net and its unlabelled scans: the same model, better, for nnU-Net again.

  python -m launch.run --config=configs/nnunet_model.py --workdir=OUT \
      --config.base.nnunet_folder=.../nnUNetTrainer__nnUNetPlans__2d --config.data.root=RAW
  python -m launch.export --workdir=OUT --format=nnunet --output=BETTER

RAW is an nnU-Net raw folder: imagesTr, labelsTr and, unlabelled, imagesTs and cases of imagesTr
without a label. Labelled cases choose checkpoints and measure judges; none of them should be one
that the model was trained on. --config.base.fold=0,1,2 takes fold 0 and asks the others by judge
`agreement`.
"""

from configs import recipes
from rndpo_jax import config as config_lib


def get_config(recipe=""):
  config = config_lib.base_config()
  config.data.source = "nnunet"
  config.data.name = "nnunet"
  config.data.num_classes = 0
  config.data.num_labelled = 1
  config.data.num_val = 8
  config.data.num_test = 8
  config.finetune.learning_rate = 1e-4
  recipes.apply(config, recipe)
  return config.lock()
