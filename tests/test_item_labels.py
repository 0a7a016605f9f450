"""In weights or in context: the rows, the attention-only network, the induction head in numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from causal_jax import taps
from causal_jax.data.tasks.item_labels import ItemLabels
from causal_jax.errors import InputError
from causal_jax.models.attention_only import AttentionOnly, progress
from causal_jax.models.induction_head import InductionHead, descend, nested_loss
from causal_jax.training.state import graph_of

SMALL = ItemLabels(classes=64, labels=16, dim=48, pairs=8, most_pairs=12, burst=2)
sample = jax.jit(ItemLabels.sample, static_argnums=(0, 3, 4))
draw_tests = jax.jit(ItemLabels.tests, static_argnums=(0, 3))


def drawn(task, split="train", batch=4000, seed=0):
    known = task.prototypes(jax.random.key(100))
    return known, sample(task, known, jax.random.key(seed), batch, split)


def parts(task, rows):
    """Positions [B, T, P], items [B, N+1, D] and label vectors [B, N, D] of tokens."""
    place, content = np.split(np.asarray(rows.tokens), [task.positions], axis=-1)
    return place, content[:, ::2], content[:, 1::2]


def nearest(vectors, table):
    return (vectors @ np.asarray(table).T - (np.asarray(table) ** 2).sum(-1) / 2).argmax(-1)


@pytest.mark.parametrize("split", ["train", "weights", "context", "swapped"])
def test_rows_are_what_they_say(split):
    known, rows = drawn(SMALL, split, 500)
    again = drawn(SMALL, split, 500)[1]
    jax.tree.map(np.testing.assert_array_equal, rows, again)
    other = drawn(SMALL, split, 500, seed=1)[1]
    assert np.any(rows.tokens != other.tokens)
    place, items, labels = parts(SMALL, rows)
    # Positions: one-hot, one after another, from a random place.
    at = place.argmax(-1)
    assert set(np.unique(place)) == {0, 1}
    np.testing.assert_array_equal(place.sum(-1), 1)
    np.testing.assert_array_equal(at - at[:, :1], np.tile(np.arange(17), (500, 1)))
    assert set(np.unique(at[:, 0])) == set(range(9))
    np.testing.assert_array_equal(nearest(labels, known.labels), rows.labels)
    # Items of the same class are near each other, whatever the class.
    same = ((items[:, :-1] - items[:, -1:]) ** 2).sum(-1) < 0.3
    np.testing.assert_array_equal(same, rows.match)
    if split != "weights":
        np.testing.assert_array_equal(rows.match.sum(-1), 2)
        np.testing.assert_array_equal((rows.labels == rows.label[:, None]), rows.match)
        counts = (np.asarray(rows.labels)[:, :, None] == np.arange(16)).sum(1)
        assert set(np.unique(counts)) == {0, 2}  # N/B labels, B times each
    if split != "context":
        k = nearest(items, known.items)
        assert ((items - np.asarray(known.items)[k]) ** 2).sum(-1).max() < 0.1
        shift = 1 if split == "swapped" else 0
        np.testing.assert_array_equal((k[:, :-1] + shift) % 16, rows.labels)
        np.testing.assert_array_equal((k[:, -1] + shift) % 16, rows.label)
    else:
        flat = items[:, 0]
        far = ((flat[:, None] - np.asarray(known.items)[None]) ** 2).sum(-1).min(-1)
        assert np.median(far) > 0.5  # classes never met


def test_the_tests_are_rows_of_the_splits():
    """One draw for all three: the same statistics as each split by itself."""
    known = SMALL.prototypes(jax.random.key(100))
    found = draw_tests(SMALL, known, jax.random.key(3), 3000)
    assert set(found) == {"context", "weights", "swapped"}
    for split, rows in found.items():
        alone = drawn(SMALL, split, 3000)[1]
        for a, b in zip(rows, alone):
            assert a.shape == b.shape
        for share in (lambda r: r.labels == r.label[:, None], lambda r: r.match):
            assert abs(share(rows).mean() - share(alone).mean()) < 0.01
        _, items, _ = parts(SMALL, rows)
        known_class = ((items - np.asarray(known.items)[nearest(items, known.items)]) ** 2).sum(-1)
        assert (np.median(known_class) > 0.5) == (split == "context")


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("burst", [0, 1])
def test_classes_follow_zipf(alpha, burst):
    task = dataclasses.replace(SMALL, zipf=alpha, burst=burst, pairs=2, most_pairs=0)
    known, rows = drawn(task, batch=20_000)
    _, items, _ = parts(task, rows)
    f = np.arange(1.0, 65) ** -alpha
    f /= f.sum()
    k = nearest(items, known.items)
    counts = np.bincount(k[:, -1], minlength=64) / len(k)
    if burst:  # two classes of different labels, and the target one of them
        label = f.reshape(4, 16).sum(0)
        both = label[:, None] * label[None] / (1 - label[:, None])
        np.fill_diagonal(both, 0)
        f = f * np.tile((both.sum(0) + both.sum(1)) / 2 / label, 4)
    np.testing.assert_allclose(counts, f, atol=5 * np.sqrt(f.max() / len(k)))


def test_room_for_more_classes_changes_no_frequency():
    task = dataclasses.replace(SMALL, zipf=0.5)
    known = task.prototypes(jax.random.key(0), room=256)
    assert known.items.shape == (256, 48)
    rows = sample(task, known, jax.random.key(1), 4000, "weights")
    k = nearest(parts(task, rows)[1], known.items)
    assert k.max() == 63
    small = task.prototypes(jax.random.key(0)).ends
    np.testing.assert_allclose(known.ends[:: 256 // 16], small[:: 64 // 16], atol=1e-6)
    with pytest.raises(InputError, match="room=80"):
        ItemLabels(classes=96, labels=32).prototypes(jax.random.key(0), room=80)


def test_shares_of_bursty_and_fresh_rows():
    task = dataclasses.replace(SMALL, bursty=0.3, fresh=0.6)
    known, rows = drawn(task, batch=4000)
    _, items, _ = parts(task, rows)
    near = ((items - np.asarray(known.items)[nearest(items, known.items)]) ** 2).sum(-1).mean(-1)
    assert abs((near > 0.3).mean() - 0.6) < 0.03
    bursty = np.asarray(rows.match).sum(-1) == 2
    assert abs(bursty.mean() - 0.3) < 0.04


def test_noise_is_within_class_and_keeps_the_length():
    for eps in (0.1, 1.0):
        task = dataclasses.replace(SMALL, noise=eps, burst=8, dim=64)
        _, rows = drawn(task, batch=2000)
        _, items, _ = parts(task, rows)
        assert abs((items**2).sum(-1).mean() - 1) < 0.05
        spread = ((items[:, 0] - items[:, 1]) ** 2).sum(-1).mean()
        assert abs(spread - 2 * eps**2 / (1 + eps**2)) < 0.05


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classes": 65}, "classes=65: .*multiple of the 16"),
        ({"burst": 3}, "burst=3: .*divisor of the 8"),
        ({"burst": 1, "labels": 4, "classes": 4}, "at most 4 different labels"),
        ({"most_pairs": 4}, "most_pairs=4"),
        ({"fresh": 1.5}, "fresh=1.5"),
        ({"noise": -1.0}, "noise=-1.0"),
    ],
)
def test_impossible_dials(fields, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SMALL, **fields)


SPEC = AttentionOnly(vocab=16, width=SMALL.width, std=0.3)
hidden = jax.jit(lambda params, x: nnx.merge(graph_of(SPEC), params).hidden(x))
logits = jax.jit(lambda params, x: nnx.merge(graph_of(SPEC), params)(x))


def test_the_network_is_its_formula():
    model = SPEC.build(jax.random.key(0))
    params = nnx.split(model)[1]
    x = np.asarray(drawn(SMALL, batch=3)[1].tokens, np.float64)
    v = x
    for l in range(2):
        q, k, w = (np.asarray(p[...][l], np.float64) for p in (model.q, model.k, model.v))
        s = np.einsum("bid,bjd->bij", v @ q, v @ k)
        p = np.exp(s) * np.tril(np.ones(s.shape[1:]))
        v = v + p / p.sum(-1, keepdims=True) @ v @ w
    np.testing.assert_allclose(hidden(params, jnp.asarray(x, jnp.float32)), v, atol=2e-4)
    h = v[:, -1]
    for layer, b in zip(model.classifier.layers, np.asarray(model.classifier.bias[...])):
        h = np.maximum(h @ np.asarray(layer[...], np.float64) + b, 0)
    wanted = h @ np.asarray(model.classifier.head[...], np.float64)
    np.testing.assert_allclose(logits(params, jnp.asarray(x, jnp.float32)), wanted, atol=2e-3)


def test_the_future_changes_nothing_and_patterns_are_distributions():
    params = nnx.split(SPEC.build(jax.random.key(0)))[1]
    x = drawn(SMALL, batch=2)[1].tokens
    changed = x.at[:, 9:].set(0.5)
    before, after = hidden(params, x), hidden(params, changed)
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert jnp.abs(before[:, 9:] - after[:, 9:]).max() > 0.1
    run = jax.jit(lambda p, x: taps.run(nnx.merge(graph_of(SPEC), p), x, capture="*attn.pattern"))
    _, seen = run(params, x)
    assert seen["attn.pattern"].shape == (1, 2, 1, 17, 17)
    assert seen["last.attn.pattern"].shape == (2, 1, 1, 17)
    for pattern in seen.values():
        np.testing.assert_allclose(pattern.sum(-1), 1, atol=1e-5)
    assert not np.triu(np.asarray(seen["attn.pattern"][0, 0, 0]), 1).any()


def test_without_values_only_the_target_counts():
    model = SPEC.build(jax.random.key(0))
    model.v[...] = jnp.zeros_like(model.v[...])
    params = nnx.split(model)[1]
    x = drawn(SMALL, batch=2)[1].tokens
    same = logits(params, x.at[:, :-1].set(1.0))
    np.testing.assert_array_equal(logits(params, x), same)


def test_a_hand_built_induction_head_reads_the_context():
    """First layer: each token copies the content before it. Second: the target finds its copy."""
    task = dataclasses.replace(SMALL, burst=1, noise=0.0)
    P, D = task.positions, task.dim
    # Width P + 3 D: content, the copied content of the token before, what the target has read.
    width = P + 3 * D
    model = AttentionOnly(vocab=16, width=width, depth=0).build(jax.random.key(0))
    known, rows = drawn(task, "context", 600)
    # The first token has none before it and reads itself: rows that ask for it are left out.
    rows = jax.tree.map(lambda a: a[np.flatnonzero(~np.asarray(rows.match[:, 0]))], rows)
    x = jnp.pad(rows.tokens, ((0, 0), (0, 0), (0, 2 * D)))
    here, before, read = (slice(P + i * D, P + (i + 1) * D) for i in range(3))
    q, k, v = (np.zeros((2, width, width), np.float32) for _ in range(3))
    q[0, np.arange(1, P), np.arange(P - 1)] = 100.0  # position i asks for position i - 1
    k[0, :P, :P] = np.eye(P)
    v[0, here, before] = np.eye(D)
    q[1, here, :D] = 100 * np.eye(D)  # the target's content asks for the content copied
    k[1, before, :D] = np.eye(D)
    v[1, here, read] = np.eye(D)
    head = np.zeros((width, 16), np.float32)
    head[read] = np.asarray(known.labels).T
    for name, value in (("q", q), ("k", k), ("v", v)):
        getattr(model, name)[...] = jnp.asarray(value)
    model.classifier.head[...] = jnp.asarray(head)
    found = jax.jit(lambda p, *a: progress(nnx.merge(nnx.split(model)[0], p), *a))(
        nnx.split(model)[1], x, *rows[1:]
    )
    assert found["accuracy"] > 0.99
    assert found["ila1"] > 0.99
    assert found["tila2"] > 0.99
    assert found["tla2"] >= found["tila2"]
    assert 0 < found["cla"] < 1


def test_progress_before_anything_is_learned():
    """Uniform attention, uniform logits: chance levels, in closed form."""
    model = SPEC.build(jax.random.key(0))
    for name in ("q", "k"):
        getattr(model, name)[...] = jnp.zeros_like(model.q[...])
    model.classifier.head[...] = jnp.zeros_like(model.classifier.head[...])
    rows = drawn(SMALL, "context", 50)[1]
    found = jax.jit(lambda p, *a: progress(nnx.merge(graph_of(SPEC), p), *a))(
        nnx.split(model)[1], *rows
    )
    np.testing.assert_allclose(found["ila1"], np.mean(1 / np.arange(2, 17, 2)), rtol=1e-5)
    np.testing.assert_allclose(found["tla2"], 8 / 17, rtol=1e-5)
    np.testing.assert_allclose(found["tila2"], 2 / 17, rtol=1e-5)
    np.testing.assert_allclose(found["cla"], 4 / 16, rtol=1e-5)  # 4 labels, twice each
    np.testing.assert_allclose(found["loss"], np.log(16), rtol=1e-5)


def test_the_induction_head_in_numbers_is_its_formula():
    spec = InductionHead(vocab=16, dim=48, start=0.7)
    model, rows = spec.build(jax.random.key(0)), drawn(SMALL, batch=4)[1]
    c = rows.tokens[..., SMALL.positions :]
    _, seen = jax.jit(lambda p, c: taps.run(nnx.merge(graph_of(spec), p), c, capture="*"))(
        nnx.split(model)[1], c
    )
    c, T = np.asarray(c, np.float64), 17
    for b in range(4):
        r = np.zeros((T, 48))
        for i in range(T):
            p = np.exp([0.7 if j == i - 1 else 0.0 for j in range(i + 1)])
            r[i] = p / p.sum() @ c[b, : i + 1]
        s = 0.7 * r @ c[b, -1] + 0.7 * (np.arange(T) % 2)
        w = np.exp(s) / np.exp(s).sum()
        np.testing.assert_allclose(seen["pattern"][b], w, atol=1e-6)
        np.testing.assert_allclose(seen["read"][b], w @ c[b], atol=1e-5)
    assert spec.param_count() == dataclasses.replace(spec, labelled=False).param_count() + 1


def test_large_numbers_look_the_label_up():
    task = dataclasses.replace(SMALL, burst=1)
    spec = InductionHead(vocab=16, dim=48)
    model, (known, rows) = spec.build(jax.random.key(0)), drawn(task, "context", 200)
    model.beta1[...], model.alpha[...], model.beta2[...] = map(jnp.float32, (50.0, 500.0, 1000.0))
    _, seen = jax.jit(lambda p, c: taps.run(nnx.merge(graph_of(spec), p), c, capture="read"))(
        nnx.split(model)[1], rows.tokens[..., task.positions :]
    )
    close = np.abs(np.asarray(seen["read"]) - np.asarray(known.labels)[rows.label]).max(-1) < 1e-3
    assert close.mean() > 0.99


def test_nested_loss_is_its_formula():
    rng = np.random.default_rng(0)
    for N, L, c in ((8, 32, 8.0), (4, 5, 2.0), (8, 8, 8.0)):
        for b, al, xi in rng.normal(size=(5, 3)) * 2:
            a = np.exp(b) / (np.exp(b) + c)
            w = np.exp(al * a) / (np.exp(al * a) + N - 1)
            u = (1 - w) / (N - 1)
            total = np.exp(xi * w) + (N - 1) * np.exp(xi * u) + (L - N)
            got = nested_loss(jnp.array([b, al, xi]), pairs=N, labels=L, rivals=c)
            np.testing.assert_allclose(got, -np.log(np.exp(xi * w) / total), atol=1e-5)
    with pytest.raises(InputError, match="pairs=9"):
        nested_loss(jnp.zeros(3), pairs=9, labels=8, rivals=1.0)


def test_learning_starts_by_itself_only_with_labels_to_spare():
    slope = jax.jit(jax.grad(nested_loss), static_argnames=("pairs", "labels", "rivals"))
    for N, L in ((8, 32), (8, 9), (4, 16), (8, 8), (4, 4)):
        g = np.asarray(slope(jnp.zeros(3), pairs=N, labels=L, rivals=float(N)))
        assert abs(g[0]) < 1e-7
        assert abs(g[1]) < 1e-7
        # d loss / d xi at 0: (1/N)(share of the context labels - 1)
        np.testing.assert_allclose(g[2], (N / L - 1) / N, atol=1e-6)
        step = 1e-2
        ends = [
            float(nested_loss(jnp.array([0.0, 0, x]), pairs=N, labels=L, rivals=float(N)))
            for x in (step, -step)
        ]
        assert abs((ends[0] - ends[1]) / (2 * step) - g[2]) < 1e-4


def test_descent_falls_off_the_cliff_when_the_card_says():
    """Steps to a loss of 0.05 at rate 0.05 from (0.01, 0.01, 0.01), and none from zero."""
    run = jax.jit(descend, static_argnames=("lr", "steps", "pairs", "labels", "rivals"))
    for (N, L), steps in {(8, 32): 1305, (8, 16): 1537, (4, 32): 761, (8, 8): 8111}.items():
        theta, loss = run(
            jnp.full(3, 0.01), lr=0.05, steps=9000, pairs=N, labels=L, rivals=float(N)
        )
        assert theta.shape == (9000, 3)
        assert abs(int(np.argmax(np.asarray(loss) <= 0.05)) - steps) <= 0.01 * steps
        assert abs(loss[0] - np.log(L)) < 3e-3
    _, loss = run(jnp.zeros(3), lr=0.05, steps=9000, pairs=8, labels=8, rivals=8.0)
    np.testing.assert_allclose(loss, np.log(8), atol=1e-5)
