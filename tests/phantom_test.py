import numpy as np
import pytest

from rndpo_jax import config as config_lib
from rndpo_jax import errors
from rndpo_jax.data.sources import phantom


def _config(**changes):
  config = config_lib.base_config()
  config.data.update(changes)
  return config


def _draw(seed, num_classes=2, size=(40, 48), **changes):
  options = {"contrast": 0.5, "noise": 0.12, **changes}
  return phantom.draw(seed, size=size, num_classes=num_classes, **options)


def test_a_case_is_a_function_of_seed_and_number():
  config = _config()
  config.data.phantom.num_cases = 3
  first = [p.image for p in phantom.open_source(config).read(0)]
  again = [p.image for p in phantom.open_source(config).read(0)]
  (rest,) = [p.image for p in phantom.open_source(config).read(2)]
  config.data.phantom.num_cases = 2
  fewer = [p.image for p in phantom.open_source(config).read(0)]
  config.data.phantom.seed = 1
  other = [p.image for p in phantom.open_source(config).read(0)]
  np.testing.assert_array_equal(first, again)
  np.testing.assert_array_equal(first[:2], fewer)
  np.testing.assert_array_equal(rest, first[2])
  assert (first[0] != first[1]).mean() > 0.5
  assert (fewer[0] != other[0]).mean() > 0.5
  assert (fewer[1] != other[0]).mean() > 0.5


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("size", [(40, 48), (24, 24, 12)])
def test_every_class_is_there_and_not_all_over(num_classes, size):
  shares = []
  for seed in range(8):
    image, mask = _draw(seed, num_classes, size)
    assert image.shape == mask.shape == size
    assert image.dtype == mask.dtype == np.uint8
    shares.append(np.bincount(mask.ravel(), minlength=num_classes) / mask.size)
  shares = np.array(shares)
  assert shares.shape[1] == num_classes
  assert (shares[:, 1:].mean(axis=0) > 0.004).all()
  assert (shares[:, 0] > 0.5).all()


def test_left_ventricle_lies_in_myocardium():
  for seed in range(5):
    _, mask = _draw(seed, 4, (64, 64))
    inner = mask == 3
    around = np.zeros_like(inner)
    for axis in (0, 1):
      for step in (-1, 1):
        around |= np.roll(inner, step, axis)
    assert inner.any()
    assert set(np.unique(mask[around & ~inner])) <= {2}


def test_contrast_and_noise_act():
  def gap(contrast):
    pairs = [_draw(seed, contrast=contrast, noise=0.0) for seed in range(8)]
    return np.mean([i[m > 0].mean() / i[(m == 0) & (i > 20)].mean() for i, m in pairs])

  def roughness(noise):
    image, _ = _draw(0, noise=noise)
    return np.abs(np.diff(image.astype(np.float32), axis=0)).mean()

  assert gap(0.8) > gap(0.3) + 0.1
  assert roughness(0.3) > 1.5 * roughness(0.0)


def test_the_default_data_set_is_drawn_whole():
  pixels = list(phantom.open_source(_config()).read(0))
  assert len(pixels) == 152 and all(one.mask.any() for one in pixels)


def test_source_describes_itself():
  source = phantom.open_source(_config(num_classes=4, group_pattern=r"phantom_(\d\d)"))
  assert source.class_names[3] == "left ventricle" and source.num_classes == 4
  assert source.records[-1]["case_id"] == "phantom_0151"
  assert source.records[-1]["group_id"] == "01"


def test_what_it_cannot_draw_is_refused():
  with pytest.raises(errors.DataError, match="num_classes: found 3"):
    phantom.open_source(_config(num_classes=3))
  with pytest.raises(errors.DataError, match=r"phantom\.size: found \(72, 80\), expected 3"):
    phantom.open_source(_config(spatial_dims=3))


@pytest.mark.parametrize("options", [{"num_cases": 10**12}, {"size": (10**5, 10**5)}])
def test_what_nobody_could_draw_is_refused_before_memory_is_taken(options):
  config = _config(num_classes=2)
  config.data.phantom.update(options)
  with pytest.raises(errors.DataError, match="config.data.phantom: .*GiB of masks alone"):
    phantom.open_source(config)
