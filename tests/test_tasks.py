"""Synthetic tasks: the prompt decides the answer, and (seed, index) decides everything."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from causal_jax.data.tasks import Task, parse_tasks, tasks
from causal_jax.data.tasks.copying import Copying
from causal_jax.data.tasks.needle import Needle
from causal_jax.data.tasks.recall import Recall
from causal_jax.data.tokenizers import BPE
from causal_jax.errors import InputError

recalls = st.integers(1, 8).flatmap(
    lambda pairs: st.builds(
        Recall,
        length=st.integers(4 * pairs - 1, 80),
        pairs=st.just(pairs),
        keys=st.integers(pairs, 20),
        values=st.integers(pairs, 20),
        power=st.sampled_from([0.01, 0.5, 1.0]),
        noise=st.booleans(),
    )
)
copyings = st.integers(1, 12).flatmap(
    lambda data: st.builds(
        Copying,
        length=st.integers(2 * data, 60),
        data=st.just(data),
        symbols=st.integers(1, 20),
        selective=st.booleans(),
    )
)
needles = st.builds(
    Needle,
    length=st.integers(99, 700),
    depth=st.none() | st.floats(0, 1),
    digits=st.integers(1, 15),
)
anything = recalls | copyings | needles
indices = st.lists(st.integers(0, 10_000), min_size=1, max_size=5)


def answer_recall(task, tokens, asked):
    """Reads the pairs in front, knows nothing else."""
    bound = dict(zip(tokens[0 : 2 * task.pairs : 2], tokens[1 : 2 * task.pairs : 2], strict=True))
    return [bound[tokens[i]] for i in asked]


def answer_copying(task, tokens, asked):
    data = [t for t in tokens[: list(tokens).index(1)] if t != 0]
    return [data[n] for n, _ in enumerate(asked)]


def answer_needle(task, tokens, asked):
    prompt = bytes(int(t) for t in tokens[1 : asked[0] + 1]).decode()
    (key,) = re.findall(r"The pass key is (\d+)\. ", prompt)
    return list(f" {key}".encode())


QUESTION = "What is the pass key? The pass key is"
ORACLES = {Recall: answer_recall, Copying: answer_copying, Needle: answer_needle}


@given(anything, st.integers(0, 2**40), indices)
def test_an_oracle_that_reads_the_prompt_is_always_right(task, seed, indices):
    batch = task.batch(seed, indices)
    for tokens, targets, weights in zip(
        batch["tokens"], batch["targets"], batch["weights"], strict=True
    ):
        asked = np.flatnonzero(weights)
        assert len(asked) > 0
        # What follows a question is the answer: hide it, or the oracle could read it off.
        hidden = tokens.copy()
        hidden[asked[asked + 1 < len(tokens)] + 1] = 0
        np.testing.assert_array_equal(ORACLES[type(task)](task, hidden, asked), targets[asked])


@given(anything, st.integers(0, 2**40), indices)
def test_rows_are_well_formed(task, seed, indices):
    batch = task.batch(seed, indices)
    shape = (len(indices), task.length)
    for name in ("tokens", "targets", "segments", "positions"):
        assert batch[name].dtype == np.int32
        assert batch[name].shape == shape, name
    assert batch["weights"].dtype == np.float32
    assert batch["weights"].shape == shape
    assert set(np.unique(batch["weights"])) <= {0, 1}
    for name in ("tokens", "targets"):
        assert batch[name].min() >= 0
        assert batch[name].max() < task.vocab
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    np.testing.assert_array_equal(
        batch["positions"], np.tile(np.arange(task.length), (shape[0], 1))
    )


@given(anything, st.integers(0, 2**40), indices, st.randoms(use_true_random=False))
def test_a_row_depends_on_seed_and_index_alone(task, seed, indices, random):
    batch = task.batch(seed, indices)
    order = list(range(len(indices)))
    random.shuffle(order)
    shuffled = task.batch(seed, [indices[i] for i in order])
    twin = type(task)(**dataclasses.asdict(task))
    for name in batch:
        np.testing.assert_array_equal(shuffled[name], batch[name][order])
        np.testing.assert_array_equal(twin.sample(seed, indices[0])[name], batch[name][0])


@pytest.mark.parametrize(
    "task",
    [Recall(), Recall(noise=True), Copying(), Copying(selective=True), Needle(digits=12)],
    ids=str,
)
def test_seeds_and_indices_are_separate_streams(task):
    rows = [task.batch(seed, range(200))["tokens"] for seed in range(5)]
    rows = np.concatenate(rows)
    assert len(np.unique(rows, axis=0)) == len(rows)  # no row twice: not of this seed nor another


PINNED = {
    "recall": [2, 7, 4, 8, 2, 7, 0, 0, 4, 8, 0],
    "copying": [3, 0, 7, 17, 0, 10, 1, 3, 7, 17],
    "needle": (
        "ay. The door is open. The pass key is 85240. Remember it. The river is wide. "
        "What is the pass key? The pass key is",
        " 85240",
    ),
}


def test_the_stream_never_changes():
    """Old results stay comparable: these rows were written down when the tasks were made."""
    got = Recall(length=11, pairs=2, keys=4, values=4).sample(7, 3)["tokens"]
    assert got.tolist() == PINNED["recall"]
    got = Copying(length=10, data=4, selective=True).sample(7, 5)["tokens"]
    assert got.tolist() == PINNED["copying"]
    assert Needle(length=120, depth=0.5).text(7, 3) == PINNED["needle"]


def test_answers_cannot_be_guessed():
    """Neither keys nor data nor depth favour a value: each fills its range evenly."""
    for batch, ids in (
        (Recall().batch(0, range(4000)), range(33, 65)),
        (Copying().batch(0, range(2000)), range(2, 18)),
        (Copying(selective=True).batch(0, range(2000)), range(2, 18)),
    ):
        answers = batch["targets"][batch["weights"] > 0]
        counts = np.array([np.sum(answers == i) for i in ids])
        expected = answers.size / len(counts)
        assert counts.sum() == answers.size
        assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()
    keys = [answer for _, answer in Needle(length=79, digits=1).texts(0, range(2000))]
    counts = np.unique(keys, return_counts=True)[1]
    assert len(counts) == 10
    assert counts.min() > 130


def test_most_questions_come_soon_and_power_one_is_even():
    def distances(power):
        batch = Recall(length=256, pairs=4, power=power).batch(0, range(500))
        return np.nonzero(batch["weights"])[1] - 8

    soon, even = distances(0.01), distances(1.0)
    assert np.median(soon) < 40
    assert abs(np.median(even) - 124) < 12


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_the_needle_lies_at_its_depth(depth):
    for prompt, _ in Needle(length=2000, depth=depth).texts(0, range(20)):
        before = prompt.index("The pass key is")
        filler = 2000 - len("The pass key is 12345. Remember it. " + QUESTION + " 12345")
        assert abs(before / filler - depth) < 0.02


@pytest.mark.parametrize("length", [79, 80, 90, 128, 1000])
def test_prompt_and_answer_have_the_asked_length(length):
    for prompt, answer in Needle(length=length).texts(1, range(20)):
        assert len((prompt + answer).encode()) == length
        assert prompt.count(answer) == 1


def test_needle_rows_of_another_tokenizer():
    task = Needle(length=300)
    pairs = BPE(vocab=320).train([task.text(1, i)[0] for i in range(20)])
    batch = task.batch(0, range(6), pairs)
    assert batch["tokens"].shape[1] < 200  # pieces of several bytes
    lengths = set()
    for index in range(6):
        real = batch["segments"][index] >= 0
        prompt, answer = task.text(0, index)
        tokens, targets = (batch[name][index][real].tolist() for name in ("tokens", "targets"))
        whole = [*tokens, targets[-1]]
        assert whole[0] == pairs.bos
        assert pairs.decode(whole) == prompt + answer
        asked = batch["weights"][index] > 0
        assert pairs.decode(batch["targets"][index][asked].tolist()) == answer
        assert not (asked & ~real).any()
        lengths.add(real.sum())
    assert len(lengths) > 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recall(length=30, pairs=8), r"task recall: length 30: 8 pairs need 31"),
        (lambda: Recall(pairs=40), r"task recall: pairs 40: there are only 32 keys"),
        (lambda: Recall(pairs=16, values=8), r"pairs 16: there are only 8 values"),
        (lambda: Recall(pairs=0), r"pairs 0: at least one"),
        (lambda: Recall(power=0.0), r"power 0.0: .*positive"),
        (lambda: Copying(length=31, data=16), r"task copying: length 31: .* 32 or more"),
        (lambda: Copying(data=0), r"data 0"),
        (lambda: Copying(symbols=0), r"symbols 0"),
        (lambda: Needle(length=20), r"task needle: length 20: .* take \d+ bytes"),
        (lambda: Needle(depth=1.5), r"depth 1.5: a fraction from 0 to 1"),
        (lambda: Needle(digits=0), r"digits 0: .*1 to 15"),
        (lambda: Copying().batch(-1, [0]), r"seed -1: .*0 or more"),
        (lambda: Copying().batch(0, [-1]), r"index -1"),
        (lambda: parse_tasks("recal"), r"unknown task 'recal'; did you mean 'recall'"),
        (lambda: parse_tasks("recall:pears=8"), r"'pears=8' is not FIELD=VALUE.*pairs"),
        (lambda: parse_tasks("recall:pairs"), r"'pairs' is not FIELD=VALUE"),
        (lambda: parse_tasks("recall:pairs=many"), r"pairs='many' is not int"),
        (lambda: parse_tasks("recall:noise=2"), r"noise='2' is not bool"),
        (lambda: parse_tasks("needle:depth=deep"), r"depth='deep' is not float or NoneType"),
    ],
)
def test_impossible_sizes_and_wrong_words(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_the_smallest_and_emptiest():
    assert Recall(length=3, pairs=1, keys=1, values=1).sample(0, 0)["targets"].tolist() == [2, 1, 2]
    assert Copying(length=2, data=1, symbols=1).sample(0, 0)["targets"].tolist() == [1, 2]
    for name in tasks.names():
        assert tasks[name]().batch(0, [])["tokens"].shape[0] == 0


def test_parse_makes_a_grid():
    got = parse_tasks("recall:pairs=2/4, length=32/64,noise=true")
    assert got == tuple(Recall(length=t, pairs=p, noise=True) for p in (2, 4) for t in (32, 64))
    assert parse_tasks("needle:depth=none/0/0.5") == (
        Needle(),
        Needle(depth=0.0),
        Needle(depth=0.5),
    )
    assert parse_tasks("copying") == (Copying(),)
    assert all(isinstance(tasks[name](), Task) for name in tasks.names())
