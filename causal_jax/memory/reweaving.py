"""Contextual memory reweaving: hidden states of chosen tokens, kept and woven back in later.

A sequence is read in segments of C tokens; nothing but a store of m slots passes their borders:

    score        r_i = w . LN(h_i) + b          h_i: token i's states at n layers, side by side
    capture      the states of the k highest r_i of a segment
    evict        of old and new the m slots with the highest r_j - lambda age_j stay
    reconstruct  Z_1 = LN(mem_1) A_1,  Z_j = LN(mem_j) A_j + GELU(Z_{j-1} U_j) V_j,
                 Z = sigmoid(r) LN(Z_n)
    reweave      x <- x + g * D,  g = sigmoid([LN(x), D] W_g + b_g)
                 D = softmax([LN(x) W_q (Z W_k)^T / sqrt(H) + beta log sigmoid(r), 0]) Z W_v W_o

A segment reads what earlier segments left, so scores may look at all of it and nothing leaks. The
last logit is that of a slot with value 0: "recall nothing". W_o starts at 0: at first the decoder
around it is untouched. `models/rewoven.py` puts it around a decoder, by its taps.

This is an instantiation: the paper (arXiv 2502.02046) gives no equation, size or code. Its words
are kept (capture of latent states by relevance, layered reconstruction, reweaving); the formulas
are this project's. The choice by top k has no gradient; sigmoid(r) carries it to the scores, behind
the norms, which would cancel it, from what was captured: train on short segments that are captured
whole, then on the problem (the parameters fit any `segment`, `slots` and `capture`).
"""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from causal_jax.errors import InputError
from causal_jax.shapes import Array, Bool, Float, Int, Key

