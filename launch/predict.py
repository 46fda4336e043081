"""Segments new images with what a run has made.

  python -m launch.predict --workdir=OUT --input=DIR --output=MASKS [--checkpoint=delivered]
  python -m launch.predict --nnunet_folder=MODEL --input=DIR --output=MASKS [--fold=0] [--mirror]

The second form segments with any model folder that nnU-Net v2 trained, as nnU-Net itself does with
one fold and without mirroring; what it does by default is --mirror --fold=0,1,2,3,4.
--input is a folder of images or one file: NIfTI, .mha, .mhd, .nrrd, .gipl, PNG, BMP, TIFF or JPEG,
named ID.nii.gz or as nnU-Net does (ID_0000.nii.gz for the first channel); or a folder of DICOM
series, a folder each, or one of them. --output gets a mask a case, in its format (PNG for JPEG,
.mha for .mhd, NIfTI for DICOM, to which --dicom_seg adds its own form) and on its own grid, with
the class ids of the training data (training masks of 0 and 255 were read as 0 and 1, and so these
hold 0 and 1), and `scores.csv`: how sure the network is of each mask, rank 1 being the one to look
at first.
The same command goes on where it was stopped. Several processes share the work, each started with
the same command and --coordinator_address=HOST:PORT --num_processes=N --process_id=I.
"""

from absl import app, flags

from launch import cache_flag, common, process_flags

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run that made the network.")
_NNUNET_FOLDER = flags.DEFINE_string(
  "nnunet_folder", None,
  "In place of --workdir: a model folder that nnU-Net v2 trained, TRAINER__PLANS__CONFIGURATION.",
)  # fmt: skip
_FOLD = flags.DEFINE_string(
  "fold", "0", "Of --nnunet_folder: a number, all, or several as 0,1,2, whose logits are averaged."
)
_INPUT = flags.DEFINE_string("input", None, "Folder of images, or one file.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder of the masks; made if it is missing.")
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", "delivered",
  "Which parameters: delivered, last, best (on validation), base, or a step of fine-tuning.",
)  # fmt: skip
_MIRROR = flags.DEFINE_bool(
  "mirror",
  None,
  "Averages over flips: 4 times the work, 8 in 3D. Probabilities over flips of all axes; of "
  "--nnunet_folder and runs with config.data.spacing logits over flips of the axes that training "
  "flipped. By default as the run of --workdir did in evaluation (config.evaluate.mirror).",
)
_PROBABILITIES = flags.DEFINE_bool(
  "probabilities", False, "Also writes ID.npz, 'probabilities' float16 [*S, C]."
)
_DICOM_SEG = flags.DEFINE_bool(
  "dicom_seg", False,
  "Also writes ID.dcm, a DICOM segmentation of the series with a segment a class (extra dicom).",
)  # fmt: skip
_SCORES = flags.DEFINE_bool(
  "scores", True, "Writes scores.csv, for which proposals of each image are drawn (--workdir)."
)
_WORKERS = flags.DEFINE_integer(
  "workers", 0, "Threads that read images; 0 for one a processor.", lower_bound=0
)


def main(argv):
  common.start(argv)
  # Libraries that start worker processes read absl flags when imported: import after parsing.
  from rndpo_jax.predict import output_folder, run
  from rndpo_jax.predict.job import Options
  from rndpo_jax.runtime import lock

  with common.one_line_errors():
    end = process_flags.meet()
  with common.one_line_errors(end):
    _check_network()
    output_folder.check(_INPUT.value, _OUTPUT.value)
    with lock.hold(_OUTPUT.value, "--output"):
      common.take_signals()
      cache_flag.use()
      options = Options(
        mirror=bool(_MIRROR.value),
        probabilities=_PROBABILITIES.value,
        scores=_SCORES.value,
        workers=_WORKERS.value,
        dicom_seg=_DICOM_SEG.value,
      )
      job, options = _job(options)
      run.run(job, _INPUT.value, _OUTPUT.value, options)


def _check_network():
  from rndpo_jax import errors

  if (_WORKDIR.value is None) == (_NNUNET_FOLDER.value is None):
    raise errors.ConfigError("give --workdir or --nnunet_folder, one of the two")
  other = _CHECKPOINT if _WORKDIR.value is None else _FOLD
  if other.present:
    network = "nnunet_folder" if _WORKDIR.value is None else "workdir"
    raise errors.ConfigError(f"--{other.name} means nothing with --{network}; leave it out")


def _job(options):
  """The network, and the options with what a run decides."""
  from rndpo_jax.nnunet import folder
  from rndpo_jax.predict import grid_run, native_network, native_run, trained

  if _WORKDIR.value is not None:
    found = trained.load(_WORKDIR.value, _CHECKPOINT.value)
    options = options._replace(mirror=found.mirrors(_MIRROR.value))
    if found.native is None:
      return grid_run.job(found, options), options
    return native_run.job(native_network.of_run(found), options), options
  folds = folder.parse_folds(_FOLD.value, "--fold")
  network = native_network.read_nnunet(_NNUNET_FOLDER.value, folds)
  return native_run.job(network, options), options


if __name__ == "__main__":
  flags.mark_flags_as_required(["input", "output"])
  app.run(main, flags_parser=common.parse)
