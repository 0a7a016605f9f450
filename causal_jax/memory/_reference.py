"""Token after token, gradients by `jax.grad`: obviously right, what all fast forms must equal.

    M_t = a_t M_{t-1} + S_t     S_t = eta_t S_{t-1} - theta_t grad l_t(anchor)     y_t = M_t(q_t)
    l_t(M) = |M(k_t) - v_t|^2 / 2

The anchor is M_{t-1} itself (exact), or the memory as it was at the last multiple of `anchor`
tokens, or (anchor None) as the state began. Titans, arXiv 2501.00663, eqs. 8-15.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from causal_jax.memory._state import Gates, MemState


def recurrence(spec, memory, state: MemState, q, k, v, gates: Gates, *, stored, new):
    """(y [B, T, N, H'], state, finite after every token [T, B]): see `MemorySpec.run`."""
    fast = {name: memory[name] for name in spec.fast_leaves}
    slow = {name: leaf for name, leaf in memory.items() if name not in fast}
    carry = {
        "W": state.weights, "S": state.momentum, "A": state.anchor, "position": state.position,
        "pending": state.pending, "recent": state.recent,
    }  # fmt: skip
    body = functools.partial(_token, spec)
    q, k, v = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (q, k, v))
    new = jnp.zeros_like(stored) if new is None else new
    tokens = (q, k, v, gates), stored, new
    tokens = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tokens)
    over_heads = jax.vmap(body, in_axes=(0, 0, 0, (0, None, None)))
    over_rows = jax.vmap(over_heads, in_axes=(0, None, None, 0))

    def token(carry, x):
        carry, y = over_rows(carry, fast, slow, x)
        ok = jnp.stack([jnp.isfinite(w).all(range(1, w.ndim)) for w in carry["W"].values()])
        return carry, (y, ok.all(0))

    carry, (y, ok) = jax.lax.scan(token, _per_head(carry, q.shape[2]), tokens)
    return jnp.swapaxes(y, 0, 1), _per_row(state, carry), ok


def _token(spec, carry, initial, slow, x):
    """One token of one head."""
    (q, k, v, gates), written, new = x
    start = functools.partial(jax.tree.map, lambda i, a: jnp.where(new, i, a))
    zero = functools.partial(jax.tree.map, jnp.zeros_like)
    W = start(initial, carry["W"])
    S = None if carry["S"] is None else start(zero(initial), carry["S"])
    A, pending, recent, at = carry["A"], carry["pending"], carry["recent"], carry["position"]
    if A is not None:
        A = start(initial, A)
        if spec.anchor is not None:
            A = jax.tree.map(lambda w, a: jnp.where(at % spec.anchor == 0, w, a), W, A)
    anchor = W if A is None else A

    M = lambda leaves, x: spec.apply_head({**slow, **leaves}, x)  # noqa: E731
    y = M(W, q)

    def surprise(k, v):
        half = lambda leaves: 0.5 * spec.loss_scale(v.shape[-1]) * jnp.sum((M(leaves, k) - v) ** 2)  # noqa: E731
        g = jax.grad(half)(anchor)
        if spec.clip is not None:
            norm = jnp.sqrt(sum(jnp.sum(x**2) for x in g.values()) + 1e-30)
            g = jax.tree.map(lambda x: x * spec.clip * jnp.tanh(norm / spec.clip) / norm, g)
        return g

    u = surprise(k, v)
    if spec.omega > 1:
        gamma = jnp.where(written, 1.0 if gates.gamma is None else gates.gamma, 0)
        u = jax.tree.map(lambda x: gamma * x, u)
        fresh = new if spec.anchor is None else new | (at % spec.anchor == 0)
        recent = {**recent, "gamma": jnp.where(fresh, 0, recent["gamma"])}
        past = jax.vmap(surprise)(recent["k"], recent["v"])
        add = lambda x, p: x + jnp.tensordot(recent["gamma"], p, 1)  # noqa: E731
        u = jax.tree.map(add, u, past)
        push = lambda old, x: jnp.concatenate([old, x[None]])[1:]  # noqa: E731
        recent = {n: push(recent[n], x) for n, x in (("k", k), ("v", v), ("gamma", gamma))}
    u = jax.tree.map(lambda x: gates.theta * x, u)
    due = written
    if spec.gate_chunk > 1:
        stored = jnp.where(new, 0, pending["stored"]) + written
        total = start(zero(initial), pending["surprise"])
        u = jax.tree.map(lambda p, x: p + jnp.where(written, x, 0), total, u)
        border = (at + 1) % spec.gate_chunk == 0
        due = border & (stored > 0)
        kept = jax.tree.map(lambda x: jnp.where(border, 0, x), u)
        pending = {**pending, "surprise": kept, "stored": jnp.where(border, 0, stored)}
    a = 1.0 if gates.log_a is None else jnp.exp(gates.log_a)
    S1 = jax.tree.map(jnp.negative, u)
    if S is not None:
        S1 = jax.tree.map(lambda s, x: jnp.exp(gates.log_eta) * s + x, S, S1)
    target = initial if spec.decay_to == "init" else zero(initial)
    W1 = jax.tree.map(lambda w, i, s: i + a * (w - i) + s, W, target, S1)
    choose = functools.partial(jax.tree.map, lambda n, o: jnp.where(due, n, o))
    W, S = choose(W1, W), None if S is None else choose(S1, S)
    y = M(W, q) if spec.read_at == "post" else y
    carry = {"W": W, "S": S, "A": A, "position": at + 1, "pending": pending, "recent": recent}
    return carry, y


def _per_head(carry, heads):
    """Values that a row's heads share, once per head; recent tokens by head."""
    spread = lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], heads))  # noqa: E731
    carry = {**carry, "position": spread(carry["position"])}
    if carry["pending"] is not None:
        pending = carry["pending"]
        carry["pending"] = {"surprise": pending["surprise"], "stored": spread(pending["stored"])}
    if carry["recent"] is not None:
        carry["recent"] = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), carry["recent"])
    return carry


def _per_row(state: MemState, carry) -> MemState:
    pending, recent = carry["pending"], carry["recent"]
    if pending is not None:
        pending = {**state.pending, **pending, "stored": pending["stored"][:, 0]}
    if recent is not None:
        recent = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), recent)
    return dataclasses.replace(
        state, weights=carry["W"], momentum=carry["S"], anchor=carry["A"], pending=pending,
        recent=recent,
    )  # fmt: skip
