"""losses, models and mining stand alone: they import nothing of how the program runs."""

import ast
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
ABOVE = ("rndpo_jax.runtime", "rndpo_jax.stages", "rndpo_jax.training", "launch")


def imported(path):
  """Files of this project that a file imports, anywhere in it."""
  for node in ast.walk(ast.parse(path.read_text())):
    base = [node.module] if isinstance(node, ast.ImportFrom) else []
    found = node.names if isinstance(node, ast.Import | ast.ImportFrom) else []
    for name in [*base, *(".".join([*base, alias.name]) for alias in found)]:
      stem = ROOT / name.replace(".", "/")
      yield from filter(pathlib.Path.exists, (stem.with_suffix(".py"), stem / "__init__.py"))


def test_pure_packages_import_nothing_from_above_them():
  pure = (ROOT / "rndpo_jax" / name for name in ("losses", "models", "mining"))
  seen, left = set(), [path for folder in pure for path in folder.glob("*.py")]
  while left:
    seen.add(path := left.pop())
    left += set(imported(path)) - seen
  names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in seen}
  assert {"rndpo_jax.losses.margins", "rndpo_jax.models.unet", "rndpo_jax.mining.program"} < names
  assert not [name for name in names if name.startswith(ABOVE)]


def test_losses_load_jax_numpy_and_chex_alone():
  loaded = []
  for names in ("jax, numpy, chex", "rndpo_jax.losses"):
    code = f"import sys, {names}; print(*{{m.partition('.')[0] for m in sys.modules}})"
    loaded.append(set(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT).split()))
  assert loaded[1] - loaded[0] == {b"rndpo_jax"}
