"""Block-sparse softmax attention for TPUs (Mosaic): only live tiles are fetched and multiplied.

The grid is (batch rows, heads, steps). The flat list of steps (`steps.py`) is prefetched into
scalar memory, the index maps read it, so the pipeline fetches exactly the next live tile while the
present one is multiplied. Sums live in float32 scratch; a step that begins an output tile resets
them, one that ends it writes the result.

    o, lse   steps by query tile: online softmax                          (grid over query heads)
    dq       the same steps; p = exp(s - lse) is made again
    dk, dv   steps by key tile, on transposed scores [keys, queries]      (grid over kv heads)

Nothing is added up by two programs: results are the same bit for bit from run to run. Partial tiles
evaluate the mask on their indices and the vectors handed in (`tile_mask.py`), or read a stored tile
of it. A query reaches no NaN of a key that it may not attend to; attending to one gives NaN.

Checked without a TPU: against the reference in both interpreters, for races, and by compiling ahead
of time for v5e, v5p and v6e. It has never been run or timed on a real chip.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse.schedule import Tiles
from pallas_kernels.block_sparse.steps import WORDS, Packing, Steps, by_key_tile, by_query_tile
from pallas_kernels.block_sparse.tile_mask import cut, stored

LANES = 128


@dataclasses.dataclass(frozen=True)
class Listed:
    """The static side of a list of steps."""

    packing: Packing
    shape: tuple[int, int, int]
    by_keys: bool


@dataclasses.dataclass(frozen=True)
class Config:
    """All that is static."""

    scale: float
    soft_cap: float | None
    block_q: int
    block_k: int
    keys: int
    groups: int
    sinks: bool
    axes: tuple[str, ...]  # of the vectors that the mask is handed
    mask: Any  # `TileMask.run`
    rows: Listed
    columns: Listed
    interpret: Any
    work: bool


def block_sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Any,
    kinds: Any,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    q_offset: Any = 0,
    tiles: Tiles | None = None,
    apart: tuple[int, int] | None = None,
    interpret: Any = False,
    work: bool = False,
) -> tuple[jax.Array, ...]:
    """Softmax attention over the live tiles of a mask.

    Args:
        q: [B, T, N, H]. k: [B, S, K, H]. v: [B, S, K, H']; one type. Head h reads h // (N / K).
        mask: callable pytree, `mask(b, h, i, j) -> bool` on broadcastable absolute indices.
        kinds: int8 [B|1, N|1, nq, nk], 0 dead, 1 partial, 2 full, for `legal_tiles(tiles, T, S)`;
            a tile that hangs over the last key must not be full. numpy: known on the host.
        scale: factor on q k^T.
        soft_cap: s -> soft_cap tanh(s / soft_cap).
        sinks: [N] logits of a virtual key without value.
        q_offset: int or [B], absolute index of the first query.
        apart: how many batch rows and heads the mask tells apart (default: all).
        interpret: False on a TPU; True or `pltpu.InterpretParams` elsewhere.
        work: also return how many tiles were multiplied, int32 [B, N, nq].

    Returns:
        o [B, T, N, H'] in v's dtype and lse [B, T, N] in float32, both differentiable; 0 and -inf
        where nothing may be attended.

    Raises:
        NotImplementedError: `refusal(...)` says why.
    """
    reason = refusal(q, k, v)
    if reason:
        raise NotImplementedError(f"tpu: {reason}")
    (B, T, N, _), (S, K) = q.shape, k.shape[1:3]
    tiles = legal_tiles(tiles or Tiles(), T, S)
    bq, bk = tiles.block_q, tiles.block_k
    q, k, v = (_pad(x.transpose(0, 2, 1, 3), n) for x, n in ((q, bq), (k, bk), (v, bk)))
    offset = jnp.asarray(q_offset, jnp.int32).reshape(-1)  # [1] or [B]
    made = cut(mask, (B, N, q.shape[2], k.shape[2]), offset)
    if made is None:
        made = stored(mask, apart or (B, N), kinds, tiles, offset)
    offset = jnp.broadcast_to(offset, (B,))
    room = WORDS // 2 if "stored" in made.axes else WORDS
    rows, columns = by_query_tile(kinds, room), by_key_tile(kinds, N // K, room)
    cfg = Config(
        scale=float(scale),
        soft_cap=None if soft_cap is None else float(soft_cap),
        block_q=bq,
        block_k=bk,
        keys=S,
        groups=N // K,
        sinks=sinks is not None,
        axes=made.axes,
        mask=made.run,
        rows=Listed(rows.packing, rows.words.shape, False),
        columns=Listed(columns.packing, columns.words.shape, True),
        interpret=interpret,
        work=work,
    )
    sinks = jnp.zeros(N, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
    steps = tuple(_operands(x, "stored" in made.axes) for x in (rows, columns))
    o, lse, *rest = _attend(  # pyright: ignore[reportGeneralTypeIssues]
        cfg, q, k, v, sinks, offset, made.vectors, steps
    )
    rest = [x.reshape(B, N, -1) for x in rest]
    return o[:, :, :T].transpose(0, 2, 1, 3), lse[:, :, :T].transpose(0, 2, 1), *rest


def refusal(q: Any, k: Any, v: Any) -> str | None:
    """Why these kernels cannot serve such arrays, or None."""
    if q.dtype not in (jnp.float32, jnp.bfloat16) or len({q.dtype, k.dtype, v.dtype}) > 1:
        return f"it needs one type, float32 or bfloat16, not {q.dtype}, {k.dtype}, {v.dtype}"
    widest = max(q.shape[-1], v.shape[-1])
    return f"head width {widest}: at most 512" if widest > 512 else None


def legal_tiles(tiles: Tiles, queries: int, keys: int) -> Tiles:
    """The nearest tiles that a TPU can work on: multiples of 128, no larger than the problem."""
    sides = (
        min(-(-size // LANES), -(-length // LANES)) * LANES
        for size, length in ((tiles.block_q, queries), (tiles.block_k, keys))
    )
    return Tiles(*sides)


def _operands(steps: Steps, stored: bool) -> tuple[Any, ...]:
    """Words and slots of stored tiles, flat for scalar memory; how many steps."""
    slots = jnp.asarray(steps.stored).reshape(-1) if stored else jnp.zeros(1, jnp.int32)
    return jnp.asarray(steps.words).reshape(-1), slots, steps.count


def _pad(x, multiple: int):
    extra = -x.shape[2] % multiple
    return jnp.pad(x, [(0, 0), (0, 0), (0, extra), (0, 0)]) if extra else x


def _forward(cfg: Config, q, k, v, sinks, offset, vectors, steps):
    from pallas_kernels.block_sparse import tpu_kernels  # Pallas takes a while to import

    o, lse, *work = tpu_kernels.forward(cfg, q, k, v, (offset, sinks), steps[0], vectors)
    return o, lse[:, :, 0], *work


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(cfg: Config, *args):
    return _forward(cfg, *args)


def _attend_fwd(cfg: Config, *args):
    out = _forward(cfg, *args)
    return out, (*args, *out[:2])


def _attend_bwd(cfg: Config, saved: Any, grads: Any):
    from pallas_kernels.block_sparse import tpu_kernels

    q, k, v, sinks, offset, vectors, steps, o, lse = saved
    do, dlse, *_ = grads
    delta = (do.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1) - dlse
    far = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # exp(s - inf) = 0 in rows without keys
    rest = (far[:, :, None], delta[:, :, None], (offset, sinks))
    dq = tpu_kernels.backward_q(cfg, q, k, v, do, *rest, steps[0], vectors)
    dk, dv = tpu_kernels.backward_kv(cfg, q, k, v, do, *rest, steps[1], vectors)
    weight = jnp.where(lse == -jnp.inf, 0, jnp.exp(sinks[None, :, None] - far))
    return dq, dk, dv, -(weight * delta).sum((0, 2)), None, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)
