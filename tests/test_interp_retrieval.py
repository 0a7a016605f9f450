"""Retrieval heads: the score on planted rows and a planted head, decoding, masking, needles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_decoder as tiny
from flax import nnx

from causal_jax.data.tokenizers import Bytes
from causal_jax.errors import InputError
from causal_jax.interp import ablate_heads, prefix, retrieval
from causal_jax.interp.needles import (
    FACTS,
    find_span,
    insert_needle,
    needle_prompt,
    prose,
    recall,
)
from causal_jax.taps import run, site

IDS = np.array([[3, 7, 8, 9, 5, 7, 8, 1]], np.int32)  # the passage 7 8 9 at 1..4; 7 8 again at 5..7
SPAN = np.array([[1, 4]], np.int32)


def scored(top, words, mode="set"):
    """Score of one head whose peaks are `top` while it writes `words`."""
    top = jnp.asarray(top, jnp.int32)[:, None, None, None]
    words = jnp.asarray(words, jnp.int32)[:, None]
    hits = retrieval.copy_hits(top, words, jnp.asarray(IDS), jnp.asarray(SPAN))
    return float(retrieval.retrieval_score(hits, top, jnp.asarray(SPAN), mode)[0, 0, 0])


def test_the_score_is_the_share_of_the_passage_that_was_copied():
    assert scored([1, 2, 3], [7, 8, 9]) == pytest.approx(1)
    assert scored([3, 1, 2], [9, 7, 8]) == pytest.approx(1)  # in any order
    assert scored([1, 2, 0], [7, 8, 9]) == pytest.approx(2 / 3)  # looks elsewhere once
    assert scored([5, 6, 3], [7, 8, 9]) == pytest.approx(1 / 3)  # equal tokens outside the passage
    assert scored([2, 3, 4], [7, 8, 9]) == 0  # the row after the one that counts: off by one
    assert scored([1, 2, 3], [-1, -1, -1]) == 0  # the answer had ended


def test_repeating_counts_in_the_events_form_only():
    twice = [1, 2, 3, 1, 2, 3], [7, 8, 9, 7, 8, 9]
    assert scored(*twice) == pytest.approx(1)
    assert scored(*twice, mode="events") == pytest.approx(2)
    with pytest.raises(InputError, match="mode='sets'"):
        scored(*twice, mode="sets")


def test_frequency_counts_prompts_with_a_copy():
    hits = jnp.zeros((3, 1, 4, 2), bool).at[1, 0, 0, 0].set(True).at[2, 0, 0, 0].set(True)
    assert retrieval.activation_frequency(hits).tolist() == [[0.25, 0.0]]
    right = jnp.array([True, True, False, False])
    assert retrieval.activation_frequency(hits, right).tolist() == [[0.5, 0.0]]


GRAPH, PARAMS = nnx.split(tiny.model())
L, N, S = tiny.L, tiny.N, 4


@functools.partial(jax.jit, static_argnames=("steps", "how"))
def _answer(tokens, start, heads=None, *, steps=S, how="uniform"):
    model = nnx.merge(GRAPH, PARAMS)
    reading = retrieval.read(model, tokens, start, room=steps)
    edits = () if heads is None else ablate_heads(heads, how)
    return retrieval.answer(model, reading, steps=steps, edits=edits)


def test_what_is_seen_while_decoding_is_what_one_full_pass_shows():
    tokens = tiny.ids()
    said = _answer(tokens, None)
    whole = jnp.concatenate([tokens, said.tokens.T], 1)
    logits, acts = tiny.go(whole[:, :-1])
    T = tokens.shape[1]
    rows = acts["attn.pattern"][..., T - 1 :, :].argmax(-1)  # [L, B, N, S]
    np.testing.assert_array_equal(said.seen.transpose(1, 2, 3, 0), rows)
    np.testing.assert_array_equal(said.tokens.T, logits[:, T - 1 :].argmax(-1))


def test_padding_in_front_moves_peaks_and_changes_nothing():
    tokens = tiny.ids()
    padded = jnp.pad(tokens, ((0, 0), (3, 0)))
    plain, moved = _answer(tokens, None), _answer(padded, jnp.array([3, 3]))
    np.testing.assert_array_equal(plain.tokens, moved.tokens)
    np.testing.assert_array_equal(plain.seen + 3, moved.seen)


def test_a_stop_token_ends_its_row():
    tokens = tiny.ids()
    first = int(_answer(tokens, None).tokens[0, 0])
    model = tiny.model()
    reading = retrieval.read(model, tokens, room=S)
    said = jax.jit(lambda r: retrieval.answer(model, r, steps=S, stop_tokens=(first,)))(reading)
    assert (np.asarray(said.tokens)[:, 0] == -1).all()


def test_masking_nobody_changes_nothing_and_masking_acts_on_decoding_only():
    tokens = tiny.ids()
    nobody, everybody = np.zeros((L, N), bool), np.ones((L, N), bool)
    plain, none = _answer(tokens, None), _answer(tokens, None, nobody)
    np.testing.assert_array_equal(plain.tokens, none.tokens)
    np.testing.assert_array_equal(plain.seen, none.seen)
    uniform = _answer(tokens, None, everybody)
    assert (np.asarray(uniform.seen) == 0).all()  # all weights equal: the first key wins


def test_planted_retrieval_head_scores_one_and_no_other_does():
    """A head made to look at the passage's token that comes next, whatever the net says."""
    tokens = jnp.asarray(np.random.default_rng(3).permutation(31)[None, :12], jnp.int32)
    s, e = 4, 8
    model = tiny.model()
    reading = retrieval.read(model, tokens, room=S)

    def planted(pattern, step):
        row = jax.nn.one_hot(s + step, pattern.shape[-1])
        return pattern.at[:, 2].set(row[None, None])

    @jax.jit
    def forced(reading):
        """Teacher-forced decoding of the passage, the planted head in layer 1."""
        cache, token, seen = reading.cache, reading.last, []
        for step in range(e - s):
            edit = site("attn.pattern", layer=1).apply(planted, step)
            see = {"attn.pattern": lambda p: retrieval.peaks(p[:, :, -1])}
            (_, cache), acts = run(model.extend, token, cache, edits=edit, capture=see)
            seen.append(acts["attn.pattern"])
            token = tokens[:, s + step][:, None]
        return jnp.stack(seen)

    top = forced(reading)
    words = tokens[0, s:e][:, None]
    span = jnp.array([[s, e]])
    hits = retrieval.copy_hits(top, words, tokens, span)
    score = retrieval.retrieval_score(hits, top, span)[:, 0]
    assert float(score[1, 2]) == 1
    assert retrieval.top_heads(score, 1) == [(1, 2)]
    assert float(score.sum()) < 0.75 * score.size  # most others do not


