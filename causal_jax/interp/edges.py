"""Edits of who may attend to whom: cut edges, let only some peek, open a prefix.

They keep what the model forbids forbidden (`prefix` aside), and leave every query its own key (the
last one it may see): a row without keys would give 0, which no trained model has met. Arguments are
those of the catalogue, `causal_jax.interp.edits`.
"""

from typing import Any

import jax.numpy as jnp

from causal_jax.edits import Deferrable, Edit
from causal_jax.interp.selection import Layer, Selection, at_layer, hits, leaves
from causal_jax.masks import Mask, from_fn


def knock_out(
    *,
    layer: Layer = None,
    head: Selection = None,
    query: Selection = None,
    key: Selection = None,
    keep_self: bool = True,
    **when: Any,
) -> list[Edit]:
    """Cut attention edges: query may no longer see key, softmax over what remains.

    `mask <- mask & ~(head, query, key chosen)`, or-ed with each query's own key. Suppressing a
    sentence is `knock_out(key=slice(k0, k1))`, cutting a head's input `knock_out(head=h)`.

    Args:
        keep_self: leave every query its own key; False may empty a row, whose output is then 0.
    """
    fn = _forbid if keep_self else _forbid_all
    args = leaves("head", head), leaves("query", query), leaves("key", key)
    return [at_layer("attn.mask", layer, when).apply(fn, *args)]


def peek(
    *,
    layer: Layer,
    query: Selection = -1,
    key: Selection = None,
    sink: Selection = 0,
    **when: Any,
) -> list[Edit]:
    """Attention-based peeking (AF1, arXiv 2509.09650): only `query` looks at `key`.

    `mask <- mask & (own | sink | query & key)`. All other queries see themselves and the sink (the
    first token). `query=()` is self-attention for everyone.
    """
    args = leaves("query", query), leaves("key", key), leaves("sink", sink)
    return [at_layer("attn.mask", layer, when).apply(_peek, *args)]


def prefix(span: Selection, *, layer: Layer = None, **when: Any) -> list[Edit]:
    """Let all positions of `span` see each other, forwards too: a prefix-LM mask.

    `mask <- mask | (query in span & key in span)`.
    """
    return [at_layer("attn.mask", layer, when).apply(_open, leaves("span", span))]


# What the edits do to a mask [B, N, T, S]: functions whose identity is part of the compile key.


def _forbid_all_now(mask, head, query, key):
    cut = _pairs(mask, query, key) & hits("head", head, mask.shape[1])[:, :, None, None]
    return mask & ~cut


def _forbid_now(mask, head, query, key):
    return _forbid_all_now(mask, head, query, key) | (_own(mask) & mask)


def _peek_now(mask, query, key, sink):
    first = hits("sink", sink, mask.shape[3])[:, None, None, :]
    return mask & (_own(mask) | first | _pairs(mask, query, key))


# The same by index, for kernels: the model's own mask still says which tiles are skipped.


def _forbid_all_later(mask, on, shape, head, query, key):
    return _restricted(mask, _spares_all, on, shape, head=head, query=query, key=key)


def _forbid_later(mask, on, shape, head, query, key):
    return _restricted(mask, _spares, on, shape, head=head, query=query, key=key)


def _peek_later(mask, on, shape, query, key, sink):
    return _restricted(mask, _peeks, on, shape, query=query, key=key, sink=sink)


def _restricted(mask: Mask, allows, on, shape, **chosen) -> Mask:
    axes = {"head": 1, "query": 2, "key": 3, "sink": 3}  # of the mask [B, N, T, S]
    tables = tuple(hits(name, sel, shape[axes[name]]) for name, sel in chosen.items())
    batch = max(len(t) for t in tables)
    rest = jnp.asarray(on), *tables
    return mask & from_fn(allows, *rest, batch=batch, heads=shape[1], evaluate=False)


def _spares_all(b, h, i, j, on, head, query, key):
    return ~(on & _entry(head, b, h) & _entry(query, b, i) & _entry(key, b, j))


def _spares(b, h, i, j, *rest):
    return _spares_all(b, h, i, j, *rest) | (i == j)


def _peeks(b, h, i, j, on, query, key, sink):
    pair = _entry(query, b, i) & _entry(key, b, j)
    return ~on | (i == j) | _entry(sink, b, j) | pair


def _entry(table, b, i):
    return table[0, i] if len(table) == 1 else table[b, i]


_forbid = Deferrable(_forbid_now, _forbid_later)
_forbid_all = Deferrable(_forbid_all_now, _forbid_all_later)
_peek = Deferrable(_peek_now, _peek_later)


def _open(mask, span):
    return mask | _pairs(mask, span, span)


def _pairs(mask, query, key):
    q, k = hits("query", query, mask.shape[2]), hits("key", key, mask.shape[3])
    return q[:, None, :, None] & k[:, None, None, :]


def _own(mask):
    """The key of the query itself: the diagonal, or, behind a cache, the last it may see."""
    T, S = mask.shape[2:]
    if T == S:
        return jnp.eye(T, dtype=bool)[None, None]
    last = S - 1 - jnp.argmax(mask[..., ::-1], axis=-1, keepdims=True)
    return last == jnp.arange(S)[None, None, None]
