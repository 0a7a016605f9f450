"""Gated linear attention in chunks for TPUs (Mosaic): the state stays in VMEM, chunk after chunk.

The grid is (batch rows, key heads, chunks); the last axis runs in order and hands the state on in
float32 scratch, so only inputs and outputs cross the memory of the chip.

    forward    o = (A + reads S) of each chunk, then S <- decay S + writes^T v
    backward   forward once more for the states before the chunks (they are not kept), then chunks
               in reverse with the gradient of the state in scratch; dq, dk, dv and, from them,
               dg = reverse cumsum of q dq - k dk inside the chunk + sum over V of S dS at its end

Inside a chunk pairs meet level by level of a binary tree (`halves.py`): no exponent is above 0. The
state is held transposed, [V, F], so that decays are rows. Everything is float32 inside, products of
full precision. Nothing is added up by two programs: the same bits from run to run.

Checked without a TPU: against the recurrence in both interpreters, for races, and by compiling
ahead of time for v5e, v5p and v6e. Never run or timed on a real chip. arXiv 2312.06635, section 4.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Config(NamedTuple):
    """All that is static."""

    chunk: int
    documents: bool
    interpret: Any


def gated_linear_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    state: jax.Array,
    document: jax.Array | None = None,
    *,
    chunk: int = 64,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Outputs of all positions and the state after the last; differentiable by q, k, v, g, state.

    Args:
        q, k, v, g, state, document: as `gated_linear_chunked`; q, k, v in float32 or bfloat16.
        chunk: positions of a chunk, a power of two; `legal_chunk` makes it one that a TPU can do.
        interpret: False on a TPU; True or `pltpu.InterpretParams` elsewhere.

    Returns:
        (o [B, T, N, V], state [B, K, F, V]), float32.

    Raises:
        NotImplementedError: `refusal(...)` says why.
    """
    if reason := refusal(q, k, v):
        raise NotImplementedError(f"tpu: {reason}")
    (B, T, N, _), V = q.shape, v.shape[3]
    C = legal_chunk(chunk, T)
    cfg = Config(C, document is not None, interpret)
    cut = functools.partial(_cut, chunk=C)
    if document is None:
        document = jnp.zeros((B, T), jnp.int32)
    o, end = _attend(  # pyright: ignore[reportGeneralTypeIssues]
        cfg, _ids(document, C), cut(q), cut(k), cut(v), cut(g.astype(jnp.float32)),
        state.astype(jnp.float32).swapaxes(2, 3),
    )  # fmt: skip
    o = jnp.moveaxis(o.reshape(B, N, -1, V), 1, 2)
    return o[:, :T], end.swapaxes(2, 3)


def refusal(q: Any, k: Any, v: Any) -> str | None:
    """Why these kernels cannot serve such arrays, or None."""
    if any(x.dtype not in (jnp.float32, jnp.bfloat16) for x in (q, k, v)):
        return f"it needs float32 or bfloat16, not {q.dtype}, {k.dtype}, {v.dtype}"
    if not q.shape[1]:
        return "there is no position"
    F, V = k.shape[-1], v.shape[-1]
    if F * V > 2**18:
        return f"a state of {F} x {V}: at most {2**18} numbers, or it does not fit beside a chunk"
    return None


def legal_chunk(chunk: int, length: int) -> int:
    """The nearest chunk that a TPU can work on: 16 to 128, no longer than the sequence needs."""
    chunk = min(max(chunk, 16), 128)
    while chunk > 16 and chunk // 2 >= length:
        chunk //= 2
    return chunk


def _cut(x: jax.Array, chunk: int) -> jax.Array:
    """[B, T, N, F] -> [B, N, chunks, C, F], zeros behind the last position."""
    x = jnp.moveaxis(jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), (0, 0), (0, 0))), 1, 2)
    return x.reshape(*x.shape[:2], -1, chunk, x.shape[-1])


def _ids(document: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Documents as columns [B, chunks, C, 2], with that of the position before the chunk, and as
    rows [B, chunks, 1, C]."""
    document = jnp.pad(document, ((0, 0), (0, -document.shape[1] % chunk)), mode="edge")
    document = document.astype(jnp.int32).reshape(len(document), -1, chunk)
    before = jnp.pad(document[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))
    both = jnp.stack([document, jnp.broadcast_to(before, document.shape)], -1)
    return both, document[:, :, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(cfg: Config, ids, q, k, v, g, state):
    from pallas_kernels.gated_linear import tpu_kernels  # Pallas takes a while to import

    return tpu_kernels.forward(cfg, ids, q, k, v, g, state)


def _attend_fwd(cfg: Config, *args):
    return _attend(cfg, *args), args  # pyright: ignore[reportGeneralTypeIssues]


def _attend_bwd(cfg: Config, saved: Any, grads: Any):
    from pallas_kernels.gated_linear import tpu_kernels

    ids, q, k, v, g, state = saved
    do, dend = grads
    states = tpu_kernels.states(cfg, ids, k, v, g, state)
    dq, dk, dv, dg, dstate = tpu_kernels.backward(cfg, ids, q, k, v, g, states, do, dend)
    return None, dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dg, dstate


_attend.defvjp(_attend_fwd, _attend_bwd)
