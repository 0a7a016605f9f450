"""Scan bodies of a deep memory: chunks whose tokens each update it, and chunks that update it once.

The mathematics of a chunk is in `pallas_kernels/memory_chunk/deep.py`. Where a gate chunk updates
the memory once and its gradients are taken at an anchor further back, a whole anchor segment has
its gradients at once, as large products, and then goes through M one leaf after the other:

    u_c = X_c^T diag(theta) G_c     S_c = eta_c S_{c-1} - u_c     W_c = a_c W_{c-1} + S_c
    Z_c = X_q,c W_{c-1}                                            for every chunk c of the segment

Chunks in a row have a backward pass of their own (custom_vjp): no forward-mode differentiation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from causal_jax.memory._state import Gates, Leaves
from causal_jax.shapes import Array
from pallas_kernels.memory_chunk import Form, Tokens, anchored_chunk, surprises
from pallas_kernels.memory_chunk.network import Network

AT_ONCE = 8  # chunks of a leaf whose values are all there when the gradient passes
KEPT = "products of tokens with weights"  # of a segment: kept for the gradient, not made again


def _keep(x: Array) -> Array:
    return checkpoint_name(x, KEPT)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens of one chunk: q, k, v [B, N, C, H], gates [B, N, C], the rest [B, 1, C].

    Attributes:
        slots: places that tokens stand at (stored or not); the others are padding.
        stored, new: as in `MemorySpec.run`; new: None where there is one document.
    """

    q: Array
    k: Array
    v: Array
    gates: Gates
    slots: Array
    stored: Array
    new: Array | None


def form_of(spec, width: int) -> Form:
    """What the chunk's mathematics needs to know of a memory whose values have this width."""
    factor = spec.loss_scale(width)
    return Form(spec.network, factor, spec.decay_to == "init", spec.read_at, spec.clip, spec.omega)


def lifted(leaves: Leaves) -> Leaves:
    """The norm's scale as a row beside tokens."""
    return {n: w[..., None, :] if n == "gamma" else w for n, w in leaves.items()}


def lowered(leaves: Leaves) -> Leaves:
    """And back."""
    return {n: w[..., 0, :] if n == "gamma" else w for n, w in leaves.items()}


def token_updates(form: Form, anchor_chunk: int | None, initial: Leaves, slow: Leaves) -> Callable:
    """Scan body where every token updates the memory; gives (y, loss, finite after it).

    All leaves here and below: `lifted`, [B or 1, N, ...].
    """

    def body(carry, x: Chunk):
        W, S, anchor, fresh = carry
        at_anchor = W if anchor is None else anchor
        if anchor is not None:
            if anchor_chunk is not None:
                # the first chunk may be the rest of one that began in an earlier call
                at_anchor = _where(fresh & x.slots.any((1, 2)), W, anchor)
            anchor = at_anchor
            if x.new is not None:
                anchor = _where(x.new.any((1, 2)), initial, anchor)
        row: Any = lambda a: None if a is None else a[..., None, :]  # noqa: E731
        document = None if x.new is None else row(jnp.cumsum(x.new, -1))
        theta = row(jnp.where(x.stored, x.gates.theta, 0))
        tokens = Tokens(
            x.q, x.k, x.v, theta, row(x.gates.log_a), row(x.gates.log_eta),
            jnp.broadcast_to(row(x.stored), theta.shape), row(x.new),
        )  # fmt: skip
        weight = row(x.gates.gamma) if form.omega > 1 else None
        y, loss, W, S = anchored_chunk(
            form, W, S, at_anchor, initial, slow.get("gamma"), tokens, weight, document
        )
        ok = _finite(W)
        if anchor is None:
            return (W, S, None, None), (y, loss, ok)
        return (W, S, anchor, jnp.ones_like(fresh)), (y, loss, ok)

    return body


