"""Retrieval in long filler: an oracle that reads the prompt finds the answer, at any length."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causal_jax.data.tasks import parse_tasks
from causal_jax.data.tasks.babilong import Babilong
from causal_jax.data.tasks.key_value import KeyValue
from causal_jax.data.tasks.markov import Markov
from causal_jax.data.tasks.motif_order import MotifOrder
from causal_jax.data.tasks.passkey import Passkey
from causal_jax.data.tasks.segmented_recall import SegmentedRecall
from causal_jax.data.tasks.sniah import Sniah
from causal_jax.errors import InputError


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("length", [7, 8, 48, 384])
def test_passkey_stands_behind_its_marker(length, noise):
    task = Passkey(length=length, noise=noise)
    batch = task.batch(3, range(40))
    whole = np.concatenate([batch["tokens"], batch["targets"][:, -1:]], 1)
    assert whole.shape == (40, length + 1)
    marker, question = task.symbols, task.symbols + 1
    for row, weights in zip(whole, batch["weights"], strict=True):
        (at,), (asked,) = np.flatnonzero(row == marker), np.flatnonzero(row == question)
        np.testing.assert_array_equal(row[at + 1 : at + 4], row[asked + 1 :])
        assert asked == length - 3
        np.testing.assert_array_equal(np.flatnonzero(weights), [length - 3, length - 2, length - 1])
        rest = np.delete(row[:asked], np.arange(at, at + 4))
        assert np.all(rest > question)
        if not noise:
            np.testing.assert_array_equal(rest, question + 1 + np.arange(len(rest)) % task.period)


def test_passkey_stands_at_its_depth():
    for depth, place in ((0.0, 0), (1.0, 40), (0.5, 20)):
        row = Passkey(length=47, depth=depth).sample(0, 0)["tokens"]
        assert int(np.flatnonzero(row == 10)[0]) == place
    places = np.argmax(Passkey(length=47).batch(0, range(500))["tokens"] == 10, 1)
    assert set(places) == set(range(41))


@pytest.mark.parametrize("kind", ["pk", "n", "w"])
@pytest.mark.parametrize("length", [300, 3000])
def test_sniah_has_one_needle(kind, length):
    for prompt, answer in Sniah(length=length, kind=kind).texts(1, range(20)):
        assert len(prompt) + len(answer) == length
        word = re.findall(r"for (\S+) mentioned in the text", prompt)[0]
        what = (
            r"uuids for {} is: ([0-9a-f-]{{36}})"
            if kind == "w"
            else r"numbers for {} is: (\d{{7}})"
        )
        found = re.findall("special magic " + what.format(word) + r"\. ", prompt)
        assert [f" {value}" for value in found] == [answer]


def follow(prompt):
    """Plays the story: where the thing is, and where it was before."""
    thing = re.findall(r"Where (?:is|was) the (\w+)", prompt)[0]
    carrier, where, history = None, {}, []
    for who, did, what in re.findall(r"([A-Z]\w+) (took|dropped|went to) the (\w+)\. ", prompt):
        if did == "took" and what == thing:
            carrier = who
        elif did == "dropped" and what == thing:
            carrier = None
        elif did == "went to":
            where[who] = what
            if who == carrier:
                history.append(what)
    before = re.findall(r"before the (\w+)\?", prompt)
    return history[history.index(before[0]) - 1] if before else history[-1]


@pytest.mark.parametrize("kind", ["qa2", "qa3"])
@pytest.mark.parametrize("extra", [0, 6])
def test_babilong_follows_its_story(kind, extra):
    for length in (470, 2000):
        texts = Babilong(length=length, kind=kind, extra=extra).texts(2, range(60))
        for prompt, answer in texts:
            assert len(prompt) + len(answer) == length
            assert answer == f" {follow(prompt)}"
        assert len({answer for _, answer in texts}) == 6


@pytest.mark.parametrize("skew", [0.0, 1.5])
def test_segmented_recall_asks_for_what_stands_in_another_segment(skew):
    task = SegmentedRecall(length=48, segment=8, pairs=3, keys=6, values=5, fillers=4, skew=skew)
    sequence, asked = task.sequences(np.random.default_rng(0).random((200, task.draws)))
    assert sequence.shape == asked.shape == (200, 49)
    np.testing.assert_array_equal(asked.sum(1), 3)
    distances = task.distances(sequence)
    for row, places, apart in zip(sequence, np.argwhere(asked)[:, 1].reshape(-1, 3), distances):
        bound = {}
        for at in np.flatnonzero(row[:40] < 6):
            assert at % 8 < 7  # its value is in the same segment
            bound[row[at]] = (row[at + 1], 5 - at // 8)
        assert len(bound) == len({d for _, d in bound.values()}) == 3
        assert places.min() >= 43
        for at in places:
            assert (row[at], apart[at]) == bound[row[at - 1]]
    keys = np.bincount(sequence[sequence < 6], minlength=6)
    assert (keys[0] > 2 * keys[5]) == (skew > 0)
    drawn, also = task.draw(jax.random.key(0), 4)
    assert drawn.shape == also.shape == (4, 49)


def test_the_answer_is_which_motif_stands_in_which_half():
    task = MotifOrder(length=60, mutation=0.0)
    seen, made = set(), task.batch(0, range(40))
    assert (made["tokens"][:, -1] == 4).all()  # the question
    for tokens, targets, weights in zip(made["tokens"], made["targets"], made["weights"]):
        letters = "".join("ACGT"[i] for i in tokens[:-1])
        halves = letters[:29], letters[29:]
        box, start = ("TATAAA", "TCAGTT") if targets[-1] == 6 else ("TCAGTT", "TATAAA")
        assert box in halves[0]
        assert start in halves[1]
        assert weights.sum() == weights[-1] == 1
        seen.add(int(targets[-1]))
    assert seen == {5, 6}
    noisy = MotifOrder(length=60, mutation=1.0).batch(0, range(40))["tokens"]
    assert (noisy[:, :-1] != made["tokens"][:, :-1]).any(1).all()
    with pytest.raises(InputError, match="mutation"):
        MotifOrder(mutation=2.0)


def test_rows_arranged_on_the_device_are_those_of_the_host():
    for task in (MotifOrder(), SegmentedRecall(), KeyValue()):
        u = np.random.default_rng(0).random((5, task.draws), np.float32)
        for host, device in zip(task.arranged(u, np), task.arranged(jnp.asarray(u), jnp)):
            assert (host == np.asarray(device)).all()


def test_markov_chains_have_the_entropies_they_say():
    task = Markov(length=400, symbols=3, order=2, concentration=0.5)
    table, often = task.table(), task.stationary()
    np.testing.assert_allclose(table.sum(1), 1.0)
    flow = (often[:, None] * table).reshape(3, 3, 3).sum(0).reshape(-1)
    np.testing.assert_allclose(flow, often, atol=1e-9)
    rows = task.batch(0, range(200))
    whole = np.concatenate([rows["tokens"], rows["targets"][:, -1:]], 1)
    context = 3 * whole[:, :-2] + whole[:, 1:-1]
    nats = -np.log(table[context, whole[:, 2:]]).mean()
    assert nats == pytest.approx(task.entropy(), abs=0.02)
    np.testing.assert_allclose(
        np.bincount(context.ravel(), minlength=9) / context.size, often, atol=0.02
    )
    assert task.entropy() <= task.entropy(1) <= task.entropy(0) <= np.log(3)
    tables = jnp.asarray(table), jnp.asarray(often)
    drawn, asked = map(np.asarray, task.draw(jax.random.key(0), 100, *tables))
    context = 3 * drawn[:, :-2] + drawn[:, 1:-1]
    nats = -np.log(table[context, drawn[:, 2:]]).mean()
    assert nats == pytest.approx(task.entropy(), abs=0.03)
    assert drawn.shape == asked.shape == (100, 401)


@pytest.mark.parametrize(
    "task",
    [Passkey(), Sniah(kind="w"), Babilong(kind="qa3"), SegmentedRecall(), Markov()],
    ids=str,
)
def test_rows_depend_on_seed_and_index_alone(task):
    batch, twin = task.batch(5, [7, 1, 900]), dataclasses.replace(task)
    for name, value in batch.items():
        np.testing.assert_array_equal(twin.batch(5, [1, 900, 7])[name], value[[1, 2, 0]])
        assert value.shape == (3, task.length)
    assert np.any(task.batch(6, [7])["tokens"] != batch["tokens"][:1])
    assert batch["tokens"].max() < task.vocab


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("passkey:length=6", "length"),
        ("passkey:depth=2", "depth"),
        ("passkey:symbols=1", "symbols"),
        ("sniah:length=100", "length"),
        ("sniah:digits=0", "digits"),
        ("babilong:length=100", "length"),
        ("babilong:extra=-1", "extra"),
        ("sniah:kind=x", "kind"),
        ("babilong:kind=qa1", "kind"),
        ("segmented_recall:length=50", "length"),
        ("segmented_recall:pairs=8", "pairs"),
        ("segmented_recall:segment=4", "segment"),
        ("markov:order=9", "order"),
        ("markov:concentration=0", "concentration"),
    ],
)
def test_impossible_dials_are_named(line, field):
    with pytest.raises(InputError, match=field):
        parse_tasks(line)
