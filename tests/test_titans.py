"""Titans layers in a decoder: nothing looks ahead, decoding equals the pass, documents apart."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from causal_jax.errors import InputError
from causal_jax.memory import Deep, Delta, LastLayer
from causal_jax.models.decoder import Decoder
from causal_jax.models.titans import titans
from causal_jax.nn.mac import MAC, mac_mask
from causal_jax.nn.titans import LMM, MAG, MAL
from causal_jax.objectives.long_document import LongDocument
from causal_jax.objectives.next_token import NextToken
from causal_jax.taps import run

T, D = 14, 8
KEY = 3  # where rounding is amplified least: one ulp of the parameters moves logits by 5e-6 to 2e-4
DELTA = Delta(theta_bias=1.0, tile=4)
SPECS = {
    "lmm": LMM(memory=DELTA, persistent=2),
    "lmm-deep": LMM(memory=Deep(depth=2, expansion=2, anchor=4), persistent=2),
    "mag": MAG(memory=DELTA, persistent=2, window=4),
    "mal": MAL(memory=LastLayer(expansion=2, tile=4), persistent=2, window=4),
    "mac": MAC(memory=DELTA, persistent=2, segment=4),
    "mac-deep": MAC(memory=Deep(depth=2, expansion=2, anchor=2), persistent=0, segment=4),
}
LEAKS = {
    "mac-paper": MAC(memory=DELTA, persistent=2, segment=4, mask="paper"),
    "mac-segment": MAC(memory=DELTA, persistent=2, segment=4, read="segment"),
}
SLOW = ("lmm", "mal", "lmm-deep", "mac-deep")


@functools.cache
def model(name):
    """A decoder of two such layers, its parameters away from their starting values."""
    spec = Decoder(
        vocab=11, layers=2, width=D, heads=2, hidden=16, context=64,
        attention=((SPECS | LEAKS)[name],),
    )  # fmt: skip

    def make(key):
        graph, params = nnx.split(spec.build(key))
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        noisy = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
        return nnx.merge(graph, jax.tree.unflatten(tree, noisy))

    with jax.ensure_compile_time_eval():
        return jax.jit(make)(jax.random.key(KEY))


@functools.partial(jax.jit, static_argnums=0)
def _call(graph, params, tokens, kw):
    return nnx.merge(graph, params)(tokens, **kw)


@functools.partial(jax.jit, static_argnums=0)
def _extend(graph, params, tokens, cache):
    return nnx.merge(graph, params).extend(tokens, cache)


def call(name, tokens, **kw):
    return _call(*nnx.split(model(name)), tokens, kw)


def ids(rows=2, length=T, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 11, (rows, length)), jnp.int32)


@pytest.mark.parametrize(
    "name",
    ["mag", "mac", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)],
)
def test_decoding_equals_the_pass(name):
    tokens, m = ids(), model(name)
    graph, params = nnx.split(m)
    cache, parts = m.init_cache(2, T), []
    # whole segments through all layers, then a piece that begins a segment, then inside of it
    for a, b in ((0, 4), (4, 8), (8, 10), (10, 12), (12, 14)):
        part = tokens[:, a:b]
        logits, cache = _extend(graph, params, part, cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), call(name, tokens), atol=2e-5)


def changed_from(name, t):
    """|change of the logits| [T] when tokens t, t + 1, ... are others."""
    tokens = ids(1)
    other = tokens.at[:, t:].set((tokens[:, t:] + 3) % 11)
    one, two = call(name, jnp.tile(tokens, (2, 1))), call(name, jnp.tile(other, (2, 1)))
    return np.asarray(jnp.abs(one - two).max((0, 2)))


@pytest.mark.parametrize("name", ["lmm", "mag", "mal", "mac"])
def test_nothing_looks_ahead(name):
    for t in (0, 1, 3, 6, T - 1):
        change = changed_from(name, t)
        assert (change[:t] == 0).all()
        assert change[t] > 1e-4
    first = ids().at[:, 0].set((ids()[:, 0] + 3) % 11)
    far = jnp.abs(call(name, ids()) - call(name, first))[:, T - 1]
    assert float(far.max()) > 1e-6, "the memory carries the first token to the last"


@pytest.mark.parametrize("name", LEAKS)
def test_what_shows_the_future_is_caught(name):
    assert changed_from(name, 2)[:2].max() > 1e-5
    with pytest.raises(InputError, match="cannot be decoded"):
        model(name).init_cache(1, T)


def documents(name, tokens, first):
    """Logits of two documents in a row, the second beginning at token `first`."""
    at = jnp.arange(T)
    wide = lambda x: jnp.broadcast_to(x[None], (2, T))  # noqa: E731
    places = wide(jnp.where(at < first, at, at - first))
    return call(name, tokens, segments=wide((at >= first).astype(jnp.int32)), positions=places)


@pytest.mark.parametrize("name", ["lmm", "mag", "mal", "mac"])
def test_documents_stay_apart(name):
    """A document is the same behind another as in front; MAC's begin where a segment begins."""
    tokens, first = ids(), 8 if name == "mac" else 5
    swapped = jnp.concatenate([tokens[:, first:], tokens[:, :first]], 1)
    behind = documents(name, tokens, first)[:, first:]
    front = documents(name, swapped, T - first)[:, : T - first]
    np.testing.assert_allclose(behind, front, atol=2e-5)


