"""Where attention goes by role, and moving it: does a model read what the user gave it?

    a_role   = sum_{x in role} Att(p, x)                       at a query p, per head
    s(Y)     = (1/|Y|) sum_{y in Y} max_h sum_{x in U} Att_h(y, x)           context dependency
    steering   Att'(y, x) = Att(y, x) c(x) / Z,   c = 1 for x in U, alpha elsewhere
               = softmax(scores + log c)                       so it is a bias on the keys

U are the user's own words: not the marks of the template, not bos, not line ends, or the sink of
bos drowns everything. Patterns are captures of site `attn.pattern` of one layer, roles are made
when the template is laid out, token by token.

Arora et al., "On the Loss of Context-awareness in General Instruction Fine-tuning", arXiv
2411.02688; steering as PASTA, arXiv 2311.02262. Deviation: several user spans are one mask (the
authors' code adds log alpha once per span); keys written while decoding are not the user's and are
scaled too.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from causal_jax.edits import Edit
from causal_jax.errors import InputError
from causal_jax.interp.selection import Layer, Selection, at_layer, hits, leaves
from causal_jax.shapes import Array, Bool, Float, Int


def role_mass(pattern: Float[Array, "B N T S"], role: Bool[Array, "B S"]) -> Float[Array, "B N T"]:
    """Attention that each query of each head gives to the keys of a role."""
    return jnp.einsum("bnts,bs->bnt", pattern, role.astype(jnp.float32))


def retrieval_head(
    pattern: Float[Array, "B N T S"], user: Bool[Array, "B S"], query: Int[Array, "B"]
) -> Int[Array, "B"]:
    """The head that looks most at the user's words, at one query of each row."""
    rows = jnp.arange(len(query))
    return role_mass(pattern, user)[rows, :, query].argmax(-1)


@dataclasses.dataclass(frozen=True)
class Allocation:
    """Shares of attention at one query of one head; they sum to 1.

    Attributes:
        user, assistant, bos: shares [B].
    """

    user: Float[Array, "B"]
    assistant: Float[Array, "B"]
    bos: Float[Array, "B"]


def allocation(
    pattern: Float[Array, "B N T S"],
    user: Bool[Array, "B S"],
    assistant: Bool[Array, "B S"],
    bos: Bool[Array, "B S"],
    query: Int[Array, "B"],
    head: Int[Array, "B"],
) -> Allocation:
    """How a head divides what it gives to these roles: what falls on others (the template) is left
    out and the rest made to sum to 1.

    Args:
        query: where the answer is predicted.
        head: of each row, e.g. `retrieval_head` of the prompt without template.
    """
    rows = jnp.arange(len(query))
    shares = [role_mass(pattern, role)[rows, head, query] for role in (user, assistant, bos)]
    total = jnp.maximum(sum(shares), jnp.finfo(jnp.float32).tiny)
    return Allocation(*(share / total for share in shares))


def context_dependency(
    pattern: Float[Array, "B N T S"],
    user: Bool[Array, "B S"],
    responses: Bool[Array, "B M T"],
) -> Float[Array, "B M"]:
    """s in [0, 1] of every response: the mean over its tokens of the most user-minded head's share.

    Args:
        pattern: causal, so that a response sees only what came before it.
        user: the user's words, of all turns.
        responses: the tokens of each response; an empty one scores 0.
    """
    most = role_mass(pattern, user).max(1)
    on = responses.astype(jnp.float32)
    return jnp.einsum("bmt,bt->bm", on, most) / jnp.maximum(on.sum(-1), 1.0)


def steer_attention(
    keep: Bool[Array, "B S"],
    alpha: Any,
    *,
    layer: Layer = None,
    head: Selection = None,
    **when: Any,
) -> list[Edit]:
    """Move attention towards some keys: all others get alpha times their odds.

    A row that sees none of `keep` stays as it is; alpha = 1 changes nothing. In a cached pass keys
    behind the mask (what is being written) are not kept.

    Args:
        keep: the keys to favour, the user's words.
        alpha: above 0, at most 1; may be traced. The paper: 0.95.
        layer, head: where; None: everywhere.

    Raises:
        InputError: a known alpha outside (0, 1].
    """
    if isinstance(alpha, int | float) and not 0.0 < alpha <= 1.0:
        raise InputError(f"alpha = {alpha}: expected above 0, at most 1")
    at = at_layer("attn.bias", layer, when)
    return [at.apply(_scaled, jnp.asarray(keep), alpha, leaves("head", head))]


def _scaled(bias, keep, alpha, head):
    missing = bias.shape[3] - keep.shape[1]
    if missing < 0:
        raise InputError(f"keep has {keep.shape[1]} keys, there are {bias.shape[3]}")
    keep = jnp.pad(keep, ((0, 0), (0, missing)))[:, None, None]
    on = hits("head", head, bias.shape[1])[:, :, None, None] & ~keep
    return bias + jnp.where(on, jnp.log(jnp.asarray(alpha, jnp.float32)), 0.0)
