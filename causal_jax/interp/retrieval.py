"""Retrieval heads: the heads that copy a far passage into the answer (arXiv 2404.15574).

    reading = read(model, tokens, start, room=32)                   # the prompts, once
    answers = answer(model, reading, steps=32)                      # greedy; where each head looked
    hits = copy_hits(answers.seen, answers.tokens, tokens, span)
    score = retrieval_score(hits, answers.seen, span).mean(1)       # [L, N]
    broken = answer(model, reading, steps=32, edits=ablate_heads(head_mask(best, L, N), "uniform"))

A head copies the token it helps to write: the row of attention that counts is that of the query
which predicts the token, and it must peak inside the passage at that very token. Rows are read
while decoding only, where a row costs S weights; the prompt itself is read by the fast path.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causal_jax.errors import InputError
from causal_jax.models.decoder import Cache, DecoderModel
from causal_jax.shapes import Array, Bool, Float, Int, Key
from causal_jax.taps import run


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reading:
    """Prompts read but for their last token, which will predict the answer's first.

    Attributes:
        last: [B, 1] the last tokens.
        cache: of all tokens before them.
    """

    last: Int[Array, "B 1"]
    cache: Cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Answers:
    """Greedy answers, and what was seen of each step.

    Attributes:
        tokens: [S, B] ids; -1 behind the end of a row.
        seen: [S, L, ...] what `see` made of each layer's row of attention, that of the query which
            predicts the token: for `peaks` [S, L, B, N], the key each head attends to most.
    """

    tokens: Int[Array, "S B"]
    seen: Any


def read(
    model: DecoderModel,
    tokens: Int[Array, "B T"],
    start: Int[Array, "B"] | None = None,
    *,
    room: int,
    edits: Any = (),
) -> Reading:
    """Read the prompts.

    Args:
        tokens: shorter prompts padded in front.
        start: first real position of each row, or None where there is no padding.
        room: tokens the answers may have.
        edits: made while reading, e.g. to ablate heads in the prompt too.
    """
    cache = model.init_cache(len(tokens), tokens.shape[1] + room, start=start)
    (_, cache), _ = run(model.extend_hidden, tokens[:, :-1], cache, edits=edits)
    return Reading(tokens[:, -1:], cache)


def answer(
    model: DecoderModel,
    reading: Reading,
    *,
    steps: int,
    stop_tokens: tuple[int, ...] = (),
    edits: Any = (),
    see: Callable | None = None,
) -> Answers:
    """Greedy answers and what every head attends to on the way.

    Args:
        steps: tokens of an answer at most.
        stop_tokens: ids that end a row; they are not part of it.
        edits: made while decoding only: the prompt stays as the full model read it.
        see: attention row [B, N, S] over prompt and answer -> what to keep of it; None: `peaks`.
    """
    B, keep = reading.last.shape[0], peaks if see is None else see

    def step(carry, _):
        token, cache, done = carry
        capture = {"attn.pattern": lambda pattern: keep(pattern[:, :, -1])}
        (logits, cache), acts = run(model.extend, token, cache, edits=edits, capture=capture)
        new = logits[:, -1].argmax(-1).astype(jnp.int32)
        done = done | (jnp.isin(new, jnp.array(stop_tokens, jnp.int32)) if stop_tokens else False)
        out = jnp.where(done, -1, new), acts["attn.pattern"]
        return (jnp.where(done, token[:, 0], new)[:, None], cache, done), out

    carry = reading.last, reading.cache, jnp.zeros(B, bool)
    _, (tokens, seen) = jax.lax.scan(step, carry, length=steps)
    return Answers(tokens, seen)


def peaks(row: Float[Array, "B N S"]) -> Int[Array, "B N"]:
    """The key with the largest weight."""
    return row.argmax(-1).astype(jnp.int32)


def copy_hits(
    top: Int[Array, "S L B N"],
    answers: Int[Array, "S B"],
    ids: Int[Array, "B T"],
    span: Int[Array, "B 2"],
) -> Bool[Array, "S L B N"]:
    """Which head copied at which step.

        hit = (s <= j < e) and x[j] = w                     j the peak, w the token being written

    Args:
        top: j, peaks of attention.
        answers: w; -1 never counts.
        ids: x, the prompts (padding included: j counts places in the array).
        span: (s, e) of the passage in each prompt.
    """
    inside = (top >= span[None, None, :, :1]) & (top < span[None, None, :, 1:])
    rows = jnp.arange(ids.shape[0])[None, None, :, None]
    there = ids[rows, jnp.clip(top, 0, ids.shape[1] - 1)]
    return inside & (there == answers[:, None, :, None])


def retrieval_score(
    hits: Bool[Array, "S L B N"],
    top: Int[Array, "S L B N"],
    span: Int[Array, "B 2"],
    mode: str = "set",
) -> Float[Array, "L B N"]:
    """How much of the passage each head copied, prompt by prompt.

        set       |different places copied| / n, in [0, 1]      the paper's
        events    |hits| / n, above 1 if the answer repeats     its code's

    Args:
        hits: from `copy_hits`.
        top: the peaks they were made of.
        span: (s, e), n = e - s.
    """
    length = (span[:, 1] - span[:, 0])[None, :, None].astype(jnp.float32)
    if mode == "events":
        return hits.sum(0) / length
    if mode != "set":
        raise InputError(f"mode={mode!r}: expected 'set' or 'events'")
    # a hit counts unless an earlier step hit the same place
    S = hits.shape[0]
    earlier = jnp.tril(jnp.ones((S, S), bool), -1)[:, :, None, None, None]
    again = (earlier & hits[None] & (top[:, None] == top[None])).any(1)
    return (hits & ~again).sum(0) / length


def activation_frequency(
    hits: Bool[Array, "S L B N"], instances: Bool[Array, "B"] | None = None
) -> Float[Array, "L N"]:
    """Share of prompts in which a head copies at least one token.

    Args:
        instances: which prompts count, e.g. those answered rightly; None: all.
    """
    active = hits.any(0)
    on = jnp.ones(hits.shape[2], bool) if instances is None else instances
    count = jnp.maximum(on.sum(), 1)
    return (active & on[None, :, None]).sum(1) / count


def top_heads(score: Any, k: int) -> list[tuple[int, int]]:
    """The k heads of highest score [L, N], best first, as (layer, head)."""
    score = np.asarray(score)
    if score.ndim != 2 or not 0 <= k <= score.size:
        raise InputError(f"k={k} of a score of shape {list(score.shape)}: expected [L, N], k <= LN")
    order = np.argsort(-score, axis=None, kind="stable")[:k]
    return [(int(i) // score.shape[1], int(i) % score.shape[1]) for i in order]


def random_heads(
    key: Key[Array, ""],
    like: list[tuple[int, int]],
    heads: int,
    exclude: list[tuple[int, int]] = [],  # noqa: B006
) -> list[tuple[int, int]]:
    """A control: as many heads in each layer as `like` has, none of them excluded.

    Where a layer has too few others, the nearest layers lend theirs.

    Args:
        like: the heads to be compared with; never drawn.
        heads: N; layers up to the largest named are used.
        exclude: further heads not to draw.
    """
    taken = {*like, *exclude}
    layers = 1 + max(layer for layer, _ in taken)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    free = {l: [h for h in range(heads) if (l, h) not in taken] for l in range(layers)}
    if sum(map(len, free.values())) < len(like):
        raise InputError(f"random_heads: {len(like)} wanted, {sum(map(len, free.values()))} free")
    chosen = []
    for layer, _ in like:
        near = min((l for l in free if free[l]), key=lambda l: (abs(l - layer), l))
        chosen.append((near, free[near].pop(int(rng.integers(len(free[near]))))))
    return chosen


def head_mask(heads: list[tuple[int, int]], L: int, N: int) -> Bool[np.ndarray, "L N"]:
    """Heads as booleans [L, N], for `ablate_heads`: one program for any choice of heads.

    Raises:
        InputError: a head that is not there.
    """
    mask = np.zeros((L, N), bool)
    for layer, head in heads:
        if not (0 <= layer < L and 0 <= head < N):
            raise InputError(f"head ({layer}, {head}): there are {L} layers of {N} heads")
        mask[layer, head] = True
    return mask
