"""Token after token, one weight gradient per token by `jax.grad`: what all faster forms must equal.

    M_t = a_t M_{t-1} + S_t     S_t = eta_t S_{t-1} - theta_t grad l_t(anchor)     y_t = M_t(q_t)

The anchor of the linear form is M_{t-1} itself, that of a deep memory the weights before the chunk,
or the initial ones behind a document's beginning. Titans, arXiv 2501.00663, eqs. 8-15.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.memory_chunk.deep import Form, Leaves
from pallas_kernels.memory_chunk.linear import Tokens


def linear(
    x: Tokens, state: jax.Array, initial: jax.Array, *, to_init: bool, read_at: str
) -> tuple[jax.Array, jax.Array]:
    """As `tpu.linear`: y [n, B, N, C, V] and [M | S] after the last token."""
    V, momentum = x.v.shape[-1], x.log_eta is not None

    def head(state, initial, x: Tokens):
        M, S = state[:, :V], state[:, V:] if momentum else jnp.zeros_like(initial)

        def token(carry, t):
            M, S = _begun(t, carry, (initial, jnp.zeros_like(initial)))
            u = t.theta * jnp.outer(t.k, t.k @ M - t.v)
            after = _moved(t, M, S, u, initial if to_init else None)
            after = jax.tree.map(lambda a, b: jnp.where(t.stored, a, b), after, (M, S))
            return after, t.q @ (after[0] if read_at == "post" else M)

        (M, S), y = lax.scan(token, (M, S), _flat(x))
        return y, jnp.concatenate([M, S], -1) if momentum else M

    y, state = _over_heads(head, (state,), (initial,), x)
    return _cut(y, x), state


def deep(
    form: Form, x: Tokens, W: Leaves, S: Leaves | None, initial: Leaves, gamma: jax.Array | None,
    *, weight: jax.Array | None = None,
) -> tuple[jax.Array, Leaves, Leaves | None]:  # fmt: skip
    """As `tpu.deep`."""
    net, momentum = form.net, S is not None

    def head(W, S, initial, gamma, x: Tokens, weight):
        slow = {} if gamma is None else {"gamma": gamma}
        apply = lambda leaves, q: net.apply({**slow, **leaves}, q[None])[0]  # noqa: E731
        tree = functools.partial(jax.tree.map)

        def surprise(anchor, k, v):
            g = jax.grad(lambda w: form.factor / 2 * jnp.sum((apply(w, k) - v) ** 2))(anchor)
            clip = form.clip
            if clip is not None:
                norm = jnp.sqrt(sum(jnp.sum(a**2) for a in g.values()) + 1e-30)
                g = tree(lambda a: a * clip * jnp.tanh(norm / clip) / norm, g)
            return g

        def chunk(carry, x):
            tokens, weight = x
            C = tokens.q.shape[0]
            document = jnp.zeros(C) if tokens.new is None else jnp.cumsum(tokens.new)
            at = jax.vmap(lambda d: tree(lambda w, i: jnp.where(d > 0, i, w), carry[0], initial))
            every = jax.vmap(surprise)(at(document), tokens.k, tokens.v)
            i, t = jnp.arange(C)[None], jnp.arange(C)[:, None]
            near = jnp.eye(C)
            if weight is not None:
                near = (t >= i) & (t - i < form.omega) & (document[:, None] == document[None])
                near = jnp.where(near, weight[None], 0)
            u = tree(lambda g: jnp.tensordot(near * tokens.theta[:, None], g, 1), every)

            def token(carry, x):
                t, u = x
                W, S = _begun(t, carry, (initial, tree(jnp.zeros_like, carry[1])))
                after = {n: _moved(t, W[n], S[n], u[n], initial[n] if form.to_init else None)
                         for n in W}  # fmt: skip
                new = {n: a[0] for n, a in after.items()}, {n: a[1] for n, a in after.items()}
                new = tree(lambda a, b: jnp.where(t.stored, a, b), new, (W, S))
                return new, apply(new[0] if form.read_at == "post" else W, t.q)

            return lax.scan(token, carry, (tokens, u))

        (W, S), y = lax.scan(chunk, (W, S), (x, weight))
        return y.reshape(-1, y.shape[-1]), W, S

    S = jax.tree.map(jnp.zeros_like, W) if S is None else S
    of_head = lambda a: jnp.moveaxis(a, 0, 2)  # noqa: E731
    row = lambda a: None if a is None else of_head(a[..., 0, :])  # noqa: E731
    tokens = Tokens(*(of_head(a.astype(jnp.float32)) for a in x[:3]), *(row(a) for a in x[3:]))
    heads = jax.vmap(head, in_axes=(0, 0, 0, 0, 0, 0))
    y, W, S = jax.vmap(heads, in_axes=(0, 0, None, None, 0, 0))(
        W, S, initial, gamma, tokens, row(weight)
    )
    return _cut(y, x), W, S if momentum else None


def _begun(t: Tokens, carry, fresh):
    new = t.new
    return carry if new is None else jax.tree.map(lambda a, b: jnp.where(new, a, b), fresh, carry)


def _moved(t: Tokens, M, S, u, target):
    a = 1.0 if t.log_a is None else jnp.exp(t.log_a)
    S = -u if t.log_eta is None else jnp.exp(t.log_eta) * S - u
    kept = a * M if target is None else target + a * (M - target)
    return kept + S, S


def _over_heads(head, states, constants, x: Tokens):
    of_head = lambda a: jnp.moveaxis(a, 0, 2)  # noqa: E731
    row = lambda a: None if a is None else of_head(a[..., 0, :])  # noqa: E731
    tokens = Tokens(*(of_head(a.astype(jnp.float32)) for a in x[:3]), *(row(a) for a in x[3:]))
    return jax.vmap(jax.vmap(head), in_axes=(0, None, 0))(*states, *constants, tokens)


def _flat(x: Tokens) -> Tokens:
    """[n, C, ...] -> [n C, ...]."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), x)


def _cut(y: jax.Array, x: Tokens) -> jax.Array:
    """[B, N, n C, V] -> [n, B, N, C, V] in v's dtype."""
    n, C = x.q.shape[0], x.q.shape[-2]
    return jnp.moveaxis(y.reshape(*y.shape[:2], n, C, -1), 2, 0).astype(x.v.dtype)
