"""config: keys on files, judges and places that cannot be read raise ConfigError."""

import fsspec
import pytest

from rndpo_jax import config as config_lib
from rndpo_jax import errors, pipeline
from rndpo_jax.checks import config_checks
from rndpo_jax.planning import dry_run

# On files: what is set, and what the message expects.
FILES = [
  ({"proposals.mix": "file:4"}, "config.data.proposals: not set"),
  ({"proposals.mix": "file+threshold:4"}, "use 'file:4'"),
  ({"proposals.mix": "file:2,file:2"}, "'file' is there twice"),
  ({"judge.name": "file"}, "'file' scores proposals from files, and config.proposals.mix has none"),
  (
    {"proposals.mix": "base:1,file:4", "data.proposals": "/own"},
    "config.judge: 'entropy' looks at the probabilities of each proposal",
  ),
  ({"data.proposals": "s3://a/b"}, "config.data.proposals: found 's3://a/b'"),
  ({"data.preferences": "s3://a/b"}, "config.data.preferences: found 's3://a/b'"),
  (
    {"data.preferences": "/p.csv", "finetune.terms.consensus.weight": 1.0},
    "config.finetune.terms.consensus: it learns the mean of mined proposals",
  ),
  (
    {"data.preferences": "/p.csv", "finetune.pair_weight": "reliability"},
    "config.finetune.pair_weight: found 'reliability', but pairs of config.data.preferences",
  ),
  (
    {"data.preferences": "/p.csv"}
    | {f"finetune.terms.chosen.{name}": 1.0 for name in ("weight", "image_temperature")},
    "terms.chosen.image_temperature: found 1.0, but pairs of config.data.preferences have no",
  ),
  (
    {"data.preferences": "/p.csv", "data.proposals": "/own"},
    "config.data.proposals: found '/own', which nothing reads",
  ),
]  # fmt: skip


JUDGES = [":", ".x:f", "x.:f", "x:", ":f", "x:f:g", "x:f.g", "1x:f", "x y:f", "../x:f"]


BUCKETS = ["s3://bucket/run", "http://host/run", "https://host/run", "gs://bucket/run"]


@pytest.mark.parametrize("changes,says", FILES)
def test_keys_on_files_that_do_not_fit_raise(changes, says):
  config = config_lib.base_config()
  config.update_from_flattened_dict(changes)
  with pytest.raises(errors.ConfigError, match=says):
    config_checks.validate(config)


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_that_is_no_package_module_function_raises(name):
  for key, value in (("name", name), ("compare", (name,))):
    config = config_lib.base_config()
    config.judge[key] = value
    with pytest.raises(errors.ConfigError, match="config.judge: unknown judge .*module:function"):
      config_checks.validate(config)


@pytest.mark.parametrize("place", BUCKETS)
def test_a_place_that_cannot_be_read_from_here_raises(place, monkeypatch, tmp_path):
  real = fsspec.get_filesystem_class

  def without_gcsfs(name):
    if name == "gs":
      raise ImportError("gcsfs")
    return real(name)

  monkeypatch.setattr(fsspec, "get_filesystem_class", without_gcsfs)
  wanted = "needs the package gcsfs" if place.startswith("gs") else "expected a folder of this host"
  for key in ("base.workdir", "data.split_file"):
    config = config_lib.base_config()
    config.update_from_flattened_dict({key: place})
    with pytest.raises(errors.ConfigError, match=f"config.{key}: .*{place}.* ?{wanted}"):
      config_checks.validate(config)
  for function in (pipeline.run, dry_run.run):
    with pytest.raises(errors.ConfigError, match=f"--workdir: .*{place}.* ?{wanted}"):
      function(config_lib.base_config(), place)
