"""Chunks of a deep memory whose gradients are all taken at the chunk's anchor, as matrix products.

Write: keys run through M at the anchor, X^1 = K, Z^l = X^l W^l, X^{l+1} = act(Z^l), and back,
G^l = d loss_i / d Z^l_i. No weight matrix is ever made for a token: with the coefficients of
`_chunks.py` the queries read

    Z_q^l = B * (X_q^l W^l) + d0 * (X_q^l S^l) + c0 * (X_q^l W_0^l) - (Theta * (X_q^l X^l^T)) G^l

and the chunk leaves W^l <- B_C W^l + d0_C S^l + c0_C W_0^l - X^l^T diag(Theta[C, :]) G^l. Theta is
D diag(theta); for the Omega rule D Gamma with Gamma[t, i] = theta_t gamma_i for 0 <= t - i < c.

Titans, arXiv 2501.00663, section 3.2; the dual form of arXiv 2407.04620 with decay and momentum.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from causal_jax.memory._chunks import HIGHEST, decay
from causal_jax.memory._network import Network, normalised
from causal_jax.memory._state import Gates, Leaves
from causal_jax.shapes import Array


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


@dataclasses.dataclass(frozen=True)
class Surprise:
    """Gradients of a chunk's tokens in factors: of matrix l X^l_i^T G^l_i, of gamma G_i itself."""

    X: dict[str, Array]
    G: dict[str, Array]
    loss: Array


def surprises(spec, anchor: Leaves, initial: Leaves, slow: Leaves, x: Chunk, keep: Array):
    """Write pass. `keep` [B, 1, C] or [B, N, C]: tokens whose gradients count."""
    net: Network = spec.network
    later = None if x.new is None else (jnp.cumsum(x.new, -1) > 0)[..., None]

    def times(h, name, transposed=False):
        turn = (lambda w: w.mT) if transposed else (lambda w: w)
        y = h @ turn(anchor[name])
        # behind a document's beginning the anchor is what a memory begins with
        return y if later is None else jnp.where(later, h @ turn(initial[name])[None], y)

    def scale():
        if "gamma" not in anchor:
            return slow["gamma"][:, :, None]
        own = anchor["gamma"][:, :, None]
        return own if later is None else jnp.where(later, initial["gamma"][None, :, None], own)

    X, pulls, h, z = {}, [], x.k, x.k
    for i, name in enumerate(net.matrices):
        if i:
            h, pull = jax.vjp(net.activate, z)
            pulls.append(pull)
        X[name], z = h, times(h, name)
    G, factor = {}, spec.loss_scale(x.v.shape[-1])
    if net.around == "residual_ln":
        unit, inverse = normalised(z)
        error = x.k + unit * (1 + scale()) - x.v
        g = factor * error
        if "gamma" in anchor:
            G["gamma"] = g * unit
        g = g * (1 + scale())
        mean = lambda y: jnp.mean(y, -1, keepdims=True)  # noqa: E731
        g = inverse * (g - mean(g) - unit * mean(g * unit))
    else:
        error = (x.k + z if net.around == "residual" else z) - x.v
        g = factor * error
    for i in reversed(range(net.depth)):
        name = net.matrices[i]
        G[name] = g
        if i:
            (g,) = pulls[i - 1](times(g, name, transposed=True))
    G = {name: jnp.where(keep[..., None], g, 0) for name, g in G.items()}
    if spec.clip is not None:
        squares = [jnp.sum(jnp.square(G[n]), -1) * jnp.sum(jnp.square(X[n]), -1) for n in X]
        squares += [jnp.sum(jnp.square(G[n]), -1) for n in G if n not in X]
        norm = jnp.sqrt(sum(squares) + 1e-30)
        G = {
            n: g * (spec.clip * jnp.tanh(norm / spec.clip) / norm)[..., None] for n, g in G.items()
        }
    return Surprise(X, G, 0.5 * jnp.sum(jnp.square(error), -1))


