"""Prompts whose documents have no order: layouts, PINE's attention, and the decoder around it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from causal_jax.attention import Dense, dense_attention
from causal_jax.attention.pine import Pine, importance, pine_attention, shifts
from causal_jax.data.tasks import unordered
from causal_jax.data.tasks.judge import Judge
from causal_jax.data.tokenizers import Bytes
from causal_jax.errors import InputError
from causal_jax.masks import Causal
from causal_jax.models.decoder import Decoder
from causal_jax.positions import Rotary, rotate
from causal_jax.segments import DocLayout, doc_layout
from causal_jax.surgery import swap_attention

ROTARY = Rotary(base=100.0)
SPEC = Decoder(vocab=23, layers=2, width=32, heads=4, kv_heads=2, context=64, attention=(Pine(),))
PREFIX, LENGTHS, SUFFIX = 3, (4, 2, 5), 4
T, N, K, H = PREFIX + sum(LENGTHS) + SUFFIX, 4, 2, 8


@functools.partial(jax.jit, static_argnames=("order", "implementation", "soft_cap"))
def attend(q, k, v, layout, **kw):
    return pine_attention(q, k, v, layout=layout, rotary=ROTARY, **kw)


def draw(seed=0, heads=(N, K, K), dtype=np.float32, batch=1):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(2 * rng.standard_normal((batch, T, n, H)), dtype) for n in heads]


def moved(lengths, order):
    """Where the tokens of a row come from when its documents stand in another order."""
    begin = PREFIX + np.cumsum((0, *lengths))
    blocks = [np.arange(begin[i], begin[i + 1]) for i in order]
    end = begin[-1]
    return np.concatenate([np.arange(PREFIX), *blocks, np.arange(end, end + SUFFIX)])


def by_hand(q, k, v, lengths, keys):
    """The card's text, token by token and head by head, in float64."""
    q, k, v = (np.asarray(x[0], np.float64) for x in (q, k, v))
    begin = PREFIX + np.cumsum((0, *lengths))
    E, M = begin[-1], len(lengths)
    doc = [int(np.searchsorted(begin, t, "right")) - 1 if PREFIX <= t < E else -1 for t in range(T)]
    turned = lambda x, at: np.asarray(  # noqa: E731
        rotate(jnp.asarray(x[None, None, None]), jnp.full((1, 1), at), ROTARY)[0, 0, 0], np.float64
    )
    out = np.zeros((T, N, H))
    for h in range(N):
        kh, vh = k[:, h // (N // K)], v[:, h // (N // K)]
        s0 = q[:, h] @ kh.T / np.sqrt(H)

        def weights(t, h=h, s0=s0):
            over = [j for j in range(T) if doc[j] >= 0 and doc[j] != doc[t]]
            e = np.zeros(T)
            if over:
                e[over] = np.exp(s0[t, over] - s0[t, over].max())
                e /= e.sum()
            return [e[begin[b] : begin[b + 1]].sum() / lengths[b] for b in range(M)]

        for t in range(T):
            own = doc[t]
            same = [t] if own < 0 else [u for u in range(T) if doc[u] == own]
            imp = np.round(np.mean([weights(u) for u in same], 0) * 2**18)
            rank = [(np.inf if b == own else imp[b], keys[b], -b) for b in range(M)]
            shift = [sum(lengths[c] for c in range(M) if rank[c] > rank[b]) for b in range(M)]
            at = t if own < 0 else E - lengths[own] + t - begin[own]
            row = []
            for j in range(T):
                sees = j <= t or (own >= 0 and doc[j] >= 0 and doc[j] != own)
                b = doc[j]
                place = j if b < 0 else E - shift[b] - lengths[b] + j - begin[b]
                s = turned(q[t, h], at) @ turned(kh[j], place) / np.sqrt(H)
                row.append(s if sees else -np.inf)
            p = np.exp(np.array(row) - max(row))
            out[t, h] = p / p.sum() @ vh
    return out


def layout_of(lengths, keys=None, batch=1, start=0):
    rows = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.int32), (batch, *np.shape(x)))  # noqa: E731
    keys = np.arange(len(lengths)) * 7 % 5 if keys is None else keys
    return DocLayout(rows(start), rows(PREFIX), rows(lengths), rows(keys))


@pytest.mark.parametrize("implementation", ["relative", "reference"])
def test_it_is_what_the_paper_says(implementation):
    q, k, v = draw()
    keys = (3, 1, 2)
    o = attend(q, k, v, layout_of(LENGTHS, keys), implementation=implementation)
    np.testing.assert_allclose(o[0], by_hand(q, k, v, LENGTHS, keys), atol=1e-5)


