"""The compilation cache: where it is, its size, damaged entries, folders that cannot be used."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from rndpo_jax.runtime import compilation_cache, multihost


@pytest.fixture
def restored():
  """JAX's settings are as before afterwards."""
  names = (
    "jax_enable_compilation_cache", "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
  )  # fmt: skip
  before = {name: getattr(jax.config, name) for name in names}
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def test_default_folder_is_in_the_users_cache_directory(monkeypatch):
  monkeypatch.setenv("HOME", "/home/one")
  monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
  folder = compilation_cache.default_folder()
  assert folder.parent == pathlib.Path("/caches/rndpo_jax/xla")
  monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
  assert compilation_cache.default_folder().parent == pathlib.Path("/home/one/.cache/rndpo_jax/xla")
  other = "vendor_id : Other\nflags : fpu\n"
  monkeypatch.setattr(pathlib.Path, "read_text", lambda path: other)
  assert compilation_cache.default_folder().name != folder.name


def test_trim_deletes_what_was_used_longest_ago(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  folder = compilation_cache.default_folder()
  autotuned = folder / "xla_gpu_per_fusion_autotune_cache_dir"
  of_another_cpu = folder.parent / "other"
  files = {
    folder / "written_last-cache": (10, 400),
    of_another_cpu / "read_last-cache": (500, 20),
    autotuned / "old.textproto": (30, 30),
    folder / "oldest-cache": (20, 20),
  }
  for path, times in files.items():
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(100))
    os.utime(path, times)
  (folder / "notes.txt").write_bytes(bytes(10_000))  # not ours
  compilation_cache.trim(folder, 250)
  left = {path.name for path in folder.parent.rglob("*") if path.is_file()}
  assert left == {"written_last-cache", "read_last-cache", "notes.txt"}


def test_off_and_the_users_own_folder(tmp_path, monkeypatch, capsys, restored):
  trimmed = []
  monkeypatch.setattr(compilation_cache, "trim", lambda *arguments: trimmed.append(arguments))
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
  compilation_cache.use(None)
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own") and not trimmed
  assert f"kept in {tmp_path / 'own'} (--comp" in capsys.readouterr().out
  compilation_cache.use(str(tmp_path / "flag"))
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "flag")
  assert trimmed == [(tmp_path / "flag", 1 << 30)]
  assert (tmp_path / "flag").stat().st_mode & 0o777 == 0o700
  assert "at most 1 GiB" in capsys.readouterr().out
  compilation_cache.use("off")
  assert not jax.config.jax_enable_compilation_cache and not capsys.readouterr().out


def test_folder_that_cannot_be_written_is_one_line(tmp_path, capsys, restored):
  (tmp_path / "file").touch()
  compilation_cache.use(str(tmp_path / "file" / "cache"))
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith("no compilation cache: ") and "--compilation_cache=DIR" in line
  assert not jax.config.jax_enable_compilation_cache


def test_no_home_directory_is_one_line(monkeypatch, capsys, restored):
  monkeypatch.setenv("XDG_CACHE_HOME", "")
  monkeypatch.setattr(os.path, "expanduser", lambda path: path)
  jax.config.update("jax_compilation_cache_dir", None)
  compilation_cache.use(None)
  (line,) = capsys.readouterr().out.splitlines()
  assert "no home directory" in line and not jax.config.jax_enable_compilation_cache


def test_folder_that_one_process_does_not_see_is_not_used(tmp_path, monkeypatch, capsys, restored):
  monkeypatch.setattr(multihost, "processes_where", lambda value: [1])
  compilation_cache.use(str(tmp_path))
  (line,) = capsys.readouterr().out.splitlines()
  assert "process 1 does not see" in line and not jax.config.jax_enable_compilation_cache
  assert not list(tmp_path.iterdir())


PROGRAM = """
import sys, jax
from rndpo_jax.runtime import compilation_cache
compilation_cache.use(sys.argv[1])
print("result", jax.jit(lambda x: (x @ x + x).sum())(jax.numpy.full((8, 8), 0.1)).item().hex())
"""


def test_damaged_entry_is_made_again(tmp_path):
  environment = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

  def run():
    done = subprocess.run(
      [sys.executable, "-c", PROGRAM, tmp_path], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.splitlines()

  kept, result = run()
  assert str(tmp_path) in kept
  (entry,) = tmp_path.glob("jit__lambda*-cache")
  whole = entry.read_bytes()
  assert run() == [kept, result]  # from the cache: the same number
  entry.write_bytes(whole[: len(whole) // 2])  # as a process that was killed leaves it
  first, said, again = run()
  assert re.match("compilation cache: Error reading .*; compiled again", said) and again == result
  assert len(entry.read_bytes()) > len(whole) // 2
  assert run() == [kept, result]
