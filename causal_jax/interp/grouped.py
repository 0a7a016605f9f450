"""Attention between groups of tokens: documents, sentences, a needle (arXiv 2505.11754).

    GA(Q, K) = 1/|Q| sum_{q in Q} sum_{k in K} a[q, k]         mean over queries, sum over keys
    IC_l(d)  = mean over heads and answer tokens of GA_l(answer token, d)
    peak     = max_d sum_l IC_l(d)

Groups that cover all keys have rows of GA that sum to 1; groups of one token are the pattern.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from causal_jax.errors import InputError
from causal_jax.shapes import Array, Bool, Float


def group_matrix(spans: Sequence[tuple[int, int]], T: int) -> Float[np.ndarray, "n T"]:
    """0/1 membership of T places in n groups.

    Args:
        spans: (first, one past the last) place of each group; may be empty, may overlap.

    Raises:
        InputError: a span that does not lie in 0..T.
    """
    G = np.zeros((len(spans), T), np.float32)
    for row, (s, e) in zip(G, spans):
        if not 0 <= s <= e <= T:
            raise InputError(f"span ({s}, {e}): expected 0 <= first <= end <= {T}")
        row[s:e] = 1
    return G


def grouped_attention(
    pattern: Float[Array, "*L B N T S"],
    queries: Float[Array, "*b q T"] | Float[np.ndarray, "*b q T"],
    keys: Float[Array, "*c k S"] | Float[np.ndarray, "*c k S"],
) -> Float[Array, "*L B N q k"]:
    """GA of every pair of groups. As a capture's reducer it is run in place, layer by layer.

    Args:
        pattern: rows of attention.
        queries, keys: from `group_matrix`; one for all rows of the batch, or [B, ...].

    Returns:
        float32; 0 for an empty group of queries.
    """
    queries, keys = (
        jnp.asarray(g) if g.ndim == 3 else jnp.asarray(g)[None] for g in (queries, keys)
    )
    count = jnp.maximum(queries.sum(-1, keepdims=True), 1)
    B = pattern.shape[-4]
    queries = jnp.broadcast_to(queries / count, (B, *queries.shape[1:]))
    keys = jnp.broadcast_to(keys, (B, *keys.shape[1:]))
    wide = pattern.astype(jnp.float32)
    return jnp.einsum("...bnts,bqt,bks->...bnqk", wide, queries, keys)


def information_contribution(
    grouped: Float[Array, "L B N q k"], answer: Bool[Array, "B q"]
) -> Float[Array, "L B k"]:
    """IC: what the answer's tokens take from each group, per layer.

    Args:
        grouped: GA whose query groups are single tokens.
        answer: which of them are the answer's; a row without any gives 0.
    """
    weight = answer / jnp.maximum(answer.sum(-1, keepdims=True), 1)
    return jnp.einsum("lbnqk,bq->lbk", grouped, weight) / grouped.shape[2]


def peak(contribution: Float[Array, "L B k"]) -> Float[Array, "B"]:
    """The largest IC, summed over layers: how sharply the answer points at one document."""
    return contribution.sum(0).max(-1)


def area_under_curve(score: Float[np.ndarray, "n"], right: Bool[np.ndarray, "n"]) -> float:
    """P(score of a right one > score of a wrong one), ties counted half; nan without both kinds."""
    good, bad = np.asarray(score)[right], np.asarray(score)[~np.asarray(right)]
    if not len(good) or not len(bad):
        return float("nan")
    gap = good[:, None] - bad[None]
    return float((gap > 0).mean() + 0.5 * (gap == 0).mean())
