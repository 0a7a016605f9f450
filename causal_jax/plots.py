"""Pictures in one style: curves with bands, bars with intervals, heat maps.

    fig, (left, right) = panels(2)
    curves(left, steps, {"factorised": a, "merged": b}, title="test loss", xlabel="step")
    heat(right, matrix, title="value rows")
    fig.savefig("x.png")

Figures are matplotlib's own, made without pyplot: nothing global, no window.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#555555")
SIGNED, UNSIGNED = "RdBu_r", "Blues"  # colour maps
_TICKS = 48  # beyond so many labels they would overlap


def panels(
    count: int, *, columns: int = 3, width: float = 4.4, height: float = 3.4, title: str = ""
) -> tuple["Figure", list["Axes"]]:
    """A figure of `count` panels in rows of at most `columns`; width and height in inches each."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for spare in axes[count:]:
        spare.axis("off")
    if title:
        figure.suptitle(title, fontsize=10)
    return figure, axes[:count]


def curves(
    ax: "Axes",
    x: Any,
    lines: Mapping[str, Any],
    *,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    log: str = "",
    levels: Mapping[str, float] | None = None,
) -> None:
    """One line per name: the median over seeds, in a band from the lowest to the highest.

    Args:
        ax: where.
        x: [n] common to all lines.
        lines: {name: [n] or [seeds, n]}.
        title, xlabel, ylabel: texts.
        log: axes in logarithmic scale: "x", "y", "xy".
        levels: horizontal reference lines, {name: y}.
    """
    for i, (name, values) in enumerate(lines.items()):
        values = np.atleast_2d(np.asarray(values, np.float64))
        colour = COLOURS[i % len(COLOURS)]
        ax.plot(x, np.median(values, 0), color=colour, label=name, linewidth=1.5)
        if len(values) > 1:
            low, high = values.min(0), values.max(0)
            ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    _levels(ax, levels)
    if "x" in log:
        ax.set_xscale("log")
    if "y" in log:
        ax.set_yscale("log")
    _finish(ax, title, xlabel, ylabel, legend=bool(lines or levels))


def bars(
    ax: "Axes",
    groups: Sequence[str],
    series: Mapping[str, Any],
    *,
    title: str = "",
    ylabel: str = "",
    levels: Mapping[str, float] | None = None,
) -> None:
    """Bars side by side: the mean over seeds, a whisker from the lowest to the highest.

    Args:
        ax: where.
        groups: names along the axis, n of them.
        series: {name: [n] or [seeds, n]}, one bar of each in every group.
        title, ylabel: texts.
        levels: horizontal reference lines, {name: y}.
    """
    places, width = np.arange(len(groups)), 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        values = np.atleast_2d(np.asarray(values, np.float64))
        mean = values.mean(0)
        spread = np.stack([mean - values.min(0), values.max(0) - mean])
        at = places + (i - (len(series) - 1) / 2) * width
        whisker = spread if len(values) > 1 else None
        colour = COLOURS[i % len(COLOURS)]
        ax.bar(at, mean, width, yerr=whisker, color=colour, label=name, capsize=2, ecolor="#333333")
    _levels(ax, levels)
    ax.axhline(0.0, color="#333333", linewidth=0.8)
    slanted = max(map(len, groups), default=0) > 8
    ax.set_xticks(
        places, groups, rotation=25 if slanted else 0, ha="right" if slanted else "center"
    )
    _finish(ax, title, "", ylabel, legend=len(series) > 1 or bool(levels))


def heat(
    ax: "Axes",
    matrix: Any,
    *,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    xticks: Sequence[str] | None = None,
    yticks: Sequence[str] | None = None,
    limit: float | None = None,
    label: str = "",
) -> None:
    """A matrix [rows, columns] as colours, first row on top.

    Values of both signs are shown red (positive) and blue about a white zero, others from white to
    dark blue; `limit` is the largest magnitude of the scale (default: that of the matrix), `label`
    what the colours mean. NaN stays blank. Of very many ticks only some are written.
    """
    matrix = np.asarray(matrix, np.float64)
    top = float(np.nanmax(np.abs(matrix), initial=1e-12)) if limit is None else limit
    signed = bool(np.nanmin(matrix, initial=0.0) < 0)
    colours = {"cmap": SIGNED, "vmin": -top} if signed else {"cmap": UNSIGNED, "vmin": 0.0}
    image = ax.imshow(matrix, aspect="auto", interpolation="nearest", vmax=top, **colours)
    ax.figure.colorbar(image, ax=ax, shrink=0.85, label=label)
    if xticks is not None:
        every = -(-len(xticks) // _TICKS)
        ax.set_xticks(range(0, len(xticks), every), xticks[::every], rotation=45, ha="right")
    if yticks is not None:
        every = -(-len(yticks) // _TICKS)
        ax.set_yticks(range(0, len(yticks), every), yticks[::every])
    _finish(ax, title, xlabel, ylabel, legend=False, grid=False)


def _levels(ax: "Axes", levels: Mapping[str, float] | None) -> None:
    for i, (name, level) in enumerate((levels or {}).items()):
        ax.axhline(level, color="#888888", linestyle=("--", ":", "-.")[i % 3], lw=1, label=name)


def _finish(
    ax: "Axes", title: str, xlabel: str, ylabel: str, *, legend: bool, grid: bool = True
) -> None:
    ax.set_title(title, fontsize=9)
    ax.set_xlabel(xlabel, fontsize=8)
    ax.set_ylabel(ylabel, fontsize=8)
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(not grid)
    if grid:
        ax.grid(alpha=0.25)
    if legend:
        ax.legend(fontsize=7, frameon=False)