def segment_updates(
    form: Form, anchor_chunk: int | None, size: int, initial: Leaves, slow: Leaves, *, partial: bool
) -> Callable:
    """Scan body over anchor segments, of which every gate chunk of `size` tokens updates once.

    The carry is (W, S, anchor, pending sum, tokens in it, position); x.q are the queries that read
    what the memory is at their chunk's start: after the token was written, the last token of the
    chunk before and all but the last of this one.

    Args:
        partial: the first or last chunk may be incomplete; else there is nothing pending.
    """
    net: Network = form.net

    chunked = lambda a: _cut(a, a.shape[2] // size)  # noqa: E731

    def body(carry, x: Chunk):
        W, S, anchor, pending, count, position = carry
        if anchor_chunk is not None:
            # a segment whose first token came in an earlier call got its anchor there
            renew = (position % anchor_chunk == 0) & x.slots[:, 0, 0]
            anchor = _where(renew, W, anchor)
        stored = chunked(x.stored)
        later: Any = None
        began: Any = None
        document: Any = None
        if x.new is not None:
            later = (jnp.cumsum(x.new, -1) > 0)[..., None]
            new = chunked(x.new)
            document = jnp.cumsum(new, -1)
            began, stored = new.any((-2, -1)), stored & (document == document[..., -1:])
        keep = _joined(stored)[..., None]
        s = surprises(form, anchor, slow.get("gamma"), x.k, x.v, keep, later, initial, kept=_keep)
        full = chunked(x.slots)[:, :, 0, -1]
        due, count = _due(stored.sum((-2, -1), dtype=jnp.int32), full, began, count)
        steps = _Steps.of(x.gates, size, due, full, began, form.to_init)
        theta = jnp.where(x.stored, x.gates.theta, 0)[..., None]
        ends = {}

        def leaf(name: str, xq: Array | None) -> Array:
            """What queries read in one leaf; its end values go to `ends`."""
            start = (W[name], *(None if part is None else part[name] for part in (S, pending)))
            tokens = xq, s.X.get(name), theta * s.G[name]
            ends[name], z = _through_chunks(initial[name], start, steps, tokens)
            return _keep(z)

        h = x.q
        for i, name in enumerate(net.matrices):
            h = leaf(name, jax.checkpoint(net.activate)(h) if i else h)
        gamma = slow.get("gamma")
        if "gamma" in W:
            gamma = jnp.repeat(leaf("gamma", None), size, axis=2)
        y = net.finish(gamma, x.q, h)
        if x.new is not None:
            of_query = document
            if form.read_at == "post":  # the query of a token stands one place behind it
                of_query = jnp.pad(document[..., :-1], [(0, 0)] * 3 + [(1, 0)])
            outside = net.apply({**slow, **initial}, x.q)
            y = jnp.where((_joined(of_query) > 0)[..., None], outside, y)
            anchor = _where(began.any(0), initial, anchor)
        W = {n: end[0] for n, end in ends.items()}
        S = None if S is None else {n: end[1] for n, end in ends.items()}
        pending = {n: end[2] for n, end in ends.items()} if partial else None
        # W is linear in what is summed: a chunk is bad if its own gradients are, or all is at last
        own = jnp.stack([jnp.isfinite(chunked(g)).all((-1, -2, -3)) for g in s.G.values()]).all(0)
        ok = own.at[-1].set(own[-1] & _finite(W))
        position = position + x.slots.shape[-1]
        return (W, S, anchor, pending, count, position), (y, s.loss, ok)

    return body


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Steps:
    """How chunks change the memory, [c, B, N, 1, 1]: S <- e S - m u and W <- a W + m S."""

    a: Any  # Array or None; what a transformation puts there is not checked
    e: Any
    m: Any
    full: Any
    began: Any
    to_init: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, gates: Gates, size: int, due, full, began, to_init: bool) -> "_Steps":
        wide = lambda flag: flag[:, :, None, None, None]  # noqa: E731

        def last(logs):
            if logs is None:
                return None
            logs = jnp.moveaxis(logs[..., size - 1 :: size], 2, 0)[..., None, None]
            return jnp.exp(jnp.where(wide(due), logs, 0))

        flags = wide(full), None if began is None else wide(began)
        m = wide(due).astype(jnp.float32)
        return cls(last(gates.log_a), last(gates.log_eta), m, *flags, to_init)


