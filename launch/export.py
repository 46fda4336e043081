"""Writes what a run has made for other programs.

  python -m launch.export --workdir=OUT --format=nnunet --output=FOLDER [--checkpoint=delivered]

--output is a new folder, and appears when all of it is written:

  nnunet       plans.json, dataset.json, fold_F/checkpoint_final.pth: for nnU-Net,
               nnUNetv2_predict_from_modelfolder -m FOLDER -f F -i IMAGES -o MASKS
  safetensors  model.safetensors, the parameters, and model.json: network, images, classes
  stablehlo    model.stablehlo, network and weights as a program for JAX alone, and model.json
"""

from absl import app, flags

from launch import common

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run that made the network.")
_FORMAT = flags.DEFINE_enum("format", None, ["nnunet", "safetensors", "stablehlo"], "What for.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; must not be there yet.")
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", "delivered",
  "Which parameters: delivered, last, best (on validation), base, or a step of fine-tuning.",
)  # fmt: skip


def main(argv):
  common.start(argv)
  # Libraries that start worker processes read absl flags when imported: import after parsing.
  from rndpo_jax.export import run

  with common.one_line_errors():
    run.run(_WORKDIR.value, _CHECKPOINT.value, _FORMAT.value, _OUTPUT.value)


if __name__ == "__main__":
  flags.mark_flags_as_required(["workdir", "format", "output"])
  app.run(main, flags_parser=common.parse)
