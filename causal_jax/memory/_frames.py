"""Runs of tokens on the grid of chunks of a deep memory, wherever a run begins.

A run that begins inside a chunk is laid into a frame of whole chunks, so many slots from its start;
slots without a token are not stored, and what stood there before is in the state.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from causal_jax.memory._anchored import (
    KEPT,
    Chunk,
    form_of,
    lifted,
    lowered,
    segment_updates,
    token_updates,
)
from causal_jax.memory._chunks import from_chunks, into_chunks
from causal_jax.memory._state import MemState
from causal_jax.shapes import Array

TILE = 64  # where no chunk is part of the function
SEGMENT = 512  # tokens with gradients at once where no anchor says how many: fits a cache


def token_form(spec, leaves, state: MemState, x: Chunk, aligned: bool):
    """Every token updates: (y, loss [B, T, N], state, finite after every chunk [n, B])."""
    T = x.stored.shape[1]
    C = spec.anchor or TILE
    initial, slow = _split(spec, leaves)
    recent, before = None, x
    if spec.omega > 1:
        recent = _recent(spec, state, x)
        if not aligned:
            x = _with_recent(state, x)
    shift = None
    if aligned:
        C = min(C, T)
    else:
        back = x.stored.shape[1] - T  # recent tokens in front
        shift = state.position % C - back
        x = _frame(x, shift + C, C, -(-(T + C - 1) // C) + 1, drop=C)
    carried = None, None
    if not (aligned and spec.anchor and T % spec.anchor == 0):
        fresh = jnp.ones_like(state.position, bool) if aligned else state.position % C == 0
        carried = state.anchor, fresh
    form = form_of(spec, x.v.shape[-1])
    body = jax.checkpoint(token_updates(form, spec.anchor, initial, slow), prevent_cse=False)
    carry = *_inside(state.weights, state.momentum, carried[0]), carried[1]
    (*leaves, _), (y, loss, ok) = jax.lax.scan(body, carry, _chunks(x, C))
    W, S, anchor = _outside(*leaves)
    y, loss = (_out(z, state.position % C if shift is not None else None, T) for z in (y, loss))
    state = dataclasses.replace(
        state, weights=W, momentum=S, anchor=W if anchor is None else anchor, recent=recent
    )
    return y, loss, state, _known(ok, shift, before)


def chunk_form(spec, leaves, state: MemState, x: Chunk, aligned: bool):
    """A gate chunk updates once; returns as `token_form`."""
    T, C = x.stored.shape[1], spec.gate_chunk
    initial, slow = _split(spec, leaves)
    shift, before = None, x
    most = max(SEGMENT // C, 1) * C
    segment = spec.anchor or min(-(-T // C) * C, most)
    if not aligned:
        grid = spec.anchor or C
        shift = state.position % grid
        frames = -(-(T + grid - 1) // grid)
        x = _frame(x, shift, grid, frames, drop=0)
        segment = spec.anchor or min(frames * C, most)
    elif spec.anchor and segment > T:
        segment = -(-T // C) * C
    chunks = _chunks(x, segment)
    late = spec.read_at == "post"
    if late:
        q = jnp.moveaxis(chunks.q, 0, 2)  # [B, N, n, L, H]
        flat = q.reshape(*q.shape[:2], -1, q.shape[-1])
        behind = jnp.pad(flat[:, :, :-1], [(0, 0), (0, 0), (1, 0), (0, 0)]).reshape(q.shape)
        chunks = dataclasses.replace(chunks, q=jnp.moveaxis(behind, 2, 0))
    partial = not aligned or T % C != 0
    start = state.position - (0 if shift is None else shift)
    pending = (state.pending["surprise"], state.pending["stored"]) if partial else (None, None)
    carry = *_inside(state.weights, state.momentum, state.anchor, pending[0]), pending[1], start
    form = form_of(spec, x.v.shape[-1])
    body = segment_updates(form, spec.anchor, C, initial, slow, partial=partial)
    if len(chunks.stored) > 1:
        policy = jax.checkpoint_policies.save_only_these_names(KEPT)
        body = jax.checkpoint(body, prevent_cse=False, policy=policy)
    (*leaves, stored, _), (y, loss, ok) = jax.lax.scan(body, carry, chunks)
    if late:
        last = spec.network.apply({**slow, **leaves[0]}, flat[:, :, -1:])
        y = jnp.moveaxis(y, 0, 2).reshape(flat.shape)
        y = jnp.concatenate([y[:, :, 1:], last], 2).reshape(q.shape)
        y = jnp.moveaxis(y, 2, 0)
    W, S, anchor, surprise = _outside(*leaves)
    y, loss = (_out(z, shift, T) for z in (y, loss))
    pending = state.pending
    if partial:
        pending = {**pending, "surprise": surprise, "stored": stored}
    state = dataclasses.replace(state, weights=W, momentum=S, anchor=anchor, pending=pending)
    ok, n = ok.reshape(-1, ok.shape[-1]), -(-T // C)
    if shift is None:  # chunks behind the end are the last one's
        ok = jnp.concatenate([ok[: n - 1], ok[n - 1 :].all(0)[None]])
    return y, loss, state, _known(ok, shift, before)


def _inside(*trees) -> list[Any]:
    """Leaves as the chunks' mathematics has them."""
    return [None if tree is None else lifted(tree) for tree in trees]


