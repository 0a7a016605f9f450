"""Gated linear attention in chunks for Hopper GPUs (Mosaic GPU): the plain variant.

States go from chunk to chunk in XLA (products of whole chunks and a scan); then every chunk is by
itself, and a program of one warpgroup makes what is inside it:

    forward    o = A v + reads S          a program per query head and chunk
    backward   dq, dk, dv                 a program per key head and chunk, over its query heads

Pairs meet level by level of a binary tree (`halves.py`), so no exponent is above 0 and all work is
WGMMA: the sums of gates too, as products of zeros and ones with the gates in three parts of
bfloat16 each (24 bits, as in float32). Operands of products are bfloat16, sums and results float32.
dg follows from q dq - k dk, in XLA. Copies and products take turns; this is a program to be right
with, not the fast one. No atomics: the same bits from run to run.

What was checked: values and gradients in the interpreter (copies, barriers and loops; products by
plain XLA) and lowering to Mosaic's module. It has never been compiled by ptxas, run or timed on a
GPU.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

CHUNK = 64  # positions of a chunk: the rows of one warpgroup's product
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class Config(NamedTuple):
    """All that is static."""

    groups: int
    documents: bool
    interpret: Any


def gated_linear_gpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    state: jax.Array,
    document: jax.Array | None = None,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Outputs of all positions and the state after the last; differentiable by q, k, v, g, state.

    Args:
        q, k, v, g, state, document: as `gated_linear_chunked`; q, k and v are rounded to bfloat16.
        interpret: False on a GPU; `InterpretGPUParams` elsewhere.

    Returns:
        (o [B, T, N, V], state [B, K, F, V]), float32.

    Raises:
        NotImplementedError: `refusal(...)` says why.
    """
    if reason := refusal(q, k, v):
        raise NotImplementedError(f"gpu: {reason}")
    (_, T, N, _), (K, V) = q.shape, v.shape[2:]
    cfg = Config(N // K, document is not None, interpret)
    if document is None:
        document = jnp.zeros(q.shape[:2], jnp.int32)
    more = ((0, 0), (0, -T % CHUNK))
    document = jnp.pad(document.astype(jnp.int32), more, mode="edge")
    q, k, v, g = (jnp.pad(x, (*more, (0, 0), (0, 0))) for x in (q, k, v, g))
    wide = -V % 64  # columns of zeros
    v, state = (jnp.pad(x, ((0, 0),) * 3 + ((0, wide),)) for x in (v, state))
    half = (x.astype(jnp.bfloat16) for x in (q, k, v))
    o, end = _attend(cfg, document, *half, g.astype(jnp.float32), state.astype(jnp.float32))  # pyright: ignore[reportGeneralTypeIssues]
    return o[:, :T, :, :V], end[..., :V]


def refusal(q: Any, k: Any, v: Any) -> str | None:
    """Why these kernels cannot serve such arrays, or None."""
    types = (jnp.float32, jnp.bfloat16, jnp.float16)
    if any(x.dtype not in types for x in (q, k, v)):
        return f"it needs float32, bfloat16 or float16, not {q.dtype}, {k.dtype}, {v.dtype}"
    F, V = k.shape[-1], v.shape[-1]
    if F not in (64, 128) or V > 128:
        return f"it needs 64 or 128 features and values of at most 128, not {F} and {V}"
    if not q.shape[1]:
        return "there is no position"
    if jax.default_backend() == "gpu":
        chip = getattr(jax.devices()[0], "compute_capability", "")
        if not str(chip).startswith("9."):
            return f"it needs a Hopper GPU (compute capability 9), this one has {chip}"
    return None


class _Chunks(NamedTuple):
    """What chunks do to the state: [B, n, C, K, F], decay [B, n, K, F]; documents before [B, n]."""

    reads: jax.Array  # a query's share of the state before
    writes: jax.Array  # a key's share in the state after
    decay: jax.Array
    before: jax.Array


def _chunks(cfg: Config, document, g) -> _Chunks:
    g, document = _cut(g), document.reshape(len(g), -1, CHUNK)
    b = jnp.cumsum(g, 2)
    later = jnp.pad(g[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0), (0, 0)))
    reads, writes = jnp.exp(b), jnp.exp(lax.cumsum(later, axis=2, reverse=True))
    decay, last = reads[:, :, -1], document[:, :, -1]
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)))
    if cfg.documents:
        reads = jnp.where((document == before[..., None])[..., None, None], reads, 0)
        writes = jnp.where((document == last[..., None])[..., None, None], writes, 0)
        decay = jnp.where((last == before)[..., None, None], decay, 0)
    return _Chunks(reads, writes, decay, before)


