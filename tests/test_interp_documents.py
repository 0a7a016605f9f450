"""Attention between groups, document prompts, permutations, chains and the net that reads them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from causal_jax.data.tasks.multihop import (
    ORDERS,
    chain,
    contains,
    exact_match,
    permute,
    tell,
)
from causal_jax.data.tokenizers import Bytes
from causal_jax.errors import InputError
from causal_jax.interp import grouped
from causal_jax.interp.documents import document_prompt
from causal_jax.models.pair_reader import pair_reader, read_pairs
from causal_jax.taps import run, site


def _pattern(L=2, B=3, N=2, T=5):
    rows = np.random.default_rng(0).random((L, B, N, T, T)).astype(np.float32)
    return jnp.asarray(rows / rows.sum(-1, keepdims=True))


def test_grouped_rows_sum_to_one_and_single_tokens_give_the_pattern():
    pattern = _pattern()
    G = grouped.group_matrix([(0, 2), (2, 3), (3, 5)], 5)
    found = grouped.grouped_attention(pattern, G, G)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)
    by_hand = pattern[:, :, :, 3:5, 0:2].sum(-1).mean(-1)
    np.testing.assert_allclose(found[..., 2, 0], by_hand, atol=1e-6)
    one = np.eye(5, dtype=np.float32)
    np.testing.assert_allclose(grouped.grouped_attention(pattern, one, one), pattern, atol=1e-6)
    each = np.stack([G, G[::-1], G])  # groups of their own in every row
    np.testing.assert_allclose(
        grouped.grouped_attention(pattern, each, each)[:, 1], found[:, 1, :, ::-1, ::-1], atol=1e-6
    )


def test_contribution_and_peak_of_a_planted_pattern():
    L, B, N = 2, 1, 2
    # two answer tokens; document 1 gets 0.25 in layer 0 and 0.75 in layer 1, document 0 0.1
    pattern = np.zeros((L, B, N, 3, 4), np.float32)
    pattern[0, :, :, 1:, 2], pattern[1, :, :, 1:, 3] = 0.25, 0.75
    pattern[..., 1:, 0] = 0.1
    pattern[..., 0, 1] = 9  # not an answer token
    keys = grouped.group_matrix([(0, 2), (2, 4)], 4)
    ga = grouped.grouped_attention(jnp.asarray(pattern), np.eye(3, dtype=np.float32), keys)
    ic = grouped.information_contribution(ga, jnp.array([[False, True, True]]))
    np.testing.assert_allclose(ic[:, 0], [[0.1, 0.25], [0.1, 0.75]], atol=1e-6)
    np.testing.assert_allclose(grouped.peak(ic), [1.0], atol=1e-6)
    with pytest.raises(InputError, match=r"span \(3, 9\)"):
        grouped.group_matrix([(3, 9)], 4)


def test_area_under_curve():
    assert grouped.area_under_curve(np.array([1.0, 2, 3, 4]), np.array([0, 0, 1, 1]) > 0) == 1
    assert grouped.area_under_curve(np.array([1.0, 1, 1]), np.array([0, 1, 1]) > 0) == 0.5
    assert np.isnan(grouped.area_under_curve(np.array([1.0]), np.array([True])))


def test_orders_keep_the_documents_and_their_places():
    n, gold = 8, (5, 1, 6)
    noise = [0, 2, 3, 4, 7]
    assert permute(n, gold, "original") == list(range(n))
    assert permute(n, gold, "forward") == [0, 5, 2, 3, 4, 1, 6, 7]
    assert permute(n, gold, "backward") == [0, 6, 2, 3, 4, 1, 5, 7]
    for i in range(3):
        new = permute(n, gold, "distance", i)
        assert sorted(new) == list(range(n))
        assert new[-1] == gold[-1]
        assert np.diff([new.index(g) for g in gold]).tolist() == [i + 1] * 2
        assert [d for d in new if d not in gold] == noise
    assert permute(n, gold, "remove_first") == [0, 1, 2, 3, 4, 6, 7]
    assert permute(n, gold, "gold_only") == [5, 1, 6]
    with pytest.raises(InputError, match="distance=3"):
        permute(n, gold, "distance", 3)
    with pytest.raises(InputError, match="order='sorted'"):
        permute(n, gold, "sorted")
    with pytest.raises(InputError, match="gold"):
        permute(3, (1, 1), "forward")
    assert len(ORDERS) == 6


def test_told_chains_lead_to_the_answer_and_nowhere_else():
    for index in range(20):
        q = tell(0, index, hops=3, documents=8)
        assert len({*q.documents}) == len(q.documents) == 8
        a, b, c = (q.documents[g] for g in q.gold)
        assert a[1] == f"{a[0]}'s teacher is {b[0]}."
        assert b[1] == f"{b[0]}'s teacher is {c[0]}."
        assert c[1] == f"{c[0]} lives in {q.answer}."
        assert q.text == f"Where does the teacher of the teacher of {a[0]} live?"
        assert sum(q.answer in text for _, text in q.documents) == 1
        assert q.ordered(range(8)) == q.documents
    assert tell(0, 3) == tell(0, 3) != tell(1, 3)
    with pytest.raises(InputError, match="documents=40"):
        tell(0, 0, documents=40)


def test_prompts_number_documents_as_they_stand_and_know_their_places():
    tokenizer, q = Bytes().train(()), tell(0, 0, documents=4)
    order = permute(4, q.gold, "backward")
    prompt = document_prompt(tokenizer, q.ordered(order), q.text, opening=q.opening)
    for i, ((s, e), (title, text)) in enumerate(zip(prompt.spans, q.ordered(order)), 1):
        spelled = tokenizer.decode(prompt.ids[s:e].tolist())
        assert spelled == f"Document [{i}](Title: {title}) {text}"
    assert tokenizer.decode(prompt.ids.tolist()).endswith(f"Answer: {q.opening}")


def test_answers_by_containment_and_exactly():
    assert contains(" Paris, in France.", "Paris")
    assert not exact_match(" Paris, in France.", "Paris")
    assert exact_match(" paris.", "Paris")
    assert not contains("Rome", "Paris")


@pytest.mark.parametrize("order", ["random", "forward", "backward"])
def test_chains_of_pairs_lead_to_the_answer(order):
    pairs, asked, answer = jax.jit(lambda k: chain(k, 64, order=order))(jax.random.key(0))
    for documents, (at, h), end in zip(*map(np.asarray, (pairs, asked, answer))):
        steps = dict(documents.tolist())
        assert len(steps) == 6  # no entity leads two ways
        path, at = [], int(at)
        for _ in range(4):
            path.append([row[0] for row in documents.tolist()].index(at))
            at = steps[at]
            if len(path) == h:
                assert at == end
        if order != "random":
            assert path == sorted(path, reverse=order == "backward")
    assert {*np.asarray(asked[:, 1]).tolist()} == {1, 2, 3, 4}


def test_documents_see_later_ones_under_the_prefix_mask_only():
    spec = pair_reader(24, 4, 6, layers=2, width=16, heads=2)
    graph, params = nnx.split(spec.build(jax.random.key(0)))
    pairs, asked, _ = chain(jax.random.key(1), 3)

    @jax.jit
    def gradient(prefix):
        """d(residual stream of document 1) / d(embedding of each document)."""

        def state(nudge):
            _, acts = run(
                lambda tap: read_pairs(nnx.merge(graph, params), pairs, asked, prefix, 24, tap=tap),
                edits=site("embed").add(nudge),
                capture=["resid_post"],
            )
            return jnp.square(acts["resid_post"][-1, :, 1]).sum()

        return jnp.abs(jax.grad(state)(jnp.zeros((3, 7, 16)))).sum((0, 2))

    causal, opened = gradient(0), gradient(6)
    assert (np.asarray(causal[:2]) > 0).all()
    assert (np.asarray(causal[2:]) == 0).all()
    assert (np.asarray(opened[:6]) > 0).all()
    assert float(opened[6]) == 0  # nobody sees the question
