"""Memories on the kernels of `pallas_kernels/memory_chunk`: who can serve, arrays in their form.

A kernel that was never run on its own hardware is never the default: it must be named.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from causal_jax.hardware import elsewhere
from causal_jax.memory import _frames
from causal_jax.memory._anchored import Chunk, form_of, lifted, lowered
from causal_jax.memory._chunks import from_chunks, into_chunks
from causal_jax.memory._state import Gates, MemState
from causal_jax.shapes import Array
from causal_jax.taps import Tap
from pallas_kernels.memory_chunk import Tokens, gpu

NAMES = ("tpu", "gpu")
INTERPRET: Any = False  # tests set it: the kernel's programs in an interpreter, on any device


def check(name: str, tap: Tap) -> None:
    """Whether a kernel may be asked at all.

    Raises:
        NotImplementedError: with the reason.
    """
    if name == "gpu":
        raise NotImplementedError(f"gpu: {gpu.refusal()}")
    if not INTERPRET and (reason := elsewhere("tpu")):
        raise NotImplementedError(f"tpu: {reason}")
    if tap.wants("surprise"):
        raise NotImplementedError("tpu: its kernel keeps no surprise; take 'chunked'")


def tokens_of(q, k, v, gates: Gates, stored, new, C: int) -> Tokens:
    """[B, T, N, H] cut into chunks, what is behind the end not stored."""
    row = lambda g: None if g is None else into_chunks(g, C)[..., None, :]  # noqa: E731
    flag = lambda g: into_chunks(g, C, heads=False)[..., None, :]  # noqa: E731
    theta = row(jnp.where(stored[..., None], gates.theta, 0))
    assert theta is not None
    wide = lambda g: jnp.broadcast_to(flag(g), theta.shape)  # noqa: E731
    q, k, v = (into_chunks(a, C) for a in (q, k, v))
    new = None if new is None else wide(new)
    return Tokens(q, k, v, theta, row(gates.log_a), row(gates.log_eta), wide(stored), new)


def linear(
    x: Tokens, T: int, state: Array, initial: Array, *, to_init: bool, read_at: str
) -> tuple[Array, Array, Array]:
    """As `momentum_delta` computes it: y [B, T, N, V], [M | S], finite or not [1, B]."""
    from pallas_kernels.memory_chunk import tpu  # Pallas takes a while to import

    y, after = tpu.linear(x, state, initial, to_init=to_init, read_at=read_at, interpret=INTERPRET)
    return from_chunks(y, T), after, jnp.isfinite(after).all((1, 2, 3))[None]


def deep(
    spec, leaves, state: MemState, q, k, v, gates: Gates, stored, new, aligned: bool, rest: Any
) -> tuple[Array, MemState, Array]:
    """Whole anchor chunks on the kernel, what is left of a chunk by `rest` (`spec.chunked`)."""
    from pallas_kernels.memory_chunk import tpu

    C, T = spec.anchor, q.shape[1]
    if spec.gate_chunk > 1 or C is None or C == 1:
        raise NotImplementedError(
            f"tpu: gate_chunk={spec.gate_chunk}, anchor={C}: its kernel updates with every token "
            "and has its gradients at the start of a chunk"
        )
    if not aligned:
        raise NotImplementedError(
            f"tpu: its kernel begins where a chunk begins; say aligned=True at multiples of {C}"
        )
    full = T // C * C
    cut = lambda tree, a, b: jax.tree.map(lambda x: x[:, a:b], tree)  # noqa: E731
    args = q, k, v, gates, stored, new
    ys, ok = [], jnp.ones((1, q.shape[0]), bool)
    if full:
        q0, k0, v0, gates0, stored0, new0 = cut(args, 0, full)
        x = tokens_of(q0, k0, v0, gates0, stored0, new0, C)
        weight = None
        if spec.omega > 1:
            weight = into_chunks(gates0.gamma, C)[..., None, :]
        inside = lifted(leaves)
        initial = {n: inside[n] for n in spec.fast_leaves}
        slow = inside.get("gamma") if "gamma" not in initial else None
        W = lifted(state.weights)
        S = None if state.momentum is None else lifted(state.momentum)
        y, W, S = tpu.deep(
            form_of(spec, v.shape[-1]), x, W, S, initial, slow, weight=weight, interpret=INTERPRET
        )
        ys.append(from_chunks(y, full))
        recent = state.recent
        if spec.omega > 1:
            chunk = Chunk(q0, k0, v0, gates0, jnp.ones_like(stored0), stored0, new0)
            recent = _frames._recent(spec, state, chunk)
        W, S = lowered(W), None if S is None else lowered(S)
        ok = jnp.stack([jnp.isfinite(w).all(range(1, w.ndim)) for w in W.values()]).all(0)[None]
        state = dataclasses.replace(
            state, weights=W, momentum=S, anchor=W, recent=recent, position=state.position + full
        )
    if full < T:
        y, state, last = rest(state, *cut(args, full, T))
        ys.append(y)
        ok = ok & last.all(0)[None]
    position = state.position - full
    return jnp.concatenate(ys, 1), dataclasses.replace(state, position=position), ok