def token_updates(spec, initial: Leaves, slow: Leaves) -> Callable:
    """Scan body where every token updates the memory; gives (y, loss, finite after it)."""
    net: Network = spec.network

    def body(carry, x: Chunk):
        W, S, anchor, fresh = carry
        at_anchor = W if anchor is None else anchor
        if anchor is not None:
            if spec.anchor is not None:
                # the first chunk may be the rest of one that began in an earlier call
                at_anchor = _where(fresh & x.slots.any((1, 2)), W, anchor)
            anchor = at_anchor
            if x.new is not None:
                outside = {n: w[None] for n, w in initial.items()}
                anchor = _where(x.new.any((1, 2)), outside, anchor)
        gates = x.gates
        stored = jnp.broadcast_to(x.stored, gates.theta.shape)
        at = decay(gates, stored, x.new, to_init=spec.decay_to == "init")
        seen = at if spec.read_at == "post" else at.before(x.new)
        keep = stored if spec.omega == 1 else gates.gamma > 0
        s = surprises(spec, at_anchor, initial, slow, x, keep)
        steps = _windows(spec, gates, x)

        h = x.q
        for i, name in enumerate(net.matrices):
            if i:
                h = net.activate(h)
            start = seen.B[..., None] * (h @ W[name])
            if seen.d0 is not None:
                start = start + seen.d0[..., None] * (h @ S[name])
            if seen.c0 is not None:
                start = start + seen.c0[..., None] * (h @ initial[name][None])
            h = start - (_steps(seen.D, steps) * (h @ s.X[name].mT)) @ s.G[name]
        gamma = slow.get("gamma")
        if "gamma" in W:
            mine = lambda c, leaf: c[..., None] * leaf[:, :, None]  # noqa: E731
            gamma = mine(seen.B, W["gamma"]) - _steps(seen.D, steps) @ s.G["gamma"]
            if seen.d0 is not None:
                gamma = gamma + mine(seen.d0, S["gamma"])
            if seen.c0 is not None:
                gamma = gamma + mine(seen.c0, initial["gamma"][None])
        y = net.finish(gamma, x.q, h)

        to_W = _steps(at.D[..., -1:, :], steps).mT
        to_S = None if S is None or at.H is None else _steps(at.H[..., -1:, :], steps).mT
        W, S = _moved(at, W, S, initial, s, to_W, to_S)
        ok = _finite(W)
        if anchor is None:
            return (W, S, None, None), (y, s.loss, ok)
        return (W, S, anchor, jnp.ones_like(fresh)), (y, s.loss, ok)

    return body


def _windows(spec, gates: Gates, x: Chunk) -> Array:
    """theta [.., C], or Gamma [..., C, C] of the Omega rule."""
    if spec.omega == 1:
        return gates.theta
    C, theta = gates.theta.shape[-1], jnp.where(x.stored, gates.theta, 0)
    t = jnp.arange(C)
    near = (t[:, None] >= t[None]) & (t[:, None] - t[None] < spec.omega)
    near = near.reshape((1,) * (gates.theta.ndim - 1) + (C, C))
    if x.new is not None:
        document = jnp.cumsum(x.new, -1)
        near = near & (document[..., :, None] == document[..., None, :])
    return jnp.where(near, theta[..., :, None] * gates.gamma[..., None, :], 0)


def _steps(D: Array, steps: Array) -> Array:
    """D diag(theta), or D Gamma."""
    if steps.ndim < D.ndim:
        return D * steps[..., None, :]
    return jnp.matmul(D, steps, precision=HIGHEST)


def _moved(at, W: Leaves, S: Leaves | None, initial: Leaves, s: Surprise, to_W, to_S):
    """(W, S) after a chunk; one product for both."""
    out_W, out_S = {}, {}
    for name in W:
        last = lambda c, n=name: c[..., -1].reshape(c.shape[:-1] + (1,) * (W[n].ndim - 2))  # noqa: E731
        g = s.G[name]
        both = to_W * g if to_S is None else jnp.concatenate([to_W * g, to_S * g], -1)
        both = s.X[name].mT @ both if name in s.X else jnp.sum(both, -2)
        step_W, *step_S = jnp.split(both, 1 if to_S is None else 2, -1)
        out_W[name] = last(at.B) * W[name] - step_W
        if at.c0 is not None:
            out_W[name] = out_W[name] + last(at.c0) * initial[name][None]
        if S is not None:
            out_W[name] = out_W[name] + last(at.d0) * S[name]
            out_S[name] = last(at.E) * S[name] - step_S[0]
    return out_W, None if S is None else out_S


