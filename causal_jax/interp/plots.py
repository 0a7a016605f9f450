"""Pictures of what was found: maps over layers and positions or heads, patterns, coloured tokens.

Every function returns a matplotlib `Figure`, made without pyplot; `save(figure, path)` writes it.
Curves, bars and the style itself are in `causal_jax.plots`.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from causal_jax.errors import InputError
from causal_jax.plots import SIGNED, UNSIGNED, heat, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save(figure: "Figure", path: str | os.PathLike) -> None:
    """Write a figure; folders on the way are made."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    figure.savefig(path, dpi=150)


def heat_map(
    values: Any,
    *,
    x: Sequence[str] | str = "position",
    y: Sequence[str] | str = "layer",
    title: str = "",
    label: str = "",
    limit: float | None = None,
) -> "Figure":
    """Values [rows, columns] as colours: layer x position, layer x head, any grid.

    Args:
        values: of both signs: red and blue about a white zero; otherwise white to dark. NaN is
            blank.
        x, y: labels (tokens, names), or the name of a numbered axis.
        label: what the colours mean, with the unit.
        limit: largest magnitude of the scale; None: that of the values.

    Raises:
        InputError: not two axes, or labels in another number.
    """
    values = _matrix("values", values)
    rows, columns = values.shape
    width, height = 2.2 + min(max(0.24 * columns, 3), 14), 1.4 + min(max(0.2 * rows, 1), 12)
    figure, (ax,) = panels(1, width=width, height=height)
    heat(
        ax, values, title=title, limit=limit, label=label,
        xticks=_labels("x", x, columns), yticks=_labels("y", y, rows),
        xlabel=x if isinstance(x, str) else "", ylabel=y if isinstance(y, str) else "",
    )  # fmt: skip
    return figure


def attention(
    pattern: Any,
    tokens: Sequence[str] | None = None,
    *,
    keys: Sequence[str] | None = None,
    title: str = "",
) -> "Figure":
    """An attention pattern [T, S]: a row per query, dark is much.

    Args:
        tokens: of the queries, and of the keys where there are as many.
        keys: of the keys.

    Raises:
        InputError: not two axes, or labels in another number.
    """
    pattern = _matrix("pattern", pattern)
    T, S = pattern.shape
    if keys is None and T == S:
        keys = tokens
    return heat_map(
        pattern,
        x="key" if keys is None else keys,
        y="query" if tokens is None else tokens,
        title=title,
        label="weight",
    )


def token_strip(
    tokens: Sequence[str], values: Any, *, title: str = "", width: int = 16
) -> "Figure":
    """Tokens in lines of text, each on the colour of its value.

    Args:
        tokens, values: as many of each. Colours as in `heat_map`.
        width: tokens per line.

    Raises:
        InputError: they are not as many.
    """
    from matplotlib.patches import Rectangle

    paints = paint(tokens, values)
    lines = -(-len(tokens) // width)
    figure, (ax,) = panels(1, width=0.75 * width, height=0.42 * lines + 0.5)
    for i, (token, (colour, ink)) in enumerate(zip(tokens, paints)):
        row, column = divmod(i, width)
        ax.add_patch(Rectangle((column, -row - 1), 1, 1, color=colour, linewidth=0))
        at = column + 0.5, -row - 0.5
        ax.text(*at, plain(token)[:12], color=ink, ha="center", va="center", fontsize=7)
    ax.set(xlim=(0, width), ylim=(-max(lines, 1), 0))
    ax.set_title(title, fontsize=9)
    ax.axis("off")
    return figure


def paint(tokens: Sequence[str], values: Any) -> list[tuple[str, str]]:
    """(colour, colour of the text on it) for every token, as "#rrggbb".

    Raises:
        InputError: not one value per token.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    values = np.asarray(values, np.float64)
    if values.shape != (len(tokens),):
        raise InputError(f"values of shape {list(values.shape)} for {len(tokens)} tokens")
    top = max(float(np.nanmax(np.abs(values), initial=0.0)), 1e-12)
    signed = bool(np.nanmin(values, initial=0.0) < 0)
    share = np.nan_to_num(0.5 + 0.5 * values / top if signed else values / top)
    colours = colormaps[SIGNED if signed else UNSIGNED]
    dark = (share > 0.75) | (signed & (share < 0.25))
    return [(to_hex(colours(s)), "#ffffff" if d else "#111111") for s, d in zip(share, dark)]


def plain(token: str) -> str:
    """A token as a label: white space made visible, nothing that matplotlib would interpret."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥").replace("$", r"\$")
    return "".join(c if c.isprintable() else "?" for c in shown)


def _matrix(name: str, values: Any) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size:
        raise InputError(f"{name} of shape {list(values.shape)}: expected [rows, columns]")
    return values


def _labels(name: str, labels: Sequence[str] | str, count: int) -> list[str] | None:
    if isinstance(labels, str):
        return None
    if len(labels) != count:
        raise InputError(f"{name}: {len(labels)} labels for {count} entries")
    return [plain(str(s))[:14] for s in labels]
