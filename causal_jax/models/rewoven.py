"""A decoder read in segments, with states kept and woven back in: reweaving around any decoder.

    model = Rewoven(Decoder(...), Reweaving(segment=256)).build(key)
    model = RewovenModel(load("smollm2").model, Reweaving(segment=256), key=key)   # a ready one

Each segment is a pass of the decoder as it is, edited at the inputs of some layers (`resid_pre`)
and captured at the outputs of others (`resid_post`): no part of the decoder knows. Attention ends
at the segment's border, positions start anew there; what crosses it is the store
(`memory/reweaving.py`, an instantiation of contextual memory reweaving, arXiv 2502.02046).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from causal_jax.errors import InputError
from causal_jax.memory.reweaving import Reweaving, Store
from causal_jax.models._base import ModelSpec, models
from causal_jax.models.decoder import Decoder, DecoderModel
from causal_jax.nn.titans import Group
from causal_jax.shapes import Array, Float, Int, Key
from causal_jax.taps import OFF, Tap, run, site


@models.register("rewoven")
@dataclasses.dataclass(frozen=True)
class Rewoven(ModelSpec):
    """A decoder with contextual memory reweaving.

    Attributes:
        base: the decoder; its context need not exceed a segment.
        reweaving: what is kept and how it comes back.
    """

    base: Decoder = Decoder()
    reweaving: Reweaving = Reweaving()

    def build(self, key: jax.Array) -> "RewovenModel":
        """Decoder and reweaving with freshly drawn parameters."""
        keys = jax.random.split(key)
        base = dataclasses.replace(self.base, vocab=self.base.vocab or self.vocab)
        return RewovenModel(base.build(keys[0]), self.reweaving, key=keys[1])

    def flops_per_token(self, length: int) -> float:
        """The decoder's on a segment, and 2 m D + 4 D^2 multiply-adds per rewoven layer."""
        r, D = self.reweaving, self.base.width
        places = len(r.reweaves(self.base.layers)) or 1
        more = 2.0 * places * (2 * r.slots * D + 4 * D * D)
        return self.base.flops_per_token(min(length, r.segment)) + 3.0 * more


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RewovenCache:
    """Everything remembered in the middle of a segment.

    Attributes:
        base: the decoder's cache of this segment.
        store: of the segments before.
        states: of this segment's tokens at the captured layers, [B, n, C, D].
        surprise: of this segment's tokens, [B, C].
        last: logits' hidden state of the last token, [B, D].
        length: tokens read, of all segments.
    """

    base: Any
    store: Store
    states: Array
    surprise: Array
    last: Array
    length: Int[Array, ""]


