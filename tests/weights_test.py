"""weights: nnU-Net's keys to parameters and back, bit for bit, in any order of axes."""

import jax
import numpy as np
import pytest
from nnunet_network_test import CASES, IDS, PLAIN, make

from rndpo_jax.models import nnunet, nnunet_architecture
from rndpo_jax.nnunet import weights

SIZES = {"num_channels": 2, "num_classes": 3}


def named(made, space):
  """Weights as in a file: random, the heads that are not read among them."""
  found = weights.from_params(make(made, space)[1], made)
  rng = np.random.default_rng(1)
  for name in found:
    if ".seg_layers." in name:
      found[name] = rng.normal(size=found[name].shape).astype(np.float32)
  return found


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("made,space", CASES, ids=IDS)
def test_to_parameters_and_back_is_the_same_bit_for_bit(made, space, reverse):
  axes = tuple(range(len(space)))[::-1] if reverse else None
  before = named(made, space)
  params, others = weights.to_params(before, made, axes=axes, **SIZES)
  after = weights.from_params(params, made, axes=axes, other_heads=others)
  assert list(after) == list(before)
  for name, array in before.items():
    assert after[name].shape == array.shape and after[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("made,space", CASES, ids=IDS)
def test_an_image_with_its_axes_in_another_order_has_the_same_logits(made, space):
  axes = (1, 0) if len(space) == 2 else (2, 0, 1)
  segmenter, _, images = make(made, space)
  file = named(made, space)
  plain, _ = weights.to_params(file, made, **SIZES)
  turned, _ = weights.to_params(file, made, axes=axes, **SIZES)
  other = nnunet.build(made.transposed(axes), num_classes=3)
  order = (0, *(1 + axis for axis in axes), len(space) + 1)
  found = jax.jit(other.apply)(turned, images.transpose(order))
  wanted = jax.jit(segmenter.apply)(plain, images).transpose(order)
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
  "changes,num_keys,num_unique",
  [
    ({"features": (8, 16, 32)}, 136, 48),
    ({"features": (32, 64, 128, 256, 320, 320)}, 292, 108),
    ({"features": (32, 64, 128, 256, 512, 512, 512, 512)}, 396, 148),
    ({"is_residual": True, "features": (32, 64, 128, 256, 320, 320)}, 956, 264),
  ],
)
def test_the_keys_are_as_many_as_in_nnunets_files(changes, num_keys, num_unique):
  levels = len(changes["features"])
  made = nnunet_architecture.derive(
    is_residual=False, spatial_dims=2, width=1, depth=levels, max_width=9
  )
  if changes.get("is_residual"):
    changes = {
      **changes, "encoder_counts": (1, 3, 4, 6, 6, 6), "decoder_counts": (1,) * 5
    }  # fmt: skip
  keys = list(weights.keys(made._replace(**changes)))
  assert len({key.name for key in keys}) == len(keys) == num_keys
  assert len({key.path for key in keys}) == num_unique


def test_some_names_in_the_order_of_the_file():
  names = [key.name for key in weights.keys(PLAIN)]
  block = "encoder.stages.0.0.convs.0"
  assert names[:8] == [
    *(f"{block}.{part}" for part in ("conv.weight", "conv.bias", "norm.weight", "norm.bias")),
    *(f"{block}.all_modules.{part}" for part in ("0.weight", "0.bias", "1.weight", "1.bias")),
  ]
  assert f"decoder.{block}.all_modules.0.weight" in names
  assert names[-4:] == [
    f"decoder.seg_layers.{n}.{part}" for n in "01" for part in ("weight", "bias")
  ]


def test_weights_that_do_not_fit_raise_naming_the_key():
  file = named(*CASES[0])
  first = "encoder.stages.0.0.convs.0.conv.weight"
  copy = "decoder.encoder.stages.0.0.convs.0.all_modules.0.weight"
  running = {"encoder.stages.0.0.convs.0.norm.running_mean": np.zeros(2, np.float32)}
  for change, message in [
    ({first: file[first].astype(np.float16)}, rf"{first}: found float16\[1, 3, 2, 2\]"),
    ({first: file[first][:1]}, rf"{first}: .*expected float32\[1, 3, 2, 2\]"),
    ({first: file[first].ravel()}, rf"{first}: found float32\[12\]"),
    ({first: np.full_like(file[first], np.nan)}, f"{first}: found values that are not finite"),
    ({copy: file[copy] + 1}, f"{copy}: found other values than under the first name"),
    (running, r"0 keys are missing \(none\) and 1 are left over \(.*running_mean\)"),
  ]:
    with pytest.raises(ValueError, match=message):
      weights.to_params({**file, **change}, PLAIN, **SIZES)
  del file[copy]
  with pytest.raises(ValueError, match=rf"1 keys are missing \({copy}\)"):
    weights.to_params(file, PLAIN, **SIZES)


def test_heads_that_prediction_does_not_read_are_zeros_unless_given():
  found = weights.from_params(make(*CASES[0])[1], PLAIN)
  assert found["decoder.seg_layers.0.weight"].shape == (3, 3, 1, 1)
  assert not found["decoder.seg_layers.0.weight"].any()
  assert found["decoder.seg_layers.1.weight"].any()
