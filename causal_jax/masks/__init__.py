"""Who may attend to whom: lazy masks that combine with & | ~ and know which tiles they leave empty.

    from causal_jax import masks as M

    mask = M.Causal() & (M.Window(4095, 0) | M.Sinks(4)) & M.Documents(segments)
    mask(b, h, i, j)                                  # element by element
    mask.to_dense(T)                                  # Bool[B|1, N|1, T, S]
    mask.block_map(T, S, block_q=128, block_k=128)    # the live tiles, for kernels
    print(M.draw(mask, 64))

True means "may attend". `Window(l, r)` means l keys before self and r after. See `algebra.py` for
the contract, `primitives.py` and `lookups.py` for the formulas, `recipes.py` for the masks of the
literature.
"""

from causal_jax.masks.algebra import And, Full, HeadSplit, Mask, Not, Or, as_mask, parts_of
from causal_jax.masks.block_map import BlockMap, split_static
from causal_jax.masks.draw import draw, draw_png
from causal_jax.masks.lookups import BlockList, Dense, Documents, FromFn, Keys, Queries, from_fn
from causal_jax.masks.primitives import Causal, Chunked, Dilated, Prefix, Sinks, Strided, Window
from causal_jax.masks.recipes import (
    bigbird,
    longformer,
    modality_mutual,
    streaming,
    strided_sparse,
    top_k_blocks,
)
from causal_jax.masks.tiles import EMPTY, FULL, PARTIAL
from causal_jax.masks.values import Constant, constant

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "And",
    "BlockList",
    "BlockMap",
    "Causal",
    "Chunked",
    "Constant",
    "Dense",
    "Dilated",
    "Documents",
    "FromFn",
    "Full",
    "HeadSplit",
    "Keys",
    "Mask",
    "Not",
    "Or",
    "Prefix",
    "Queries",
    "Sinks",
    "Strided",
    "Window",
    "as_mask",
    "bigbird",
    "constant",
    "draw",
    "draw_png",
    "from_fn",
    "longformer",
    "modality_mutual",
    "parts_of",
    "split_static",
    "streaming",
    "strided_sparse",
    "top_k_blocks",
]
