"""nnunet.folder: a model folder becomes a network; a real one's logits are PyTorch's."""

import json
import os
import pathlib

import jax
import nnunet_reference
import numpy as np
import pth_files
import pytest

from rndpo_jax import errors
from rndpo_jax.models import nnunet, nnunet_architecture
from rndpo_jax.nnunet import folder, weights

MADE = nnunet_architecture.derive(
  is_residual=False, spatial_dims=2, width=2, depth=2, max_width=8
)._replace(kernels=((1, 3), (3, 3)), strides=((1, 1), (1, 2)))


def write(path):
  """A tiny model folder; returns its weights."""
  segmenter = nnunet.build(MADE, num_classes=2)
  image = jax.ShapeDtypeStruct((1, 4, 6, 1), np.float32)
  params = jax.eval_shape(segmenter.init, jax.random.key(0), image)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
  named = weights.from_params(params, MADE)
  pth_files.write(path / "fold_0" / "checkpoint_final.pth", named)
  own = {
    "UNet_class_name": "PlainConvUNet",
    "UNet_base_num_features": 2,
    "unet_max_num_features": 8,
    "n_conv_per_stage_encoder": MADE.encoder_counts,
    "n_conv_per_stage_decoder": MADE.decoder_counts,
    "pool_op_kernel_sizes": MADE.strides,
    "conv_kernel_sizes": MADE.kernels,
    "spacing": [1.5, 2.0],
    "patch_size": [4, 6],
    "normalization_schemes": ["ZScoreNormalization"],
    "use_mask_for_norm": [False],
  }
  plans = {"transpose_forward": [0, 1, 2], "configurations": {"2d": own}}
  (path / "plans.json").write_text(json.dumps(plans))
  dataset = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "organ": 1}}
  (path / "dataset.json").write_text(json.dumps(dataset))
  return named


def test_a_folder_gives_the_logits_of_its_weights_for_images_in_our_order_of_axes(tmp_path):
  named = write(tmp_path)
  model = folder.read(tmp_path)
  image = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)  # (x, y)
  logits = jax.jit(model.segmenter.apply)(model.params, image[None, :, :, None])
  wanted = nnunet_reference.forward(named, MADE, np.float64(image.T[None])).T
  assert logits.shape == (1, 6, 4, 2)
  np.testing.assert_allclose(logits[0], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
  again = weights.from_params(
    model.params, model.plans.architecture, axes=model.plans.axes, other_heads=model.other_heads
  )
  assert {name: array.tobytes() for name, array in again.items()} == {
    name: array.tobytes() for name, array in named.items()
  }


def test_weights_that_the_plans_do_not_describe_raise_naming_the_file(tmp_path):
  write(tmp_path)
  content = json.loads((tmp_path / "plans.json").read_text())
  content["configurations"]["2d"]["UNet_base_num_features"] = 3
  (tmp_path / "plans.json").write_text(json.dumps(content))
  with pytest.raises(errors.FileError, match=r"fold_0/checkpoint_final.pth: encoder.stages.0.0"):
    folder.read(tmp_path)
  with pytest.raises(errors.FileError, match="fold_1/checkpoint_final.pth: .*No such file"):
    folder.read(tmp_path, 1)


@pytest.mark.skipif("RNDPO_NNUNET_MODEL" not in os.environ, reason="no model of nnU-Net here")
def test_logits_of_a_real_model_are_those_of_pytorch():
  """RNDPO_NNUNET_MODEL has model/.../fold_0 and expected/forward_and_preprocessing.npz."""
  root = pathlib.Path(os.environ["RNDPO_NNUNET_MODEL"])
  place = next(root.glob("model/**/fold_0")).parent
  stored = np.load(root / "expected" / "forward_and_preprocessing.npz")
  model = folder.read(place)
  # (1, I, y, x) to (1, x, y, I)
  images, wanted = (stored[f"network_{name}"].transpose(0, 3, 2, 1) for name in ("input", "logits"))
  logits = jax.jit(model.segmenter.apply)(model.params, images)
  difference = float(np.abs(logits - wanted).max() / np.abs(wanted).max())
  print(f"largest difference of logits {difference:.2e} of the largest logit")
  assert difference < 1e-4
  again = weights.from_params(
    model.params, model.plans.architecture, axes=model.plans.axes, other_heads=model.other_heads
  )
  assert list(again) == list(model.checkpoint.weights)
  for name, array in model.checkpoint.weights.items():
    assert again[name].tobytes() == array.tobytes(), name
