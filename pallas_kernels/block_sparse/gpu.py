"""Block-sparse softmax attention for Hopper GPUs (Mosaic GPU), in two variants.

Plain (`gpu_kernels.py`): one warpgroup works on one tile of queries. It reads the list of live
tiles from global memory, and for each copies keys and values by TMA into swizzled shared memory,
multiplies them with WGMMA, and keeps the online softmax in registers, in base 2: full tiles first,
without mask code, then partial ones. Copies and products take turns: a program to be right with.

Ring (`gpu_ring.py`, `ring=True`): a third warpgroup copies the listed tiles ahead into a ring of
buffers while two others multiply, each half of a tile of 128 rows. Head widths up to 128.

    o, lse   a program per query head and tile of queries
    dq       the same lists; p = exp(s - lse) is made again
    dk, dv   a program per kv head and tile of keys, over its query heads; scores are transposed

No atomics: results are the same bit for bit from run to run. What was checked: values in the
interpreter (copies, barriers and loops; products by plain XLA), and lowering to Mosaic's module. It
has never been compiled by ptxas, run or timed on a GPU. A value that is not finite reaches every
query of a partial tile, also those that may not attend to it ("tpu" and "xla" keep it from them).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse.schedule import Tiles
from pallas_kernels.block_sparse.steps import FULL, number
from pallas_kernels.block_sparse.tile_mask import cut, stored

LOG2E = math.log2(math.e)


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
    axes: tuple[str, ...]  # of the vectors; "bias" comes last and is not the mask's
    mask: Any  # `TileMask.run`
    interpret: Any
    ring: bool


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
    key_bias: jax.Array | None = None,
    q_offset: Any = 0,
    tiles: Tiles | None = None,
    apart: tuple[int, int] | None = None,
    interpret: Any = False,
    ring: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention over the live tiles of a mask.

    Args:
        q: [B, T, N, H]. k: [B, S, K, H]. v: [B, S, K, H']; one type. Head h reads h // (N / K).
        mask: callable pytree, `mask(b, h, i, j) -> bool` on broadcastable absolute indices.
        kinds: int8 [B|1, N|1, nq, nk], 0 dead, 1 partial, 2 full, for `legal_tiles(tiles, ring)`; a
            tile that hangs over the last key must not be full. numpy: known on the host.
        scale: factor on q k^T.
        soft_cap: s -> soft_cap tanh(s / soft_cap).
        sinks: [N] logits of a virtual key without value.
        key_bias: [B, S], added to every score of a key (-inf: nobody attends to it); not
            differentiated.
        q_offset: int or [B], absolute index of the first query.
        apart: how many batch rows and heads the mask tells apart (default: all).
        interpret: False on a GPU; `_testing.gpu_interpreter()` elsewhere.
        ring: the variant whose copies run ahead.

    Returns:
        o [B, T, N, H'] in v's dtype and lse [B, T, N] in float32, both differentiable; 0 and -inf
        where nothing may be attended.

    Raises:
        NotImplementedError: `refusal(...)` says why.
    """
    reason = refusal(q, k, v, ring)
    if reason:
        raise NotImplementedError(f"gpu: {reason}")
    (B, T, N, _), (S, K) = q.shape, k.shape[1:3]
    tiles = legal_tiles(tiles or Tiles(), ring)
    bq, bk = tiles.block_q, tiles.block_k
    q, k, v = (_pad(x, n) for x, n in ((q, bq), (k, bk), (v, bk)))
    offset = jnp.asarray(q_offset, jnp.int32).reshape(-1)
    made = cut(mask, (B, N, q.shape[1], k.shape[1]), offset)
    if made is None:
        made = stored(mask, apart or (B, N), kinds, tiles, offset)
    axes, vectors = made.axes, made.vectors
    if key_bias is not None:
        spare = k.shape[1] - S
        bias = jnp.pad(key_bias.astype(jnp.float32), ((0, 0), (0, spare)))
        axes, vectors = (*axes, "bias"), (*vectors, jax.lax.stop_gradient(bias))
    cfg = Config(
        scale=float(scale),
        soft_cap=None if soft_cap is None else float(soft_cap),
        block_q=bq,
        block_k=bk,
        keys=S,
        groups=N // K,
        sinks=sinks is not None,
        axes=axes,
        mask=made.run,
        interpret=interpret,
        ring=ring,
    )
    sinks = jnp.zeros(N, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
    slots = number(kinds)
    listed = (_lists(kinds, slots), _lists(kinds.swapaxes(2, 3), slots.swapaxes(2, 3)))
    offset = jnp.broadcast_to(offset, (B,))
    o, lse = _attend(cfg, q, k, v, sinks, offset, vectors, listed)  # pyright: ignore[reportGeneralTypeIssues]
    return o[:, :T], lse[:, :, :T].transpose(0, 2, 1)


def refusal(q: Any, k: Any, v: Any, ring: bool = False) -> str | None:
    """Why these kernels cannot serve such arrays, or None."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or len({q.dtype, k.dtype, v.dtype}) > 1:
        return f"it needs one type, bfloat16 or float16, not {q.dtype}, {k.dtype}, {v.dtype}"
    H, Hv = q.shape[-1], v.shape[-1]
    if H % 64 or Hv % 64 or max(H, Hv) > 256:
        return f"it needs head widths that are multiples of 64 up to 256, not {H} and {Hv}"
    if ring and max(H, Hv) > 128:
        return f"its ring has room for head widths up to 128, not {H} and {Hv}"
    if jax.default_backend() == "gpu":
        chip = getattr(jax.devices()[0], "compute_capability", "")
        if not str(chip).startswith("9."):
            return f"it needs a Hopper GPU (compute capability 9), this one has {chip}"
    return None


def legal_tiles(tiles: Tiles, ring: bool = False) -> Tiles:
    """The nearest tiles that one warpgroup can work on, or two of them with a ring."""
    if ring:
        return Tiles(128, 128)
    return Tiles(64, 64 if tiles.block_k <= 64 else 128)


def _pad(x, multiple: int):
    extra = -x.shape[1] % multiple
    return jnp.pad(x, [(0, 0), (0, extra), (0, 0), (0, 0)]) if extra else x


def _lists(grid: Any, slots: Any) -> tuple[jax.Array, ...]:
    """(full [b, h, rows], count, idx [b, h, rows, columns], slots): full tiles, then partial ones,
    and where the partial ones are stored."""
    xp: Any = np if isinstance(grid, np.ndarray) else jnp
    order = xp.argsort(xp.where(grid == FULL, 0, xp.where(grid > 0, 1, 2)), -1, stable=True)
    lists = (
        (grid == FULL).sum(-1),
        (grid > 0).sum(-1),
        order,
        xp.take_along_axis(slots, order, -1),
    )
    return tuple(jnp.asarray(x, jnp.int32) for x in lists)


def _kernels(cfg: Config) -> Any:
    from pallas_kernels.block_sparse import gpu_kernels, gpu_ring  # Mosaic takes a while to import

    return gpu_ring if cfg.ring else gpu_kernels


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(cfg: Config, q, k, v, sinks, offset, vectors, listed):
    return _kernels(cfg).forward(cfg, q, k, v, sinks, offset, listed[0], vectors)


def _attend_fwd(cfg: Config, *args):
    out = _attend(cfg, *args)  # pyright: ignore[reportGeneralTypeIssues]
    return out, (*args, *out)


def _attend_bwd(cfg: Config, saved: Any, grads: Any):
    q, k, v, sinks, offset, vectors, listed, o, lse = saved
    do, dlse = grads
    dot = (do.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1).transpose(0, 2, 1)
    delta = dot - dlse
    far = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # exp(s - inf) = 0 in rows without keys
    args = (cfg, q, k, v, do, far * LOG2E, delta, offset)
    dq = _kernels(cfg).backward_q(*args, listed[0], vectors)
    dk, dv = _kernels(cfg).backward_kv(*args, listed[1], vectors)
    weight = jnp.where(lse == -jnp.inf, 0, jnp.exp(sinks[None, :, None] - far))
    return dq, dk, dv, -(weight * delta).sum((0, 2)), None, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)