class RewovenModel(nnx.Module):
    """A decoder and the parameters of a `Reweaving` around it.

    Args:
        base: the decoder, shared, not copied.
        reweaving: the settings.
        key: draws the parameters.
    """

    def __init__(self, base: DecoderModel, reweaving: Reweaving, *, key: Key[Array, ""]):
        self.base, self.reweaving = base, reweaving
        sizes = {"width": base.spec.width, "layers": base.spec.layers}
        self.weights = Group(reweaving.init(key, **sizes))

    @property
    def spec(self) -> Decoder:
        """The decoder's."""
        return self.base.spec

    def __call__(
        self, tokens: Int[Array, "B T"], *, segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None, key: Key[Array, ""] | None = None,
        tap: Tap = OFF,
    ) -> Float[Array, "B T V"]:  # fmt: skip
        """Logits of the next token at every position, float32; arguments as of `hidden`."""
        h = self.hidden(tokens, segments=segments, positions=positions, key=key, tap=tap)
        return tap("logits", self.unembed(h))

    def hidden(
        self, tokens: Int[Array, "B T"], *, segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None, key: Key[Array, ""] | None = None,
        tap: Tap = OFF,
    ) -> Float[Array, "B T D"]:  # fmt: skip
        """The decoder's `hidden`, segment after segment from an empty store.

        Args:
            tokens: ids, T a multiple of the segment.
            segments: document ids; what was kept is recalled inside its document only.
            positions: not used: positions start anew in every segment.
            key: switches dropout on, the same draw in every segment.
            tap: not for what is inside the decoder: that is edited here already.
        """
        return self.read(tokens, self.init_store(len(tokens)), segments=segments, key=key)[0]

    def unembed(self, h: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The decoder's."""
        return self.base.unembed(h)

    def init_store(self, batch: int) -> Store:
        """An empty store."""
        return self.reweaving.init_store(
            batch, width=self.base.spec.width, layers=self.base.spec.layers
        )

    def read(
        self, tokens: Int[Array, "B T"], store: Store, *,
        segments: Int[Array, "B T"] | None = None, key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Store, Float[Array, ""]]:  # fmt: skip
        """Whole segments, from a store to the next.

        Returns:
            hidden states, the store after the last segment, and the mean distance of the
            reconstruction's stages from the deepest states (an auxiliary loss).

        Raises:
            InputError: T is no multiple of the segment.
        """
        h, store, apart, _ = self._read(tokens, store, segments, key)
        return h, store, apart.mean()

    def scores(
        self, tokens: Int[Array, "B T"], store: Store, *,
        segments: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T"]:  # fmt: skip
        """The score of every token as `read` captures by it; arguments and errors are its."""
        return self._read(tokens, store, segments, None)[3]

    def _read(self, tokens: Array, store: Store, segments: Array | None, key: Array | None):
        """Hidden states, the last store, each segment's distance, scores."""
        C, (B, T) = self.reweaving.segment, tokens.shape
        if T % C:
            raise InputError(f"{T} tokens: expected a multiple of reweaving.segment={C}")
        ids = jnp.zeros_like(tokens) if segments is None else segments
        cut = lambda a: jnp.moveaxis(a.reshape(B, T // C, C), 1, 0)  # noqa: E731
        graph, params = nnx.split(self)

        def body(store, xs):
            tokens, ids = xs
            h, store, apart, r = nnx.merge(graph, params)._segment(tokens, ids, store, key)
            return store, (h, apart, r)

        # only the store is kept of a segment: writing all its activations down took longer
        segment = jax.checkpoint(body, prevent_cse=False)
        store, (h, apart, r) = jax.lax.scan(segment, store, (cut(tokens), cut(ids)))
        whole = lambda a: jnp.moveaxis(a, 0, 1).reshape(B, T, *a.shape[3:])  # noqa: E731
        return whole(h), store, apart, whole(r)

    def _segment(self, tokens: Array, ids: Array, store: Store, key: Array | None):
        every = self.reweaving.bptt
        if every:
            ends = store.count % every == 0
            still = jax.tree.map(jax.lax.stop_gradient, store)
            store = jax.tree.map(lambda a, b: jnp.where(ends, a, b), still, store)
        edits, apart = self._edits(store, ids)
        h, acts = run(
            self.base.hidden, tokens, segments=ids, key=key, edits=edits, capture=["resid_post"]
        )
        states = self._states(acts)
        surprise = None
        if self.reweaving.scorer == "surprise":
            logp = jax.nn.log_softmax(self.unembed(h[:, :-1]))
            surprise = -jnp.take_along_axis(logp, tokens[:, 1:, None], -1)[..., 0]
            surprise = jnp.pad(surprise, ((0, 0), (0, 1)))
        store, r = self._after(store, states, ids, surprise)
        return h, store, apart, r

    def _states(self, acts: dict[str, Array]) -> Array:
        """Outputs of the captured layers, [B, n, C, D]."""
        chosen = jnp.asarray(self.reweaving.captures(self.base.spec.layers))
        return jnp.moveaxis(acts["resid_post"][chosen], 0, 1)

    def _after(self, store: Store, states: Array, ids: Array, surprise: Array | None):
        """The store after a segment, and its tokens' scores."""
        r = self.reweaving.score(self.weights.tree(), states, store.count, surprise)
        return self.reweaving.captured_into(store, states, r, ids), r

    def _edits(self, store: Store, ids: Array):
        """The edits that weave the store in, and the distance of the reconstruction."""
        params, layers = self.weights.tree(), self.base.spec.layers
        z, apart = self.reweaving.reconstruct(params, store.mem, store.rel)
        seen = store.valid[:, None] & (store.document[:, None] == ids[..., None])
        places = self.reweaving.reweaves(layers)
        where = [("resid_pre", l) for l in places] or [("resid_post", layers - 1)]
        edits = [
            site(name, layer=l).apply(
                self.reweaving.reweave, params[f"at{place}"], z, store.rel, seen, gate="cond"
            )
            for (name, l), place in zip(where, places or (layers,))
        ]
        return edits, apart

    # ------------------------------------------------------------ decoding

    def init_cache(
        self, batch: int, length: int, *, start: Int[Array, "B"] | None = None
    ) -> RewovenCache:
        """An empty cache; its size does not depend on `length`.

        Raises:
            InputError: padding in front, which would move the segments.
        """
        if start is not None:
            raise InputError("start: segments go by place; run rows of equal length together")
        store, C, D = self.init_store(batch), self.reweaving.segment, self.base.spec.width
        n = store.mem.shape[1]
        return RewovenCache(
            self.base.init_cache(batch, C), store, jnp.zeros((batch, n, C, D), jnp.float32),
            jnp.zeros((batch, C), jnp.float32),
            jnp.zeros((batch, D), jnp.dtype(self.base.spec.dtype)), jnp.zeros((), jnp.int32),
        )  # fmt: skip

    def extend(
        self, tokens: Int[Array, "B T"], cache: RewovenCache, *, tap: Tap = OFF
    ) -> tuple[Float[Array, "B T V"], RewovenCache]:
        """Read T more tokens; logits and the cache after them."""
        h, cache = self.extend_hidden(tokens, cache, tap=tap)
        return tap("logits", self.unembed(h)), cache

    def extend_hidden(
        self, tokens: Int[Array, "B T"], cache: RewovenCache, *, tap: Tap = OFF
    ) -> tuple[Float[Array, "B T D"], RewovenCache]:
        """`extend` up to the final norm.

        From a segment's beginning whole segments are passes; tokens that stay inside the segment
        are one pass. Only what begins inside a segment and leaves it is read token after token.
        """
        T, C = tokens.shape[1], self.reweaving.segment
        graph, params = nnx.split(self)
        here = lambda: nnx.merge(graph, params)  # noqa: E731

        def one_by_one(cache):
            def body(cache, token):
                h, cache = here()._within(token[:, None], here()._flushed(cache))
                return cache, h[:, 0]

            cache, h = jax.lax.scan(body, cache, jnp.moveaxis(tokens, 1, 0))
            return jnp.moveaxis(h, 0, 1), cache

        def from_border(cache):
            model, cache, whole = here(), here()._flushed(cache), (T - 1) // C * C
            h = []
            if whole:
                passed, store, _ = model.read(tokens[:, :whole], cache.store)
                length = cache.length + whole
                cache = dataclasses.replace(cache, store=store, last=passed[:, -1], length=length)
                h.append(passed)
            rest, cache = model._within(tokens[:, whole:], cache)
            return jnp.concatenate([*h, rest], 1), cache

        if T == 1:
            return one_by_one(cache)
        at, ways = cache.length % C, [one_by_one, from_border]
        way = (at == 0).astype(jnp.int32)
        if T < C:
            ways.append(lambda cache: here()._within(tokens, cache))
            way = jnp.where((at > 0) & (at + T <= C), 2, way)
        return jax.lax.switch(way, ways, cache)

    def _flushed(self, c: RewovenCache) -> RewovenCache:
        """At a border the segment behind it goes into the store."""
        batch, C = c.surprise.shape

        def kept():
            surprise = c.surprise.at[:, -1].set(0.0)  # of a token of the next segment
            ids = jnp.zeros((batch, C), jnp.int32)
            store, _ = self._after(c.store, c.states, ids, surprise)
            return store, self.base.init_cache(batch, C)

        border = (c.length % C == 0) & (c.length > 0)
        store, base = jax.lax.cond(border, kept, lambda: (c.store, c.base))
        return dataclasses.replace(c, store=store, base=base)

    def _within(self, tokens: Array, c: RewovenCache):
        """Tokens that do not reach beyond the segment: hidden states and the cache."""
        C, (batch, T) = self.reweaving.segment, tokens.shape
        at = c.length % C
        edits, _ = self._edits(c.store, jnp.zeros((batch, 1), jnp.int32))
        (h, base), acts = run(
            self.base.extend_hidden, tokens, c.base, edits=edits, capture=["resid_post"]
        )
        surprise = c.surprise
        if self.reweaving.scorer == "surprise":
            before = jnp.concatenate([c.last[:, None].astype(h.dtype), h[:, :-1]], 1)
            logp = jax.nn.log_softmax(self.unembed(before))
            told = -jnp.take_along_axis(logp, tokens[..., None], -1)[..., 0]
            places = at - 1 + jnp.arange(T)
            places = jnp.where(places < 0, C, places)  # of the segment before: dropped
            surprise = surprise.at[:, places].set(told, mode="drop")
        new = self._states(acts).astype(c.states.dtype)
        states = jax.lax.dynamic_update_slice_in_dim(c.states, new, at, 2)
        last = h[:, -1].astype(c.last.dtype)
        return h, RewovenCache(base, c.store, states, surprise, last, c.length + T)
