"""XLA's flags with which the tests' programs are compiled sooner, and how a test does without."""

import contextlib
import importlib.metadata

import pytest

# jaxlib 0.10 still has the older emitters of machine code, which take less than half the time; XLA
# of later ones ends the program on this flag. Programs are compiled in one piece, since the other
# core is another worker's.
FLAGS = (
  "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
  if importlib.metadata.version("jaxlib").startswith("0.10.")
  else ""
)


@contextlib.contextmanager
def emitters_in_use():
  """What is compiled meanwhile is emitted as users' programs are. JAX has no setting for it."""
  from jax._src import compiler  # not above: JAX reads the environment when it is imported

  make_options = compiler.get_compile_options

  def with_emitters(*args, **kwargs):
    options = make_options(*args, **kwargs)
    flag = ("xla_cpu_use_fusion_emitters", True)
    options.env_option_overrides = [*options.env_option_overrides, flag]
    return options

  with pytest.MonkeyPatch.context() as patch:
    if FLAGS:
      patch.setattr(compiler, "get_compile_options", with_emitters)
    yield
