"""Linear memory with momentum and forgetting: the delta rule that Titans make of it, exactly.

    M_t = a_t M_{t-1} + S_t     S_t = eta_t S_{t-1} - theta_t k_t^T (k_t M_{t-1} - v_t)
    y_t = q_t M_t

In tiles of C tokens (any C: the result is the same), with the coefficients of `_chunks.py`, a minus
meaning "before the token":

    T = diag(theta) (D- * (K K^T))                                     strictly lower triangular
    (I + T) U = diag(theta) (B- * (K M) + d0- * (K S) - V)         rows theta_t (k_t M_{t-1} - v_t)
    Y = B * (Q M) + d0 * (Q S) - (D * (Q K^T)) U
    M <- B_C M + d0_C S - K^T diag(D[C, :]) U        S <- E_C S - K^T diag(H[C, :]) U

    cost    about 12 H^2 + 10 C H operations per token and head
    equals  eta = 0: Gated DeltaNet with g = a, beta = theta / a, v' = a v (surprise is measured
            before forgetting); eta = 0, a = 1: DeltaNet; without T: the anchored form (`deep.py`)

Papers: Titans, arXiv 2501.00663, with L_M = 1; the solve generalises arXiv 2406.06484.
"""

import dataclasses

import jax
import jax.numpy as jnp

from causal_jax.errors import InputError
from causal_jax.memory._base import Case, MemorySpec, memories
from causal_jax.memory._chunks import (
    HIGHEST,
    Decay,
    decay,
    from_chunks,
    into_chunks,
    unit_lower_inverse,
)
from causal_jax.memory._network import Network
from causal_jax.memory._state import Gates
from causal_jax.shapes import Array, Bool, Float
from causal_jax.taps import OFF, Tap


def momentum_delta(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N V"],
    gates: Gates,
    weights: Float[Array, "B N H V"] | None = None,
    momentum: Float[Array, "B N H V"] | None = None,
    *,
    initial: Float[Array, "N H V"] | None = None,
    tile: int = 64,
    stored: Bool[Array, "B T"] | None = None,
    new: Bool[Array, "B T"] | None = None,
    to_init: bool = False,
    read_at: str = "post",
    tap: Tap = OFF,
) -> tuple[
    Float[Array, "B T N V"],
    Float[Array, "B N H V"],
    Float[Array, "B N H V"] | None,
    Bool[Array, "n B"],
]:
    """Write every token into a linear memory and read with every query, in float32.

    Args:
        q, k, v: queries, keys, values.
        gates: theta, log_a, log_eta (None: no momentum).
        weights, momentum: M and S before the first token; None: `initial`, 0.
        initial: M_0, with which a document begins and to which `to_init` forgets; None: 0.
        tile: C.
        stored: which tokens are written; None: all.
        new: where a document begins.
        to_init: forgetting leads to M_0 instead of 0.
        read_at: "post" or "pre": read after or before the token is written.
        tap: site `surprise` [B, T, N].

    Returns:
        y in v's dtype, M and S after the last token (S None without momentum), and for every tile
        and row whether M was finite after it, [n, B].
    """
    (B, T, N, H), V = q.shape, v.shape[-1]
    C = min(tile, T)
    wide = jnp.promote_types(jnp.float32, v.dtype)
    initial = jnp.zeros((N, H, V), wide) if initial is None else initial.astype(wide)
    M = jnp.broadcast_to(initial[None], (B, N, H, V)) if weights is None else weights
    has_momentum = gates.log_eta is not None
    if momentum is None and has_momentum:
        momentum = jnp.zeros((B, N, H, V), wide)
    stored = jnp.ones((B, T), bool) if stored is None else stored
    written = stored[..., None, None]
    k, v_in = (jnp.where(written, x.astype(wide), 0) for x in (k, v))
    gates = dataclasses.replace(gates, theta=jnp.where(stored[..., None], gates.theta, 0))
    xs = (
        *(into_chunks(x, C) for x in (q.astype(wide), k, v_in)),
        jax.tree.map(lambda g: into_chunks(g, C), gates),
        into_chunks(stored, C, heads=False),
        None if new is None else into_chunks(new, C, heads=False),
    )

    def body(carry, x):
        q, k, v, gates, stored, new = x
        at = decay(gates, jnp.broadcast_to(stored, gates.theta.shape), new, to_init=to_init)
        before = at.before(new)
        U = _errors(before, k, v, gates.theta, carry, initial)
        seen = at if read_at == "post" else before
        y = _from_start(seen, q, carry, initial) - (seen.D * (q @ k.mT)) @ U
        carry = _carry(at, k, U, carry, initial)
        ok = jnp.isfinite(carry[0]).all((1, 2, 3))
        return carry, (y, U if tap.wants("surprise") else None, ok)

    (M, momentum), (y, U, ok) = jax.lax.scan(body, (M, momentum), xs)
    if U is not None:
        error = from_chunks(U, T) / jnp.where(gates.theta == 0, 1, gates.theta)[..., None]
        tap("surprise", 0.5 * jnp.sum(jnp.square(error), -1))
    return from_chunks(y, T).astype(v.dtype), M, momentum, ok