def chunk_updates(spec, initial: Leaves, slow: Leaves, *, partial: bool) -> Callable:
    """Scan body where a gate chunk updates the memory once.

    The carry is (W, S, anchor, pending sum, tokens in it, position); x.q are the queries that read
    what the memory is at the chunk's start: after the token was written, the last token of the
    chunk before and all but the last of this one.

    Args:
        partial: the first or last chunk may be incomplete; else there is nothing pending.
    """
    net: Network = spec.network

    def body(carry, x: Chunk):
        W, S, anchor, pending, count, position = carry
        if spec.anchor is not None:
            renew = (position % spec.anchor == 0) & x.slots.any((1, 2))
            anchor = _where(renew, W, anchor)
        y = net.apply({**slow, **W}, x.q)
        stored, began, outside = x.stored, None, {n: w[None] for n, w in initial.items()}
        if x.new is not None:
            document = jnp.cumsum(x.new, -1)
            began, stored = x.new.any((1, 2)), stored & (document == document[..., -1:])
            of_query = document
            if spec.read_at == "post":  # the query of a token stands one place behind it
                of_query = jnp.pad(document[..., :-1], [(0, 0), (0, 0), (1, 0)])
            y = jnp.where((of_query > 0)[..., None], net.apply({**slow, **outside}, x.q), y)
        s = surprises(spec, anchor, initial, slow, x, jnp.broadcast_to(stored, x.gates.theta.shape))
        theta = jnp.where(stored, x.gates.theta, 0)[..., None]
        u = {
            n: s.X[n].mT @ (theta * g) if n in s.X else (theta * g).sum(-2) for n, g in s.G.items()
        }
        here = stored.sum((1, 2), dtype=jnp.int32)
        if began is not None:
            W = _where(began, outside, W)
            S = None if S is None else _where(began, jax.tree.map(jnp.zeros_like, S), S)
            anchor = _where(began, outside, anchor)
            count = jnp.where(began, 0, count)
            if partial:
                pending = _where(began, jax.tree.map(jnp.zeros_like, pending), pending)
        if partial:
            u, here = jax.tree.map(jnp.add, u, pending), here + count
        full = x.slots[:, 0, -1]
        S1, W1 = {}, {}
        for n, w in W.items():
            last = lambda g, w=w: jnp.exp(g[..., -1]).reshape(g.shape[:-1] + (1,) * (w.ndim - 2))  # noqa: E731
            S1[n] = -u[n] if S is None else last(x.gates.log_eta) * S[n] - u[n]
            a = 1.0 if x.gates.log_a is None else last(x.gates.log_a)
            base = initial[n][None] if spec.decay_to == "init" else 0.0
            W1[n] = base + a * (w - base) + S1[n]
        due = full & (here > 0)
        W, S = _where(due, W1, W), None if S is None else _where(due, S1, S)
        if partial:
            pending = _where(full, jax.tree.map(jnp.zeros_like, u), u)
            count = jnp.where(full, 0, here)
        position = position + x.slots.shape[-1]
        return (W, S, anchor, pending, count, position), (y, s.loss, _finite(W))

    return body


def _where(rows: Array, a: Any, b: Any) -> Any:
    """Leaf by leaf, row by row."""
    pick = lambda a, b: jnp.where(rows.reshape(-1, *[1] * (b.ndim - 1)), a, b)  # noqa: E731
    return jax.tree.map(pick, a, b)


def _finite(W: Leaves) -> Array:
    return jnp.stack([jnp.isfinite(w).all(range(1, w.ndim)) for w in W.values()]).all(0)
