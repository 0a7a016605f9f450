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
import functools

import jax.numpy as jnp

from causal_jax.errors import InputError
from causal_jax.memory import _context, _kernels
from causal_jax.memory._base import Case, MemorySpec, memories
from causal_jax.memory._chunks import from_chunks
from causal_jax.memory._kernels import tokens_of
from causal_jax.memory._state import Gates
from causal_jax.shapes import Array, Bool, Float
from causal_jax.taps import OFF, Tap
from pallas_kernels.memory_chunk import linear
from pallas_kernels.memory_chunk.network import Network


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
    implementation: str | None = None,
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
        implementation: None: XLA; "tpu": the kernel.

    Returns:
        y in v's dtype, M and S after the last token (S None without momentum), and for every tile
        and row whether M was finite after it, [n, B].
    """
    (B, T, N, H), V = q.shape, v.shape[-1]
    wide = jnp.promote_types(jnp.float32, v.dtype)
    initial = jnp.zeros((N, H, V), wide) if initial is None else initial.astype(wide)
    state = jnp.broadcast_to(initial[None], (B, N, H, V)) if weights is None else weights
    if gates.log_eta is not None:
        momentum = jnp.zeros((B, N, H, V), wide) if momentum is None else momentum
        state = jnp.concatenate([state, momentum], -1)
    stored = jnp.ones((B, T), bool) if stored is None else stored
    k, v_in = (jnp.where(stored[..., None, None], x, 0) for x in (k, v))
    if implementation is None:
        k, v_in = k.astype(wide), v_in.astype(wide)
    C = min(tile, T) if implementation is None else tile
    x = tokens_of(q if implementation else q.astype(wide), k, v_in, gates, stored, new, C)
    how = {"to_init": to_init, "read_at": read_at}
    if implementation is not None:
        y, state, ok = _kernels.linear(x, T, state, initial, **how)
    else:
        y, U, state, ok = linear(x, state, initial[None], **how)
        y, ok = from_chunks(y, T), ok.all(-1)
        if tap.wants("surprise"):
            theta = jnp.where(stored[..., None] & (gates.theta != 0), gates.theta, 1)
            tap("surprise", 0.5 * jnp.sum(jnp.square(from_chunks(U, T) / theta[..., None]), -1))
    M, S = state[..., :V], state[..., V:] if gates.log_eta is not None else None
    return y.astype(v.dtype), M, S, ok


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

    def on_kernel(self, leaves, state, q, k, v, gates, *, stored, new, aligned):
        """The same, whole tiles at a time."""
        return run_linear(self, "w0", leaves["w0"], state, q, k, v, gates, stored, new, OFF, "tpu")


def run_linear(spec, name, initial, state, q, k, v, gates, stored, new, tap, implementation=None):
    """`momentum_delta` on the one fast leaf `name`; returns as `MemorySpec.chunked`."""
    momentum = None if state.momentum is None else state.momentum[name]
    static = {"to_init": spec.decay_to == "init", "read_at": spec.read_at, "tile": spec.tile}
    run = functools.partial(momentum_delta, **static, implementation=implementation)
    args = q, k, v, gates, state.weights[name], momentum
    given = {"initial": initial, "stored": stored, "new": new}
    n = _context.devices()
    if n > 1 and q.shape[1] % n == 0 and implementation is None and not tap.wants("surprise"):
        y, M, S, ok = _context.over_context(run, *args, **given)
    else:
        y, M, S, ok = run(*args, **given, tap=tap)
    S = None if S is None else {name: S}
    return y, dataclasses.replace(state, weights={name: M}, momentum=S), ok
