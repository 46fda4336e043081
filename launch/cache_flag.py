"""The flag of the compilation cache, shared by the programs that train."""

from absl import flags

_COMPILATION_CACHE = flags.DEFINE_string(
  "compilation_cache", None,
  "Folder where compiled programs are kept for later runs, or 'off'; by default that of "
  "JAX_COMPILATION_CACHE_DIR, else one in the user's cache directory.",
)  # fmt: skip


def use():
  """Turns the cache on as the flag says: after the processes have met, before any compilation."""
  from rndpo_jax.runtime import compilation_cache

  compilation_cache.use(_COMPILATION_CACHE.value)
