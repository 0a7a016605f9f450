"""Algorithm 2 of HyperAttention as it is written: softmax's denominators in near-linear time.

With A = exp(Q K^T) and a mask M of the pairs that are counted exactly (the blocks of sorted
hashes), D = diag(A 1) is estimated row by row:

    tau = max over m random rows j of < 1 - M_j, A_j >                the heaviest unmasked row
    C_i = eps^2 m / (n log n) (< M_i, A_i > + tau / kappa)            cap of a sampled entry
    d_i = n / m sum_l (1 - M_il) min(A_il, C_i)                       over m uniform columns l
    D_i = < M_i, A_i > + max(d_i, tau / kappa)

kappa bounds the ratio of unmasked row sums, so tau / kappa bounds all of them from below. Dense,
for tests and teaching: `hyper_attention` leaves out cap and floor and counts the samples as they
are. Paper: arXiv 2310.05869.
"""

import math

import jax
import jax.numpy as jnp

from causal_jax.errors import InputError
from causal_jax.shapes import Array, Bool, Float, Key


def approx_d_reference(
    q: Float[Array, "T H"],
    k: Float[Array, "S H"],
    mask: Bool[Array, "T S"],
    m: int,
    kappa: float,
    eps: float,
    key: Key[Array, ""],
) -> Float[Array, "T"]:
    """The estimated row sums of exp(q k^T), one head; not shifted, so scores must be moderate.

    Args:
        q: queries, the scale folded in. k: keys.
        mask: pairs that are counted exactly.
        m: rows looked at for tau (without replacement, at most T), and columns drawn (with).
        kappa: ratio of the largest unmasked row sum to the smallest, >= 1.
        eps: accuracy asked for; inf: no cap, and the estimate is unbiased wherever the floor
            tau / kappa does not bind.
        key: draws rows and columns.

    Returns:
        D [T] in float32 or wider.

    Raises:
        InputError: shapes that do not fit, m < 1, kappa < 1, eps <= 0.
    """
    (T, H), S = q.shape, k.shape[0]
    if k.shape[1] != H or mask.shape != (T, S):
        raise InputError(
            f"q {q.shape}, k {k.shape}, mask {mask.shape}: expected [T, H], [S, H] and [T, S]"
        )
    if m < 1 or not kappa >= 1 or not eps > 0:
        raise InputError(f"m={m}, kappa={kappa}, eps={eps}: expected m >= 1, kappa >= 1, eps > 0")
    wide = jnp.promote_types(jnp.float32, q.dtype)
    exact = jax.lax.Precision.HIGHEST
    a = jnp.exp(jnp.matmul(q.astype(wide), k.astype(wide).T, precision=exact))
    inside = jnp.where(mask, a, 0).sum(1)
    of_rows, of_columns = jax.random.split(key)
    rows = jax.random.permutation(of_rows, T)[:m]
    floor = jnp.where(mask, 0, a).sum(1)[rows].max() / kappa
    columns = jax.random.randint(of_columns, (m,), 0, S)
    share = eps**2 * m / (S * max(math.log(S), 1.0))
    cap = share * (inside + floor)[:, None] if math.isfinite(share) else jnp.inf
    drawn = jnp.where(mask, 0, jnp.minimum(a, cap))[:, columns]
    return inside + jnp.maximum(S / m * drawn.sum(1), floor)