def _outside(*trees) -> list[Any]:
    return [None if tree is None else lowered(tree) for tree in trees]


def _split(spec, leaves):
    leaves = lifted({n: w[None] for n, w in leaves.items()})
    initial = {n: leaves[n] for n in spec.fast_leaves}
    return initial, {n: w for n, w in leaves.items() if n not in initial}


def _chunks(x: Chunk, C: int) -> Chunk:
    """[B, T, ...] -> [n, B, N or 1, C, ...]."""
    heads = lambda a: into_chunks(a, C)  # noqa: E731
    rows = lambda a: into_chunks(a, C, heads=False)  # noqa: E731
    return Chunk(
        heads(x.q), heads(x.k), heads(x.v), jax.tree.map(heads, x.gates), rows(x.slots),
        rows(x.stored), None if x.new is None else rows(x.new),
    )  # fmt: skip


def _frame(x: Chunk, shift: Array, C: int, chunks: int, drop: int) -> Chunk:
    """Every row `shift` [B] slots later in `chunks` chunks, of which `drop` slots are cut off."""

    def one(row, shift):
        frame = jnp.zeros((chunks * C + drop, *row.shape[1:]), row.dtype)
        return jax.lax.dynamic_update_slice_in_dim(frame, row, shift, 0)[drop:]

    return jax.tree.map(lambda a: jax.vmap(one)(a, shift), x)


def _out(y: Array, shift: Array | None, T: int) -> Array:
    """[n, B, N, C, ...] -> [B, T, N, ...], out of the frame."""
    y = from_chunks(y, y.shape[0] * y.shape[3])
    if shift is None:
        return y[:, :T]
    cut = lambda row, s: jax.lax.dynamic_slice_in_dim(row, s, T, 0)  # noqa: E731
    return jax.vmap(cut)(y, shift)


def _known(ok: Array, shift: Array | None, x: Chunk) -> Array:
    """Which chunks left a finite memory, as equal parts of the run; off the grid: as one."""
    return ok if shift is None else ok.all(0)[None]


def _recent(spec, state: MemState, x: Chunk):
    """The tokens that the next step's window reaches back to."""
    back, old = spec.omega - 1, state.recent
    at = state.position[:, None] + jnp.arange(x.stored.shape[1])[None]
    fresh = at % spec.anchor == 0
    count = jnp.cumsum(fresh if x.new is None else fresh | x.new, 1)
    past = jnp.zeros_like(count, shape=(count.shape[0], back))
    same = (jnp.concatenate([past, count], 1) == count[:, -1:])[:, -back:]
    out = {n: jnp.concatenate([old[n], getattr(x, n)], 1)[:, -back:] for n in ("k", "v")}
    gamma = jnp.concatenate([old["gamma"], x.gates.gamma], 1)[:, -back:]
    return {**out, "gamma": jnp.where(same[..., None], gamma, 0)}


def _with_recent(state: MemState, x: Chunk) -> Chunk:
    """The run with recent tokens in front: they are windows' past, and no tokens of their own."""
    old, nothing = state.recent, lambda a, n: jnp.zeros_like(a, shape=(a.shape[0], n, *a.shape[2:]))
    n = old["gamma"].shape[1]
    pad = lambda a: jnp.concatenate([nothing(a, n), a], 1)  # noqa: E731
    out = jax.tree.map(pad, x)
    front = lambda old, new: jnp.concatenate([old.astype(new.dtype), new], 1)  # noqa: E731
    gates = dataclasses.replace(out.gates, gamma=front(old["gamma"], x.gates.gamma))
    return dataclasses.replace(out, k=front(old["k"], x.k), v=front(old["v"], x.v), gates=gates)
