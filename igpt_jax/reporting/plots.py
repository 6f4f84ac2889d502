"""Plots of numbers: curves with error bars, baselines, the level of guessing, chosen points."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from igpt_jax.files import replacing

# Okabe and Ito's colours, which the colour-blind tell apart; no two curves share a marker either.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_CURVE_STYLES = ("-", "--", "-.", ":")
_LEVEL_STYLES = ("--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
_GREY = "0.3"  # of baselines
_LINE = 0.04  # height of a line of text, in shares of the axes' height
_FEW = 30  # points up to which a curve has markers
_MOST_WITHIN = 8  # curves whose legend lies within the axes


@dataclasses.dataclass(frozen=True)
class Curve:
  """A curve of a panel.

  Attributes:
    x, y: coordinates of its points.
    error: half the length of each point's error bar; None: of accuracies, their standard error.
    faint: True if it is shown behind the others.
    band: (lowest, highest) y of each point, shaded; None: there is none.
    dashed: True for a dashed black line; the other curves of the panel are solid then.
    joined: False for points without a line through them.
  """

  x: Sequence[float]
  y: Sequence[float]
  error: Sequence[float] | None = None
  faint: bool = False
  band: tuple[Sequence[float], Sequence[float]] | None = None
  dashed: bool = False
  joined: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
  """Curves that share axes.

  Attributes:
    curves: by name; one that begins with "_" isn't in the legend.
    y_label: what y is, and its unit.
    levels: horizontal lines, by name; equal ones share a line and name it together.
    chosen: (name, x, y) of points to mark with a star; None: there are none.
    accuracy: True if y is an accuracy, shown in percent.
    images: number of images that accuracies were measured on, for error bars; 0: unknown.
    classes: number of classes, for the accuracy of guessing; 0: unknown.
    ordered: True if the curves have an order, which their colours show.
    x_label: of an x axis of its own; "": it shares the figure's.
    log: the logarithmic axes, "x", "y" or "xy"; "": none.
  """

  curves: Mapping[str, Curve]
  y_label: str
  levels: Mapping[str, float] = dataclasses.field(default_factory=dict)
  chosen: tuple[str, Sequence[float], Sequence[float]] | None = None
  accuracy: bool = False
  images: int = 0
  classes: int = 0
  ordered: bool = False
  x_label: str = ""
  log: str = ""


def standard_error(accuracy: float, images: int) -> float:
  """Returns the standard error of an accuracy measured on so many images; 0 if unknown."""
  return math.sqrt(accuracy * (1 - accuracy) / images) if images else 0.0


def plot(
  path: str,
  *panels: Panel,
  title: str,
  x_label: str = "",
  note: str = "",
  whole_steps: bool = False,
  reverse_x: bool = False,
  x_ticks: Sequence[float] = (),
) -> None:
  """Draws panels, one below the other, into a PNG.

  Args:
    path: path of the PNG.
    panels: share the x axis, unless they have x labels of their own.
    title, x_label: texts of the figure.
    note: line below the title; what error bars are, say.
    whole_steps: True if x is a small integer (a layer): ticks at integers only.
    reverse_x: True if x decreases to the right.
    x_ticks: all ticks of a logarithmic x axis; (): the axis is linear.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot, ticker

  shared = not any(panel.x_label for panel in panels)
  figure, axes_of = pyplot.subplots(
    len(panels), squeeze=False, sharex=shared, constrained_layout=True,
    figsize=(7.5, 4.5 + (2.5 if shared else 4) * (len(panels) - 1)),
  )  # fmt: skip
  for axes, panel in zip(axes_of[:, 0], panels, strict=True):
    for axis in panel.log:
      getattr(axes, f"set_{axis}scale")("log")
    _draw(axes, panel)
    for axis in panel.log:
      _label_ticks(getattr(axes, f"{axis}axis"))
    axes.set_ylabel(panel.y_label)
    axes.set_xlabel(panel.x_label)
    if panel.accuracy:
      axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=None))
    axes.grid(alpha=0.3)
    beside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)}
    axes.legend(fontsize=8, **(beside if len(panel.curves) > _MOST_WITHIN else {}))
  last = axes_of[-1, 0]
  last.set_xlabel(x_label or panels[-1].x_label)
  if whole_steps:
    last.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
  if reverse_x:
    last.invert_xaxis()
  if x_ticks:
    last.set_xscale("log")
    last.set_xticks(x_ticks, labels=[f"{x:g}" for x in x_ticks])
    last.minorticks_off()
  # Not as mathematics: a folder's name may hold dollar signs.
  figure.suptitle(title, parse_math=False)
  if note:
    axes_of[0, 0].set_title(note, fontsize=8.5, color=_GREY)
  with replacing(path) as partial:
    figure.savefig(partial, dpi=130, format="png")
  pyplot.close(figure)