def _from_start(at: Decay, x: Array, carry, initial: Array) -> Array:
    """x read from the chunk's starting values only, decayed up to each token."""
    M, S = carry
    y = at.B[..., None] * (x @ M)
    if at.d0 is not None:
        y = y + at.d0[..., None] * (x @ S)
    if at.c0 is not None:
        y = y + at.c0[..., None] * (x @ initial[None])
    return y


def _errors(before: Decay, k: Array, v: Array, theta: Array, carry, initial: Array) -> Array:
    """U [..., C, V]: theta times the error of every token at the memory just before it."""
    T = theta[..., None] * (before.D * (k @ k.mT))
    alone = theta[..., None] * (_from_start(before, k, carry, initial) - v)
    return jnp.matmul(unit_lower_inverse(T), alone, precision=HIGHEST)


def _carry(at: Decay, k: Array, U: Array, carry, initial: Array):
    """(M, S) after the chunk."""
    M, S = carry
    last = lambda c: c[..., -1][..., None, None]  # noqa: E731
    step = lambda coefficients: k.mT @ (coefficients[..., -1, :][..., None] * U)  # noqa: E731
    new = last(at.B) * M - step(at.D)
    if at.c0 is not None:
        new = new + last(at.c0) * initial[None]
    if S is None:
        return new, None
    return new + last(at.d0) * S, last(at.E) * S - step(at.H)


@memories.register(
    "delta",
    cases=(
        Case((2, 19, 2, 8), {"tile": 4}),
        Case((2, 19, 2, 8), {"tile": 16, "decay_to": "init", "read_at": "pre"}),
        Case((1, 9, 1, 4), {"momentum": False, "tile": 5}),
        Case((1, 9, 2, 4), {"decay": False, "conv": 0, "tile": 8}),
    ),
)
@dataclasses.dataclass(frozen=True)
class Delta(MemorySpec):
    """Linear memory with momentum (arXiv 2501.00663, L_M = 1), exact at any tile.

    Attributes:
        tile: tokens worked on at once; changes the speed, not the result.
    """

    tile: int = 64

    def __post_init__(self):
        super().__post_init__()
        if self.tile < 1:
            raise InputError(f"tile={self.tile}: expected at least 1")

    @property
    def network(self) -> Network:
        """One matrix, zero at the start."""
        return Network()

    def chunked(self, leaves, state, q, k, v, gates, *, stored, new, aligned, tap):
        """`momentum_delta` on the one matrix."""
        return run_linear(self, "w0", leaves["w0"], state, q, k, v, gates, stored, new, tap)


def run_linear(spec, name, initial, state, q, k, v, gates, stored, new, tap):
    """`momentum_delta` on the one fast leaf `name`; returns as `MemorySpec.chunked`."""
    momentum = None if state.momentum is None else state.momentum[name]
    y, M, S, ok = momentum_delta(
        q, k, v, gates, state.weights[name], momentum, initial=initial, tile=spec.tile,
        stored=stored, new=new, to_init=spec.decay_to == "init", read_at=spec.read_at, tap=tap,
    )  # fmt: skip
    S = None if S is None else {name: S}
    return y, dataclasses.replace(state, weights={name: M}, momentum=S), ok