def test_ties_are_broken_by_the_documents_hashes():
    q, k, v = draw(1)
    q = jnp.zeros_like(q)  # every document is as important as every other
    for keys in ((1, 2, 3), (3, 1, 2)):
        o = attend(q, k, v, layout_of(LENGTHS, keys))
        np.testing.assert_allclose(o[0], by_hand(q, k, v, LENGTHS, keys), atol=1e-5)


@pytest.mark.parametrize("case", ["plain", "zero queries", "identical documents", "one empty"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_attention_is_invariant(case, dtype):
    lengths = {"identical documents": (4, 4, 3), "one empty": (6, 0, 5)}.get(case, LENGTHS)
    keys = np.array((9, 9, 1) if case == "identical documents" else (3, 1, 2))
    with jax.enable_x64(dtype == np.float64):
        q, k, v = draw(2, dtype=dtype)
        if case == "zero queries":
            q = jnp.zeros_like(q)
        if case == "identical documents":
            copied = np.arange(T)
            copied[PREFIX + 4 : PREFIX + 8] = np.arange(PREFIX, PREFIX + 4)
            q, k, v = (x[:, copied] for x in (q, k, v))
        want = attend(q, k, v, layout_of(lengths, keys))
        for order in itertools.permutations(range(3)):
            at = moved(lengths, order)
            layout = layout_of([lengths[i] for i in order], keys[list(order)])
            got = attend(*(x[:, at] for x in (q, k, v)), layout)
            gap = np.abs(np.asarray(got) - np.asarray(want[:, at])).max()
            assert gap <= (5e-6 if dtype == np.float32 else 1e-12)


def test_documents_tile_the_space_between_prefix_and_suffix():
    q, k, _ = draw(3)
    layout = layout_of(LENGTHS)
    own = layout.document(jnp.arange(T)[None])
    shift = np.asarray(shifts(importance(q, k, layout), layout, own))[0]
    for row in shift.reshape(-1, 3):
        at = np.concatenate([np.arange(n) - s - n for n, s in zip(LENGTHS, row)])
        np.testing.assert_array_equal(np.sort(at), np.arange(-sum(LENGTHS), 0))
    inside = np.asarray(own[0]) < 3
    mine = shift[:, inside, np.asarray(own[0])[inside]]
    assert not mine.any()  # the own document is the closest
    far = np.asarray(shifts(importance(q, k, layout), layout, own, "far"))[0]
    behind = ~inside
    total = shift[:, behind] + far[:, behind] + np.array(LENGTHS)[None, None]
    np.testing.assert_array_equal(total, sum(LENGTHS))  # the reverse order


@pytest.mark.parametrize("lengths", [(), (sum(LENGTHS),)])
def test_with_one_document_or_none_it_is_causal_attention(lengths):
    q, k, v = draw(4)
    at = jnp.arange(T)[None]
    want = dense_attention(rotate(q, at, ROTARY), rotate(k, at, ROTARY), v, mask=Causal())
    layout = DocLayout(
        jnp.zeros(1, jnp.int32), jnp.full(1, PREFIX, jnp.int32),
        jnp.array([lengths], jnp.int32).reshape(1, -1),
        jnp.zeros((1, len(lengths)), jnp.int32),
    )  # fmt: skip
    np.testing.assert_allclose(attend(q, k, v, layout), want, atol=1e-5)


def test_grouped_heads_are_repeated_heads():
    q, k, v = draw(5)
    wide = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    layout = layout_of(LENGTHS)
    np.testing.assert_allclose(attend(q, k, v, layout), attend(q, *wide, layout), atol=1e-5)


def test_padding_in_front_and_ragged_rows():
    """Two rows of different documents, one padded with NaN, are what each is alone."""
    short = (2, 1, 3)
    n = PREFIX + sum(short) + SUFFIX
    one, two = draw(6), [x[:, :n] for x in draw(7)]
    pad = ((0, 0), (T - n, 0), (0, 0), (0, 0))
    both = [
        jnp.concatenate([a, jnp.pad(b, pad, constant_values=jnp.nan)]) for a, b in zip(one, two)
    ]
    first, second = layout_of(LENGTHS), layout_of(short)
    start = DocLayout(*(jnp.array([T - n], jnp.int32),), second.prefix, second.lengths, second.keys)
    layout = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, start)
    o = attend(*both, layout)
    np.testing.assert_allclose(o[:1], attend(*one, first), atol=1e-5)
    np.testing.assert_allclose(o[1:, T - n :], attend(*two, second), atol=1e-5)
    assert not jnp.any(o[1, : T - n])


def test_reversed_and_inside_order_differ():
    q, k, v = draw(8)
    layout = layout_of(LENGTHS)
    near = attend(q, k, v, layout)
    assert jnp.abs(near - attend(q, k, v, layout, order="far")).max() > 1e-2
    at = np.arange(T)
    at[[PREFIX, PREFIX + 1]] = at[[PREFIX + 1, PREFIX]]
    swapped = attend(*(x[:, at] for x in (q, k, v)), layout)
    assert jnp.abs(near - swapped)[:, -1].max() > 1e-3


def test_gradients_are_finite():
    q, k, v = draw(9)
    loss = lambda *a: jnp.sum(jnp.sin(attend(*a, layout_of(LENGTHS))))  # noqa: E731
    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    assert all(jnp.all(jnp.isfinite(g)) and jnp.any(g) for g in grads)


# Layouts


def test_a_layout_says_where_everything_is():
    tokens = np.arange(2 * 12).reshape(2, 12)
    layout = doc_layout(tokens, [1, 2], [[3, 2], [2, 0]], start=[0, 4])
    at = jnp.arange(12)[None]
    np.testing.assert_array_equal(
        layout.document(at), [[2, 0, 0, 0, 1, 1] + 6 * [2], 6 * [2] + [0, 0] + 4 * [2]]
    )
    np.testing.assert_array_equal(layout.offset(at)[0], [0, 0, 1, 2, 0, 1, 6, 7, 8, 9, 10, 11])
    np.testing.assert_array_equal(layout.offset(at)[1], [-4, -3, -2, -1, 0, 1, 0, 1, 4, 5, 6, 7])
    np.testing.assert_array_equal(layout.end, [6, 4])
    np.testing.assert_array_equal(
        layout.shared_positions(12)[0], [0, 1, 2, 3, 1, 2, 4, 5, 6, 7, 8, 9]
    )
    see = np.asarray(layout.visible(12).to_dense(12, 12))[0, 0]
    apart = np.asarray(layout.apart(12).to_dense(12, 12))[0, 0]
    causal = np.tril(np.ones((12, 12), bool))
    cross = np.zeros((12, 12), bool)
    cross[1:4, 4:6] = cross[4:6, 1:4] = True
    np.testing.assert_array_equal(see, causal | cross)
    np.testing.assert_array_equal(apart, causal & ~cross)
    hidden = np.asarray(layout.visible(12).to_dense(12, 12))[1, 0]
    assert not hidden[:, :4].any()


def test_a_documents_hash_is_its_content():
    p, a, b, s = [1], [2, 3], [3, 2], [9, 9]
    one = doc_layout(np.array([p + a + b + s, p + b + a + s]), 1, [2, 2])
    assert one.keys[0, 0] == one.keys[1, 1]
    assert one.keys[0, 1] == one.keys[1, 0]
    assert one.keys[0, 0] != one.keys[0, 1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lengths": [9, 9]}, "fit into the 12 slots"),
        ({"lengths": [3, -1]}, "expected numbers >= 0"),
        ({"prefix": [1, 2, 3]}, r"prefix of shape \[3\]"),
        ({"lengths": [[2, 2]] * 3}, r"lengths of shape \[3, 2\]"),
    ],
)
def test_wrong_layouts_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        doc_layout(np.zeros((2, 12), int), **{"prefix": 1, "lengths": [2, 2]} | wrong)