def _label_ticks(axis: Any) -> None:
  """Labels 1, 2 and 5 of each decade on a logarithmic axis of less than two, else each decade alone."""
  from matplotlib import ticker

  low, high = axis.get_view_interval()
  if high < 100 * low:
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:,g}")
  axis.set_minor_formatter(ticker.NullFormatter())


def _draw(axes: Any, panel: Panel) -> None:
  """Draws a panel's curves, levels and marks."""
  from matplotlib import colormaps

  many = max(len(panel.curves) - 1, 1)
  solid = panel.ordered or any(curve.dashed for curve in panel.curves.values())
  i = 0
  for name, curve in panel.curves.items():
    colour = _COLOURS[i % len(_COLOURS)]
    if panel.ordered:
      colour = colormaps["viridis"](0.9 * (1 - i / many))
    if curve.dashed:
      colour = "black"
    error = curve.error
    if error is None and panel.accuracy and panel.images:
      error = [standard_error(y, panel.images) for y in curve.y]
    # Hollow markers of different shapes, and gaps in later lines: equal curves show below each other.
    axes.errorbar(
      curve.x, curve.y, yerr=error, label=name, color=colour, alpha=0.35 if curve.faint else 1,
      linestyle=_line_style(curve, solid, i),
      linewidth=1 if curve.faint else 1.6, elinewidth=0.8, capsize=2,
      marker=_MARKERS[(i + i // len(_MARKERS)) % len(_MARKERS)] if len(curve.x) <= _FEW else None,
      markersize=6.5, markerfacecolor="none",
    )  # fmt: skip
    if curve.band:
      axes.fill_between(curve.x, *curve.band, color=colour, alpha=0.15, linewidth=0)
    i += not curve.faint  # the next one has a faint one's colour
  if panel.chosen:
    name, x, y = panel.chosen
    axes.plot(x, y, "*", label=name, color="gold", markeredgecolor="black", markersize=12, zorder=5)
  levels = dict(panel.levels)
  if panel.classes:
    chance = 1 / panel.classes
    bottom, top = axes.get_ylim()
    if chance > bottom - 0.75 * (top - bottom):
      levels[_chance(panel.classes)] = chance
    else:
      note = f"{_chance(panel.classes)}: {chance:.1%}, far below this axis"
      axes.annotate(note, (0.01, 0.015), xycoords="axes fraction", fontsize=8, color=_GREY)
  _draw_levels(axes, panel, levels)


def _line_style(curve: Curve, solid: bool, i: int) -> str:
  if not curve.joined:
    return "none"
  return "--" if curve.dashed else "-" if solid else _CURVE_STYLES[i % len(_CURVE_STYLES)]


def _chance(classes: int) -> str:
  return f"chance, 1 of {classes:,} classes"


def _draw_levels(axes: Any, panel: Panel, levels: Mapping[str, float]) -> None:
  """Draws horizontal lines, each named at its right end; names don't cover each other."""
  names: dict[float, list[str]] = {}
  for name, level in sorted(levels.items(), key=lambda item: item[1]):
    names.setdefault(level, []).append(name)
  for i, level in enumerate(names):
    axes.axhline(level, linestyle=_LEVEL_STYLES[i % len(_LEVEL_STYLES)], color=_GREY, linewidth=1.2)
  bottom, top = axes.get_ylim()
  axes.set_ylim(bottom, top)
  labels = []
  for level, equal in names.items():
    value = f"{level:.1%}" if panel.accuracy else f"{level:.4g}"
    if panel.accuracy and panel.images and _chance(panel.classes) not in equal:
      value += f" ± {standard_error(level, panel.images):.1%}"
    labels.append([*(f"{name} =" for name in equal[:-1]), equal[-1], value])
  at = [(level - bottom) / (top - bottom) for level in names]
  middles = _apart(at, [_LINE * len(lines) for lines in labels])
  for y, middle, lines in zip(at, middles, labels, strict=True):
    axes.annotate(
      "\n".join(lines), (1, y), (1.03, middle), xycoords="axes fraction", fontsize=8, va="center",
      color=_GREY, arrowprops={"arrowstyle": "-", "relpos": (0, 0.5), "color": _GREY, "linewidth": 0.6},
    )  # fmt: skip


def _apart(middles: Sequence[float], heights: Sequence[float]) -> list[float]:
  """Moves intervals, ordered by their middles, so that none overlaps the next, below 1 if they fit."""
  moved, free = [], -math.inf
  for middle, height in zip(middles, heights, strict=True):
    moved.append(max(middle, free + height / 2))
    free = moved[-1] + height / 2
  free = 1.0
  for i in reversed(range(len(moved))):
    moved[i] = min(moved[i], free - heights[i] / 2)
    free = moved[i] - heights[i] / 2
  return moved
