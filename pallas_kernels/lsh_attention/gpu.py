"""The same for Hopper GPUs (Mosaic GPU), by the kernels of block-sparse attention.

The blocks of keys and, behind them, the samples are one row of keys. A tile of queries has a list
of the tiles of its own block, and of all tiles of samples:

    keys     block 0 | block 1 | ... | block M - 1 | samples
    tile c             x (its own)                   x x x x

so one online softmax runs over both, dq has the same lists, and dk, dv the transposed ones: a
program per tile of keys, no atomics. A key's bias (the log of a sample's weight, -inf for a key
that is not there) is added to its scores; a sample in the tile's own block is masked, and so is
what the caller's mask forbids.

Checked without a GPU: lowering for Hopper. The slow test of its values in the interpreter exists,
but has not been run yet. Never compiled by ptxas, run or timed on a GPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse import Tiles
from pallas_kernels.block_sparse import gpu as block_sparse
from pallas_kernels.block_sparse.steps import FULL, PARTIAL
from pallas_kernels.lsh_attention.problem import Problem

ROWS = 64  # queries of a tile


def gpu(x: Problem, scale: float, *, interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """o [P, C, Q, V] in v's dtype and lse [P, C, Q] in float32, both differentiable.

    Args:
        scale: factor on q . k.
        interpret: False on a GPU; `_testing.gpu_interpreter()` elsewhere.

    Raises:
        NotImplementedError: `refusal(...)` says why.
    """
    reason = refusal(x)
    if reason:
        raise NotImplementedError(f"gpu: {reason}")
    (P, C, Q, _), (M, S), R = x.q.shape, x.bias.shape[1:], x.bias_sample.shape[1]
    columns = 64 if max(S, R) <= 64 else 128
    pad = functools.partial(_padded, multiple=columns)
    q = _padded(x.q, 2, ROWS)
    bias, own_k, own_v = pad(x.bias, 2, value=-jnp.inf), pad(x.k, 2), pad(x.v, 2)
    bias_sample = pad(x.bias_sample, 1, value=-jnp.inf)
    # -1: no sample, whatever the tile's block
    lies_in = pad(x.block_sample + 1, 1) - 1
    width = M * bias.shape[2]

    def row(own, sampled):
        return jnp.concatenate([own.reshape(P, width, *own.shape[3:]), sampled], 1)

    of_tile = jnp.repeat(x.block, q.shape[2], 1)  # the block of every query
    of_key = row(jnp.full(bias.shape, -1, jnp.int32), lies_in)
    places = None
    if x.mask is not None and x.places is not None:
        y = x.places
        j = row(pad(y.j, 2), pad(y.j_sample, 1))
        i, h = (_padded(a, 2, ROWS).reshape(P, -1) for a in (y.i, y.h))
        places = (x.mask, y.b, h, i, j)
    o, lse = block_sparse.block_sparse_attention(
        q.reshape(P, -1, 1, q.shape[3]),
        row(own_k, pad(x.k_sample, 1))[:, :, None],
        row(own_v, pad(x.v_sample, 1))[:, :, None],
        jax.tree_util.Partial(_listed, of_tile, of_key, places),
        _kinds(x.block, q.shape[2] // ROWS, bias.shape[1:], bias_sample.shape[1], columns, places),
        scale=scale,
        key_bias=row(bias, bias_sample),
        tiles=Tiles(ROWS, columns),
        apart=(P, 1),
        interpret=interpret,
    )
    o, lse = o.reshape(P, C, q.shape[2], -1), lse.reshape(P, C, q.shape[2])
    return o[:, :, :Q], lse[:, :, :Q]


def refusal(x: Problem) -> str | None:
    """Why these kernels cannot serve a problem, or None."""
    return block_sparse.refusal(x.q, x.k, x.v)


def _padded(a, axis: int, multiple: int, value: float = 0.0):
    extra = -a.shape[axis] % multiple
    widths = [(0, extra * (n == axis)) for n in range(a.ndim)]
    return jnp.pad(a, widths, constant_values=value) if extra else a


def _listed(of_tile, of_key, places, b, h, i, j):
    """May query slot i of problem b use key slot j of its list?"""
    ok = of_key[b, j] != of_tile[b, i]
    if places is None:
        return ok
    mask, of_problem, heads, at_i, at_j = places
    return ok & mask(of_problem[b], heads[b, i], at_i[b, i], at_j[b, j])


def _kinds(block, parts: int, blocks: tuple[int, ...], samples: int, columns: int, places):
    """int8 [P, 1, query tiles, key tiles]: full in the own block, partial among the samples."""
    own = jnp.repeat(block, parts, 1)[:, None, :, None]
    tile = jnp.arange(blocks[0] * blocks[1] // columns) // (blocks[1] // columns)
    inside = jnp.where(tile[None, None, None] == own, FULL if places is None else PARTIAL, 0)
    shared = jnp.full((*inside.shape[:3], samples // columns), PARTIAL)
    return jnp.concatenate([inside, shared], 3).astype(jnp.int8)
