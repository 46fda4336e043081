"""A phantom of twelve images, for the tests of what reads it."""

from rndpo_jax import config as config_lib


def get_config():
  config = config_lib.base_config()
  data = config.data
  data.size = (16, 16)
  data.num_labelled, data.num_val, data.num_test = 3, 2, 2
  data.phantom.num_cases = 12
  data.phantom.size = (20, 24)
  return config
