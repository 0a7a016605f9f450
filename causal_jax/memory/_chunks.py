"""What happens to the past inside a chunk: decay of memory and momentum between any two tokens.

    A[t, j] = prod_{r = j+1..t} a_r      H[t, j] = prod_{r = j+1..t} eta_r         (0 for t < j)
    B_t = prod_{r <= t} a_r   E_t = prod_{r <= t} eta_r   D = A diag(m) H   d0 = A (m E)

so that with the chunk's starting values M, S and the tokens' steps u

    M_t = B_t M + d0_t S - sum_j D[t, j] u_j [+ c0_t M_0]     S_t = E_t S - sum_j H[t, j] u_j

Tokens that are not stored have m = 0, a = eta = 1 and u = 0. c0 is there where forgetting leads to
M_0, and after the beginning of a document inside the chunk. Titans, arXiv 2501.00663, section 3.2.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax.memory._state import Gates
from causal_jax.shapes import Array

HIGHEST = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decay:
    """Coefficients of chunks, [..., C] and [..., C, C], float32; rows t, columns j.

    Attributes:
        B, D: what stays of M, how steps add to it.
        c0: of M_0, or None.
        d0, E, H: of S, or None without momentum.
    """

    B: Array
    D: Array
    c0: Array | None
    d0: Array | None
    E: Array | None
    H: Array | None

    def before(self, new: Array | None) -> "Decay":
        """The same before the token's own step instead of after it; E and H are left out."""
        B, c0, d0 = _late(self.B, 1.0), self.c0, self.d0
        D = jnp.concatenate([jnp.zeros_like(self.D[..., :1, :]), self.D[..., :-1, :]], -2)
        c0 = None if c0 is None else _late(c0, 0.0)
        d0 = None if d0 is None else _late(d0, 0.0)
        if new is not None:
            B, D = jnp.where(new, 0, B), jnp.where(new[..., None], 0, D)
            c0 = None if c0 is None else jnp.where(new, 1, c0)
            d0 = None if d0 is None else jnp.where(new, 0, d0)
        return Decay(B, D, c0, d0, None, None)


def decay(gates: Gates, stored: Array, new: Array | None, *, to_init: bool) -> Decay:
    """Coefficients of chunks.

    Args:
        gates: log_a and log_eta [..., C].
        stored: m, which tokens are stored, [..., C].
        new: where a document begins, [..., C].
        to_init: forgetting leads to M_0.
    """
    m = stored.astype(jnp.float32)
    document = None if new is None else jnp.cumsum(new, -1)
    A, B = _products(gates.log_a, stored, document)
    c0 = None
    if new is not None:
        assert document is not None
        C = stored.shape[-1]
        log_a = jnp.zeros_like(m) if gates.log_a is None else jnp.where(stored, gates.log_a, 0)
        same = document[..., :, None] == document[..., None, :]
        same = same & _under(np.tri(C, dtype=bool), m.ndim - 1)
        own = jnp.sum(jnp.where(same, log_a[..., None, :], 0), -1)
        c0 = jnp.where(document > 0, jnp.exp(own), 0)
    if to_init and gates.log_a is not None:
        c0 = 1 - B
    if gates.log_eta is None:
        return Decay(B, A * m[..., None, :], c0, None, None, None)
    H, E = _products(gates.log_eta, stored, document)
    D = jnp.matmul(A * m[..., None, :], H, precision=HIGHEST)
    d0 = jnp.matmul(A, (m * E)[..., None], precision=HIGHEST)[..., 0]
    return Decay(B, D, c0, d0, E, H)


def _products(logs: Array | None, stored: Array, document: Array | None) -> tuple[Array, Array]:
    """(products over j < r <= t, [..., C, C]; products over r <= t, [..., C])."""
    lead, C = stored.shape[:-1], stored.shape[-1]
    lower = _under(np.tri(C, dtype=bool), len(lead))
    if logs is None:
        between = jnp.broadcast_to(jnp.asarray(lower, jnp.float32), (*lead, C, C))
        start = jnp.ones((*lead, C), jnp.float32)
    else:
        logs = jnp.where(stored, logs, 0)
        between = jnp.where(lower, jnp.exp(segment_sums(logs)), 0)
        ones = np.triu(np.ones((C, C))).astype(logs.dtype)
        start = jnp.exp(jnp.matmul(logs, ones, precision=HIGHEST))
    if document is not None:
        between = jnp.where(document[..., :, None] == document[..., None, :], between, 0)
        start = jnp.where(document == 0, start, 0)
    return between, start


