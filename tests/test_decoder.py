"""The decoder: caches equal full passes, layouts equal each other, taps cost nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from causal_jax.attention import Dense
from causal_jax.models.decoder import Decoder
from causal_jax.nn.stack import Segment, segments_of
from causal_jax.positions import Rotary
from causal_jax.taps import run, site, sites

TINY = Decoder(vocab=31, layers=3, width=16, heads=4, kv_heads=2, context=32)
VARIANTS = {
    "llama": TINY,
    "gpt2": dataclasses.replace(
        TINY,
        kv_heads=0,
        norm="layer",
        activation="gelu_tanh",
        rotary=None,
        learned_positions=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    ),
    "neox": dataclasses.replace(
        TINY, parallel=True, rotary=Rotary(fraction=0.5), norm="layer", tied=False
    ),
    "gemma2": dataclasses.replace(
        TINY,
        layers=5,
        post_norm=True,
        activation="geglu_tanh",
        attention=(Dense(window=3, soft_cap=50.0), Dense(soft_cap=50.0)),
        logits_soft_cap=30.0,
        embed_scale=4.0,
        head_dim=8,
    ),
    "qwen3": dataclasses.replace(TINY, qk_norm=True, qkv_bias=True, scan=False),
}


@pytest.fixture(params=VARIANTS, scope="module")
def spec(request):
    return VARIANTS[request.param]


@pytest.fixture(scope="module")
def model(spec):
    """Parameters away from their starting values (biases 0, scales 1): no fixed points."""
    graph, params = built(spec)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    leaves = [x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def built(spec):
    """(graph, params); one compiled program instead of many small ones."""
    graph = nnx.split(nnx.eval_shape(lambda: spec.build(jax.random.key(0))))[0]
    return graph, jax.jit(lambda: nnx.split(spec.build(jax.random.key(0)))[1])()


def jitted(model, method="__call__"):
    """A method as one compiled program."""
    graph, params = nnx.split(model)
    call = jax.jit(lambda params, *a, **kw: getattr(nnx.merge(graph, params), method)(*a, **kw))
    return lambda *a, **kw: call(params, *a, **kw)


def ids(batch, length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 31, (batch, length)), jnp.int32)


def close(a, b, tol=2e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=tol, rtol=tol)


def test_causal(model):
    tokens, forward = ids(2, 11), jitted(model)
    changed = tokens.at[:, 6:].set((tokens[:, 6:] + 1) % 31)
    a, b = forward(tokens), forward(changed)
    close(a[:, :6], b[:, :6], 1e-6)
    assert np.abs(a - b)[:, 6:].max() > 1e-3


def test_prefill_and_steps_equal_the_full_pass_at_every_split(model):
    tokens, extend = ids(2, 7), jitted(model, "extend")
    full = jitted(model)(tokens)
    for split in range(8):
        cache, parts = model.init_cache(2, 9), []
        if split:
            logits, cache = extend(tokens[:, :split], cache)
            parts.append(logits)
        for t in range(split, 7):
            logits, cache = extend(tokens[:, t : t + 1], cache)
            parts.append(logits)
        assert int(cache.length) == 7
        close(jnp.concatenate(parts, 1), full)


def test_left_padded_batch_equals_single_rows(model):
    tokens, pad, extend, forward = ids(3, 8), [0, 3, 6], jitted(model, "extend"), jitted(model)
    padded = jnp.stack([jnp.pad(row[: 8 - p], (p, 0)) for row, p in zip(tokens, pad)])
    cache = model.init_cache(3, 10, start=jnp.asarray(pad))
    logits, cache = extend(padded[:, :7], cache)
    last, cache = extend(padded[:, 7:], cache)
    logits = jnp.concatenate([logits, last], 1)
    for row, p, got in zip(tokens, pad, logits):
        close(got[p:], forward(row[None, : 8 - p])[0])


def test_packed_documents_equal_documents_alone(model):
    tokens, forward = ids(1, 11), jitted(model)
    segments = jnp.asarray([[0] * 5 + [1] * 6])
    positions = jnp.asarray([[*range(5), *range(6)]])
    packed = forward(tokens, segments=segments, positions=positions)
    close(packed[:, :5], forward(tokens[:, :5]))
    close(packed[:, 5:], forward(tokens[:, 5:]))


def test_unstacked_layers_are_the_same_model(model):
    tokens, apart = ids(2, 7), model.unstacked()
    assert all(s.repeats == 1 and len(s.specs) == 1 for s in apart.stack.segments)
    full = jitted(model)(tokens)
    close(jitted(apart)(tokens), full)
    close(jitted(apart, "extend")(tokens, apart.init_cache(2, 8))[0], full)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_remat_changes_no_gradient(name):
    params = built(VARIANTS[name])[1]

    def grads(remat):
        graph = built(dataclasses.replace(VARIANTS[name], remat=remat))[0]
        loss = lambda p: jnp.mean(jnp.square(nnx.merge(graph, p)(ids(2, 6))))  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    expected = grads("none")
    for remat in ("dots", "full"):
        jax.tree.map(lambda a, b: close(a, b, 1e-5), expected, grads(remat))


def test_every_parameter_receives_a_gradient(model):
    graph, params = nnx.split(model)
    tokens = jnp.arange(31, dtype=jnp.int32)[None]
    loss = lambda p: jnp.mean(jnp.square(nnx.merge(graph, p)(tokens)))  # noqa: E731
    for path, g in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        if "positions" in jax.tree_util.keystr(path):
            g = g[:31]  # rows beyond the sequence are not read
        assert (np.abs(np.asarray(g)).max(-1) > 0).all(), jax.tree_util.keystr(path)


class Untapped:
    """What a model without taps would do, written without `causal_jax.taps`."""

    def __call__(self, name, x):
        return x

    def wants(self, name):
        return False

    def scope(self, prefix):
        return self

    def loop(self, fs, carry, xs, *, axis="layer", length=None, start=0, scan=True, remat=None):
        assert remat is None

        def body(carry, xs):
            ys = []
            for f, x in zip(fs, xs):
                carry, y = f(carry, x, self)
                ys.append(y)
            return carry, tuple(ys)

        if scan:
            return jax.lax.scan(body, carry, xs)
        repeats = jax.tree.leaves(xs)[0].shape[0]
        assert repeats == 1
        return body(carry, jax.tree.map(lambda a: a[0], xs))


def test_taps_off_is_letter_for_letter_the_untapped_program(spec, model):
    tokens = ids(2, 6)
    graph, params = nnx.split(model)
    off = jax.make_jaxpr(lambda p, t: nnx.merge(graph, p)(t))(params, tokens)
    # beartype checks annotations in the tests, and `Untapped` is not a Tap on purpose: go past the
    # check
    hidden = type(model).__call__
    untapped = jax.make_jaxpr(
        lambda p, t: getattr(hidden, "__wrapped__", hidden)(nnx.merge(graph, p), t)
    )(params, tokens)
    assert str(off) == str(untapped)


def test_sites_are_those_of_the_contract(spec, model):
    found = sites(model, ids(2, 6))
    per_layer = {"resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_act"}
    per_layer |= {"q", "k", "v", "attn.z"}
    assert per_layer | {"embed", "final", "logits"} <= set(found)
    for name in per_layer:
        assert found[name].shape[0] == spec.layers, name


def test_captures_come_in_layer_order(model, spec):
    graph, params = nnx.split(model)
    tokens = ids(2, 6)

    @jax.jit
    def look(params, edits):
        capture = ["resid_pre", "resid_post", "embed"]
        return run(nnx.merge(graph, params), tokens, edits=edits, capture=capture)[1]

    seen = look(params, [])
    close(seen["resid_pre"][0], seen["embed"])
    close(seen["resid_pre"][1:], seen["resid_post"][:-1])
    for layer in range(spec.layers):
        edited = look(params, [site("resid_post", layer=jnp.asarray(layer)).add(1.0)])
        delta = np.abs(edited["resid_post"] - seen["resid_post"]).max((1, 2, 3))
        assert (delta[:layer] == 0).all()
        assert (delta[layer:] > 0).all()


def test_a_knocked_out_edge_carries_nothing(model):
    graph, params = nnx.split(model)
    tokens = ids(2, 6)
    cut = [site("attn.mask").at[:, :, 3:, 1].set(False)]

    @jax.jit
    def patterns(params):
        capture = ["attn.pattern", "logits"]
        return run(nnx.merge(graph, params), tokens, edits=cut, capture=capture)[1]

    seen = patterns(params)
    assert (seen["attn.pattern"][:, :, :, 3:, 1] == 0).all()
    np.testing.assert_allclose(seen["attn.pattern"].sum(-1), 1.0, rtol=1e-5)
    fused = jax.jit(lambda p: run(nnx.merge(graph, p), tokens, edits=cut)[0])(params)
    close(fused, seen["logits"])


def test_dropout_needs_a_key_and_then_acts():
    graph, params = built(dataclasses.replace(TINY, dropout=0.5))
    model = nnx.merge(graph, params)
    tokens, forward = ids(2, 6), jitted(model)
    close(forward(tokens), jitted(nnx.merge(built(TINY)[0], params))(tokens))
    a, b, c = (forward(tokens, key=jax.random.key(s)) for s in (1, 2, 1))
    assert np.abs(a - b).max() > 1e-3
    close(a, c, 0)


def test_bfloat16_stays_near_float32(spec, model):
    tokens = ids(2, 16)
    params = nnx.split(model)[1]
    half = built(dataclasses.replace(spec, dtype="bfloat16"))[0]
    got, want = jitted(nnx.merge(half, params))(tokens), jitted(model)(tokens)
    assert got.dtype == jnp.float32
    assert np.sqrt(np.mean((got - want) ** 2)) < 0.05 * np.sqrt(np.mean(want**2))


def test_nothing_but_parameters(model):
    _, params, rest = nnx.split(model, nnx.Param, ...)
    assert not jax.tree.leaves(rest)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))


def test_counts():
    spec = dataclasses.replace(TINY, tied=False)
    n, d, f = 16 * 4 * (4 + 2 + 2 + 4), 16, spec.hidden_width
    assert spec.param_count() == 2 * 31 * d + 3 * (n + 3 * d * f + 2 * d) + d
    assert spec.flops_per_token(8) > 6 * (spec.param_count() - 31 * d - 7 * d)


def test_segments_of_a_pattern():
    a, b = Dense(window=4), Dense()
    assert segments_of([a] * 4) == (Segment(0, (a,), 4),)
    assert segments_of([a, b] * 3) == (Segment(0, (a, b), 3),)
    assert segments_of([a, b, a, b, a]) == (Segment(0, (a, b), 2), Segment(4, (a,), 1))
    assert segments_of([a, a, a, b]) == (Segment(0, (a,), 3), Segment(3, (b,), 1))
    assert segments_of([a]) == (Segment(0, (a,), 1),)
    assert len(segments_of([a, a], scan=False)) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": 0}, "layers"),
        ({"kv_heads": 3}, "kv_heads must divide heads"),
        ({"width": 18}, "heads must divide width"),
        ({"attention": ()}, "attention"),
        ({"dropout": 1.0}, "dropout"),
        ({"hidden": -1}, "hidden"),
    ],
)
def test_bad_sizes_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **change)


def test_a_vocabulary_is_needed():
    with pytest.raises(ValueError, match="vocab"):
        Decoder(layers=1, width=8, heads=1).build(jax.random.key(0))


def test_padding_in_front_of_sinks_is_refused():
    spec = dataclasses.replace(TINY, vocab=31, attention=(Dense(window=4, sinks=2),))
    model = nnx.eval_shape(lambda: spec.build(jax.random.key(0)))
    with pytest.raises(ValueError, match="absolute places"):
        model.init_cache(2, 8, start=jnp.zeros(2, jnp.int32))
