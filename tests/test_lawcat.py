"""LAWCAT: a linear layer on a teacher's projections, its cache, and the two stages' rules."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from causal_jax.attention import Dense
from causal_jax.errors import InputError
from causal_jax.linearize import linearize, linearized, untaught
from causal_jax.masks import Window
from causal_jax.models.decoder import Decoder
from causal_jax.nn.lawcat import Lawcat
from causal_jax.objectives.attention_transfer import AttentionTransfer
from causal_jax.paths import named_leaves
from causal_jax.positions import Rotary

SPEC = Decoder(
    vocab=19, layers=2, width=32, heads=4, kv_heads=2, hidden=48, context=64, rotary=Rotary()
)
teacher = SPEC.build(jax.random.key(0))
TOKENS = jax.random.randint(jax.random.key(1), (2, 21), 0, 19)
KINDS = {
    "plain": Lawcat(),
    "window": Lawcat(window=5),
    "rotated": Lawcat(rotate=True),
    "bare": Lawcat(kernel=1, gated=False, normalise=False, features=6),
}


def student_of(kind, **changes):
    """A student with parameters far from their start, so that everything matters."""
    spec = dataclasses.replace(KINDS[kind], **changes)
    graph, params = nnx.split(linearize(teacher, None, spec, key=jax.random.key(2)))
    keys = iter(jax.random.split(jax.random.key(3), 100))
    shake = lambda p: p + 0.3 * jax.random.normal(next(keys), p.shape)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(shake, params))


def run(model, tokens, **kw):
    graph, params = nnx.split(model)
    return jax.jit(lambda p, t: nnx.merge(graph, p)(t, **kw))(params, tokens)


def batch_of(tokens):
    zeros = jnp.zeros_like(tokens)
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    return {"tokens": tokens, "segments": zeros, "positions": places}


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_steps_are_the_whole(kind):
    model = student_of(kind)
    want = run(model, TOKENS)
    graph, params = nnx.split(model)
    extend = jax.jit(lambda p, t, c: nnx.merge(graph, p).extend(t, c))
    size = None
    for cuts in ((0, 12, 13, 14, 21), (0, 1, 2, 3, 21)):
        cache, out = model.init_cache(2, 64), []
        for a, b in itertools.pairwise(cuts):
            logits, cache = extend(params, TOKENS[:, a:b], cache)
            out.append(logits)
            now = sum(x.nbytes for x in jax.tree.leaves(cache.layers))
            assert size in (None, now)
            size = now
        np.testing.assert_allclose(jnp.concatenate(out, 1), want, atol=2e-4)
    assert size == sum(x.nbytes for x in jax.tree.leaves(model.init_cache(2, 9999).layers))


@pytest.mark.parametrize("kind", ["plain", "window"])
def test_padding_in_front_and_behind_changes_nothing(kind):
    model = student_of(kind)
    want = run(model, TOKENS)
    padded = jnp.pad(TOKENS, ((0, 0), (3, 0)), constant_values=7)
    graph, params = nnx.split(model)
    extend = jax.jit(lambda p, t, c: nnx.merge(graph, p).extend(t, c))
    cache = model.init_cache(2, 64, start=jnp.full(2, 3))
    first, cache = extend(params, padded[:, :14], cache)
    rest, _ = extend(params, padded[:, 14:], cache)
    got = jnp.concatenate([first, rest], 1)[:, 3:]
    np.testing.assert_allclose(got, want, atol=2e-4)
    behind = jnp.pad(TOKENS, ((0, 0), (0, 6)), constant_values=7)
    ids = jnp.where(jnp.arange(27)[None] < 21, 0, -1) * jnp.ones((2, 1), jnp.int32)
    np.testing.assert_allclose(run(model, behind, segments=ids)[:, :21], want, atol=2e-4)


@pytest.mark.parametrize("kind", ["plain", "window"])
def test_documents_are_apart(kind):
    model = student_of(kind)
    ids = jnp.broadcast_to((jnp.arange(21) >= 9).astype(jnp.int32)[None], (2, 21))
    places = jnp.where(ids == 1, jnp.arange(21)[None] - 9, jnp.arange(21)[None])
    got = run(model, TOKENS, segments=ids, positions=places)
    np.testing.assert_allclose(got[:, :9], run(model, TOKENS[:, :9]), atol=2e-4)
    np.testing.assert_allclose(got[:, 9:], run(model, TOKENS[:, 9:]), atol=2e-4)


def test_the_future_changes_nothing_and_one_token_is_enough():
    model = student_of("window")
    other = TOKENS.at[:, 11:].set((TOKENS[:, 11:] + 5) % 19)
    a, b = run(model, TOKENS), run(model, other)
    np.testing.assert_allclose(a[:, :11], b[:, :11], atol=1e-6)
    assert jnp.abs(a[:, 11:] - b[:, 11:]).max() > 1e-2
    np.testing.assert_allclose(run(model, TOKENS[:, :1]), a[:, :1], atol=1e-5)


def test_while_taught_the_model_is_the_teacher():
    taught = linearize(teacher, None, key=jax.random.key(2))
    np.testing.assert_allclose(run(taught, TOKENS), run(teacher, TOKENS), atol=1e-6)
    old, new = (named_leaves(nnx.split(m)[1]) for m in (teacher, taught))
    for name, leaf in old.items():
        np.testing.assert_array_equal(leaf, new[name])
    cache = taught.init_cache(2, 32)
    np.testing.assert_allclose(taught.extend(TOKENS, cache)[0], run(teacher, TOKENS), atol=1e-4)


def test_transfer_reaches_every_new_parameter_and_no_other():
    graph, params = nnx.split(linearize(teacher, None, Lawcat(teach=True), key=jax.random.key(2)))
    objective = AttentionTransfer()

    def loss(params):
        return objective.loss(nnx.merge(graph, params), batch_of(TOKENS), None)

    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert np.isfinite(value)
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], value, rtol=1e-6)
    for name, grad in named_leaves(grads).items():
        if "lawcat" in name:
            assert bool(jnp.isfinite(grad).all()), name
            for layer in grad:
                assert jnp.abs(layer).max() > 0, name


def test_some_layers_only_and_what_was_there_stays_their_teacher():
    mixed = dataclasses.replace(SPEC, layers=3, attention=(Dense(), Dense(window=7), Dense()))
    spec = linearized(mixed, (1, 2))
    assert [getattr(s, "teacher", None) for s in spec.layer_specs()] == [
        None, Dense(window=7), Dense(),
    ]  # fmt: skip
    model = spec.build(jax.random.key(0))
    value, _ = AttentionTransfer().loss(model, batch_of(TOKENS), None)
    assert np.isfinite(value)
    assert not any(getattr(s, "teach", False) for s in untaught(spec).layer_specs())


def test_what_goes_wrong_is_named():
    spec = linearized(SPEC)
    with pytest.raises(InputError, match="no attention any more"):
        linearized(spec)
    with pytest.raises(InputError, match="outside 0"):
        linearized(SPEC, 2)
    with pytest.raises(InputError, match="stage one"):
        untaught(untaught(spec))
    with pytest.raises(InputError, match="stage one"):
        AttentionTransfer().loss(teacher, batch_of(TOKENS), None)
    with pytest.raises(InputError, match="kernel"):
        Lawcat(kernel=0)
    with pytest.raises(InputError, match="mixer already"):
        Lawcat(teacher=Lawcat())
    with pytest.raises(InputError, match="half a head"):
        dataclasses.replace(linearized(SPEC), head_dim=7, rotary=None).build(jax.random.key(0))
    with pytest.raises(InputError, match="causal inside documents"):
        student_of("plain")(TOKENS, mask=Window(3, 0))