@jax.custom_vjp
def segment_sums(x: Array) -> Array:
    """sum_{r = j+1..t} x_r, [..., C] -> [..., C, C]; what stands above the diagonal means nothing.

    Added up, never subtracted: after one strongly negative entry the difference of two running
    sums would have lost the small ones. For blocks of 2s tokens and t in the second half, j in the
    first: the sum from the middle to t plus the sum from j to the middle.
    """
    C = x.shape[-1]
    t = np.arange(C)
    total, s = jnp.zeros((*x.shape, C), x.dtype), 1
    while s < C:
        middle = t // (2 * s) * 2 * s + s  # of each token's block
        up = (middle[None] <= t[:, None]) & (t[:, None] <= t[None]) & (middle[:, None] == middle)
        down = (t[None] < t[:, None]) & (t[:, None] < middle[None]) & (middle[:, None] == middle)
        here = (middle[:, None] == middle) & (t[None] < middle) & (middle[:, None] <= t[:, None])
        prefix = jnp.matmul(x, up.astype(x.dtype), precision=HIGHEST)
        suffix = jnp.matmul(x, down.astype(x.dtype), precision=HIGHEST)
        level = prefix[..., :, None] + suffix[..., None, :]
        total, s = jnp.where(_under(here, x.ndim - 1), level, total), 2 * s
    return total


def _sums_forward(x):
    return segment_sums(x), None


def _sums_backward(_, g):
    """Sums over rows minus sums over columns, summed from r on."""
    C = g.shape[-1]
    g = jnp.where(_under(np.tri(C, k=-1, dtype=bool), g.ndim - 2), g, 0)
    ends = g.sum(-1) - g.sum(-2)
    return (jnp.matmul(ends, np.tri(C).astype(ends.dtype), precision=HIGHEST),)


segment_sums.defvjp(_sums_forward, _sums_backward)


def unit_lower_inverse(x: Array) -> Array:
    """Inverse of I + strictly lower triangle of x [..., C, C], by halves.

        [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]

    Matrix products only, all blocks of one size at once; the series of powers of x that is often
    used instead is exact on paper and useless for keys that resemble each other.
    """
    C = x.shape[-1]
    whole = 1 << (C - 1).bit_length()
    if whole != C:
        pad = [(0, 0)] * (x.ndim - 2) + [(0, whole - C)] * 2
        return unit_lower_inverse(jnp.pad(x, pad))[..., :C, :C]
    if C == 1:
        return jnp.ones_like(x)
    h = C // 2
    halves = jnp.stack([x[..., :h, :h], x[..., h:, h:]], -3)
    first, second = jnp.split(unit_lower_inverse(halves), 2, -3)
    first, second = first[..., 0, :, :], second[..., 0, :, :]
    corner = x[..., h:, :h]
    corner = -jnp.matmul(second, jnp.matmul(corner, first, precision=HIGHEST), precision=HIGHEST)
    top = jnp.concatenate([first, jnp.zeros_like(first)], -1)
    return jnp.concatenate([top, jnp.concatenate([corner, second], -1)], -2)


def into_chunks(x: Array, C: int, heads: bool = True) -> Array:
    """[B, T, N, ...] -> [n, B, N, C, ...] (no heads: [B, T] -> [n, B, 1, C]), 0 behind the end."""
    T = x.shape[1]
    n = -(-T // C)
    x = jnp.pad(x, [(0, 0), (0, n * C - T)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], n, C, *x.shape[2:])
    if not heads:
        return jnp.swapaxes(x, 0, 1)[:, :, None]
    return jnp.moveaxis(x, (1, 3), (0, 2))


def from_chunks(y: Array, T: int) -> Array:
    """[n, B, N, C, H] -> [B, T, N, H]."""
    y = jnp.moveaxis(y, (0, 2), (1, 3))
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :T]


def _late(x: Array, first: float) -> Array:
    return jnp.concatenate([jnp.full_like(x[..., :1], first), x[..., :-1]], -1)


def _under(table: np.ndarray, axes: int) -> np.ndarray:
    """A constant matrix, to stand beside arrays with `axes` more axes in front."""
    return table.reshape((1,) * axes + table.shape)