def _cut(x) -> jax.Array:
    """[B, T, K, F] -> float32 [B, n, C, K, F]."""
    return x.astype(jnp.float32).reshape(x.shape[0], -1, CHUNK, *x.shape[2:])


def _states(it: _Chunks, k, v, state) -> tuple[jax.Array, jax.Array]:
    """The states before the chunks [n, B, K, F, V], and the last."""
    new = _einsum("bnckf,bnckv->nbkfv", _cut(k) * it.writes, _cut(v))

    def step(state, xs):
        decay, new = xs
        return decay[..., None] * state + new, state

    end, before = lax.scan(step, state, (jnp.moveaxis(it.decay, 1, 0), new))
    return before, end


def thirds(g: jax.Array) -> tuple[jax.Array, ...]:
    """Three arrays of bfloat16 that add up to g, to 24 bits."""
    parts = []
    for _ in range(3):
        part = lax.reduce_precision(g, 8, 7)  # a cast there and back would be optimised away
        parts.append(part.astype(jnp.bfloat16))
        g = g - part
    return tuple(parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(cfg: Config, document, q, k, v, g, state):
    from pallas_kernels.gated_linear import gpu_kernels  # Mosaic takes a while to import

    it = _chunks(cfg, document, g)
    before, end = _states(it, k, v, state)
    o = gpu_kernels.forward(cfg, document, it.before, q, k, v, thirds(g), _half(before))
    return o, end


def _attend_fwd(cfg: Config, *args):
    return _attend(cfg, *args), args  # pyright: ignore[reportGeneralTypeIssues]


def _attend_bwd(cfg: Config, saved: Any, grads: Any):
    from pallas_kernels.gated_linear import gpu_kernels

    document, q, k, v, g, state = saved
    do, dend = grads
    (B, T, N, _), K = q.shape, k.shape[2]
    it = _chunks(cfg, document, g)
    before, end = _states(it, k, v, state)
    wide = (B, -1, CHUNK, K, N // K)
    new = _einsum(
        "bnckgf,bnckgv->nbkfv",
        _cut(q).reshape(*wide, q.shape[3]) * it.reads[..., None, :],
        _cut(do).reshape(*wide, do.shape[3]),
    )

    def step(after, xs):
        decay, new = xs
        return decay[..., None] * after + new, after

    dstate, after = lax.scan(step, dend, (jnp.moveaxis(it.decay, 1, 0), new), reverse=True)
    dq, dk, dv = gpu_kernels.backward(
        cfg, document, it.before, q, k, v, thirds(g), _half(before), _half(after),
        do.astype(jnp.bfloat16),
    )  # fmt: skip
    moved = (q.astype(jnp.float32) * dq).reshape(B, T, K, N // K, -1).sum(3)
    moved = _cut(moved - k.astype(jnp.float32) * dk)
    tail = (jnp.concatenate([before[1:], end[None]]) * after).sum(-1)
    dg = lax.cumsum(moved, axis=2, reverse=True) + jnp.moveaxis(tail, 0, 1)[:, :, None]
    return None, *(x.astype(jnp.bfloat16) for x in (dq, dk, dv)), dg.reshape(g.shape), dstate


def _half(states: jax.Array) -> jax.Array:
    """[n, B, K, F, V] -> bfloat16 [B, K, n F, V]."""
    n, B, K, F, V = states.shape
    return states.transpose(1, 2, 0, 3, 4).reshape(B, K, n * F, V).astype(jnp.bfloat16)


_attend.defvjp(_attend_fwd, _attend_bwd)
