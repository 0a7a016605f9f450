"""What is computed: every tile of queries attends to its own block of keys and to the samples.

    s_qj = scale q . k_j + bias_j         over the keys j of the tile's block, and over the samples
                                          j that do not lie in it
    o_q  = sum_j softmax_j(s_qj) v_j      lse_q = log sum_j exp(s_qj)

One softmax over both, so nothing has to be merged. No kernel here: shared by kernels.
"""

from typing import Any, NamedTuple

import jax


class Places(NamedTuple):
    """Where rows came from, for a mask: absolute indices."""

    b: jax.Array  # [P] sequence
    h: jax.Array  # [P, C, Q] query head
    i: jax.Array  # [P, C, Q] query
    j: jax.Array  # [P, M, S] key
    j_sample: jax.Array  # [P, R] sampled key


class Problem(NamedTuple):
    """P independent problems of C tiles of Q queries, M blocks of S keys and R sampled keys.

    A bias is added to a key's scores: 0, the log of a sample's weight, -inf (no such key) or NaN.
    """

    q: Any  # [P, C, Q, H]
    k: Any  # [P, M, S, H]
    v: Any  # [P, M, S, V]
    k_sample: Any  # [P, R, H]
    v_sample: Any  # [P, R, V]
    block: Any  # [P, C] int32: the block that a tile attends to
    block_sample: Any  # [P, R] int32: the block that a sample lies in
    bias: Any  # [P, M, S] float32
    bias_sample: Any  # [P, R] float32
    mask: Any = None  # callable pytree mask(b, h, i, j) -> bool, or None: all
    places: Places | None = None  # of a mask
    used: Any = None  # [P] int32: the first so many tiles hold queries; None: all
