"""The exact chunkwise form of linear memory with momentum: lines that XLA and kernels share.

    M_t = a_t M_{t-1} + S_t     S_t = eta_t S_{t-1} - theta_t k_t^T (k_t M_{t-1} - v_t)
    y_t = q_t M_t

For a chunk of C tokens (any C: the result is the same), with the coefficients of `decay.py`, a
minus meaning "before the token":

    T = diag(theta) (D- * (K K^T))                                     strictly lower triangular
    (I + T) U = diag(theta) (B- * (K M) + d0- * (K S) - V)         rows theta_t (k_t M_{t-1} - v_t)
    Y = B * (Q M) + d0 * (Q S) - (D * (Q K^T)) U
    M <- B_C M + d0_C S - K^T diag(D[C, :]) U        S <- E_C S - K^T diag(H[C, :]) U

M and S lie side by side in one array, [M | S] or M alone, so that one product serves both.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.memory_chunk.decay import Decay, decay, turned


class Tokens(NamedTuple):
    """Tokens of a chunk; any axes in front.

    Attributes:
        q, k, v: [..., C, H] and [..., C, V].
        theta: step sizes, a row [..., 1, C]; 0 where a token is not stored.
        log_a, log_eta: rows, or None.
        stored: bool row.
        new: where a document begins, bool row, or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    theta: jax.Array
    log_a: jax.Array | None
    log_eta: jax.Array | None
    stored: jax.Array
    new: jax.Array | None = None


class Prepared(NamedTuple):
    """What a chunk needs that does not depend on the state.

    Attributes:
        at, before, seen: coefficients after and before each token, and of the reading.
        theta: column.
        inverse: of I + T.
        scores: seen.D * (Q K^T).
    """

    at: Decay
    before: Decay
    seen: Decay
    theta: jax.Array
    inverse: jax.Array
    scores: jax.Array


def prepare(
    x: Tokens, *, to_init: bool, read_at: str, document=None, sums=None, inverse
) -> Prepared:
    """Coefficients, the inverse, and scores; `inverse`, `sums`: which of those in `decay.py`."""
    at = decay(x.log_a, x.log_eta, x.stored, document, to_init=to_init, sums=sums)
    before = at.before(x.new)
    seen = at if read_at == "post" else before
    keys, theta = turned(x.k), turned(x.theta)
    system = inverse(theta * (before.D * (x.k @ keys)))
    return Prepared(at, before, seen, theta, system, seen.D * (x.q @ keys))


def advance(p: Prepared, x: Tokens, state: jax.Array, initial: jax.Array):
    """(y [..., C, V], U [..., C, V], [M | S] after the chunk)."""
    C, V = x.v.shape[-2:]
    both = jnp.concatenate([x.k, x.q], -2) if C % 8 == 0 else None
    if both is None:
        keys, queries = x.k @ state, x.q @ state
    else:
        z = both @ state
        keys, queries = z[..., :C, :], z[..., C:, :]
    alone = p.theta * (_from_start(p.before, x.k, keys, initial) - x.v)
    U = jnp.matmul(p.inverse, alone)
    y = _from_start(p.seen, x.q, queries, initial) - p.scores @ U
    M, S = state[..., :V], state[..., V:]
    last = lambda c: c[..., -1:, :]  # noqa: E731
    steps, new = turned(last(p.at.D)) * U, last(p.at.B) * M
    if p.at.c0 is not None:
        new = new + last(p.at.c0) * initial
    if p.at.d0 is not None and p.at.E is not None and p.at.H is not None:
        steps = jnp.concatenate([steps, turned(last(p.at.H)) * U], -1)
        new = jnp.concatenate([new + last(p.at.d0) * S, last(p.at.E) * S], -1)
    return y, U, new - turned(x.k) @ steps


def _from_start(at: Decay, x: jax.Array, z: jax.Array, initial: jax.Array) -> jax.Array:
    """z = x [M | S], decayed up to each token."""
    V = initial.shape[-1]
    y = at.B * z[..., :V]
    if at.d0 is not None:
        y = y + at.d0 * z[..., V:]
    if at.c0 is not None:
        y = y + at.c0 * (x @ initial)
    return y
