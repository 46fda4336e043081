"""Results as a document, a table and a plot."""

from __future__ import annotations

import importlib.metadata
import io
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import jax
import matplotlib
import rich.box
import rich.console
import rich.table

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402, the backend comes first

from rndpo_jax.benchmark import timing  # noqa: E402
from rndpo_jax.runtime import files  # noqa: E402

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")

METHOD = (
  "Variants are compiled (time apart) and run before they are timed. Rounds of one sample each, "
  "in an order drawn again every round, after a pause of 10 ms; a sample is calls_per_sample calls "
  "in a row and a wait for the outputs; each call takes the next of many random inputs. "
  "seconds_median is the median over samples, p25 and p75 its spread. bytes_at_least is what any "
  "program must move, bandwidth is that over the median, and copy_bandwidth is that of y = x + 1 "
  "(every byte read and written once), timed in the same rounds: for the loss on the logits, else "
  "on 64 MiB. Memory of a call is on one device."
)


def document(rows: Sequence[dict[str, Any]], peers: bool) -> dict[str, Any]:
  """What the JSON file holds: command, versions, devices, method and the rows.

  Args:
    rows: as `timing.rows` returns them.
    peers: whether PyTorch was timed beside, so that its version is told.
  """
  versions = {"python": platform.python_version()}
  versions |= {name: importlib.metadata.version(name) for name in PACKAGES}
  if peers:
    import torch

    versions["torch"] = torch.__version__
  stats = jax.local_devices()[0].memory_stats() or {}
  return {
    "versions": versions,
    "torch_threads": torch.get_num_threads() if peers else None,
    "device_kind": jax.devices()[0].device_kind,
    "num_devices": jax.device_count(),
    "command": shlex.join(["python", "-m", "launch.benchmark", *sys.argv[1:]]),
    "platform": jax.default_backend(),
    "processor": _processor(),
    "num_cores": len(os.sched_getaffinity(0)),
    "device_peak_memory_bytes": stats.get("peak_bytes_in_use"),
    "method": METHOD,
    "results": list(rows),
  }


def _processor() -> str | None:
  """The host's processor as Linux names it."""
  try:
    with open("/proc/cpuinfo") as lines:
      names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  except OSError:
    return None
  return names[0] if names else None


def write(path: os.PathLike, content: dict[str, Any]) -> list[str]:
  """Writes the JSON file and, if the loss was timed, a plot beside it; returns the paths."""
  files.write_json(path, content)
  written = [str(path)]
  rows = [r for r in content["results"] if r["benchmark"] == "loss" and r["status"] == "ok"]
  if rows:
    written.append(str(path).removesuffix(".json") + ".png")
    files.write_bytes(written[1], plot(rows, f"{content['device_kind']}, {content['processor']}"))
  return written


COLUMNS = (
  "variant", "compile s", "median ms", "p25 - p75", "images/s", "pairs/s", "Mpixel/s", "GB/s",
  "of copy", "memory MB", "relative time",
)  # fmt: skip


def tables(rows: Sequence[dict[str, Any]]) -> list[rich.table.Table]:
  """One table for each benchmark and shape, in the order of the rows."""
  made: dict[str, rich.table.Table] = {}
  for row in rows:
    title = f"{row['benchmark']} {row['shape']}, {row['classes']} classes, {row['dtype']}"
    if title not in made:
      made[title] = rich.table.Table(title=title, box=rich.box.SIMPLE)
      for column in COLUMNS:
        made[title].add_column(column, justify="left" if column == "variant" else "right")
    made[title].add_row(*_cells(row))
  return list(made.values())


def print_tables(rows: Sequence[dict[str, Any]]) -> None:
  """Prints the tables, wide enough that a pipe does not cut them."""
  console = rich.console.Console()
  if not console.is_terminal:
    console = rich.console.Console(width=160)
  for table in tables(rows):
    console.print(table)
  baselines = dict.fromkeys((r["benchmark"], r["baseline"]) for r in rows if r["status"] == "ok")
  for name, baseline in baselines:
    console.print(f"{name}: times relative to {baseline!r}", markup=False)
  for row in rows:
    if row["status"] != "ok":
      console.print(f"{row['variant']}: {row['status']}, {row['reason']}", markup=False)


def _cells(row: dict[str, Any]) -> list[str]:
  if row["status"] != "ok":
    return [row["variant"], *["-"] * (len(COLUMNS) - 2), row["status"]]

  def number(key, scale=1.0, digits=4):
    return "-" if row[key] is None else f"{row[key] * scale:.{digits}g}"

  return [
    row["variant"],
    number("compile_seconds", digits=2),
    number("seconds_median", 1e3),
    f"{number('seconds_p25', 1e3, 3)} - {number('seconds_p75', 1e3, 3)}",
    number("images_per_second"),
    number("pairs_per_second"),
    number("megapixels_per_second"),
    number("bandwidth_bytes_per_second", 1e-9, 3),
    number("fraction_of_copy_bandwidth", digits=3),
    number("peak_memory_bytes", 1e-6),
    number("time_over_baseline", digits=3),
  ]


def plot(rows: Sequence[dict[str, Any]], title: str) -> bytes:
  """PNG: throughput against size, one line a variant, and the limit that the copy sets.

  The limit at a size is the copy's bandwidth there over the bytes that a pixel needs at least.
  """
  figure, axes = plt.subplots(figsize=(8, 5), dpi=120)
  measured = [row for row in rows if row["variant"] != timing.COPY]
  for name in dict.fromkeys(row["variant"] for row in measured):
    points = sorted(
      (row["pixels"], row["megapixels_per_second"]) for row in measured if row["variant"] == name
    )
    axes.plot(*zip(*points, strict=True), marker="o", label=name)
  limit = sorted(
    {
      (r["pixels"], r["copy_bandwidth_bytes_per_second"] * r["pixels"] / r["bytes_at_least"] / 1e6)
      for r in measured
    }
  )
  axes.plot(*zip(*limit, strict=True), "k--", marker="_", label="limit: copy bandwidth")
  axes.set(xscale="log", yscale="log", xlabel="pixels", ylabel="megapixels a second", title=title)
  first = measured[0]
  axes.text(
    0.99, 0.01, f"value and gradient, {first['classes']} classes, {first['dtype']}, "
    f"{first['pairs']} pair(s) an image", transform=axes.transAxes, ha="right", fontsize=8,
  )  # fmt: skip
  axes.grid(True, which="both", alpha=0.2)
  axes.legend(fontsize=8)
  stream = io.BytesIO()
  figure.savefig(stream, format="png", bbox_inches="tight")
  plt.close(figure)
  return stream.getvalue()
