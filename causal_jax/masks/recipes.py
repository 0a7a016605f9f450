"""Named masks of the literature, as compositions. `window` always counts keys before self."""

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax.errors import InputError
from causal_jax.masks.algebra import Mask
from causal_jax.masks.lookups import BlockList, Keys, Queries
from causal_jax.masks.primitives import Causal, Sinks, Strided, Window
from causal_jax.shapes import Array, Bool, Float


def streaming(window: int, sinks: int = 4) -> Mask:
    """StreamingLLM (2309.17453): the first `sinks` keys and the last `window` before self.

    The paper's cache of w recent tokens, self included, is window = w - 1.
    """
    return Causal() & (Window(window, 0) | Sinks(sinks))


def longformer(window: int, globals: int | tuple[int, ...] = 0, *, causal: bool = False) -> Mask:
    """Longformer (2004.05150): a window, and global tokens that see and are seen by everybody.

    Args:
        window: keys on each side of self.
        globals: the first n tokens, or the positions of the global tokens.
        causal: restrict to the past, for decoders.
    """
    tokens = range(globals) if isinstance(globals, int) else globals
    mask = Window(window, window)
    if len(tokens):
        mask = mask | Keys(tokens) | Queries(tokens)
    return Causal() & mask if causal else mask


def bigbird(
    length: int,
    *,
    window: int,
    globals: int | tuple[int, ...] = 0,
    random: int = 3,
    block: int = 64,
    heads: int = 1,
    seed: int = 0,
    causal: bool = True,
) -> Mask:
    """BigBird (2007.14062): window, global tokens, random blocks of keys per block of queries.

    The blocks are drawn on the host from `seed`: the mask is static. A causal row draws from the
    past only and takes all of it where there are fewer than `random` blocks.

    Args:
        length: number of tokens that the random blocks cover.
        window, globals: as in `longformer`.
        random: number of random blocks of keys per block of queries.
        block: tokens in a block.
        heads: 1: the same blocks for all heads; else one draw per head.
    """
    for field, value, least in (
        ("length", length, 1),
        ("random", random, 0),
        ("block", block, 1),
        ("heads", heads, 1),
    ):
        if value < least:
            raise InputError(f"bigbird: {field}={value}: expected an integer >= {least}")
    rows = -(-length // block)
    rng = np.random.default_rng(seed)
    idx = np.full((1, heads, rows, max(random, 1)), -1, np.int32)
    for h in range(heads):
        for row in range(rows):
            choice = rng.permutation(row + 1 if causal else rows)[:random]
            idx[0, h, row, : choice.size] = np.sort(choice)
    mask = longformer(window, globals) | BlockList(idx, block, block)
    return Causal() & mask if causal else mask


def strided_sparse(stride: int) -> Mask:
    """Sparse Transformer (1904.10509), strided: the last `stride` keys and every stride-th one."""
    return Causal() & (Window(stride - 1, 0) | Strided(stride))


def modality_mutual(queries: Bool[Array, "B T"], keys: Bool[Array, "B T"]) -> Mask:
    """Modality-mutual attention (2503.02597): causal, and `queries` also see all of `keys`.

    Args:
        queries: [B, T], True at the tokens that gain sight (the image).
        keys: [B, T], True at the tokens they see although these come later (the question).
    """
    return Causal() | (Queries(queries) & Keys(keys))


def top_k_blocks(
    scores: Float[Array, "B K Q P"],
    k: int,
    block_q: int,
    block_k: int,
    *,
    force_first: int = 1,
    force_local: int = 2,
    causal: bool = True,
    groups: int = 1,
) -> BlockList:
    """The k best blocks of keys per block of queries, chosen at run time (MoBA, NSA).

    Always among the chosen: the first `force_first` blocks, the blocks that hold the row's own
    positions and the `force_local - 1` before them. Causal rows choose from the
    past and themselves, and list fewer than k blocks where there are fewer. No block is listed
    twice. Combine with `Causal()`: blocks are whole.

    Args:
        scores: [B|1, heads, nq, nk], larger is better; not differentiated.
        k: blocks per row, the forced ones included.
        block_q, block_k: tokens in a block of queries and of keys.
        force_first, force_local: how many blocks are forced; force_local=0: not even the row's own.
        groups: query heads per head of `scores` (NSA shares one choice among the heads of a GQA
            group).

    Returns:
        BlockList with leaf idx int32 [B, heads * groups, nq, k], ascending, -1 behind the last.

    Raises:
        InputError: k < 1, or smaller than the number of forced blocks of some row.
    """
    if scores.ndim != 4:
        raise InputError(f"scores of shape {list(scores.shape)}: expected [B, heads, nq, nk]")
    rows, cols = scores.shape[2:]
    if not 1 <= k <= cols:
        raise InputError(f"k={k}: expected 1 ... {cols} (number of blocks of keys)")
    row, col = np.arange(rows).reshape(-1, 1), np.arange(cols).reshape(1, -1)
    first, last = row * block_q // block_k, ((row + 1) * block_q - 1) // block_k
    allowed = (col <= last) if causal else np.ones((rows, cols), bool)
    local = (col > first - force_local) & (col <= last) & (force_local > 0)
    forced = ((col < force_first) | local) & allowed
    most = int(forced.sum(1).max())
    if most > k:
        raise InputError(
            f"k={k}: force_first and force_local claim {most} blocks of a row: raise k"
        )
    scores = jax.lax.stop_gradient(scores).astype(jnp.float32)
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    scores = jnp.clip(scores, jnp.finfo(jnp.float32).min, jnp.finfo(jnp.float32).max)
    scores = jnp.where(forced[None, None], jnp.inf, scores)
    scores = jnp.where(allowed[None, None], scores, -jnp.inf)
    best, idx = jax.lax.top_k(scores, k)
    idx = jnp.sort(jnp.where(best == -jnp.inf, cols, idx), -1)  # missing ones last
    idx = jnp.where(idx == cols, -1, idx).astype(jnp.int32)
    return BlockList(jnp.repeat(idx, groups, axis=1), block_q, block_k)
