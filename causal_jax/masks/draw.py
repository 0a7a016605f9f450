"""Masks as pictures: text for the terminal, PNG for papers."""

import os
from typing import Any

import numpy as np

from causal_jax.errors import InputError
from causal_jax.masks.algebra import as_mask

_ENTRY = "·█"  # hidden, allowed
_TILE = "·▒█"  # EMPTY, PARTIAL, FULL


def _grid(mask: Any, T: int, S: int | None, block: int | None, b: int, h: int) -> np.ndarray:
    """Entries [T, S] in {0, 1}, or statuses of tiles [nq, nk] in {0, 1, 2}."""
    mask = as_mask(mask)
    S = T if S is None else S
    for field, value, size in (("b", b, mask.batch), ("h", h, mask.heads)):
        if value != 0 and not 0 <= value < size:
            raise InputError(
                f"{field}={value}: the mask distinguishes {size}: expected 0 ... {size - 1}"
            )
    if block is None:
        mask._require(T, S)
        i, j = np.arange(T).reshape(-1, 1), np.arange(S).reshape(1, -1)
        return np.asarray(mask(b, h, i, j)).astype(np.int8)
    grid = np.asarray(mask.block_map(T, S, block, block).tiles())
    return grid[min(b, grid.shape[0] - 1), min(h, grid.shape[1] - 1)]


def draw(
    mask: Any, T: int, S: int | None = None, *, block: int | None = None, b: int = 0, h: int = 0
) -> str:
    """The mask as text: one line per query, one character per key (or tile of them).

    Entries: `·` hidden, `█` allowed. Tiles: `·` empty, `▒` partial, `█` full.

    Args:
        mask: anything `as_mask` takes.
        T, S: numbers of queries and keys.
        block: draw tiles of block x block instead of entries; cheap for long sequences.
        b, h: which sequence and head.
    """
    glyphs = _ENTRY if block is None else _TILE
    return "\n".join("".join(glyphs[x] for x in row) for row in _grid(mask, T, S, block, b, h))


def draw_png(
    mask: Any,
    T: int,
    S: int | None = None,
    path: str | os.PathLike = "mask.png",
    *,
    block: int | None = None,
    b: int = 0,
    h: int = 0,
    title: str = "",
) -> None:
    """The mask as a PNG file: allowed entries dark; with `block`, partial tiles in between.

    Args: as `draw`; path: file to write; title: text above the picture.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure  # no pyplot: leaves the user's backend alone

    grid = _grid(mask, T, S, block, b, h)
    colours = ["#f2efe8", "#1f4e79"] if block is None else ["#f2efe8", "#8fb3d1", "#1f4e79"]
    rows, cols = grid.shape
    scale = 5 / max(rows, cols)
    figure = Figure(figsize=(1.3 + max(cols * scale, 1), 1.1 + max(rows * scale, 1)), dpi=150)
    axes = figure.add_subplot()
    extent = (0, T if S is None else S, T, 0)
    axes.imshow(
        grid,
        cmap=ListedColormap(colours),
        vmin=0,
        vmax=len(colours) - 1,
        interpolation="nearest",
        extent=extent,
    )
    axes.set(xlabel="key", ylabel="query", title=title)
    figure.savefig(path, bbox_inches="tight")
