"""PINE: attention that does not know in which order documents were given.

A prompt is [prefix | documents D_1 ... D_M | suffix] (`causal_jax.segments`). Documents see each
other; each query orders them by how much it attends to them without positions, and the more
important stands the closer:

    w_ij    = softmax_j( q_i . k_j / sqrt(H) )       over all documents but the query's own; q, k
                                                     not rotated
    imp_ib  = 1/n_b sum_{j in D_b} w_ij              for a query inside a document the mean of its
                                                     document's tokens: one order per document
    shift_b = sum of the lengths of documents closer than b
    key of offset o in D_b stands at  E - shift_b - n_b + o
    query of offset o in D_a  at      E - n_a + o    (its own document is the closest)

Prefix and suffix keep their positions, E and behind for the suffix. Equally important documents are
told apart by a hash of their tokens, so nothing depends on the order given: a decoder with this in
every layer gives the same logits for every order of the documents, exactly up to rounding (by
induction: embedding, norms and feed-forward layers act on each token alone). Importance is rounded
to 2^-18, so that float noise does not decide between equals; two that differ by less than the noise
at a rounding boundary can still change places.

The result depends on differences of positions only: a document's keys are rotated once, by their
offset, and each query once per document ("relative"). "reference" rotates every key for every
query, as the formula says.

    cost     dense attention's, and per document one more product of all queries with all keys;
             memory B N T S
    exact    equals dense causal attention with one document or none, and without a layout

Needs un-rotated q and k (`places`), and all documents in one pass: a cache grows by suffix tokens.

Deviation: rounding and hash break ties; the authors' stable sort breaks them by the order given.
Paper: Eliminating Position Bias of Language Models, arXiv 2407.01100.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from causal_jax.attention._base import AttentionSpec, Case, attention
from causal_jax.attention._scores import _einsum, _finite, _modify, _softmax, _wide, _with_bad
from causal_jax.attention.dense import _check, _check_mask, _check_scalars, dense_attention
from causal_jax.errors import InputError
from causal_jax.masks import Mask, Prefix, as_mask
from causal_jax.positions import Rotary, rotate
from causal_jax.segments import DocLayout
from causal_jax.shapes import Array, Bool, Float, Int, Key
from causal_jax.taps import OFF, Tap


def importance(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    layout: DocLayout,
    *,
    scale: float | None = None,
    q_offset: int | Int[Array, "B"] = 0,
) -> Float[Array, "B N T M"]:
    """How much each query attends to each document, per token of it, without positions.

    Args:
        q, k: not rotated; they are finite.
        layout: of the S slots of k; the queries of a document are all there or none.
        scale: factor on q . k; None: H ** -0.5.
        q_offset: slot of the first query.

    Returns:
        float32 (or wider); queries of one document share a row. 0 for the query's own document.
    """
    (B, T, N, H), (S, K), M = q.shape, k.shape[1:3], layout.documents
    own, doc = layout.document(_slots(T, q_offset)), layout.document(jnp.arange(S)[None])
    s = _products(q.reshape(B, T, K, N // K, H), k) * (H**-0.5 if scale is None else scale)
    among = (doc < M)[:, None] & (doc[:, None] != own[..., None])
    w, _ = _softmax(s, among[:, None], None)
    documents = jnp.arange(M)[None, None]
    holds = (doc[..., None] == documents).astype(w.dtype)
    size = jnp.maximum(layout.lengths, 1).astype(w.dtype)
    each = _einsum("bnts,bsm->bntm", w, holds) / size[:, None, None]
    asks = (own[..., None] == documents).astype(w.dtype)
    count = jnp.maximum(asks.sum(1), 1)[:, None, :, None]
    mean = _einsum("bntm,bta->bnam", each, asks) / count
    shared = _einsum("bnam,bta->bntm", mean, asks)
    return jnp.where((own < M)[:, None, :, None], shared, each)


def shifts(
    importance: Float[Array, "B N T M"],
    layout: DocLayout,
    own: Int[Array, "B T"],
    order: str = "near",
) -> Int[Array, "B N T M"]:
    """Tokens of documents that stand closer to the query than document b.

    `closer(l, b) = (imp_l, key_l, -l) > (imp_b, key_b, -b)` lexicographically, own document first.

    Args:
        importance: of each document to each query.
        layout: for the documents' lengths and hashes.
        own: the document a query is in; M: none.
        order: "near" puts the important close, "far" the unimportant.
    """
    M = layout.documents
    index = jnp.arange(M)
    rounded = jnp.round(importance * 2**18) * (1 if order == "near" else -1)
    mine = (own[..., None] == index[None, None])[:, None]
    rounded = jnp.where(mine, jnp.inf, rounded)
    a, b = rounded[..., :, None], rounded[..., None, :]
    keys = layout.keys[:, None, None]
    first = keys[..., :, None], keys[..., None, :]
    before = (index[:, None] < index[None])[None, None, None]
    tie = (first[0] > first[1]) | ((first[0] == first[1]) & before)
    closer = (a > b) | ((a == b) & tie)
    lengths = layout.lengths[:, None, None, :, None]
    return jnp.sum(jnp.where(closer, lengths, 0), -2, dtype=jnp.int32)


def pine_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    layout: DocLayout,
    rotary: Rotary | None,
    order: str = "near",
    mask: Mask | Bool[Array, "..."] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    q_offset: int | Int[Array, "B"] = 0,
    kv_length: Int[Array, "B"] | None = None,
    key: Key[Array, ""] | None = None,
    tap: Tap = OFF,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """Attention over a prompt with unordered documents, in float32.

    Args:
        q, k: not rotated.
        v: values.
        layout: where the documents are among the S slots.
        rotary: the model's rotary embedding; None: it has none, then only visibility changes.
        order: "near" is PINE, "far" its reverse.
        mask: restricts what the layout allows.
        scale, soft_cap, q_offset, kv_length: as in `dense_attention`.
        key: not used, nothing is random here; part of the contract of all mechanisms.
        tap: sites `mask` [B,N,T,S] (materialised only if wanted), `scores`, `pattern`
            [B,N,T,S] float32, `z` = o.
        implementation: None or "relative", "reference".

    Returns:
        o in v's dtype; 0 for a query that may attend to nothing.

    Raises:
        InputError: shapes that do not fit, unknown implementation or order.
    """
    if implementation not in (None, "relative", "reference"):
        raise InputError(f"implementation={implementation!r}: expected 'relative' or 'reference'")
    _check_order(order)
    _check(q, k, v, mask, None, None, soft_cap, scale)
    (B, T, N, H), (S, K), dtype = q.shape, k.shape[1:3], v.dtype
    mask = as_mask(mask)
    if kv_length is not None:
        mask = mask & Prefix(kv_length)
    _check_mask(mask, B, N)
    allowed = (mask & layout.visible(S)).to_dense(T, S, q_offset=q_offset)
    if tap.wants("mask"):
        allowed = tap("mask", jnp.broadcast_to(allowed, (B, N, T, S)))
    (q, bad_q), (k, bad_k), (v, bad_v) = (_finite(x.astype(_wide(x))) for x in (q, k, v))
    slots = _slots(T, q_offset)
    own = layout.document(slots)
    shift = shifts(importance(q, k, layout, scale=scale, q_offset=q_offset), layout, own, order)
    score = _explicit if implementation == "reference" else _relative
    factor = H**-0.5 if scale is None else scale
    s = _modify(score(q, k, layout, rotary, slots, shift) * factor, None, soft_cap)
    s = _with_bad(s, bad_q, bad_k + bad_v)
    p, _ = _softmax(tap("scores", s), allowed, None)
    p = tap("pattern", p)
    o = _einsum("bkgts,bskh->btkgh", p.reshape(B, K, N // K, T, S), v)
    return tap("z", o.reshape(B, T, N, -1).astype(dtype))


def _slots(T: int, q_offset: int | Array) -> Array:
    """Slots of the queries, [B or 1, T]."""
    return jnp.reshape(jnp.asarray(q_offset, jnp.int32), (-1, 1)) + jnp.arange(T)[None]


def _query_positions(layout: DocLayout, slots: Array) -> Array:
    """A document that asks is the last one; all else stands where it is. [B, T]"""
    own = layout.document(slots)
    sizes = jnp.pad(layout.lengths, ((0, 0), (0, 1)))  # 0 for no document
    begin = layout.end[:, None] - jnp.take_along_axis(sizes, own, -1)
    return layout.offset(slots) + jnp.where(own < layout.documents, begin, 0)


def _relative(q, k, layout, rotary, slots, shift):
    """Scores [B, N, T, S]: keys turned by their offsets, queries once per document."""
    (B, T, N, H), (S, K), M = q.shape, k.shape[1:3], layout.documents
    grouped = (B, T, K, N // K, H)
    if rotary is None:
        return _products(q.reshape(grouped), k)
    at, keys = _query_positions(layout, slots), jnp.arange(S)[None]
    k = rotate(k, layout.offset(keys), rotary)
    s = _products(rotate(q, at, rotary).reshape(grouped), k)
    doc = layout.document(keys)[:, None, None]
    begin = (layout.end[:, None] - layout.lengths)[:, None, None] - shift  # [B, N, T, M]
    for b in range(M):
        away = (at[:, None] - begin[..., b]).transpose(0, 2, 1).reshape(B, T * N)
        turned = rotate(q.reshape(B, T * N, 1, H), away, rotary).reshape(grouped)
        s = jnp.where(doc == b, _products(turned, k), s)
    return s


def _explicit(q, k, layout, rotary, slots, shift):
    """The same with every key turned for every query and head: [B, N, T, S, H] in memory."""
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    k = jnp.repeat(k, N // K, axis=2).transpose(0, 2, 1, 3)
    k = jnp.broadcast_to(k[:, :, None], (B, N, T, S, H))
    if rotary is not None:
        keys = jnp.arange(S)[None]
        begin = (layout.end[:, None] - layout.lengths)[:, None, None] - shift
        begin = jnp.pad(begin, ((0, 0),) * 3 + ((0, 1),))
        doc = jnp.broadcast_to(layout.document(keys)[:, None, None], (B, N, T, S))
        at = jnp.take_along_axis(begin, doc, -1) + layout.offset(keys)[:, None, None]
        k = rotate(k.reshape(B, -1, 1, H), at.reshape(B, -1), rotary).reshape(k.shape)
        q = rotate(q, _query_positions(layout, slots), rotary)
    return _einsum("btnh,bntsh->bnts", q, k)


def _products(q: Array, k: Array) -> Array:
    """Grouped q [B, T, K, G, H] . k [B, S, K, H] -> [B, K G, T, S]."""
    s = _einsum("btkgh,bskh->bkgts", q, k)
    return s.reshape(len(s), -1, *s.shape[3:])


def _check_order(order: str) -> None:
    if order not in ("near", "far"):
        raise InputError(f"order={order!r}: expected 'near' or 'far'")


@attention.register(
    "pine",
    cases=(Case((2, 17, 4, 8)), Case((1, 19, 4, 8), kv_heads=2, spec={"soft_cap": 5.0})),
)
@dataclasses.dataclass(frozen=True)
class Pine(AttentionSpec):
    """Position-invariant inference (arXiv 2407.01100); without a layout ordinary attention.

    Attributes:
        order: "near" puts important documents close to the query, "far" is the reverse.
        scale: factor on q . k; None: head width ** -0.5.
        soft_cap: squashes the scores to (-soft_cap, soft_cap); None: not.
    """

    order: str = "near"
    scale: float | None = None
    soft_cap: float | None = None

    patterns: ClassVar[frozenset[str]] = frozenset({"self-causal"})
    places: ClassVar[bool] = True

    def __post_init__(self):
        _check_order(self.order)
        _check_scalars(self.soft_cap, self.scale)

    def exact_when(self, length: int) -> bool:
        """Without a layout, unless scores are capped or rescaled."""
        return self.soft_cap is None and self.scale is None

    @property
    def by_distance(self) -> bool:
        """Always."""
        return True

    def cost(self, T: int, S: int, N: int, H: int, Hv: int) -> float:
        """Without a layout: dense attention's 2 (H + H') per head and allowed pair."""
        past = np.arange(max(S - T, 0), max(S - T, 0) + T, dtype=np.float64)
        return float(2 * (H + Hv) * N * np.minimum(past + 1, S).sum())

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K V"],
        *,
        mask: Mask | Bool[Array, "..."] | None = None,
        key: Key[Array, ""] | None = None,
        tap: Tap = OFF,
        implementation: str | None = None,
        q_offset: int | Int[Array, "B"] = 0,
        kv_length: Int[Array, "B"] | None = None,
        layout: DocLayout | None = None,
        rotary: Rotary | None = None,
    ) -> Float[Array, "B T N V"]:
        """Attend; with a layout q and k come un-rotated, to be rotated as `rotary` says."""
        rest = {
            "mask": mask, "scale": self.scale, "soft_cap": self.soft_cap, "q_offset": q_offset,
            "kv_length": kv_length, "key": key, "tap": tap, "implementation": implementation,
        }  # fmt: skip
        if layout is not None:
            return pine_attention(q, k, v, layout=layout, rotary=rotary, order=self.order, **rest)
        if rotary is not None:
            raise InputError("rotary: without a layout q and k come rotated; expected None")
        o = dense_attention(q, k, v, **rest)
        assert not isinstance(o, tuple)
        return o
