"""One look for every picture: heat maps, attention patterns, token strips, curves with bands.

Functions take numpy-like arrays and return a `matplotlib.figure.Figure`, made without pyplot: no
backend is chosen, no global state is touched. `save(figure, path)` writes it.

    save(heat_map(effect, title="effect of a patch"), "map.png")
"""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from causal_jax.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1f4e79", "#c8553d", "#4f8a5b", "#8c6bb1", "#d19a2a", "#5b5b5b", "#3aa0a8", "#a83a6e")
SEQUENTIAL, DIVERGING = "Blues", "RdBu_r"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}
DPI = 150
_MANY = 40  # tick labels beyond which only some are written


def figure(
    width: float = 6.0, height: float = 3.6, panels: tuple[int, int] = (1, 1)
) -> tuple["Figure", Any]:
    """An empty figure in the house style and its axes (an array of them for several panels)."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(width, height), layout="constrained")
        axes = fig.subplots(*panels)
    for ax in np.atleast_1d(axes).flat:
        ax.set_prop_cycle(color=COLOURS)
    return fig, axes


def save(fig: "Figure", path: str | os.PathLike) -> None:
    """Write a figure; folders on the way are made."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    fig.savefig(path, dpi=DPI)


def heat_map(
    values: Any,
    *,
    x: Sequence[str] | str = "position",
    y: Sequence[str] | str = "layer",
    title: str = "",
    label: str = "",
    centre: float | None = 0.0,
    limits: tuple[float, float] | None = None,
    ax: "Axes | None" = None,
) -> "Figure":
    """Values [rows, columns] as colours: layer x position, layer x head, any grid.

    Args:
        values: NaN is left blank. Row 0 is at the bottom, as layers are.
        x, y: tick labels (tokens, names), or the name of an axis that is numbered.
        label: what the colour means, with its unit.
        centre: this value is white and the two signs get two colours; None: one colour, from the
            least to the largest.
        limits: of the colours; None: from the values.
        ax: where to draw; None: a new figure.

    Raises:
        InputError: not two axes, or as many labels as there are not rows or columns.
    """
    values = _matrix("values", values)
    rows, columns = values.shape
    fig, ax = _axes(ax, 1.8 + min(max(0.22 * columns, 2.5), 14), 1.2 + min(0.2 * rows + 1, 12))
    finite = values[np.isfinite(values)]
    low, high = limits or ((finite.min(), finite.max()) if finite.size else (0.0, 1.0))
    if centre is not None and limits is None:
        reach = max(high - centre, centre - low, 1e-12)
        low, high = centre - reach, centre + reach
    colours = SEQUENTIAL if centre is None else DIVERGING
    image = ax.imshow(
        values, origin="lower", aspect="auto", cmap=colours, vmin=low, vmax=high,
        interpolation="nearest",
    )  # fmt: skip
    ax.grid(False)
    _ticks(ax.xaxis, x, columns, "x")
    _ticks(ax.yaxis, y, rows, "y")
    ax.set_title(title)
    fig.colorbar(image, ax=ax, label=label, shrink=0.9)
    return fig


def attention(
    pattern: Any,
    tokens: Sequence[str] | None = None,
    *,
    keys: Sequence[str] | None = None,
    title: str = "",
    ax: "Axes | None" = None,
) -> "Figure":
    """An attention pattern [T, S]: queries downwards, keys to the right, dark is much.

    Args:
        tokens: of the queries; also of the keys where there are as many.
        keys: of the keys.
    """
    pattern = _matrix("pattern", pattern)
    T, S = pattern.shape
    side = min(max(0.2 * max(T, S), 3), 12)
    fig, ax = _axes(ax, side + 1.2, side * T / max(T, S) + 1.2)
    image = ax.imshow(pattern, cmap=SEQUENTIAL, vmin=0, vmax=max(float(pattern.max()), 1e-12))
    ax.grid(False)
    if keys is None and tokens is not None and T == S:
        keys = tokens
    _ticks(ax.xaxis, "key" if keys is None else keys, S, "keys")
    _ticks(ax.yaxis, "query" if tokens is None else tokens, T, "tokens")
    ax.set_title(title)
    fig.colorbar(image, ax=ax, shrink=0.8)
    return fig


