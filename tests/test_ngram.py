"""Witten-Bell against a dictionary written from the formula, and on the real corpus."""

import math
import time
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from causal_jax.data.ngram import WittenBell
from causal_jax.errors import InputError

START = -1


class Brute:
    """The definition, one byte at a time."""

    def __init__(self, order, documents):
        self.order = order
        self.follow = defaultdict(lambda: defaultdict(int))
        for document in documents:
            for i, c in enumerate(document):
                for n in range(1, order + 1):
                    self.follow[self.context(document, i, n)][c] += 1

    def context(self, document, i, n):
        padded = [START] * (self.order - 1) + list(document[:i])
        return tuple(padded[len(padded) - (n - 1) :])

    def p(self, c, document, i, n):
        if n == 0:
            return 1 / 256
        lower = self.p(c, document, i, n - 1)
        follow = self.follow.get(self.context(document, i, n))
        if follow is None:
            return lower
        total, types = sum(follow.values()), len(follow)
        return (follow.get(c, 0) + types * lower) / (total + types)


documents = st.lists(
    st.text("ab\0\xff", max_size=12).map(lambda s: s.encode("latin-1")), max_size=5
)


@given(documents.filter(any), documents.filter(any), st.integers(1, 6))
def test_matches_the_definition(train, held, order):
    model, brute = WittenBell(order).fit(train), Brute(order, train)
    want = [
        [brute.p(c, d, i, n) for d in held for i, c in enumerate(d)] for n in range(1, order + 1)
    ]
    np.testing.assert_allclose(model.probabilities(held), want, rtol=1e-12)
    bits = [-sum(map(math.log2, row)) / len(row) for row in want]
    np.testing.assert_allclose(model.bits_per_byte(held), bits, rtol=1e-12)


@given(documents.filter(any), st.binary(max_size=8))
def test_next_byte_sums_to_one(train, context):
    p = WittenBell(5).fit(train).next_byte(context)
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-12)
    assert (p > 0).all()


def test_next_byte_is_what_the_stream_was_given():
    model = WittenBell(4).fit([b"abracadabra", b"abba"])
    text = b"abrac!"
    given_ = model.probabilities(text)
    for i, c in enumerate(text):
        np.testing.assert_allclose(model.next_byte(text[:i])[:, c], given_[:, i], rtol=1e-12)


def test_contexts_do_not_cross_documents():
    apart, joined = WittenBell(3).fit([b"xa", b"xb"]), WittenBell(3).fit(b"xaxb")
    p = apart.probabilities([b"xa", b"xb"])
    assert p[2, 0] == p[2, 2]  # both x open a document
    after = apart.next_byte(b"xa")
    np.testing.assert_array_equal(after[2], after[0])  # nothing ever followed: the unigram answers
    assert joined.next_byte(b"xa")[2, ord("x")] > 0.5


def test_the_embedded_corpus():
    from pydoc_data.topics import topics

    text = "\n".join(topics.values()).encode()
    cut = len(text) * 9 // 10
    start = time.perf_counter()
    bits = WittenBell(5).fit(text[:cut]).bits_per_byte(text[cut:])
    assert time.perf_counter() - start < 10
    # The interpreter's documentation changes a little with its version.
    np.testing.assert_allclose(bits, (4.68, 3.34, 2.47, 2.06, 1.90), atol=0.12)
    assert list(bits) == sorted(bits, reverse=True)


@pytest.mark.parametrize("order", [0, 8, -1])
def test_impossible_order(order):
    with pytest.raises(InputError, match=f"order {order}.*between 1 and 7"):
        WittenBell(order)


def test_nothing_to_count_or_measure():
    for empty in (b"", [], [b"", b""]):
        with pytest.raises(InputError, match="no bytes"):
            WittenBell(2).fit(empty)
        with pytest.raises(InputError, match="no bytes"):
            WittenBell(2).fit(b"a").bits_per_byte(empty)