Scorer = Literal["learned", "norm", "variance", "surprise", "random", "last"]
Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Store:
    """What is kept of a sequence; its size does not depend on how much was read.

    Attributes:
        mem: states of m tokens at n layers.
        rel: their scores r.
        age: segments since they were captured.
        valid: which slots are filled.
        document: which document each is from.
        count: segments read so far.
    """

    mem: Float[Array, "B n m D"]
    rel: Float[Array, "B m"]
    age: Int[Array, "B m"]
    valid: Bool[Array, "B m"]
    document: Int[Array, "B m"]
    count: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Reweaving:
    """Sizes and switches.

    Attributes:
        segment: tokens of a segment, C.
        slots: m.
        capture: tokens captured per segment, k; 0: C / 8.
        capture_layers: layers (from 0) whose outputs are kept; (): at 1/4, 1/2 and 3/4 of depth.
        reweave_layers: layers whose inputs are rewoven; (): those after the captured ones.
        final: reweave only what the last norm reads (the paper's flow chart).
        heads: of the reweaving's attention.
        scorer: "learned", or what the ablations put in its place: "norm" and "variance" of the
            deepest state, "surprise" -log p of the next token, "random", the "last" tokens.
        recency: lambda; very large: first in, first out.
        hierarchy: False: Z is the sum of LN(mem_j) A_j.
        relevance_bias: False: beta = 0.
        soft_weight: False: Z is not weighted by sigmoid(r).
        bptt: segments after which gradients through the store stop; 0: never.
    """

    segment: int = 32
    slots: int = 16
    capture: int = 0
    capture_layers: tuple[int, ...] = ()
    reweave_layers: tuple[int, ...] = ()
    final: bool = False
    heads: int = 2
    scorer: Scorer = "learned"
    recency: float = 0.0
    hierarchy: bool = True
    relevance_bias: bool = True
    soft_weight: bool = True
    bptt: int = 8

    def __post_init__(self):
        for name, least in (
            ("segment", 1),
            ("slots", 1),
            ("heads", 1),
            ("capture", 0),
            ("bptt", 0),
        ):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)}: expected at least {least}")
        if self.captured > self.segment:
            raise InputError(f"capture={self.capture}: expected at most segment={self.segment}")
        if self.scorer not in get_args(Scorer):
            raise InputError(f"scorer={self.scorer!r}: expected one of {get_args(Scorer)}")
        if not self.recency >= 0:
            raise InputError(f"recency={self.recency}: expected 0 or more")

    @property
    def captured(self) -> int:
        """k."""
        return self.capture or max(self.segment // 8, 1)

    def captures(self, layers: int) -> tuple[int, ...]:
        """Layers whose outputs are kept, of so many."""
        chosen = self.capture_layers or tuple(
            sorted({max(layers * i // 4, 1) - 1 for i in (1, 2, 3)})
        )
        return _checked("capture_layers", chosen, layers)

    def reweaves(self, layers: int) -> tuple[int, ...]:
        """Layers whose inputs are rewoven, of so many; none with `final`."""
        if self.final:
            return ()
        after = tuple(c + 1 for c in self.captures(layers) if c + 1 < layers)
        return _checked("reweave_layers", self.reweave_layers or after, layers)

    def init(self, key: Key[Array, ""], *, width: int, layers: int) -> Params:
        """Parameters for a decoder of so many layers of width D: a nested dict of float32 arrays.

        Raises:
            InputError: heads do not divide the width, layers that are not there.
        """
        if width % self.heads:
            raise InputError(f"heads={self.heads}: expected a divisor of width={width}")
        n, keys = len(self.captures(layers)), iter(jax.random.split(key, 64))
        draw = lambda i, o: jax.random.normal(next(keys), (i, o), jnp.float32) * i**-0.5  # noqa: E731
        small, zeros = max(width // 4, 1), jnp.zeros
        params: Params = {"a": jnp.broadcast_to(jnp.eye(width)[None] / n, (n, width, width))}
        if self.hierarchy and n > 1:
            params["u"] = jnp.stack([draw(width, small) for _ in range(n - 1)])
            params["v"] = zeros((n - 1, small, width))
        if self.scorer == "learned":
            params["score"] = {"w": draw(n * width, 1)[:, 0], "b": zeros(())}
        for layer in self.reweaves(layers) or (layers,):
            params[f"at{layer}"] = {
                "q": draw(width, width), "k": draw(width, width), "v": draw(width, width),
                "o": zeros((width, width)), "gate": draw(2 * width, width),
                "gate_bias": jnp.full(width, -2.0), "beta": jnp.ones(()),
            }  # fmt: skip
        return params

    def init_store(self, batch: int, *, width: int, layers: int) -> Store:
        """An empty store; float32 beside a decoder of any dtype."""
        m, n = self.slots, len(self.captures(layers))
        rows = lambda dtype: jnp.zeros((batch, m), dtype)  # noqa: E731
        return Store(
            jnp.zeros((batch, n, m, width), jnp.float32), rows(jnp.float32), rows(jnp.int32),
            rows(bool), rows(jnp.int32), jnp.zeros((), jnp.int32),
        )  # fmt: skip

    def score(
        self, params: Params, h: Float[Array, "B n C D"], count: Int[Array, ""],
        surprise: Float[Array, "B C"] | None = None,
    ) -> Float[Array, "B C"]:  # fmt: skip
        """r of every token of a segment, float32.

        Args:
            h: states at the captured layers.
            count: segments before this one; draws the numbers of "random".
            surprise: for the scorer of this name.
        """
        B, _, C, _ = h.shape
        if self.scorer == "learned":
            side = jnp.moveaxis(h, 1, 2).reshape(B, C, -1)
            r = normalised(side) @ params["score"]["w"] + params["score"]["b"]
            return r.astype(jnp.float32)
        if self.scorer == "surprise":
            if surprise is None:
                raise InputError("scorer='surprise': needs -log p of the next tokens, got none")
            return surprise.astype(jnp.float32)
        if self.scorer == "random":
            key = jax.random.fold_in(jax.random.key(0), count)
            return jax.random.normal(key, (B, C), jnp.float32)
        if self.scorer == "last":
            return jnp.broadcast_to(jnp.arange(C, dtype=jnp.float32)[None] / C, (B, C))
        deepest = h[:, -1].astype(jnp.float32)
        if self.scorer == "variance":
            return jnp.var(deepest, -1)
        return normalised(jnp.sqrt(jnp.sum(jnp.square(deepest), -1)))

    def captured_into(
        self, store: Store, h: Float[Array, "B n C D"], r: Float[Array, "B C"],
        document: Int[Array, "B C"],
    ) -> Store:  # fmt: skip
        """The store after a segment with states h and scores r; only its last document stays."""
        k, here = self.captured, document == document[:, -1:]
        order = jnp.where(here, jax.lax.stop_gradient(r), -jnp.inf)
        places = jax.lax.top_k(order, k)[1]
        take = lambda a: jnp.take_along_axis(a, places, 1)  # noqa: E731
        new = jnp.take_along_axis(h.astype(jnp.float32), places[:, None, :, None], 2)
        aside = lambda a, b: jnp.concatenate([a, b], 1)  # noqa: E731
        mem = jnp.concatenate([store.mem, new], 2)
        rel, fresh = aside(store.rel, take(r)), jnp.zeros_like(places)
        age = aside(store.age, fresh) + 1
        still = store.valid & (store.document == document[:, -1:])
        valid, ids = aside(still, take(here)), aside(store.document, take(document))
        keep = jax.lax.stop_gradient(rel) - self.recency * age.astype(jnp.float32)
        keep = jax.lax.top_k(jnp.where(valid, keep, -jnp.inf), self.slots)[1]
        kept = lambda a: jnp.take_along_axis(a, keep, 1)  # noqa: E731
        mem = jnp.take_along_axis(mem, keep[:, None, :, None], 2)
        return Store(mem, kept(rel), kept(age), kept(valid), kept(ids), store.count + 1)

    def reconstruct(
        self, params: Params, mem: Float[Array, "B n m D"], rel: Float[Array, "B m"]
    ) -> tuple[Float[Array, "B m D"], Float[Array, ""]]:
        """Z, and how far its stages are from the deepest states: mean_j |Z_j - mem_n|^2 / D."""
        direct = jnp.einsum("bnmd,nde->bnme", normalised(mem), params["a"])
        stages = [direct[:, 0]]
        for j in range(1, mem.shape[1]):
            if "u" in params:
                step = jax.nn.gelu(stages[-1] @ params["u"][j - 1], approximate=False)
                stages.append(direct[:, j] + step @ params["v"][j - 1])
            else:
                stages.append(stages[-1] + direct[:, j])
        goal = jax.lax.stop_gradient(mem[:, -1])
        apart = sum(jnp.mean(jnp.square(z - goal)) for z in stages) / len(stages)
        z = normalised(stages[-1])
        if self.soft_weight:
            z = z * jax.nn.sigmoid(rel)[..., None]
        return z, jnp.asarray(apart)

    def reweave(
        self, x: Float[Array, "B C D"], params: Params, z: Float[Array, "B m D"],
        rel: Float[Array, "B m"], seen: Bool[Array, "B #C m"],
    ) -> Float[Array, "B C D"]:  # fmt: skip
        """x with what it recalls from Z; exactly x where no slot is seen.

        Args:
            params: of this layer, `init(...)["at<layer>"]`.
            rel: scores of the slots.
            seen: which slots each token may recall.
        """
        (B, C, D), wide = x.shape, normalised(x)
        split = lambda a: a.reshape(B, -1, self.heads, D // self.heads)  # noqa: E731
        q, k, v = (split(a @ params[n]) for a, n in ((wide, "q"), (z, "k"), (z, "v")))
        logits = jnp.einsum("bchd,bmhd->bhcm", q, k) * (D // self.heads) ** -0.5
        if self.relevance_bias:
            logits = logits + (params["beta"] * jax.nn.log_sigmoid(rel))[:, None, None]
        logits = jnp.where(seen[:, None], logits, -jnp.inf)
        nothing = jnp.zeros((B, self.heads, C, 1), logits.dtype)
        alpha = jax.nn.softmax(jnp.concatenate([logits, nothing], -1))[..., :-1]
        recalled = jnp.einsum("bhcm,bmhd->bchd", alpha, v).reshape(B, C, D) @ params["o"]
        both = jnp.concatenate([wide, recalled], -1)
        gate = jax.nn.sigmoid(both @ params["gate"] + params["gate_bias"][None, None])
        return (x + (gate * recalled).astype(x.dtype)).astype(x.dtype)


def normalised(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Layer norm without parameters, float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-5)


def _checked(field: str, chosen: tuple[int, ...], layers: int) -> tuple[int, ...]:
    if not chosen or any(not 0 <= c < layers for c in chosen):
        raise InputError(f"{field}={chosen}: expected layers from 0 to {layers - 1}")
    return chosen