def token_strip(
    tokens: Sequence[str],
    values: Any,
    *,
    title: str = "",
    centre: float | None = 0.0,
    width: int = 16,
) -> "Figure":
    """Tokens in lines of text, each on the colour of its value.

    Args:
        tokens, values: as many of each.
        width: tokens per line.

    Raises:
        InputError: they are not as many.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    values = np.asarray(values, np.float64)
    if values.shape != (len(tokens),):
        raise InputError(f"values of shape {list(values.shape)} for {len(tokens)} tokens")
    lines = -(-len(tokens) // width)
    fig, ax = figure(0.75 * width, 0.42 * lines + 0.5)
    share = colour_share(values, centre)
    colours = colormaps[SEQUENTIAL if centre is None else DIVERGING]
    for i, (token, s) in enumerate(zip(tokens, share)):
        row, column = divmod(i, width)
        ax.add_patch(Rectangle((column, -row - 1), 1, 1, color=colours(s), linewidth=0))
        dark = s > 0.75 or (centre is not None and s < 0.25)
        ax.text(
            column + 0.5, -row - 0.5, plain(token)[:12], ha="center", va="center", fontsize=7,
            color="white" if dark else "black",
        )  # fmt: skip
    ax.set(xlim=(0, width), ylim=(-lines, 0), title=title)
    ax.axis("off")
    return fig


def curves(
    lines: Mapping[str, tuple[Any, Any]],
    *,
    x: str = "",
    y: str = "",
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    levels: Mapping[str, float] | None = None,
    ax: "Axes | None" = None,
) -> "Figure":
    """Curves, with the band from least to largest where a curve has several runs.

    Args:
        lines: name -> (x [n], y [n] or [seeds, n]); of several runs the mean is drawn.
        levels: name -> height of a dashed line (a threshold, a baseline).

    Raises:
        InputError: x and y of a curve have not the same length.
    """
    fig, ax = _axes(ax, 6.0, 3.6)
    for (name, (xs, ys)), colour in zip(lines.items(), _cycle()):
        xs, ys = np.asarray(xs), np.atleast_2d(np.asarray(ys, np.float64))
        if xs.shape != ys.shape[1:]:
            raise InputError(f"curve {name!r}: {len(xs)} x for {ys.shape[1:]} y")
        ax.plot(xs, ys.mean(0), color=colour, label=name, marker="o" if len(xs) < 30 else "", ms=3)
        if len(ys) > 1:
            ax.fill_between(xs, ys.min(0), ys.max(0), color=colour, alpha=0.18, linewidth=0)
    for (name, height), colour in zip((levels or {}).items(), reversed(COLOURS)):
        ax.axhline(height, color=colour, linestyle="--", linewidth=1, label=name)
    ax.set(xlabel=x, ylabel=y, title=title)
    if log_x:
        ax.set_xscale("log")
    if log_y:
        ax.set_yscale("log")
    if lines or levels:
        ax.legend()
    return fig


def bars(
    values: Mapping[str, Any], *, y: str = "", title: str = "", ax: "Axes | None" = None
) -> "Figure":
    """A bar per name; of several values the mean, each value as a dot.

    Args:
        values: name -> number, or the numbers of all seeds.
    """
    fig, ax = _axes(ax, 1.5 + max(0.9 * len(values), 2.5), 3.4)
    for i, ((name, value), colour) in enumerate(zip(values.items(), _cycle())):
        value = np.atleast_1d(np.asarray(value, np.float64))
        ax.bar(i, value.mean(), color=colour, width=0.7, label=name, alpha=0.85)
        if len(value) > 1:
            ax.plot(np.full(len(value), i), value, "o", color="black", ms=3)
    ax.set_xticks(range(len(values)), list(values), rotation=20 if len(values) > 4 else 0)
    ax.set(ylabel=y, title=title)
    return fig


def colour_share(values: Any, centre: float | None = 0.0) -> np.ndarray:
    """Values as places 0..1 in a colour map; `centre` at 0.5 (None: the least value at 0)."""
    values = np.nan_to_num(np.asarray(values, np.float64))
    if not values.size:
        return values
    if centre is None:
        return (values - values.min()) / max(np.ptp(values), 1e-12)
    return 0.5 + 0.5 * (values - centre) / max(np.abs(values - centre).max(), 1e-12)


def plain(token: str) -> str:
    """A token as a label: white space made visible, nothing that matplotlib would interpret."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥").replace("$", r"\$")
    return "".join(c if c.isprintable() else "?" for c in shown)


def _axes(ax: "Axes | None", width: float, height: float) -> tuple[Any, Any]:
    if ax is not None:
        return ax.get_figure(), ax
    return figure(width, height)


def _cycle():
    while True:
        yield from COLOURS


def _matrix(name: str, values: Any) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size:
        raise InputError(f"{name} of shape {list(values.shape)}: expected [rows, columns]")
    return values


def _ticks(axis: Any, labels: Sequence[str] | str, count: int, name: str) -> None:
    if isinstance(labels, str):
        axis.set_label_text(labels)
        return
    if len(labels) != count:
        raise InputError(f"{name}: {len(labels)} labels for {count} entries")
    every = -(-count // _MANY)
    shown = [plain(str(s))[:14] for s in labels[::every]]
    turn = axis.axis_name == "x" and max(map(len, shown)) > 2
    axis.set_ticks(range(0, count, every), shown, rotation=90 if turn else 0, fontsize=7)
