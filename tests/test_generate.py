"""Sampling against a brute-force definition; generation against full forward passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_jax.attention import Dense
from causal_jax.data.tokenizers import Bytes
from causal_jax.errors import InputError
from causal_jax.generate import Completion, Sampling, complete, generate, sample_logits
from causal_jax.models.decoder import Decoder
from causal_jax.text_watch import Watch

GREEDY = Sampling(0.0)
BYTES = Bytes().train([])


def brute_distribution(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Probabilities token by token, from the words of the docstring."""
    p = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: (-logits[i], i))
    keep = order[:top_k] if top_k is not None else list(order)
    if top_p is not None:
        total, reached, kept = sum(p[i] for i in keep), 0.0, []
        for i in keep:
            if reached / total >= top_p:
                break
            kept.append(i)
            reached += p[i]
        keep = kept
    if min_p is not None:
        keep = [i for i in keep if p[i] >= min_p * p[order[0]]]
    out = np.zeros(len(p))
    out[keep] = p[keep]
    return out / out.sum()


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 100},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"top_p": 1.0},
    {"min_p": 0.3},
    {"min_p": 0.0},
    {"min_p": 1.0},
    {"top_k": 5, "top_p": 0.8},
    {"temperature": 2.0, "top_k": 6, "top_p": 0.9, "min_p": 0.25},
]


@pytest.mark.parametrize("kw", SETTINGS, ids=str)
def test_frequencies_are_those_of_the_definition(kw):
    logits = np.array([0.3, 2.0, -1.0, 1.1, 2.5, 0.0, -4.0, 1.9], np.float32)
    want = brute_distribution(logits, **kw)
    n = 40_000
    drawn = sample_logits(jnp.tile(jnp.asarray(logits)[None], (n, 1)), jax.random.key(0), **kw)
    got = np.bincount(np.asarray(drawn), minlength=len(logits)) / n
    assert set(np.flatnonzero(got)) <= set(np.flatnonzero(want))  # never a token outside
    np.testing.assert_allclose(got, want, atol=5 * np.sqrt(0.25 / n))


@given(
    st.lists(st.floats(-20, 20, width=16), min_size=8, max_size=8),
    st.sampled_from([None, 1, 3, 14]),
    st.none() | st.floats(0.05, 0.95),
    st.none() | st.floats(0.05, 0.95),
)
@settings(max_examples=20)
def test_support_is_that_of_the_definition(values, top_k, top_p, min_p):
    logits = np.array(values, np.float32)
    want = brute_distribution(logits, top_k=top_k, top_p=top_p, min_p=min_p)
    kw = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    keys = jax.random.split(jax.random.key(1), 64)
    drawn = jax.vmap(lambda key: sample_logits(jnp.asarray(logits), key, **kw))(keys)
    # At the very edge of a restriction float32 and float64 may differ: give the edge away.
    loose = brute_distribution(
        logits,
        top_k=top_k,
        top_p=top_p and min(1.0, top_p + 1e-5),
        min_p=min_p and min_p - 1e-5,
    )
    assert set(np.asarray(drawn).tolist()) <= set(np.flatnonzero(want + loose).tolist())


def test_equal_logits_keep_exactly_k():
    logits = jnp.zeros((2000, 6))
    drawn = np.asarray(sample_logits(logits, jax.random.key(0), top_k=2))
    assert set(drawn.tolist()) == {0, 1}


def test_zero_temperature_is_argmax_and_logits_may_be_bf16_or_masked():
    logits = jnp.array([[0.0, 3.0, 1.0], [5.0, -jnp.inf, 4.9]], jnp.bfloat16)
    np.testing.assert_array_equal(sample_logits(logits, jax.random.key(0), temperature=0.0), [1, 0])
    many = sample_logits(jnp.tile(logits[1:], (500, 1)), jax.random.key(0), top_p=0.999, min_p=0.01)
    assert set(np.asarray(many).tolist()) == {0, 2}


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"temperature": -1.0}, r"temperature -1.0: 0 .* or a positive"),
        ({"temperature": float("nan")}, r"temperature nan"),
        ({"top_k": 0}, r"top_k 0: 1 or more"),
        ({"top_p": 0.0}, r"top_p 0.0: above 0 and at most 1"),
        ({"top_p": 1.5}, r"top_p 1.5"),
        ({"min_p": -0.1}, r"min_p -0.1: from 0 to 1"),
    ],
)
def test_impossible_sampling(kw, message):
    with pytest.raises(InputError, match=message):
        sample_logits(jnp.zeros(4), jax.random.key(0), **kw)


SPECS = {
    "grouped": {"kv_heads": 2},
    "window": {"attention": (Dense(window=5), Dense())},
    "learned": {"rotary": None, "learned_positions": True, "norm": "layer", "activation": "gelu"},
    "sinks": {"attention": (Dense(window=4, sinks=2),), "scan": False},
}


def build(name):
    spec = Decoder(vocab=258, layers=2, width=16, heads=4, context=64, **SPECS[name])
    return spec.build(jax.random.key(1))


@pytest.fixture(scope="module")
def model():
    return build("grouped")


def prompts(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, n) for n in lengths]


@functools.partial(jax.jit, static_argnums=0)
def full_pass(graph, params, tokens):
    return nnx.merge(graph, params)(tokens[None])[0]


def slow_greedy(model, prompt, new):
    """The definition: one full forward pass per token (what stands behind is not attended to)."""
    graph, params = nnx.split(model)
    ids, at = np.zeros(model.spec.context, np.int32), len(prompt)
    ids[:at] = prompt
    for i in range(at, at + new):
        ids[i] = np.argmax(full_pass(graph, params, ids)[i - 1])
    return ids[at : at + new].tolist()


