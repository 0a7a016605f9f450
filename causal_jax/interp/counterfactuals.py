"""Counterfactual attention: rows that do not depend on what the model attends to.

    uniform   1 / n        random   U / sum U, U ~ U(0, 1)
    shuffled  the row's weights in random order
    reversed  (max - A) / sum(max - A); a row of equal weights stays as it is

over the n visible keys of a row. What a model says under such attention is what it says without
looking; contrasted with what it says otherwise (`causal_jax.decoding`) it leaves what attention
contributed. "Causal" here means an intervention on attention; no adjustment sum is computed.

Draws depend on the key, the row's place in the batch, the head, the query's slot and the key's slot
alone: a step with a cache draws what the whole forward pass draws there.

CausalMM (arXiv 2410.04780), whose code normalises before the mask and not after it
(`normalised=False`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from causal_jax.edits import Edit, site
from causal_jax.errors import InputError
from causal_jax.interp.selection import Selection, hits, leaves
from causal_jax.shapes import Array, Float, Key

KINDS = ("uniform", "random", "shuffled", "reversed")
DRAWN = ("random", "shuffled")


def counterfactual(
    kind: str,
    key: Key[Array, ""] | None = None,
    *,
    normalised: bool = True,
    layer: Any = None,
    head: Selection = None,
    query: Selection = None,
    **when: Any,
) -> list[Edit]:
    """Counterfactual attention in the layers, heads and queries chosen; see the module.

    "uniform" sets the query to 0, which every kernel can do; the others rewrite the pattern. The
    visible keys are those with weight > 0. The same key gives every layer the same draw.

    Args:
        kind: "uniform", "random", "shuffled" or "reversed".
        key: for "random" and "shuffled".
        normalised: rows sum to 1; False as in `counterfactual_attention`.
        layer, head, query: as in `interp.edits`.

    Raises:
        InputError: unknown kind, or one that draws and has no key.
    """
    _check(kind, key)
    if kind == "uniform" and normalised:
        at = site("q", **({} if layer is None else {"layer": layer}), **when)
        return [at.apply(_zero, leaves("query", query), leaves("head", head))]
    at = site("attn.pattern", **({} if layer is None else {"layer": layer}), **when)
    fn = _EDITS[kind, normalised]
    return [at.apply(fn, leaves("head", head), leaves("query", query), key)]


def counterfactual_attention(
    pattern: Float[Array, "B N T S"],
    visible: Any,
    kind: str,
    key: Key[Array, ""] | None = None,
    *,
    normalised: bool = True,
) -> Float[Array, "B N T S"]:
    """Attention rows over the same visible keys that do not depend on what the model attends to.

    Args:
        pattern: rows sum to 1 over the visible keys.
        visible: bool, broadcasts to the pattern.
        kind: see the module.
        key: for the kinds that draw.
        normalised: rows sum to 1. False: the authors' listings, "uniform" 1/S, "random" divided by
            the sum over all S keys, then masked; "reversed" max - A.

    Returns:
        as the pattern, 0 where not visible.

    Raises:
        InputError: unknown kind, or one that draws and has no key.
    """
    _check(kind, key)
    visible = jnp.broadcast_to(visible, pattern.shape)
    if kind == "shuffled":
        return _shuffled(pattern, visible, _draws(key, visible))
    if kind == "uniform":
        new = jnp.ones_like(pattern)
    elif kind == "random":
        new = jnp.maximum(_draws(key, visible), 1e-6)
    else:
        new = jnp.max(jnp.where(visible, pattern, 0), -1, keepdims=True) - pattern
        level = jnp.sum(jnp.where(visible, new, 0), -1, keepdims=True) <= 1e-6
        new = jnp.where(level, pattern, new)
    if not normalised:
        total = jnp.ones((), new.dtype) if kind == "reversed" else new.sum(-1, keepdims=True)
        return jnp.where(visible, new / total, 0)
    new = jnp.where(visible, new, 0)
    total = new.sum(-1, keepdims=True)
    return new / jnp.where(total == 0, 1, total)


def _check(kind: str, key: Any) -> None:
    if kind not in KINDS:
        raise InputError(f"counterfactual kind={kind!r}: expected one of {', '.join(KINDS)}")
    if (key is None) == (kind in DRAWN):
        use = "missing" if key is None else "without use"
        raise InputError(f"counterfactual kind={kind!r}: key={use}")


def _draws(key: Any, visible: Array) -> Array:
    """U(0, 1) [B, N, T, S] float32; a row belongs to the slot of its last visible key, its own."""
    B, N, _, S = visible.shape
    slots = S - 1 - jnp.argmax(visible[..., ::-1], -1)
    # A vector of uniforms begins with those of a shorter one: S does not matter.
    row = lambda k, slot: jax.random.uniform(jax.random.fold_in(k, slot), (S,))  # noqa: E731
    heads = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(
        jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B)), jnp.arange(N)
    )
    return jax.vmap(jax.vmap(jax.vmap(row, (None, 0))))(heads, slots)


def _shuffled(pattern: Array, visible: Array, drawn: Array) -> Array:
    """Rows permuted among their visible keys: rank of a random number <-> rank of the place."""
    order = jnp.argsort(jnp.where(visible, drawn, jnp.inf), axis=-1)  # visible first, at random
    place = jnp.argsort(~visible, axis=-1, stable=True)  # visible keys first, as they stand
    moved = jnp.take_along_axis(pattern, order, axis=-1)
    new = jnp.put_along_axis(jnp.zeros_like(pattern), place, moved, axis=-1, inplace=False)
    return jnp.where(visible, new, 0)


def _zero(q, query, head):
    on = hits("query", query, q.shape[1])[:, :, None] & hits("head", head, q.shape[2])[:, None]
    return jnp.where(on[..., None], 0, q).astype(q.dtype)


def _edit(pattern, head, query, key, *, kind, normalised):
    new = counterfactual_attention(pattern, pattern > 0, kind, key, normalised=normalised)
    on = hits("head", head, pattern.shape[1])[:, :, None, None]
    on = on & hits("query", query, pattern.shape[2])[:, None, :, None]
    return jnp.where(on, new, pattern)


# Made once: the identity of an edit's function is part of the compile key.
_EDITS = {
    (kind, normalised): functools.partial(_edit, kind=kind, normalised=normalised)
    for kind in KINDS
    for normalised in (True, False)
}
