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
        C, (B, T) = self.reweaving.segment, tokens.shape
        if T % C:
            raise InputError(f"{T} tokens: expected a multiple of reweaving.segment={C}")
        ids = jnp.zeros_like(tokens) if segments is None else segments
        cut = lambda a: jnp.moveaxis(a.reshape(B, T // C, C), 1, 0)  # noqa: E731
        graph, params = nnx.split(self)

        def body(store, xs):
            tokens, ids = xs
            h, store, apart = nnx.merge(graph, params)._segment(tokens, ids, store, key)
            return store, (h, apart)

        store, (h, apart) = jax.lax.scan(body, store, (cut(tokens), cut(ids)))
        return jnp.moveaxis(h, 0, 1).reshape(B, T, -1), store, apart.mean()

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
        return h, self._after(store, states, ids, surprise), apart

    def _states(self, acts: dict[str, Array]) -> Array:
        """Outputs of the captured layers, [B, n, C, D]."""
        chosen = jnp.asarray(self.reweaving.captures(self.base.spec.layers))
        return jnp.moveaxis(acts["resid_post"][chosen], 0, 1)

    def _after(self, store: Store, states: Array, ids: Array, surprise: Array | None) -> Store:
        r = self.reweaving.score(self.weights.tree(), states, store.count, surprise)
        return self.reweaving.captured_into(store, states, r, ids)

    def _edits(self, store: Store, ids: Array):
        """The edits that weave the store in, and the distance of the reconstruction."""
        params, layers = self.weights.tree(), self.base.spec.layers
        z, apart = self.reweaving.reconstruct(params, store.mem)
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
            self.base.init_cache(batch, C), store, jnp.zeros((batch, n, C, D)),
            jnp.zeros((batch, C)), jnp.zeros((batch, D), jnp.dtype(self.base.spec.dtype)),
            jnp.zeros((), jnp.int32),
        )  # fmt: skip

    def extend(
        self, tokens: Int[Array, "B T"], cache: RewovenCache, *, tap: Tap = OFF
    ) -> tuple[Float[Array, "B T V"], RewovenCache]:
        """Read T more tokens, one after the other; logits and the cache after them."""
        h, cache = self.extend_hidden(tokens, cache, tap=tap)
        return tap("logits", self.unembed(h)), cache

    def extend_hidden(
        self, tokens: Int[Array, "B T"], cache: RewovenCache, *, tap: Tap = OFF
    ) -> tuple[Float[Array, "B T D"], RewovenCache]:
        """`extend` up to the final norm."""
        graph, params = nnx.split(self)

        def body(cache, token):
            h, cache = nnx.merge(graph, params)._token(token[:, None], cache)
            return cache, h[:, 0]

        cache, h = jax.lax.scan(body, cache, jnp.moveaxis(tokens, 1, 0))
        return jnp.moveaxis(h, 0, 1), cache

    def _token(self, token: Array, c: RewovenCache):
        C, one = self.reweaving.segment, jnp.zeros((len(token), 1), jnp.int32)
        at = c.length % C
        if self.reweaving.scorer == "surprise":
            logp = jax.nn.log_softmax(self.unembed(c.last))
            told = -jnp.take_along_axis(logp, token, -1)
            place = jnp.where(at == 0, C, at - 1)  # beyond the end: dropped
            c = dataclasses.replace(
                c, surprise=c.surprise.at[:, place].set(told[:, 0], mode="drop")
            )
        ids, surprise = jnp.zeros(c.surprise.shape, jnp.int32), c.surprise.at[:, -1].set(0.0)
        store, base = jax.lax.cond(
            (at == 0) & (c.length > 0),
            lambda: (self._after(c.store, c.states, ids, surprise),
                     self.base.init_cache(len(token), C)),
            lambda: (c.store, c.base),
        )  # fmt: skip
        edits, _ = self._edits(store, one)
        (h, base), acts = run(
            self.base.extend_hidden, token, base, edits=edits, capture=["resid_post"]
        )
        new = self._states(acts).astype(c.states.dtype)
        states = jax.lax.dynamic_update_slice_in_dim(c.states, new, at, 2)
        return h, RewovenCache(base, store, states, c.surprise, h[:, 0], c.length + 1)