def _leaf_update(initial: Array, carry: Any, x: Any) -> tuple[Any, Array]:
    """A chunk's update of one leaf, and what the queries in front of it read."""
    (W, S, pending), (c, (xq, X, G)) = carry, x
    z = W if xq is None else xq @ W  # queries of the document before still read the old memory
    if c.began is not None:
        W = jnp.where(c.began, initial, W)
        S = None if S is None else jnp.where(c.began, 0, S)
    u = G.sum(-2, keepdims=True) if X is None else _products(X, G)
    if pending is not None:
        u = u + (pending if c.began is None else jnp.where(c.began, 0, pending))
        pending = jnp.where(c.full, 0, u)
    step = -c.m * u if S is None else c.e * S - c.m * u
    moved = W if c.a is None else c.a * W
    if c.to_init and c.a is not None:
        moved = moved + (1 - c.a) * initial
    return (moved + (step if S is None else c.m * step), S if S is None else step, pending), z


@jax.custom_vjp
def _products(X: Array, G: Array) -> Array:
    """X^T G."""
    return jnp.einsum("...ti,...tj->...ij", X, G)


def _products_backward(kept, u):
    """Derived, the first would come out turned."""
    X, G = kept
    return jnp.einsum("...tj,...ij->...ti", G, u), X @ u


_products.defvjp(lambda X, G: (_products(X, G), (X, G)), _products_backward)


def _through_chunks(initial: Array, start: Any, steps: "_Steps", tokens: Any):
    """`_leaf_update` over the chunks of tokens [B, N, L, ..]: (end values, z [B, N, L or c, ..]).

    Long runs go in groups of which only the first values are kept for the gradient.
    """
    n = len(steps.m)
    size = max(d for d in range(1, n + 1) if n % d == 0 and d <= AT_ONCE)
    if size == n:
        return _group(initial, start, steps, tokens)
    body = lambda carry, x: _group(initial, carry, *x)  # noqa: E731
    steps = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), steps)
    end, z = jax.lax.scan(body, start, (steps, jax.tree.map(lambda a: _cut(a, n // size), tokens)))
    return end, _joined(z)


@jax.custom_vjp
def _group(initial, start, steps, tokens):
    """Chunks one after the other; the gradient makes what is between them again."""
    tokens = jax.tree.map(lambda a: _cut(a, len(steps.m)), tokens)
    body = lambda carry, x: _leaf_update(initial, carry, x)  # noqa: E731
    end, z = jax.lax.scan(body, start, (steps, tokens))
    return end, _joined(z)


def _unrolled(initial, carry, steps, tokens):
    """The same, written out: faster by a third where every chunk's values are needed again."""
    n, zs = len(steps.m), []
    leaves, tree = jax.tree.flatten(tokens)
    cut = zip(*(jax.lax.split(a, [a.shape[2] // n] * n, axis=2) for a in leaves))
    for c, x in enumerate(cut):
        x = jax.tree.map(lambda a, c=c: a[c], steps), jax.tree.unflatten(tree, x)
        carry, z = _leaf_update(initial, carry, x)
        zs.append(z)
    return carry, jnp.concatenate(zs, 2)


def _group_backward(kept, g):
    return jax.vjp(_unrolled, *kept)[1](g)


_group.defvjp(lambda *args: (_group(*args), args), _group_backward)


def _cut(a: Array, n: int) -> Array:
    """[B, N, L, ..] -> [n, B, N, L / n, ..]."""
    return jnp.moveaxis(a.reshape(*a.shape[:2], n, -1, *a.shape[3:]), 2, 0)


def _joined(a: Array) -> Array:
    """And back."""
    a = jnp.moveaxis(a, 0, 2)
    return a.reshape(*a.shape[:2], -1, *a.shape[4:])


def _due(stored: Array, full: Array, began: Array | None, count: Array | None):
    """Which chunks update the memory, [c, B], and how many tokens are pending at the end."""
    if count is None:
        return full & (stored > 0), None

    def body(count, x):
        stored, full, began = x
        here = stored + (count if began is None else jnp.where(began, 0, count))
        return jnp.where(full, 0, here), full & (here > 0)

    count, due = jax.lax.scan(body, count, (stored, full, began))
    return due, count


def _where(rows: Array, a: Any, b: Any) -> Any:
    """Leaf by leaf, row by row."""
    pick = lambda a, b: jnp.where(rows.reshape(-1, *[1] * (b.ndim - 1)), a, b)  # noqa: E731
    return jax.tree.map(pick, a, b)


def _finite(W: Leaves) -> Array:
    return jnp.stack([jnp.isfinite(w).all(range(1, w.ndim)) for w in W.values()]).all(0)
