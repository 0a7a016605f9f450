"""Fact recall, the one-layer linear model, maps of least norm, and the harness that trains them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_jax.data.tasks.fact_recall import FactRecall
from causal_jax.errors import InputError
from causal_jax.interp.margins import (
    effective_rank,
    least_norm,
    least_norm_convex,
    margins,
    nuclear_norm,
)
from causal_jax.models import one_layer_linear as layer
from causal_jax.papers._harness import bootstrap, train
from causal_jax.training.optimizer import SGD, AdamW, Schedule

tasks = st.builds(
    FactRecall,
    groups=st.integers(2, 5),
    train=st.integers(1, 3),
    test=st.integers(1, 3),
    noise=st.integers(1, 4),
    length=st.integers(3, 12),
)
KINDS = ("train_fact", "train_implication", "test_fact", "test_implication")


@given(tasks)
def test_items_are_what_the_paper_says(task):
    items = {kind: task.items(kind) for kind in KINDS}
    train, test = (set(items[f"{part}_fact"][:, 0]) for part in ("train", "test"))
    assert not train & test
    assert len(train | test) == task.subjects
    for part in ("train", "test"):
        fact, implied = items[f"{part}_fact"], items[f"{part}_implication"]
        np.testing.assert_array_equal(fact[:, 0], implied[:, 0])
        np.testing.assert_array_equal(fact[:, 2] + task.groups, implied[:, 2])  # b_i, c_i
        assert set(fact[:, 1]) == {0}
        assert set(implied[:, 1]) == {1}
    # every group has the same number of subjects of either kind
    assert set(np.bincount(items["train_fact"][:, 2])[task.facts]) == {task.train}
    assert set(np.bincount(items["test_fact"][:, 2])[task.facts]) == {task.test}


@settings(max_examples=10)
@given(tasks, st.integers(0, 5))
def test_rows_hold_their_item_in_order(task, seed):
    tokens, answers = map(np.asarray, task.training(jax.random.key(seed), 9))
    shown = {(s, r): a for kind in KINDS[:3] for s, r, a in task.items(kind)}
    asked = {(s, r) for s, r, _ in task.items("test_implication")}
    subjects = range(2 + 2 * task.groups, 2 + 2 * task.groups + task.subjects)
    assert tokens.shape == (9, task.length)
    assert tokens.dtype == np.int32
    for row, answer in zip(tokens, answers, strict=True):
        assert row[-1] == task.vocab - 1
        where = [i for i, t in enumerate(row) if t in subjects or t in (0, 1)]
        subject, relation = row[where]
        assert subject in subjects
        assert shown[subject, relation] == answer
        assert (subject, relation) not in asked  # never in a training batch
        others = np.delete(row, [*where, task.length - 1])
        assert ((others >= task.vocab - 1 - task.noise) & (others < task.vocab - 1)).all()
    thirds = [{tuple(i) for i in task.items(kind)} for kind in KINDS[:3]]
    for i, (row, answer) in enumerate(zip(tokens, answers, strict=True)):
        s, r = (t for t in row if t in subjects or t in (0, 1))
        assert (s, r, answer) in thirds[i // 3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": 1}, "groups = 1"),
        ({"train": 0}, "train = 0"),
        ({"length": 2}, "length = 2"),
        ({"noise": 0}, "noise = 0: rows of 16 tokens"),
    ],
)
def test_a_task_that_cannot_be_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        FactRecall(**fields)


def test_kinds_and_batches_are_checked():
    with pytest.raises(InputError, match="multiple of 3"):
        FactRecall().training(jax.random.key(0), 8)


TASK = FactRecall(groups=3, train=1, test=2, noise=2, length=7)


def one_hot(tokens):
    return jax.nn.one_hot(tokens, TASK.vocab)


def pair():
    """The same function, factorised and merged, and a batch."""
    keys = jax.random.split(jax.random.key(0), 3)
    two = layer.init(keys[0], TASK.vocab)
    two["kq"] = two["kq"] + 0.3 * jax.random.normal(keys[1], two["kq"].shape)
    one = {"kq": two["kq"], "ov": layer.output_value(two)}
    return two, one, TASK.training(keys[2], 6)


def test_factorised_and_merged_are_the_same_function():
    two, one, (tokens, _) = pair()
    x = one_hot(tokens)
    np.testing.assert_allclose(layer.logits(two, x), layer.logits(one, x), atol=1e-5)
    # W sum_t x_t (x_t . W_KQ x_T), term by term
    z = sum(
        x[:, t] * jnp.einsum("bd,de,be->b", x[:, t], one["kq"], x[:, -1])[:, None]
        for t in range(TASK.length)
    )
    np.testing.assert_allclose(layer.logits(one, x), z @ one["ov"].T, atol=1e-5)


def test_gradients_of_the_factors_are_those_of_the_product():
    two, one, (tokens, answers) = pair()

    def loss(params):
        logits = layer.logits(params, one_hot(tokens))
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), answers[:, None], 1).mean()

    whole, parts = jax.grad(loss)(one)["ov"], jax.grad(loss)(two)
    np.testing.assert_allclose(parts["o"], whole @ two["v"], atol=1e-6)
    np.testing.assert_allclose(parts["v"], whole.T @ two["o"], atol=1e-6)


def test_only_the_numbers_of_tokens_matter():
    two, _, (tokens, _) = pair()
    shuffled = jnp.concatenate([tokens[:, -2::-1], tokens[:, -1:]], 1)
    same = layer.logits(two, one_hot(tokens)), layer.logits(two, one_hot(shuffled))
    np.testing.assert_allclose(*same, atol=1e-5)


def test_the_start_can_be_even_and_narrow():
    even = layer.init(jax.random.key(0), 4, merged=True, ones=1e-4)
    np.testing.assert_array_equal(even["ov"], np.full((4, 4), 1e-4, np.float32))
    assert layer.init(jax.random.key(0), 6, 2)["o"].shape == (6, 2)
    with pytest.raises(InputError, match="no inner width"):
        layer.init(jax.random.key(0), 6, 2, merged=True)


def test_norms_of_matrices():
    w = jax.random.normal(jax.random.key(0), (5, 7))
    u, s, vt = np.linalg.svd(np.asarray(w), full_matrices=False)
    np.testing.assert_allclose(nuclear_norm(w), s.sum(), rtol=1e-5)
    # balanced factors reach the least (||A||^2 + ||B||^2) / 2, others do not go below it
    a, b = u * np.sqrt(s), (np.sqrt(s)[:, None] * vt).T
    assert 0.5 * (np.square(a).sum() + np.square(b).sum()) == pytest.approx(s.sum(), rel=1e-5)
    mix = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0] * np.linspace(0.5, 2, 5)
    c, d = a @ mix, b @ np.linalg.inv(mix).T
    np.testing.assert_allclose(c @ d.T, w, atol=1e-4)
    assert 0.5 * (np.square(c).sum() + np.square(d).sum()) > s.sum()
    np.testing.assert_allclose(effective_rank(jnp.eye(4)), 4.0, rtol=1e-5)
    np.testing.assert_allclose(effective_rank(jnp.ones((4, 4))), 1.0, rtol=1e-3)


def problem(groups, shown, asked):
    """Training items, test items: what is read [M, D], the answer among 2 groups."""
    task = FactRecall(groups, shown, asked, noise=0, length=3)

    def read(*kinds):
        items = np.concatenate([task.items(kind) for kind in kinds])
        z = np.eye(task.vocab)[items[:, 0]] + np.eye(task.vocab)[items[:, 1]]
        return z, items[:, 2] - task.facts.start

    return read(*KINDS[:3]), read(KINDS[3])


@pytest.mark.parametrize("solve", [least_norm, least_norm_convex])
@pytest.mark.parametrize("sizes", [(3, 1, 2), (3, 2, 1)])
def test_least_nuclear_norm_associates_and_least_frobenius_norm_does_not(solve, sizes):
    groups, shown, asked = sizes
    (z, answers), (test_z, test_answers) = problem(*sizes)
    values = {}
    for norm in ("nuclear", "frobenius"):
        w = solve(z, answers, 2 * groups, norm)
        h = np.array(margins(jnp.asarray(w), jnp.asarray(z), jnp.asarray(answers)))
        own = np.arange(2 * groups)[None] == answers[:, None]
        assert np.abs(h[own]).max() == 0
        assert h[~own].min() > 1 - 1e-4  # the constraints
        h = np.array(margins(jnp.asarray(w), jnp.asarray(test_z), jnp.asarray(test_answers)))
        other = (np.arange(2 * groups)[None] != test_answers[:, None])[:, groups:]
        found = h[:, groups:][other]
        expected = min(1.0, (shown / asked) ** 0.5) if norm == "nuclear" else 0.0
        np.testing.assert_allclose(found, expected, atol=1e-3)
        values[norm] = float(nuclear_norm(jnp.asarray(w))), float(np.square(w).sum())
    assert values["nuclear"][0] < values["frobenius"][0]
    assert values["nuclear"][1] > values["frobenius"][1]


CONSTANT = Schedule(kind="constant", warmup=0)


def quadratic(optimizer, **options):
    """Two seeds walk down |p - 3|^2 with noise drawn from the key."""
    return train(
        lambda key: {"p": jax.random.normal(key, (2,))},
        lambda params, key: jnp.sum((params["p"] - 3.0) ** 2) + jax.random.normal(key),
        optimizer,
        8,
        2,
        every=4,
        measure=lambda params, key: {"p": params["p"], "u": jax.random.uniform(key)},
        **options,
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        SGD(lr=0.1, schedule=CONSTANT, clip=None, weight_decay=0.0, momentum=0.0),
        AdamW(lr=0.05, schedule=Schedule(warmup=2), clip=0.5, weight_decay=0.1, decays="."),
    ],
)
def test_the_harness_makes_the_updates_of_the_loop(optimizer):
    params, records = quadratic(optimizer)
    for seed in (0, 1):
        p = {"p": records["p"][seed, 0]}
        tx = optimizer.transformation()
        opt = tx.init(p)
        for t in range(8):
            grads = jax.grad(lambda p: jnp.sum((p["p"] - 3.0) ** 2))(p)
            updates, opt = tx.update(grads, opt, p)
            p = {"p": p["p"] - optimizer.learning_rate(t, 8) * updates["p"]}
        np.testing.assert_allclose(params["p"][seed], p["p"], rtol=1e-5)
    np.testing.assert_array_equal(records["step"], [0, 4, 8])
    assert records["p"].shape == (2, 3, 2)
    assert np.isnan(records["loss"][:, 0]).all()
    assert len(set(records["u"].ravel())) == 6  # a key of its own for every record and seed


def test_seeds_do_not_depend_on_how_they_are_run():
    optimizer = SGD(lr=0.1, schedule=CONSTANT, clip=None, weight_decay=0.0)
    together, apart = quadratic(optimizer), quadratic(optimizer, together=False)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_bootstrap_interval_holds_the_mean():
    values = np.random.default_rng(0).normal(5.0, 1.0, 200)
    low, high = bootstrap(values)
    half = 1.96 / 200**0.5
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * half, rel=0.2)
    assert bootstrap(np.ones(5)) == (1.0, 1.0)
    assert bootstrap(values, np.median, level=0.5) < (high, high)
