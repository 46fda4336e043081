"""Programs of launch/ started from one process that has imported what takes long, and killed there.

`programs` gives a function that starts them; the process of their own that it starts them from is

  python -m tests.killable MODULE

which reads a line for every start: in JSON, the program's arguments, and a pattern of paths or "".
The module is run in a process of its own, which kills itself (signal 9) half way through writing a
file whose path fits the pattern; nothing depends on how soon somebody looks. Its exit code ends
what it printed.
"""

import contextlib
import fnmatch
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys

END = "ended by"


@contextlib.contextmanager
def programs(module):
  """start(*arguments, kill_at=PATTERN) -> (exit code, what it printed)."""
  process = subprocess.Popen(
    [sys.executable, "-m", "tests.killable", module],
    cwd=pathlib.Path(__file__).parent.parent,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )

  def start(*arguments, kill_at=""):
    process.stdin.write(json.dumps([arguments, kill_at]) + "\n")
    process.stdin.flush()
    lines = []
    for line in process.stdout:
      if line.startswith(END):
        return int(line.split()[-1]), "".join(lines)
      lines.append(line)
    raise AssertionError("".join(lines))

  with process:
    yield start


def kill_at(pattern):
  from rndpo_jax.runtime import files

  write = files.write_bytes

  def write_bytes(path, content, **options):
    if not fnmatch.fnmatch(str(path), pattern):
      return write(path, content, **options)
    path = pathlib.Path(path)
    (path.parent / f".{path.name}.tmp").write_bytes(content[: len(content) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

  files.write_bytes = write_bytes


def main():
  from launch import xla_flags

  xla_flags.tune()
  import flax  # noqa: F401
  import matplotlib.backends.backend_agg  # noqa: F401
  import nibabel  # noqa: F401
  import optax  # noqa: F401
  import orbax.checkpoint  # noqa: F401
  import tensorflow_datasets  # noqa: F401

  from rndpo_jax import pipeline  # noqa: F401

  module = sys.argv[1]
  for line in sys.stdin:
    arguments, pattern = json.loads(line)
    child = os.fork()
    if child == 0:
      sys.argv = [module, *arguments]
      if pattern:
        kill_at(pattern)
      runpy.run_module(module, run_name="__main__", alter_sys=True)
      sys.exit(0)
    _, status = os.waitpid(child, 0)
    print(END, os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
  main()
