"""Predicts one large volume with a 3D network and prints how much memory that took at most.

  python tests/large_volume.py --folder=DIR [--shape=512,512,1300] [--patch=128] [--spacing=1.0]
  python tests/large_volume.py --folder=DIR --nnunet_folder=MODEL [--shape=512,512,1300]

The network is one convolution of 1 x 1 x 1 with 4 classes, so that the time is that of all else:
reading, resampling, tiles, sums, scores and writing. DIR gets an int16 volume of 1 mm and its mask;
the network's spacing may be another. With a folder that nnU-Net trained it is that network, fold 0.
Exit code 1 if the memory was more than 4.5 GB.
"""

import argparse
import pathlib
import resource
import shutil
import subprocess
import sys
import time

LIMIT_GB = 4.5


def make(path, shape):
  """Writes the volume slice by slice, in a process of its own: its memory is not to count."""
  import nibabel
  import numpy as np

  header = nibabel.Nifti1Header()
  header.set_data_dtype(np.int16)
  header.set_data_shape(shape)
  header.set_zooms((1.0, 1.0, 1.0))
  header.set_sform(np.eye(4), code=1)
  header.set_xyzt_units("mm")
  header.set_data_offset(352)
  header["magic"] = b"n+1"
  rng = np.random.default_rng(0)
  with path.open("wb") as file:
    file.write(header.binaryblock + bytes(4))
    for _ in range(shape[2]):
      file.write(rng.integers(1, 1000, shape[1::-1], np.int16).tobytes())


def convolution(patch, spacing_mm):
  import numpy as np

  from rndpo_jax.predict import native_network

  kernel = np.array([[-1.0, 0.5, 0.2, 0.1]], np.float32)
  return native_network.NativeNetwork(
    apply=lambda params, images: images @ params,
    params=(kernel,),
    num_channels=1,
    class_names=("background", "a", "b", "c"),
    spacing=(spacing_mm,) * 3,
    patch_size=(patch,) * 3,
    schemes=("zscore",),
    statistics=(None,),
    mirror_axes=(),
    of_pictures=False,
    title="a convolution of 1 x 1 x 1",
    settings={},
  )


def predict(folder, asked):
  from launch import xla_flags

  xla_flags.tune()
  from etils import epath

  from rndpo_jax.predict import native_network, native_run, run
  from rndpo_jax.predict.job import Options

  if asked.nnunet_folder:
    network = native_network.read_nnunet(asked.nnunet_folder, (0,))
  else:
    network = convolution(asked.patch, asked.spacing)
  options = Options(workers=1)
  run.run(native_run.job(network, options), str(folder / "in"), epath.Path(folder / "out"), options)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--folder", type=pathlib.Path, required=True)
  parser.add_argument("--shape", default="512,512,1300")
  parser.add_argument("--patch", type=int, default=128)
  parser.add_argument("--spacing", type=float, default=1.0, help="mm, of the network")
  parser.add_argument(
    "--nnunet_folder", help="a model folder of nnU-Net, in place of patch, spacing"
  )
  parser.add_argument("--make", action="store_true", help="only writes the volume")
  options = parser.parse_args()
  shape = tuple(map(int, options.shape.split(",")))
  volume = options.folder / "in" / "large.nii"
  if options.make:
    return make(volume, shape)
  shutil.rmtree(options.folder / "out", ignore_errors=True)
  volume.parent.mkdir(parents=True, exist_ok=True)
  subprocess.run([sys.executable, *sys.argv, "--make"], check=True)
  start = time.monotonic()
  predict(options.folder, options)
  peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
  seconds = time.monotonic() - start
  print(f"{options.shape}: {peak_gb:.2f} GB of memory at most, {seconds:.0f} s")
  sys.exit(peak_gb > LIMIT_GB)


if __name__ == "__main__":
  sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
  main()