# The decoder


@functools.cache
def model():
    """A decoder with parameters large enough that attention is far from uniform."""

    @jax.jit
    def make():
        params = nnx.split(SPEC.build(jax.random.key(0)))[1]
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        noisy = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
        return jax.tree.unflatten(tree, noisy)

    graph = nnx.split(nnx.eval_shape(lambda: SPEC.build(jax.random.key(0))))[0]
    return nnx.merge(graph, make())


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, params, tokens, layout):
    return nnx.merge(graph, params)(tokens, layout=layout)


def logits(m, tokens, layout=None):
    return np.asarray(forward(*nnx.split(m), jnp.asarray(tokens), layout))


def orders(lengths, seed=0):
    """A prompt with its documents in all orders: tokens, layout, where each token came from."""
    row = np.random.default_rng(seed).integers(0, 23, PREFIX + sum(lengths) + SUFFIX)
    perms = list(itertools.permutations(range(len(lengths))))
    at = np.stack([moved(lengths, p) for p in perms])
    tokens = row[at].astype(np.int32)
    return tokens, doc_layout(tokens, PREFIX, np.array(lengths)[np.array(perms)]), at


@pytest.mark.parametrize("lengths", [LENGTHS, (2, 4, 1, 3)])
def test_the_order_of_the_documents_changes_nothing(lengths):
    tokens, layout, at = orders(lengths)
    out = logits(model(), tokens, layout)
    gap = out - out[0][at]  # every token finds itself again
    assert np.abs(gap).max() <= 5e-6 * max(1, np.abs(out).max())
    # without re-assigned positions, or read one after the other, it does
    masked = logits(swap_attention(model(), {None: Dense()}), tokens, layout)
    assert np.abs(masked[:, -1] - masked[:1, -1]).max() > 1e-3
    plain = logits(model(), tokens)
    assert np.abs(plain[:, -1] - plain[:1, -1]).max() > 1e-2


