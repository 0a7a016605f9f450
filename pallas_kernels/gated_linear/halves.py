"""Which pairs of positions of a chunk part where, and what lies between them: a binary tree.

A chunk is halved until single positions are left. Positions i > j part at exactly one level: i in
the second half of some block of 2 s positions, j in the first. With the middle m of that block

    exp(g_{j+1} + ... + g_i) = exp(g_m + ... + g_i) exp(g_{j+1} + ... + g_{m-1})

both exponents are sums of some g <= 0, so nothing overflows whatever the gates are, and a level is
one matrix product of the whole chunk. A position is in only one half of a level: one exponent
serves it as query and as key. Here are comparisons of indices, for kernels to make in place.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def levels(chunk: int) -> int:
    """How often a chunk is halved."""
    return (chunk - 1).bit_length()


def between(level: int, i: Any, t: Any) -> Any:
    """Whether gate t lies between position i and the middle of i's block of this level."""
    second = ((i >> level) & 1) == 1
    return ((t >> level) == (i >> level)) & ((second & (t <= i)) | (~second & (t > i)))


def part(level: int, i: Any, j: Any) -> Any:
    """Whether query i and key j part at this level."""
    return (((i >> level) ^ 1) == (j >> level)) & (((i >> level) & 1) == 1)


def decays(g: jax.Array, dot: Callable) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """What the positions of a chunk decay by, [C, F] each.

    Args:
        g: [C, F] float32.
        dot: the exact product of a matrix [R, C] of zeros and ones, float32, and g.

    Returns:
        to the middle of the block, level by level; since the chunk's beginning, the own gate
        included; until its end, the own gate left out.
    """
    C = g.shape[0]
    i, t = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    sums = [between(level, i, t) for level in range(levels(C))] + [t <= i, t > i]
    every = jnp.exp(dot(jnp.concatenate([s.astype(jnp.float32) for s in sums], 0), g))
    *tree, since, until = (every[n * C : (n + 1) * C] for n in range(len(sums)))
    return tree, since, until
