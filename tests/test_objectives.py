"""Chunked cross-entropy equals the plain one, values and gradients, and never holds all logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from causal_jax.models.decoder import Decoder
from causal_jax.objectives._cross_entropy import chunked_cross_entropy
from causal_jax.objectives.next_token import NextToken


def problem(batch=2, length=13, width=8, vocab=50, seed=0):
    rng = np.random.default_rng(seed)
    h = jnp.asarray(rng.normal(size=(batch, length, width)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(width, vocab)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (batch, length)), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 2, (batch, length)), jnp.float32)
    return h, w, targets, weights


def unembed(w):
    return lambda h: jnp.einsum("...d,dv->...v", h, w)


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_equals_log_softmax(chunk):
    h, w, targets, weights = problem()

    def plain(h, w):
        logp = jax.nn.log_softmax(h @ w)
        return -jnp.sum(jnp.take_along_axis(logp, targets[..., None], -1)[..., 0] * weights)

    def chunked(h, w):
        return chunked_cross_entropy(h, unembed(w), targets, weights, chunk=chunk)["nll"]

    np.testing.assert_allclose(chunked(h, w), plain(h, w), rtol=1e-6)
    for got, want in zip(jax.grad(chunked, (0, 1))(h, w), jax.grad(plain, (0, 1))(h, w)):
        np.testing.assert_allclose(got, want, atol=1e-5)
    sums = chunked_cross_entropy(h, unembed(w), targets, weights, chunk=chunk)
    hits = (jnp.argmax(h @ w, -1) == targets) * weights
    np.testing.assert_allclose(sums["correct"], hits.sum())
    np.testing.assert_allclose(sums["count"], weights.sum())
    np.testing.assert_allclose(
        sums["z2"], jnp.sum(jax.nn.logsumexp(h @ w, axis=-1) ** 2 * weights), rtol=1e-5
    )


def test_never_holds_all_logits():
    h, w, targets, weights = problem(batch=2, length=1024, width=8, vocab=4096)

    def peak(chunk):
        def nll(h, w):
            return chunked_cross_entropy(h, unembed(w), targets, weights, chunk=chunk)["nll"]

        return jax.jit(jax.grad(nll)).lower(h, w).compile().memory_analysis().temp_size_in_bytes

    all_logits = 2 * 1024 * 4096 * 4
    assert peak(32) < all_logits / 8
    assert peak(1024) >= all_logits / 2


def test_next_token_pieces_do_not_change_the_loss():
    model = Decoder(vocab=300, layers=1, width=16, heads=2).build(jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 300, (4, 400)), jnp.int32)
    batch = {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, 1),
        "weights": jnp.asarray(rng.integers(0, 2, (4, 400)), jnp.float32),
        "segments": jnp.zeros((4, 400), jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(400)[None], (4, 400)),
    }
    small, whole = NextToken(z_loss=1e-2, logits_mib=1), NextToken(z_loss=1e-2)
    graph, params = nnx.split(model)

    def grads(objective):
        loss = lambda p: objective.loss(nnx.merge(graph, p), batch, None)[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    (a, da), (b, db) = grads(small), grads(whole)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), da, db)
    _, metrics = whole.loss(model, batch, None)
    assert float(metrics["loss"][1]) == float(batch["weights"].sum())
    plain = dataclasses.replace(whole, z_loss=0.0).loss(model, batch, None)[0]
    np.testing.assert_allclose(plain, metrics["loss"][0] / metrics["loss"][1], rtol=1e-6)
    assert a > plain


def test_a_batch_without_targets_is_zero_not_nan():
    model = Decoder(vocab=10, layers=1, width=8, heads=1).build(jax.random.key(0))
    zeros = jnp.zeros((1, 4), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "segments", "positions"), zeros)
    batch["weights"] = jnp.zeros((1, 4))
    assert float(NextToken().loss(model, batch, None)[0]) == 0.0


@pytest.mark.parametrize("bad", [{"z_loss": -1.0}, {"logits_mib": 0}])
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        NextToken(**bad)