def test_a_cache_grows_by_suffix_tokens():
    tokens, layout, _ = orders(LENGTHS, seed=1)
    tokens, layout = tokens[:2], jax.tree.map(lambda x: x[:2], layout)
    want = logits(model(), tokens, layout)

    @functools.partial(jax.jit, static_argnums=0)
    def stepwise(graph, params, tokens, layout):
        m, cut = nnx.merge(graph, params), T - SUFFIX
        out, cache = m.extend(tokens[:, :cut], m.init_cache(2, T + 5, layout=layout))
        rest = []
        for t in range(cut, T):
            step, cache = m.extend(tokens[:, t : t + 1], cache)
            rest.append(step)
        return jnp.concatenate([out, *rest], 1)

    got = stepwise(*nnx.split(model()), jnp.asarray(tokens), layout)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_without_a_layout_it_is_the_model_as_it_was():
    tokens = orders(LENGTHS)[0]
    dense = swap_attention(model(), {None: Dense()})
    np.testing.assert_array_equal(logits(model(), tokens), logits(dense, tokens))


@pytest.mark.parametrize("name", ["segments", "positions"])
def test_a_layout_stands_alone(name):
    tokens, layout, _ = orders(LENGTHS)
    with pytest.raises(InputError, match=f"{name}: a layout says"):
        model()(jnp.asarray(tokens), layout=layout, **{name: jnp.zeros(tokens.shape, jnp.int32)})
    with pytest.raises(InputError, match="layout of 6 rows for 1"):
        model()(jnp.asarray(tokens[:1]), layout=layout)


def test_learned_positions_are_refused():
    learned = Decoder(vocab=23, layers=1, width=8, heads=2, learned_positions=True)
    with pytest.raises(InputError, match="learned positions"):
        learned.build(jax.random.key(0)).init_cache(6, 30, layout=orders(LENGTHS)[1])


def test_specs_are_checked():
    with pytest.raises(InputError, match="order='middle'"):
        Pine(order="middle")
    with pytest.raises(InputError, match="come rotated"):
        Pine()(*draw(), rotary=ROTARY)


# Tasks


def test_the_judge_knows_the_best():
    task = Judge(documents=3)
    documents, best = jax.jit(lambda k: task.sample(k, 400, 0.9))(jax.random.key(0))
    total = np.asarray(documents[..., 1:] - 2 - task.names).sum(-1)
    assert ((total >= 0) & (total <= 18)).all()
    assert (total.argmax(-1) == best).all()
    assert ((total == total.max(-1, keepdims=True)).sum(-1) == 1).all()
    assert 0.85 < np.mean(best == 0) < 0.98
    assert all(len(set(row)) == 3 for row in np.asarray(documents[..., 0]).tolist())
    assert task.prompt(documents).shape == (400, 11)
    assert (task.answer(documents, best) == documents[jnp.arange(400), best, 0]).all()


@pytest.mark.parametrize("kind", unordered.KINDS)
def test_questions_in_all_orders(kind):
    tokenizer = Bytes().train(())
    asked = [unordered.question(kind, 3, seed) for seed in range(2)]
    found = unordered.rows(tokenizer, asked, [(0, 1, 2), (2, 0, 1)])
    assert found.tokens.shape[0] == 4
    for row, (q, order) in enumerate(itertools.product(asked, [(0, 1, 2), (2, 0, 1)])):
        text = bytes(found.tokens[row, found.start[row] + 1 :].tolist()).decode()
        assert text == q.prefix + "".join(q.documents[i] for i in order) + q.suffix + " "
        assert order[found.place[row]] == q.right
        assert chr(found.answers[row, found.place[row]]) == q.answers[q.right][0]
        end = found.start[row] + found.prefix[row] + found.lengths[row].sum()
        assert bytes(found.tokens[row, end:].tolist()).decode() == q.suffix + " "
    assert unordered.question(kind, 3, 0) == asked[0]
    with pytest.raises(InputError, match="documents=99"):
        unordered.question(kind, 99, 0)
