"""Angular hashing: vectors of a small angle get the same code, neighbours in rank differ in a bit.

    code(x) = sum_j 2^j [ (x W)_j > 0 ]       P[code(x) = code(y)] = (1 - angle(x, y) / pi)^r
    rank(c) = position of c in the reflected Gray sequence = c ^ c>>1 ^ c>>2 ^ ...

so that sorting by rank puts buckets side by side whose codes differ in exactly one hyperplane. The
product is computed in float32: in half precision codes flip near a hyperplane.
"""

import jax
import jax.numpy as jnp

from causal_jax.errors import InputError
from causal_jax.shapes import Array, Float, Int, Key

ORDERS = ("rank", "gray", "binary")
MOST = 30  # bits of a code in an int32


def angular_lsh(key: Key[Array, ""], width: int, projections: int) -> Float[Array, "H r"]:
    """Normals of random hyperplanes through the origin, [width, projections] float32."""
    return jax.random.normal(key, (width, projections), jnp.float32)


def lsh_rank(
    x: Float[Array, "*B H"], proj: Float[Array, "H r"], order: str = "rank"
) -> Int[Array, "*B"]:
    """Where the bucket of each vector stands, in [0, 2^r).

    Args:
        x: vectors.
        proj: from `angular_lsh`.
        order: of the buckets. "rank": neighbours differ in one bit. "gray": by c ^ c>>1, as the
            public PyTorch code sorts. "binary": by the code itself.

    Raises:
        InputError: unknown order, more bits than an int32 has.
    """
    check_order(order)
    r = proj.shape[1]
    if r > MOST:
        raise InputError(f"proj of shape {proj.shape}: expected at most {MOST} projections")
    side = jnp.matmul(x.astype(jnp.float32), proj, precision=jax.lax.Precision.HIGHEST) > 0
    return ordered(side.astype(jnp.int32) @ (1 << jnp.arange(r, dtype=jnp.int32)), order)


def ordered(code: Int[Array, "*B"], order: str) -> Int[Array, "*B"]:
    """The place of a code among all codes."""
    if order == "gray":
        return code ^ (code >> 1)
    if order == "rank":
        for shift in (1, 2, 4, 8, 16):
            code = code ^ (code >> shift)
    return code


def check_order(order: str) -> None:
    """Refuse an unknown order."""
    if order not in ORDERS:
        raise InputError(f"order={order!r}: expected one of {', '.join(ORDERS)}")
