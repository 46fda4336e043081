"""Programs of launch/ started from one process that has imported what takes long, and killed there.

  python -m tests.killable MODULE [ARGUMENT...]

Reads a line for every start: a path, or none. The module is run in a process of its own, which
kills itself (signal 9) half way through writing a file whose path fits the pattern; nothing depends
on how soon somebody looks. Its exit code ends what it printed.
"""

import fnmatch
import os
import pathlib
import runpy
import signal
import sys

END = "ended by"


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

  module, *arguments = sys.argv[1:]
  for line in sys.stdin:
    child = os.fork()
    if child == 0:
      sys.argv = [module, *arguments]
      if line.strip():
        kill_at(line.strip())
      runpy.run_module(module, run_name="__main__", alter_sys=True)
      sys.exit(0)
    _, status = os.waitpid(child, 0)
    print(END, os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
  main()
