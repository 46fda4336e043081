"""JSON files of a work directory that somebody edited: one line that names the file."""

import shutil

import pytest

from rndpo_jax import errors, pipeline

# The file, and the stage that reads it.
READ_BY = (
  ("config.json", "report"),
  ("splits.json", "finetune"),
  ("data/records.json", "finetune"),
  ("base/selected.json", "finetune"),
  ("pairs/manifest.json", "finetune"),
  ("pairs/manifest.json", "evaluate"),
  ("pairs/judges.json", "evaluate"),
  ("pairs/fingerprints.json", "mine"),
  ("finetune/done.json", "evaluate"),
  ("results.json", "report"),
)


@pytest.fixture(scope="module")
def copied(tiny_run, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("edited") / "run"
  shutil.copytree(tiny_run[1], workdir)
  return tiny_run[0], workdir


@pytest.mark.parametrize("content", ["null", "[]", '"x"', '{"a": NaN}', "{}"])
@pytest.mark.parametrize("name,stage", READ_BY)
def test_an_edited_file_is_named(copied, name, stage, content):
  config, workdir = copied
  done, path = workdir / pipeline.DONE[stage], workdir / name
  kept = {one: one.read_bytes() for one in {done, path}}
  if done != path:
    done.unlink()
  path.write_text(content)
  try:
    with pytest.raises(errors.RndpoError) as refusal:
      pipeline.run(config, workdir, [stage])
  finally:
    for one, before in kept.items():
      one.write_bytes(before)
  assert path.name in str(refusal.value) or path.parent.name in str(refusal.value)
  assert len(str(refusal.value).splitlines()) == 1
