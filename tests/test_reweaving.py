"""Contextual memory reweaving: the decoder untouched at first, causality, the store, decoding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from causal_jax.errors import InputError
from causal_jax.memory.reweaving import Reweaving
from causal_jax.models.decoder import Decoder
from causal_jax.models.rewoven import Rewoven

C, S, D, L = 4, 3, 8, 2
SPEC = Rewoven(
    base=Decoder(vocab=11, layers=L, width=D, heads=2, hidden=16, context=C),
    reweaving=Reweaving(segment=C, slots=4, capture=2, capture_layers=(0, 1), reweave_layers=(1,)),
)


@functools.cache
def model(woven=True, **changes):
    """Parameters away from their starting values where `woven`."""
    spec = dataclasses.replace(SPEC, reweaving=dataclasses.replace(SPEC.reweaving, **changes))

    def make(key):
        graph, params = nnx.split(spec.build(key))
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        scale = 0.3 if woven else 0.0
        noisy = [x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
        return nnx.merge(graph, jax.tree.unflatten(tree, noisy))

    with jax.ensure_compile_time_eval():
        return jax.jit(make)(jax.random.key(0))


def ids(rows=2, length=S * C, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 11, (rows, length)), jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def _read(graph, params, tokens, store, segments):
    h, store, _ = nnx.merge(graph, params).read(tokens, store, segments=segments)
    return h, store


def read(m, tokens, store=None, segments=None):
    store = m.init_store(len(tokens)) if store is None else store
    segments = jnp.zeros_like(tokens) if segments is None else segments
    return _read(*nnx.split(m), tokens, store, segments)


def segmentwise(base, tokens):
    """The decoder alone, every segment for itself."""
    parts = tokens.reshape(len(tokens), -1, C)
    h = jax.lax.map(base.hidden, jnp.moveaxis(parts, 1, 0))
    return jnp.moveaxis(h, 0, 1).reshape(len(tokens), -1, D)


def test_at_first_it_is_the_decoder_bit_for_bit():
    m = model(woven=False)
    assert (m.hidden(ids()) == segmentwise(m.base, ids())).all()


def test_at_first_its_gradients_are_the_decoders():
    """In float64: the two programs need not round alike."""
    with jax.enable_x64(True):
        spec = dataclasses.replace(SPEC, base=dataclasses.replace(SPEC.base, dtype="float64"))
        graph, params = nnx.split(spec.build(jax.random.key(0)))
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)

        def loss(params, woven):
            m = nnx.merge(graph, params)
            h = m.hidden(ids()) if woven else segmentwise(m.base, ids())
            return jnp.sum(jnp.sin(jnp.arange(h.size, dtype=h.dtype)).reshape(h.shape) * h)

        grad = jax.jit(jax.grad(loss), static_argnums=1)
        woven, alone = (grad(params, x)["base"] for x in (True, False))
        assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(alone))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), woven, alone)


@pytest.mark.parametrize("scorer", ["learned", "surprise"])
def test_later_tokens_change_nothing_even_where_they_change_what_is_captured(scorer):
    m, tokens = model(scorer=scorer), ids()
    h = read(m, tokens)[0]
    captured = set()
    for t in (1, C, 2 * C + 1):
        changed = tokens.at[:, t:].set(ids(seed=1)[:, t:])
        new, store = read(m, changed)
        np.testing.assert_array_equal(new[:, :t], h[:, :t])
        assert float(jnp.abs(new - h)[:, t:].max()) > 1e-4
        captured.add(np.asarray(store.rel).tobytes())
    assert len(captured) > 1


def test_what_is_far_back_comes_through_the_store_only():
    tokens = ids()
    changed = tokens.at[:, :C].set(ids(seed=1)[:, :C])
    assert float(jnp.abs(read(model(), tokens)[0] - read(model(), changed)[0])[:, -C:].max()) > 1e-4
    off = model(woven=False)
    assert (read(off, tokens)[0][:, C:] == read(off, changed)[0][:, C:]).all()


def test_a_store_that_is_large_enough_holds_every_segments_choice():
    spec = Reweaving(segment=C, slots=2 * S, capture=2)
    params = spec.init(jax.random.key(0), width=D, layers=L)
    h = jax.random.normal(jax.random.key(1), (S, 2, 1, C, D))
    store, chosen = spec.init_store(2, width=D, layers=L), []
    for part in h:
        r = spec.score(params, part, store.count)
        store = spec.captured_into(store, part, r, jnp.zeros((2, C), jnp.int32))
        best = np.argsort(-np.asarray(r), 1)[:, :2]
        chosen.append(np.take_along_axis(np.asarray(part), best[:, None, :, None], 2))
    whole = np.concatenate(chosen, 2)
    assert bool(store.valid.all())
    for row in range(2):
        kept = {m.tobytes() for m in np.moveaxis(np.asarray(store.mem[row]), 1, 0)}
        assert kept == {np.ascontiguousarray(m).tobytes() for m in np.moveaxis(whole[row], 1, 0)}


@pytest.mark.parametrize("soft", [True, False])
def test_scores_learn_by_the_soft_weight(soft):
    """Without the relevance bias nothing else leads to them; the norms must not cancel it."""
    spec = dataclasses.replace(SPEC.reweaving, relevance_bias=False, soft_weight=soft)
    params = spec.init(jax.random.key(0), width=D, layers=L)
    params["at1"]["o"] = jax.random.normal(jax.random.key(1), (D, D))
    h = jax.random.normal(jax.random.key(2), (2, 2, C, D))
    store = spec.init_store(2, width=D, layers=L)

    @jax.jit
    @jax.grad
    def slope(params):
        after = spec.captured_into(
            store, h, spec.score(params, h, store.count), jnp.zeros((2, C), jnp.int32)
        )
        z, _ = spec.reconstruct(params, after.mem, after.rel)
        x = spec.reweave(h[:, 0], params["at1"], z, after.rel, after.valid[:, None])
        return jnp.square(x).sum()

    steepest = float(jnp.abs(slope(params)["score"]["w"]).max())
    assert steepest > 1e-2 if soft else steepest == 0


def test_first_in_first_out_with_much_recency():
    spec = Reweaving(segment=C, slots=2, capture=2, recency=1e6)
    params = spec.init(jax.random.key(0), width=D, layers=L)
    store = spec.init_store(1, width=D, layers=L)
    for i in range(3):
        h = jax.random.normal(jax.random.key(i), (1, 1, C, D))
        store = spec.captured_into(
            store, h, spec.score(params, h, store.count), jnp.full((1, C), i, jnp.int32)
        )
        assert store.document.tolist() == [[i, i]]


def test_the_order_of_slots_means_nothing_and_an_empty_store_nothing_at_all():
    spec = SPEC.reweaving
    params = spec.init(jax.random.key(0), width=D, layers=L)["at1"]
    params["o"] = jax.random.normal(jax.random.key(9), (D, D))
    x, z = (jax.random.normal(jax.random.key(i), (2, n, D)) for i, n in ((1, 5), (2, 4)))
    rel, seen = jax.random.normal(jax.random.key(3), (2, 4)), jnp.ones((2, 1, 4), bool)
    order = jnp.asarray([2, 0, 3, 1])
    f = jax.jit(spec.reweave)
    out = f(x, params, z, rel, seen)
    np.testing.assert_allclose(f(x, params, z[:, order], rel[:, order], seen), out, atol=1e-5)
    assert float(jnp.abs(out - x).max()) > 1e-3
    np.testing.assert_array_equal(f(x, params, z, rel, ~seen), x)


def test_cut_at_any_border_it_is_the_same():
    m, tokens = model(), ids()
    whole, last = read(m, tokens)
    first, store = read(m, tokens[:, :C])
    rest, end = read(m, tokens[:, C:], store)
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), whole, atol=1e-6)
    np.testing.assert_allclose(end.mem, last.mem, atol=1e-6)


@pytest.mark.parametrize(("scorer", "sizes"), [("learned", (5, 7)), ("surprise", (2, 2, 8))])
def test_decoding_equals_the_pass(scorer, sizes):
    """Cut inside a segment, at its end, and where whole segments are read at once."""
    m, tokens = model(scorer=scorer), ids()
    cache = m.init_cache(2, 99)
    graph, params = nnx.split(m)
    step = jax.jit(lambda p, t, c: nnx.merge(graph, p).extend_hidden(t, c))
    parts, at = [], 0
    for size in sizes:
        part, cache = step(params, tokens[:, at : at + size], cache)
        parts.append(part)
        at += size
    np.testing.assert_allclose(jnp.concatenate(parts, 1), read(m, tokens)[0], atol=1e-4)
    assert int(cache.length) == S * C


def test_one_program_for_any_number_of_segments():
    m, traces = model(), []
    graph, params = nnx.split(m)

    @jax.jit
    def one(params, tokens, store):
        traces.append(0)
        return nnx.merge(graph, params).read(tokens, store)[:2]

    store = m.init_store(2)
    for _ in range(5):
        _, store = one(params, ids(length=C), store)
    assert len(traces) == 1
    assert int(store.count) == 5


def test_the_scores_learn_once_something_is_woven_in():
    graph, params = nnx.split(model())

    @jax.jit
    def grad(params):
        return jax.grad(lambda p: jnp.sum(nnx.merge(graph, p).hidden(ids())[:, -1] ** 3))(params)

    g = grad(params)["weights"]["score"]["w"][...]
    assert float(jnp.abs(g).max()) > 1e-6


def test_documents_recall_nothing_of_each_other():
    m, tokens, other = model(), ids(), ids(seed=1)
    segments = jnp.broadcast_to((jnp.arange(S * C) >= C + 2).astype(jnp.int32)[None], tokens.shape)
    changed = jnp.where(segments == 0, other, tokens)
    one, two = (read(m, t, segments=segments)[0] for t in (tokens, changed))
    np.testing.assert_allclose(one[:, C + 2 :], two[:, C + 2 :], atol=1e-6)


def test_bad_input_is_named():
    with pytest.raises(InputError, match="capture=9"):
        Reweaving(segment=8, capture=9)
    with pytest.raises(InputError, match="expected layers from 0 to 3"):
        Reweaving(capture_layers=(4,)).init(jax.random.key(0), width=8, layers=4)
    with pytest.raises(InputError, match="heads=3"):
        Reweaving(heads=3).init(jax.random.key(0), width=8, layers=4)
    with pytest.raises(InputError, match="5 tokens"):
        model().hidden(ids(length=5))