@pytest.mark.parametrize("name", SPECS)
def test_greedy_equals_repeated_full_passes(name):
    """Alone and in a batch whose shorter prompts are padded on the left."""
    model, rows = build(name), prompts(9, 1, 4)
    want = [slow_greedy(model, row, 21) for row in rows]
    (alone,) = generate(model, rows[:1], max_tokens=21, sampling=GREEDY)
    assert alone.tokens.tolist() == want[0]
    assert alone.finish == "length"
    batch = generate(model, rows, max_tokens=21, sampling=GREEDY)
    assert [made.tokens.tolist() for made in batch] == want


def test_a_row_does_not_depend_on_its_neighbours(model):
    kw = {"max_tokens": 20, "sampling": Sampling(1.0, top_k=50), "seed": 3}
    first, second, third = prompts(9, 1, 4)
    some = generate(model, [first, second, third], **kw)
    others = generate(model, [third, second, first], **kw)
    np.testing.assert_array_equal(some[1].tokens, others[1].tokens)
    assert some[0].tokens.tolist() != others[2].tokens.tolist()  # another place, another stream


def test_chunks_and_seeds(model):
    rows = prompts(3, 6)
    kw: dict = {"max_tokens": 19, "sampling": Sampling(1.0)}
    whole = generate(model, rows, seed=5, chunk=32, **kw)
    pieces = generate(model, rows, seed=5, chunk=4, **kw)
    other = generate(model, rows, seed=6, chunk=4, **kw)
    for a, b, c in zip(whole, pieces, other, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        assert a.tokens.tolist() != c.tokens.tolist()
    twins = generate(model, [rows[0], rows[0]], seed=5, chunk=4, **kw)
    assert twins[0].tokens.tolist() != twins[1].tokens.tolist()  # each row its own stream


def test_rows_end_by_token_wish_length_and_context(model):
    rows = prompts(5, 60)
    greedy = generate(model, rows, max_tokens=10, sampling=GREEDY)
    assert [len(g.tokens) for g in greedy] == [10, 4]  # a row ends where its context is full
    assert [g.finish for g in greedy] == ["length", "context"]
    first = greedy[0].tokens
    stop = int(first[6])
    at = first.tolist().index(stop)
    ended = generate(model, rows[:1], max_tokens=10, sampling=GREEDY, stop_tokens=[stop])[0]
    assert ended.tokens.tolist() == first[:at].tolist()
    assert ended.finish == "stop"
    seen = []

    def after_two(new):
        seen.append(new)
        return np.array([len(seen) == 2, False])

    kw: dict = {"max_tokens": 12, "sampling": GREEDY, "chunk": 3, "on_tokens": after_two}
    got = generate(model, [rows[0], rows[0]], **kw)
    assert [len(g.tokens) for g in got] == [6, 12]
    assert [g.finish for g in got] == ["stop", "length"]
    np.testing.assert_array_equal(seen[2][0], [-1, -1, -1])
    assert all(s.shape == (2, 3) for s in seen)


@pytest.mark.parametrize(
    ("rows", "kw", "message"),
    [
        ([[]], {}, r"prompt 0 has shape \(0,\): .*at least one id"),
        ([[1], [1, 258]], {}, r"prompt 1 has ids 1 to 258: the model knows 0 to 257"),
        ([[-1]], {}, r"prompt 0 has ids -1"),
        ([[1] * 64], {}, r"prompt 0 has 64 tokens: the model's context is 64.*shorten it to 63"),
        ([[1]], {"max_tokens": 0}, r"max_tokens 0: at least 1"),
    ],
)
def test_prompts_that_cannot_be(model, rows, kw, message):
    with pytest.raises(InputError, match=message):
        generate(model, [np.array(r, np.int64) for r in rows], **kw)
    assert generate(model, []) == []


@given(st.text("abĉ ", max_size=30), st.lists(st.text("abĉ", min_size=1, max_size=3), max_size=3))
def test_watching_text_grow(text, stop):
    """What is shown is the text before the first stop string, in pieces, never taken back."""
    watch, shown = Watch(BYTES, tuple(stop)), ""
    for token in BYTES.encode(text):
        piece = watch.push(np.array([token]))
        shown += piece
        assert text.startswith(shown)
    shown += watch.flush()
    cuts = [text.find(s) for s in stop if s in text]
    # Of several stop strings the one that is complete first counts.
    if cuts:
        ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
        first = min(end for end, _ in ends)
        want = text[: min(text[:first].find(s) for s in stop if s in text[:first])]
        assert watch.stopped
    else:
        want = text
    assert shown == watch.text == want


def test_texts_are_streamed_and_stopped(model):
    texts = ["Hello", "The for", "x"]
    kw = {"max_tokens": 24, "sampling": Sampling(1.0), "chunk": 5, "seed": 2}
    pieces = {}
    plain = complete(
        model, BYTES, texts, on_text=lambda r, t: pieces.setdefault(r, []).append(t), **kw
    )
    for row, made in enumerate(plain):
        assert isinstance(made, Completion)
        assert "".join(pieces.get(row, [])) == made.text == BYTES.decode(made.tokens.tolist())
    # A stop string taken from the middle of what row 0 says ends row 0 there, and no other row.
    stop = plain[0].text[8:11]
    at = plain[0].text.find(stop)
    cut = complete(model, BYTES, texts, stop=[stop], **kw)
    assert cut[0].text == plain[0].text[:at]
    assert cut[0].finish == "stop"
    assert BYTES.decode(cut[0].tokens.tolist()).endswith(stop)
    for a, b in zip(cut[1:], plain[1:], strict=True):
        assert a.text == (b.text if stop not in b.text else b.text[: b.text.find(stop)])
    with pytest.raises(InputError, match="stop ''"):
        complete(model, BYTES, texts, stop=[""], **kw)
