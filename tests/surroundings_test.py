"""launch.run in odd surroundings: it works, or says in one line why it cannot."""

import os
import pathlib
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = "--config=tests/tiny_config.py"


def run(shell, workdir, *arguments, **variables):
  """The program by bash, in the place of RUN in `shell`: exit code, what it printed, its errors."""
  command = [sys.executable, "-m", "launch.run", CONFIG, f"--workdir={workdir}", *arguments]
  done = subprocess.run(
    ["bash", "-o", "pipefail", "-c", shell.replace("RUN", shlex.join(command))],
    cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert "Traceback" not in done.stderr, done.stderr
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
  "shell,variables,said",
  [
    ("RUN", {"JAX_PLATFORMS": "gpux"}, "error: JAX_PLATFORMS=gpux: JAX cannot use it here"),
    ("RUN", {"JAX_PLATFORMS": "cuda"}, "error: JAX_PLATFORMS=cuda: JAX cannot use it here"),
    ("ulimit -f 16; RUN", {}, "error: a file would be larger than this process may write"),
    ("RUN | head -n 1", {}, "error: nobody reads the standard output any more"),
  ],
)
def test_refused_in_one_line(tmp_path, shell, variables, said):
  code, _, errors = run(shell, tmp_path / "run", "--stages=prepare", **variables)
  (line,) = errors.splitlines()
  assert code == 1 and line.startswith(said), errors


@pytest.mark.parametrize("shell", ["RUN >&-", "RUN <&- >&- 2>&-"])
def test_closed_streams_are_nothing_to_it(tmp_path, shell):
  code, output, errors = run(shell, tmp_path / "run", "--stages=prepare")
  assert code == 0 and not output and not errors
  assert (tmp_path / "run" / "data" / "records.json").exists()


def test_the_users_number_types_and_drawing_settings_change_nothing(tiny_run, tmp_path):
  _, undisturbed = tiny_run
  (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfigure.dpi: 3000\nfont.size: 90\n")
  code, output, errors = run(
    "RUN", tmp_path / "run", JAX_ENABLE_X64="1", JAX_NUMPY_DTYPE_PROMOTION="strict",
    MPLBACKEND="nonsense", MATPLOTLIBRC=str(tmp_path / "matplotlibrc"),
  )  # fmt: skip
  assert code == 0, errors
  assert output.startswith("JAX_ENABLE_X64=True is not for this program: it runs with False\n")
  for name in ("results.json", "pairs/manifest.json"):
    assert (tmp_path / "run" / name).read_bytes() == (undisturbed / name).read_bytes()

  def pictures(workdir):
    parts = (workdir / "report.html").read_text().split('src="data:image')[1:]
    return [part.partition('"')[0] for part in parts]

  ours, theirs = pictures(tmp_path / "run"), pictures(undisturbed)
  assert len(ours) > 5 and ours == theirs