def test_a_document_inside_a_segment_does_not_see_the_one_before():
    tokens = ids()
    one = documents("mac", tokens, 6)
    two = documents("mac", tokens.at[:, :6].set(ids(seed=1)[:, :6]), 6)
    assert float(jnp.abs(one - two)[:, :6].max()) > 1e-3
    np.testing.assert_allclose(one[:, 6:], two[:, 6:], atol=1e-6)


def test_the_mask_of_a_segment():
    strict, paper = (mac_mask(3, 1, mode)[0, 0].astype(int) for mode in ("strict", "paper"))
    assert strict.tolist() == [[1, 1, 0, 0, 1, 0, 0], [1, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]]
    assert paper[0].tolist() == [1, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("name", ["mag", pytest.param("mac", marks=pytest.mark.slow)])
def test_every_parameter_learns(name):
    graph, params = nnx.split(model(name))

    def loss(params):
        logits = nnx.merge(graph, params)(ids())
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 0])

    grads = jax.jit(jax.grad(loss))(params)
    still = [
        "/".join(map(str, path))
        for path, g in nnx.to_flat_state(grads)
        if not np.abs(np.asarray(g[...])).max() > 0
    ]
    assert still == []


def test_surprise_can_be_read():
    graph, params = nnx.split(model("mac"))
    read = jax.jit(
        lambda p, t: run(nnx.merge(graph, p), t, capture=["mac.mem.surprise", "mac.h"])[1]
    )
    acts = read(params, ids(length=12))
    assert acts["mac.mem.surprise"].shape == (2, 3, 2, 4, 2)  # layer, segment, B, C, N
    assert acts["mac.h"].shape == (2, 3, 2, 4, D)


def test_bad_input_is_named():
    with pytest.raises(InputError, match="segment=6: expected a multiple"):
        MAC(memory=Deep(anchor=4), segment=6)
    with pytest.raises(InputError, match="window=0"):
        MAG(window=0)
    with pytest.raises(InputError, match="qk_norm"):
        dataclasses.replace(model("mag").spec, qk_norm=True).build(jax.random.key(0))
    with pytest.raises(InputError, match="absolute places"):
        model("mac").init_cache(2, T, start=jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize("name", ["mag", pytest.param("mac", marks=pytest.mark.slow)])
def test_a_long_document_is_read_window_after_window(name):
    """The loss of the whole row; gradients of the last window do not reach the first."""
    graph, params = nnx.split(model(name))
    row = ids(length=13)
    batch = {"tokens": row[:, :12], "targets": row[:, 1:], "weights": jnp.ones((2, 12))}
    batch |= {
        "segments": jnp.zeros((2, 12), jnp.int32),
        "positions": jnp.arange(12)[None] + 0 * row[:, :12],
    }

    def loss(params, window):
        objective = LongDocument(window=window) if window else NextToken()
        return objective.loss(nnx.merge(graph, params), batch, None)[0]

    value = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (whole, g), (cut, h) = value(params, 0), value(params, 4)
    assert float(cut) == pytest.approx(float(whole), abs=1e-5)
    apart = max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(g), jax.tree.leaves(h)))
    assert 1e-5 < apart < 10.0


def test_mac_begins_by_telling_tokens_apart():
    """Grouped keys begin as the first queries of their group, what is read as h at a tenth."""
    spec = Decoder(vocab=11, layers=1, width=16, heads=4, kv_heads=2, attention=(MAC(segment=4),))
    mixer: Any = spec.build(jax.random.key(0)).stack.blocks[0][0].attention
    read = lambda x: np.asarray(x[...]).reshape(16, -1)  # noqa: E731
    q, k = read(mixer.attention.q.kernel).reshape(16, 2, 2, 4), read(mixer.attention.k.kernel)
    np.testing.assert_array_equal(k.reshape(16, 2, 4), q[:, :, 0])
    assert np.abs(q[:, :, 0] - q[:, :, 1]).max() > 0.1
    h, m = (read(part.weights.o.kernel).std() for part in (mixer.reader, mixer.memory))
    assert 0.05 < h / m < 0.2


def test_the_sizes_are_what_they_are_called():
    for kind in ("lmm", "mac", "mag", "mal"):
        for size in ("170m", "340m", "400m", "760m"):
            spec = titans(kind, size, vocab=32_000)
            assert spec.param_count() == pytest.approx(float(size[:-1]) * 1e6, rel=0.04)
