"""Packing: every token is a target exactly once, and nothing reaches into another document."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from causal_jax.data.packing import ConcatRows, FitRows, Stream, best_fit, pieces

BOS, EOS = 1, 2
LENGTHS = st.lists(st.integers(1, 23), min_size=1, max_size=12)


def stream_of(lengths):
    """Documents whose tokens are all different, so that every pair can be recognised."""
    documents, next_token = [], 10
    for n in lengths:
        documents.append(np.array([BOS, *range(next_token, next_token + n), EOS]))
        next_token += n
    starts = np.cumsum([0] + [len(d) for d in documents])
    return Stream(np.concatenate(documents).astype(np.uint16), starts), documents


def all_pairs(documents):
    return sorted((int(a), int(b)) for d in documents for a, b in pairwise(d))


def counted_pairs(rows):
    return sorted(
        (int(a), int(b))
        for row in rows
        for a, b, w in zip(row["tokens"], row["targets"], row["weights"], strict=True)
        if w
    )


def check_row(row, context):
    """Shapes, padding, and that a segment is one unbroken stretch of one document."""
    dtypes = {name: value.dtype.name for name, value in row.items()}
    ints = dict.fromkeys(("tokens", "targets", "segments", "positions"), "int32")
    assert dtypes == ints | {"weights": "float32"}
    assert {value.shape for value in row.values()} == {(context,)}
    padding = row["segments"] < 0
    assert not row["weights"][padding].any()
    assert not row["tokens"][padding].any()
    assert set(row["segments"][~padding]) == set(range(row["segments"].max() + 1))
    for segment in range(row["segments"].max() + 1):
        (places,) = np.nonzero(row["segments"] == segment)
        np.testing.assert_array_equal(places, places[0] + np.arange(len(places)))
        np.testing.assert_array_equal(row["positions"][places], np.arange(len(places)))
        # the next token is this target: one document, no gap
        np.testing.assert_array_equal(row["tokens"][places[1:]], row["targets"][places[:-1]])
        assert EOS not in row["targets"][places[:-1]]
        assert BOS not in row["targets"][places]


@given(lengths=LENGTHS, context=st.integers(1, 40), data=st.data())
def test_concat_counts_every_target_once_wherever_it_cuts(lengths, context, data):
    stream, documents = stream_of(lengths)
    rows = ConcatRows(stream, context)
    shift = data.draw(st.integers(0, context - 1))
    batch = rows.batch(range(len(rows)), [shift] * len(rows))
    made = [{k: v[i] for k, v in batch.items()} for i in range(len(rows))]
    for row in made:
        check_row(row, context)
    assert counted_pairs(made) == all_pairs(documents)


@given(lengths=LENGTHS, context=st.integers(1, 40))
def test_concat_pads_the_last_row_only(lengths, context):
    stream, documents = stream_of(lengths)
    rows = list(ConcatRows(stream, context))
    assert len(rows) == -(-stream.pairs // context)
    assert all(row["weights"].all() for row in rows[:-1])
    assert counted_pairs(rows) == all_pairs(documents)


@given(lengths=LENGTHS, context=st.integers(1, 40), data=st.data())
def test_a_stride_counts_every_target_once_with_more_before_it(lengths, context, data):
    stream, documents = stream_of(lengths)
    stride = data.draw(st.integers(1, context))
    rows = list(ConcatRows(stream, context, stride))
    for row in rows:
        check_row(row, context)
    assert counted_pairs(rows) == all_pairs(documents)
    for row in rows[1:]:  # a counted pair has context - stride pairs of its row before it
        assert not row["weights"][: context - stride].any()


@given(lengths=LENGTHS, context=st.integers(1, 40))
def test_fit_keeps_documents_whole_and_counts_every_target_once(lengths, context):
    stream, documents = stream_of(lengths)
    rows = list(FitRows(stream, context))
    for row in rows:
        check_row(row, context)
    assert counted_pairs(rows) == all_pairs(documents)
    for document in documents:
        if len(document) - 1 <= context:
            holding = [r for r in rows if np.isin(document[1:-1], r["targets"]).any()]
            assert len(holding) == 1


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), room=st.integers(30, 60))
def test_best_fit_fills_rows_without_overfilling(lengths, room):
    lengths = np.array(lengths)
    rows = best_fit(lengths, room)
    assert sorted(p for row in rows for p in row) == list(range(len(lengths)))
    sums = [int(lengths[row].sum()) for row in rows]
    assert max(sums) <= room
    fewest = -(-int(lengths.sum()) // room)  # a lower bound of the optimum
    halves = int((lengths > room // 2).sum())  # no two of these share a row
    assert len(rows) <= max(11 * max(fewest, halves) / 9 + 1, 2 * fewest)


def test_best_fit_takes_the_fullest_row_that_fits():
    assert best_fit(np.array([6, 5, 4, 5, 3, 2]), 10) == [[0, 2], [1, 3], [4, 5]]
    assert best_fit(np.array([8, 7, 3, 2]), 10) == [[0, 3], [1, 2]]


def test_a_long_document_is_cut_into_rows():
    stream, _ = stream_of([25])
    begins, lengths = pieces(stream.starts, 10)
    np.testing.assert_array_equal(begins, [0, 10, 20])
    np.testing.assert_array_equal(lengths, [10, 10, 6])


def test_what_a_row_looks_like():
    stream, _ = stream_of([2, 1])
    (row,) = ConcatRows(stream, 7)
    assert {k: v.tolist() for k, v in row.items()} == {
        "tokens": [BOS, 10, 11, BOS, 12, 0, 0],
        "targets": [10, 11, EOS, 12, EOS, 0, 0],
        "weights": [1, 1, 1, 1, 1, 0, 0],
        "segments": [0, 0, 0, 1, 1, -1, -1],
        "positions": [0, 1, 2, 0, 1, 0, 0],
    }


def test_a_ring_closed_inside_one_document_is_two_segments():
    stream, _ = stream_of([7])  # 8 pairs, two rows of 4
    batch = ConcatRows(stream, 4).batch([0, 1], [1, 1])
    assert batch["tokens"].tolist() == [[16, BOS, 10, 11], [12, 13, 14, 15]]
    assert batch["segments"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 0]]


def test_an_impossible_stride_is_refused():
    stream, _ = stream_of([3])
    for stride in (0, 9):
        with pytest.raises(ValueError, match=f"stride is {stride}; from 1 to the context 8"):
            ConcatRows(stream, 8, stride)