def test_cached_decoding_after_an_opened_prompt_is_one_pass_with_the_prefix_mask():
    tokens, model = tiny.ids(), tiny.model()
    T = tokens.shape[1]

    @jax.jit
    def both(tokens):
        reading = retrieval.read(model, tokens, room=S, edits=prefix(range(T - 1)))
        said = retrieval.answer(model, reading, steps=S)
        whole = jnp.concatenate([tokens, said.tokens.T], 1)[:, :-1]
        logits, _ = run(model, whole, edits=prefix(range(T - 1)))
        return said.tokens.T, logits[:, T - 1 :].argmax(-1)

    cached, full = both(tokens)
    np.testing.assert_array_equal(cached, full)


def test_rankings_masks_and_controls():
    score = np.array([[0.1, 0.9, 0.0], [0.5, 0.0, 0.9]])
    assert retrieval.top_heads(score, 3) == [(0, 1), (1, 2), (1, 0)]
    assert retrieval.head_mask([(0, 1), (1, 2)], 2, 3).tolist() == [[0, 1, 0], [0, 0, 1]]
    with pytest.raises(InputError, match=r"head \(2, 0\)"):
        retrieval.head_mask([(2, 0)], 2, 3)
    with pytest.raises(InputError, match="k=7"):
        retrieval.top_heads(score, 7)
    best, strong = [(0, 1), (3, 2), (3, 3)], [(3, 0)]
    for seed in range(20):
        drawn = retrieval.random_heads(jax.random.key(seed), best, 8, strong)
        assert sorted(layer for layer, _ in drawn) == [0, 3, 3]
        assert len({*drawn}) == 3
        assert not {*drawn} & {*best, *strong}
    with pytest.raises(InputError, match="5 wanted"):
        retrieval.random_heads(jax.random.key(0), [(0, i) for i in range(5)], 8)


def test_needles_stand_behind_a_sentence_and_are_found_exactly():
    hay = np.array([1, 2, 9, 3, 4, 9, 5], np.int32)
    needle = np.array([7, 7], np.int32)
    assert insert_needle(hay, needle, 0.6, [9]).tolist() == [1, 2, 9, 7, 7, 3, 4, 9, 5]
    assert insert_needle(hay, needle, 0.0, [9]).tolist()[:2] == [7, 7]
    assert insert_needle(hay, needle, 1.0, [9]).tolist()[-2:] == [7, 7]
    assert find_span(np.array([7, 1, 7, 2]), np.array([7, 2])) == (2, 4)
    with pytest.raises(InputError, match="does not occur"):
        find_span(hay, needle)
    with pytest.raises(InputError, match="depth=2"):
        insert_needle(hay, needle, 2.0)


def test_prompts_hold_the_fact_once_and_say_where():
    tokenizer = Bytes().train(())
    book = prose(["One sentence. Another one here.", "A third. And a fourth."] * 20, tokenizer, 600)
    for fact in FACTS:
        for lead in (False, True):
            prompt = needle_prompt(tokenizer, book, fact, length=500, depth=0.5, lead=lead)
            s, e = prompt.span
            assert tokenizer.decode(prompt.ids[s:e].tolist()) == f" {fact.key}"
            assert abs(len(prompt.ids) - 500) <= 1
            text = tokenizer.decode(prompt.ids.tolist())
            assert text.endswith(f"Answer: {fact.opening}" if lead else "Answer:")
        shared = {*fact.key.lower().split()} & {*fact.question.lower().rstrip("?").split()}
        assert shared <= {"a", "the"}
    with pytest.raises(InputError, match="length=10"):
        needle_prompt(tokenizer, book, FACTS[0], length=10, depth=0.5)
    with pytest.raises(InputError, match="are needed"):
        prose(["short"], tokenizer, 100)


def test_recall_counts_words():
    assert recall("Smoked trout, with olives", "smoked trout with seven olives") == pytest.approx(
        0.8
    )
    assert recall("", "a b") == 0
    assert recall("a a a", "a a b") == pytest.approx(2 / 3)
