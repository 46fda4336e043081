"""files: whole or not there, and errors that name the file."""

import errno
import resource

import pytest

from rndpo_jax import errors
from rndpo_jax.runtime import files


@pytest.mark.parametrize(
  "error,full",
  [
    (OSError(errno.ENOSPC, "x"), True),
    (OSError(errno.EDQUOT, "x"), True),
    (ValueError("RESOURCE_EXHAUSTED: write: Disk quota exceeded"), True),
    (RuntimeError("write() failed: No space left on device; at byte 8192"), True),
    (OSError(errno.EFBIG, "x"), True),
    (OSError(errno.EACCES, "x"), False),
    (ValueError("RESOURCE_EXHAUSTED: out of memory"), False),
  ],
)
def test_a_full_disk_and_a_full_quota_are_known(error, full):
  assert files.is_full_disk(error) == full


def test_round_trip_leaves_one_file(tmp_path):
  files.write_json(tmp_path / "new" / "a.json", {"b": [1, None]})
  files.write_json(tmp_path / "new" / "a.json", {"b": 2})
  assert files.read_json(tmp_path / "new" / "a.json") == {"b": 2}
  assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


@pytest.mark.parametrize(
  "text,found",
  [
    ("null", "found null, expected an object"),
    ("[1]", "found a list, expected an object"),
    ('{"a": Infinity}', "found Infinity, expected finite"),
    ("{}", "'a' is missing"),
    ('{"a": "x"}', "'a' is \"x\""),
    ('{"a": true}', "'a' is true"),
    ('{"a": {}}', "'a' is an object"),
    ("[" * 100_000, "no valid JSON"),
  ],
)
def test_what_the_program_did_not_write_is_named(tmp_path, text, found):
  (tmp_path / "a.json").write_text(text)
  with pytest.raises(errors.FileError, match=f"a.json: .*{found}.*delete it"):
    files.read_json(tmp_path / "a.json", a=int)
  (tmp_path / "a.json").write_text('{"a": 3, "b": null}')
  assert files.read_json(tmp_path / "a.json", a=int) == {"a": 3, "b": None}


def test_nan_is_refused_and_the_old_file_stays(tmp_path):
  files.write_json(tmp_path / "a.json", {"b": 1})
  with pytest.raises(ValueError, match="not JSON compliant"):
    files.write_json(tmp_path / "a.json", {"b": float("nan")})
  assert files.read_json(tmp_path / "a.json") == {"b": 1}


def test_truncated_json_is_named(tmp_path):
  (tmp_path / "a.json").write_text('{"b": ')
  with pytest.raises(errors.FileError, match="a.json: no valid JSON.*delete it"):
    files.read_json(tmp_path / "a.json")


def test_checksum_is_that_of_the_bytes(tmp_path):
  files.write_text(tmp_path / "a", "abc")
  expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
  assert files.sha256(tmp_path / "a") == expected


def test_as_many_files_can_be_open_as_are_needed():
  before = resource.getrlimit(resource.RLIMIT_NOFILE)
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (600, before[1]))
    files.allow_open(88, "pairs")
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 600
    files.allow_open(1024, "pairs")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard == before[1] and (soft >= 1024 + 512 or soft == resource.RLIM_INFINITY)
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_more_files_than_the_host_allows_raise(monkeypatch):
  monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
  with pytest.raises(errors.FileError, match=r"pairs: 4000 files .* needs 4512, .* allows it 4096"):
    files.allow_open(4000, "pairs")
