"""What happens to the past inside a chunk: decay of memory and momentum between any two tokens.

    A[t, j] = prod_{r = j+1..t} a_r      H[t, j] = prod_{r = j+1..t} eta_r         (0 for t < j)
    B_t = prod_{r <= t} a_r   E_t = prod_{r <= t} eta_r   D = A diag(m) H   d0 = A (m E)

so that with the chunk's starting values M, S and the tokens' steps u

    M_t = B_t M + d0_t S - sum_j D[t, j] u_j [+ c0_t M_0]     S_t = E_t S - sum_j H[t, j] u_j

Tokens that are not stored have m = 0, a = eta = 1 and u = 0. c0 is there where forgetting leads to
M_0, and after the beginning of a document inside the chunk. Titans, arXiv 2501.00663, section 3.2.

What belongs to a token is a row [..., 1, C] on the way in and a column [..., C, 1] on the way out:
the same lines run on batches of chunks in XLA and on one chunk inside a kernel.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

HIGHEST = jax.lax.Precision.HIGHEST
_product = functools.partial(jnp.matmul, precision=HIGHEST)


class Decay(NamedTuple):
    """Coefficients of chunks, [..., C, 1] and [..., C, C], float32; rows t, columns j.

    Attributes:
        B, D: what stays of M, how steps add to it.
        c0: of M_0, or None.
        d0, E, H: of S, or None without momentum.
    """

    B: jax.Array
    D: jax.Array
    c0: jax.Array | None
    d0: jax.Array | None
    E: jax.Array | None
    H: jax.Array | None

    def before(self, new: jax.Array | None) -> "Decay":
        """The same before the token's own step instead of after it; E and H are left out.

        Args:
            new: whether a document begins, [..., 1, C], or None.
        """
        B, c0, d0 = _late(self.B, 1.0), self.c0, self.d0
        D = _late(self.D, 0.0)
        c0 = None if c0 is None else _late(c0, 0.0)
        d0 = None if d0 is None else _late(d0, 0.0)
        if new is not None:
            new = turned(new)
            B, D = jnp.where(new, 0, B), jnp.where(new, 0, D)
            c0 = None if c0 is None else jnp.where(new, 1, c0)
            d0 = None if d0 is None else jnp.where(new, 0, d0)
        return Decay(B, D, c0, d0, None, None)


def decay(
    log_a: jax.Array | None,
    log_eta: jax.Array | None,
    stored: jax.Array,
    document: jax.Array | None,
    *,
    to_init: bool,
    sums: Callable | None = None,
) -> Decay:
    """Coefficients of chunks.

    Args:
        log_a, log_eta: logs of what stays, [..., 1, C]; None: all of M, nothing of S.
        stored: m, which tokens are stored, bool [..., 1, C].
        document: how many documents have begun in the chunk up to each token, [..., 1, C]; None:
            none.
        to_init: forgetting leads to M_0.
        sums: `segment_sums` (the default), or `sums_by_product` inside a kernel.
    """
    C = stored.shape[-1]
    lead = stored.ndim - 2
    m = stored.astype(jnp.float32)
    here = _lower(C, lead)
    if document is not None:
        here = here & (turned(document) == document)
    products = functools.partial(_products, stored, here, document, sums or segment_sums)
    A, B = products(log_a)
    c0 = None
    if document is not None:
        own = jnp.where(here, _stored_only(log_a, stored, m), 0).sum(-1, keepdims=True)
        c0 = jnp.where(turned(document) > 0, jnp.exp(own), 0)
    if to_init and log_a is not None:
        c0 = 1 - B
    if log_eta is None:
        return Decay(B, A * m, c0, None, None, None)
    H, E = products(log_eta)
    D = _product(A * m, H)
    d0 = (A * (m * turned(E))).sum(-1, keepdims=True)
    return Decay(B, D, c0, d0, E, H)


def _products(stored, here, document, sums, logs):
    """(products over j < r <= t, [..., C, C]; products over r <= t, [..., C, 1])."""
    C, lead = stored.shape[-1], stored.ndim - 2
    m = stored.astype(jnp.float32)
    if logs is None:
        between, start = here.astype(jnp.float32), turned(jnp.ones_like(m))
    else:
        logs = _stored_only(logs, stored, m)
        # not exp first: above the diagonal anything may stand
        between = jnp.exp(jnp.where(here, sums(logs), -jnp.inf))
        start = jnp.exp(jnp.where(_lower(C, lead), logs, 0).sum(-1, keepdims=True))
    between = jnp.broadcast_to(between, (*stored.shape[:-2], C, C))
    return between, start if document is None else jnp.where(turned(document) == 0, start, 0)


def _stored_only(logs, stored, m):
    return jnp.zeros_like(m) if logs is None else jnp.where(stored, logs, 0)


def turned(x: jax.Array) -> jax.Array:
    """A row as a column, and the other way round."""
    return jnp.swapaxes(x, -1, -2)


def _late(x: jax.Array, first: float) -> jax.Array:
    return jnp.concatenate([jnp.full_like(x[..., :1, :], first), x[..., :-1, :]], -2)


def _grid(C: int, lead: int) -> tuple[jax.Array, jax.Array]:
    """Row and column numbers of a matrix, with so many axes in front."""
    shape = (1,) * lead + (C, C)
    return tuple(jax.lax.broadcasted_iota(jnp.int32, shape, lead + i) for i in (0, 1))  # pyright: ignore


def _lower(C: int, lead: int) -> jax.Array:
    row, column = _grid(C, lead)
    return row >= column


def sums_by_product(x: jax.Array) -> jax.Array:
    """`segment_sums` as one matrix product of masked rows: for kernels."""
    C, lead = x.shape[-1], x.ndim - 2
    row, column = _grid(C, lead)
    later = jnp.where(row > column, jnp.float32(1), jnp.float32(0))
    return _product(jnp.where(row >= column, x, 0), later)


@jax.custom_vjp
def segment_sums(x: jax.Array) -> jax.Array:
    """sum_{r = j+1..t} x_r, [..., 1, C] -> [..., C, C]; above the diagonal anything may stand.

    Added up, never subtracted: after one strongly negative entry the difference of two running
    sums would have lost the small ones. For blocks of 2s tokens and t in the second half, j in the
    first: the sum from the middle to t plus the sum from j to the middle.
    """
    C, x = x.shape[-1], x[..., 0, :]
    t = np.arange(C)
    total, s = jnp.zeros((*x.shape, C), x.dtype), 1
    while s < C:
        middle = t // (2 * s) * 2 * s + s  # of each token's block
        up = (middle[None] <= t[:, None]) & (t[:, None] <= t[None]) & (middle[:, None] == middle)
        down = (t[None] < t[:, None]) & (t[:, None] < middle[None]) & (middle[:, None] == middle)
        here = (middle[:, None] == middle) & (t[None] < middle) & (middle[:, None] <= t[:, None])
        prefix = _product(x, up.astype(x.dtype))
        suffix = _product(x, down.astype(x.dtype))
        level = prefix[..., :, None] + suffix[..., None, :]
        total = jnp.where(here.reshape((1,) * (x.ndim - 1) + (C, C)), level, total)
        s *= 2
    return total


def _sums_forward(x):
    return segment_sums(x), None


def _sums_backward(_, g):
    """Sums over rows minus sums over columns, summed from r on."""
    C = g.shape[-1]
    row, column = _grid(C, g.ndim - 2)
    g = jnp.where(row > column, g, 0)
    ends = g.sum(-1) - g.sum(-2)
    return (_product(ends, np.tri(C).astype(ends.dtype))[..., None, :],)


segment_sums.defvjp(_sums_forward, _sums_backward)


@jax.custom_vjp
def unit_lower_inverse(x: jax.Array) -> jax.Array:
    """Inverse of I + strictly lower triangle of x [..., C, C], by halves.

        [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]

    Matrix products only, all blocks of one size at once; the series of powers of x that is often
    used instead is exact on paper and useless for keys that resemble each other.
    """
    return _halves(x)


@jax.custom_vjp
def inverse_by_masks(x: jax.Array) -> jax.Array:
    """`unit_lower_inverse` with the same products, each of full size: for kernels."""
    return _masks(x)


def _halves(x):
    C = x.shape[-1]
    whole = 1 << (C - 1).bit_length()
    if whole != C:
        pad = [(0, 0)] * (x.ndim - 2) + [(0, whole - C)] * 2
        return _halves(jnp.pad(x, pad))[..., :C, :C]
    if C == 1:
        return jnp.ones_like(x)
    h = C // 2
    halves = jnp.stack([x[..., :h, :h], x[..., h:, h:]], -3)
    first, second = jnp.split(_halves(halves), 2, -3)
    first, second = first[..., 0, :, :], second[..., 0, :, :]
    corner = -_product(second, _product(x[..., h:, :h], first))
    top = jnp.concatenate([first, jnp.zeros_like(first)], -1)
    return jnp.concatenate([top, jnp.concatenate([corner, second], -1)], -2)


def _masks(x):
    C = x.shape[-1]
    row, column = _grid(C, x.ndim - 2)
    # the highest bit in which row and column differ says which level their corner belongs to
    differ = row ^ column
    corner = lambda bit: jnp.where((row > column) & (differ >> bit == 1), x, 0)  # noqa: E731
    inverse = jnp.where(row == column, 1, 0).astype(x.dtype) - corner(0)
    for bit in range(1, (C - 1).bit_length()):
        inverse = inverse - _product(inverse, _product(corner(bit), inverse))
    return inverse


def _inverse_forward(of, x):
    inverse = of(x)
    return inverse, inverse


def _inverse_backward(inverse, g):
    """d(X^-1) = -X^-1 dX X^-1, below the diagonal."""
    row, column = _grid(g.shape[-1], g.ndim - 2)
    turn = turned(inverse)
    return (jnp.where(row > column, -_product(_product(turn, g), turn), 0),)


unit_lower_inverse.defvjp(functools.partial(_inverse_forward, _halves), _inverse_backward)
inverse_by_masks.defvjp(functools.partial(_inverse_forward, _masks), _inverse_backward)
