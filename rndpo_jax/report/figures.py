"""Charts and picture tiles of the report, as `data:` addresses that need no file and no network."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogFormatter

# Okabe and Ito's palette, told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, RED = "#0072b2", "#e69f00", "#009e73", "#d55e00"
YELLOW, GREY = "#f0e442", "#6b7280"
CLASS_COLORS = ("#e69f00", "#56b4e9", "#cc79a7", "#009e73", "#f0e442", "#d55e00", "#0072b2")
_STYLE = {
  "font.size": 10,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.edgecolor": "#9ca3af",
  "axes.grid": True,
  "grid.color": "#e5e7eb",
  "axes.axisbelow": True,
  "legend.frameon": False,
  "svg.hashsalt": "rndpo_jax",  # the same figure gives the same bytes
}
_TILE_PIXELS = 220
_HALO = withStroke(linewidth=3, foreground="white")  # keeps text legible over lines


@contextlib.contextmanager
def _style() -> Iterator[None]:
  """Matplotlib's own defaults and ours, whatever the user's matplotlibrc says."""
  with matplotlib.rc_context():
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(_STYLE)
    yield


@_style()
def lines(
  series: Mapping[str, tuple[Sequence[float], Sequence[float], dict]],
  *,
  ylabel: str,
  marks: Sequence[tuple[float, float, str, str]] = (),
  wide: bool = False,
) -> str:
  """A line chart over steps.

  Args:
    series: label -> (steps, values, matplotlib line options); a label starting with '_' stays out
      of the legend, and values that are NaN leave a gap.
    ylabel: what is drawn, with its unit.
    marks: (step, value, text, colour) of points to name.
    wide: a larger chart, its legend above.
  """
  figure = Figure(figsize=(6.2, 4.0) if wide else (4.4, 2.7), layout="constrained")
  axes = figure.add_subplot()
  for label, (steps, values, options) in series.items():
    axes.plot(steps, values, label=label, **{"linewidth": 1.8, **options})
  for step, value, text, color in marks:
    axes.plot([step], [value], "o", color=color, markersize=8, fillstyle="none", markeredgewidth=2)
    # The highest is named above it, others below: two that are close would be over each other.
    is_highest = value == max(mark[1] for mark in marks)
    axes.annotate(
      text, (step, value), xytext=(0, 9 if is_highest else -9), textcoords="offset points",
      ha="center", va="bottom" if is_highest else "top", color=color, path_effects=[_HALO],
      zorder=5,
    )  # fmt: skip
  axes.margins(x=0.06 if marks else 0.02, y=0.16 if marks else 0.08)
  axes.set_xlabel("fine-tuning step" if wide else "step")
  axes.set_ylabel(ylabel)
  if sum(not label.startswith("_") for label in series) > 1:
    if wide:
      figure.legend(loc="outside upper center", ncols=2, fontsize=10)
    else:
      axes.legend(loc="best", fontsize=9)
  return _svg(figure)


@_style()
def histogram(edges: Sequence[float], counts: Sequence[float], quantiles: Mapping) -> str:
  """Histogram over a logarithmic axis, with named quantiles as vertical lines."""
  figure = Figure(figsize=(5.6, 2.9), layout="constrained")
  axes = figure.add_subplot()
  edges = np.maximum(np.asarray(edges, float), 0.5)  # a logarithm has no place for 0
  first = int(np.argmax(np.asarray(counts) > 0))
  edges, counts = edges[first:], counts[first:]
  axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color="#93c5fd", edgecolor="white")
  axes.set_xscale("log")
  for axis_format in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
    axis_format(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
  for name, value in quantiles.items():
    if value and value > 0:
      axes.axvline(value, color=GREY, linewidth=1, linestyle="--")
      axes.annotate(
        f"{name}: {value:.0f}", (value, 1), xycoords=("data", "axes fraction"), rotation=90,
        xytext=(-3, -3), textcoords="offset points", ha="right", va="top", fontsize=8, color=GREY,
        path_effects=[_HALO],
      )  # fmt: skip
  axes.set_xlabel("region size (pixels where chosen and rejected differ)")
  axes.set_ylabel("pairs")
  return _svg(figure)


@_style()
def intervals(rows: Sequence[tuple[str, float, float, float]], *, chance: float, label: str) -> str:
  """Points with intervals, one row each: (name, value, low, high)."""
  figure = Figure(figsize=(5.6, 0.8 + 0.38 * len(rows)), layout="constrained")
  axes = figure.add_subplot()
  for y, (_, value, low, high) in enumerate(rows):
    axes.plot([low, high], [y, y], color=BLUE, linewidth=2, alpha=0.5)
    axes.plot([value], [y], "o", color=BLUE)
  axes.axvline(chance, color=RED, linewidth=1, linestyle="--")
  axes.set_yticks(range(len(rows)), [_plain_text(name) for name, *_ in rows])
  axes.set_ylim(len(rows) - 0.5, -0.5)
  axes.set_xlabel(label)
  return _svg(figure)


@_style()
def tile(
  image: np.ndarray,
  outlines: Sequence[tuple[np.ndarray, str, str]] = (),
  fill: tuple[np.ndarray, str] | None = None,
) -> str:
  """A picture with outlines.

  Args:
    image: [H, W, I]; three channels are shown as RGB, of any other number the first.
    outlines: (bool[H, W], colour, line style) each.
    fill: (bool[H, W], colour) of a region to tint and outline.
  """
  height, width = image.shape[:2]
  scale = _TILE_PIXELS / max(height, width)
  size = (max(width * scale, 24) / 100, max(height * scale, 24) / 100)
  figure = Figure(figsize=size, dpi=100)
  FigureCanvasAgg(figure)
  axes = figure.add_axes((0, 0, 1, 1))
  axes.set_axis_off()
  shown = display(image)
  axes.imshow(shown, cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="antialiased")
  if fill is not None and fill[0].any():
    tint = np.zeros((height, width, 4))
    tint[fill[0]] = (*matplotlib.colors.to_rgb(fill[1]), 0.45)
    axes.imshow(tint, aspect="auto", interpolation="nearest")
    outlines = [(fill[0], fill[1], "solid"), *outlines]
  for mask, color, style in outlines:
    if mask.any() and not mask.all():
      _outline(axes, mask, color, style)
  axes.set_xlim(-0.5, width - 0.5)
  axes.set_ylim(height - 0.5, -0.5)
  content = io.BytesIO()
  # Full colour resolution: thin coloured outlines blur without it.
  figure.savefig(content, format="jpg", pil_kwargs={"quality": 78, "subsampling": 0})
  return _address("image/jpeg", content.getvalue())


def _outline(axes, mask: np.ndarray, color: str, style: str) -> None:
  """Draws the border of a mask; its pixels are repeated outward, for a contour takes 2 at least."""
  padded = np.pad(mask.astype(float), 1, mode="edge")
  rows, columns = (np.arange(-1, n + 1) for n in mask.shape)
  axes.contour(columns, rows, padded, [0.5], colors=[color], linestyles=[style], linewidths=1.3)


def display(image: np.ndarray) -> np.ndarray:
  """[H, W, I] as f[H, W] or, with three channels, f[H, W, 3], in 0..1.

  uint8 keeps its range; anything else is stretched from its 0.5th to its 99.5th percentile, a
  channel at a time.
  """
  image = image if image.shape[-1] == 3 else image[..., :1]
  if image.dtype == np.uint8 and image.max(initial=0) > 1:
    shown = image / 255.0
  else:
    low, high = np.percentile(image.astype(np.float64), (0.5, 99.5), axis=(0, 1))
    shown = np.clip((image - low) / np.maximum(high - low, 1e-6), 0, 1)
  return shown if shown.shape[-1] == 3 else shown[..., 0]


def class_color(c: int) -> str:
  """The colour of foreground class `c`, counted from 1."""
  return CLASS_COLORS[(c - 1) % len(CLASS_COLORS)]


def _plain_text(text: str) -> str:
  """Text that matplotlib must not read as a formula."""
  return text.replace("$", r"\$")


def _svg(figure: Figure) -> str:
  content = io.BytesIO()
  figure.savefig(content, format="svg", metadata={"Date": None})
  return _address("image/svg+xml", content.getvalue())


def _address(kind: str, content: bytes) -> str:
  return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
