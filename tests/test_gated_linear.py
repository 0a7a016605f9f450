"""Gated linear attention: three forms of the same numbers, states, documents, padding, features."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from causal_jax.attention import Dense
from causal_jax.attention.gated_linear import (
    GatedLinear,
    gated_linear_attention,
    gated_linear_recurrent,
    hedgehog,
)
from causal_jax.errors import InputError
from causal_jax.masks import Causal, Documents, Keys, Prefix, Window
from causal_jax.models.decoder import Decoder
from pallas_kernels.gated_linear import gated_linear_chunked

CHUNKED = {C: jax.jit(functools.partial(gated_linear_chunked, chunk=C)) for C in (16, 64)}
recurrent = jax.jit(gated_linear_recurrent)
attend = jax.jit(
    functools.partial(gated_linear_attention, mask=Causal()),
    static_argnames=("implementation", "return_state"),
)


def problem(scale, B=2, T=75, N=4, K=2, F=8, V=5, seed=0):
    rng = np.random.default_rng(seed)
    arrays = (
        rng.uniform(size=(B, T, N, F)),
        rng.uniform(size=(B, T, K, F)),
        rng.normal(size=(B, T, K, V)),
        -scale * rng.uniform(size=(B, T, K, F)),
    )
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


def in_float64(q, k, v, g, state):
    """The recurrence in numpy."""
    q, k, v, g, s = (np.asarray(x, np.float64) for x in (q, k, v, g, state))
    group = q.shape[2] // k.shape[2]
    out = []
    for t in range(q.shape[1]):
        s = np.exp(g[:, t])[..., None] * s + k[:, t][..., None] * v[:, t][:, :, None]
        out.append(np.einsum("bnf,bnfv->bnv", q[:, t], np.repeat(s, group, 1)))
    return np.stack(out, 1), s


@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0])
def test_all_forms_are_the_recurrence(scale):
    q, k, v, g = problem(scale)
    state = jnp.ones((2, 2, 8, 6))
    w = jnp.concatenate([v, jnp.ones((*v.shape[:3], 1))], -1)
    want, end = in_float64(q, k, w, g, state)
    size = np.abs(want).max()
    for form in (recurrent, CHUNKED[16], CHUNKED[64]):
        o, s = form(q, k, w, g, state)
        np.testing.assert_allclose(o / size, want / size, atol=1e-5)
        np.testing.assert_allclose(s, end, atol=1e-5 * size)
    want = in_float64(q, k, w, g, 0 * state)[0]
    want = want[..., :-1] / want[..., -1:]
    for name in ("recurrent", "xla", "reference", None):
        o = attend(q, k, v, log_gate=g, implementation=name)
        np.testing.assert_allclose(o, want, atol=1e-4 if scale == 20 else 1e-5, err_msg=str(name))


@pytest.mark.parametrize("scale", [0.05, 3.0])
def test_long_sequences_of_mild_and_of_strong_decay(scale):
    q, k, v, g = problem(scale, T=530, N=2, F=4, V=3)
    ids = jnp.asarray(np.arange(530)[None] // 301).repeat(2, 0).astype(jnp.int32)
    want, end = in_float64(q[:, 301:], k[:, 301:], v[:, 301:], g[:, 301:], jnp.zeros((2, 2, 4, 3)))
    zero = jnp.zeros((2, 2, 4, 3))
    o, s = CHUNKED[64](q, k, v, g, zero, ids)
    size = np.abs(want).max()
    np.testing.assert_allclose(o[:, 301:] / size, want / size, atol=1e-5)
    np.testing.assert_allclose(s / size, end / size, atol=1e-5)
    pull = (jnp.cos(jnp.arange(o.size)).reshape(o.shape), jnp.ones_like(s))

    def back(form):
        return jax.jit(lambda *a: jax.vjp(lambda *a: form(*a, ids), *a)[1](pull))(q, k, v, g, zero)

    for a, b in zip(back(CHUNKED[64]), back(gated_linear_recurrent)):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0])
def test_gradients_of_chunks_are_those_of_the_recurrence(scale):
    q, k, v, g = problem(scale)

    def loss(name, *arrays):
        q, k, v, g = arrays
        return jnp.sum(jnp.sin(attend(q, k, v, log_gate=g, implementation=name)))

    ours, theirs = (
        jax.jit(jax.grad(functools.partial(loss, name), argnums=(0, 1, 2, 3)))(q, k, v, g)
        for name in ("xla", "recurrent")
    )
    for a, b in zip(ours, theirs):
        assert bool(jnp.isfinite(a).all())
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("T", [1, 7, 8, 9, 64, 65])
def test_any_length_and_any_cut(T):
    q, k, v, g = problem(0.3, T=T)
    o, end = attend(q, k, v, log_gate=g, return_state=True)
    for cut in {0, 1, T // 2, T}:
        a, s = attend(*(x[:, :cut] for x in (q, k, v)), log_gate=g[:, :cut], return_state=True)
        b, s = attend(
            *(x[:, cut:] for x in (q, k, v)), log_gate=g[:, cut:], state=s, return_state=True
        )
        np.testing.assert_allclose(jnp.concatenate([a, b], 1), o, atol=1e-5)
        np.testing.assert_allclose(s, end, atol=1e-5)


def test_documents_are_apart():
    q, k, v, g = problem(0.3)
    ids = jnp.asarray([[0] * 20 + [1] * 50 + [-1] * 5, [3] * 7 + [4] + [5] * 67])
    for name in ("recurrent", "xla", "reference"):
        o = gated_linear_attention(
            q, k, v, log_gate=g, mask=Causal() & Documents(ids), implementation=name, chunk=16
        )
        for row, cuts in ((0, (0, 20, 70, 75)), (1, (0, 7, 8, 75))):
            for a, b in itertools.pairwise(cuts):
                one = (x[row : row + 1, a:b] for x in (q, k, v))
                alone = attend(*one, log_gate=g[row : row + 1, a:b])
                np.testing.assert_allclose(o[row : row + 1, a:b], alone, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["recurrent", "xla", "reference"])
def test_padding_before_and_behind_changes_nothing(name):
    q, k, v, g = problem(0.3, T=30)
    want, end = attend(q, k, v, log_gate=g, return_state=True)
    for before, behind in ((5, 0), (0, 6)):
        padded = [jnp.pad(x, ((0, 0), (before, behind), (0, 0), (0, 0))) for x in (q, k, v, g)]
        padded = [jnp.where(x == 0, 7.0, x) for x in padded[:3]] + padded[3:]
        padded[3] = jnp.where(padded[3] == 0, -0.1, padded[3])
        real = (jnp.arange(30 + before + behind) >= before) & (
            jnp.arange(30 + before + behind) < before + 30
        )
        mask = Causal() & (~Prefix(before) if before else Prefix(jnp.full(2, 30)))
        keys = Causal() & Keys(real)
        for m in (mask, keys):
            run = functools.partial(gated_linear_attention, *padded[:3], log_gate=padded[3], mask=m)
            o = run(implementation=name)
            np.testing.assert_allclose(o[:, before : before + 30], want, atol=1e-5)
            if name != "reference":
                state = run(return_state=True, implementation=name)[1]
                np.testing.assert_allclose(state, end, atol=1e-5)


def test_without_gates_it_is_normalised_linear_attention():
    q, k, v, _ = problem(1.0, N=2)
    w = jnp.tril(jnp.ones((75, 75)))[None, None] * jnp.einsum("btnf,bsnf->bnts", q, k)
    want = jnp.einsum("bnts,bsnv->btnv", w / w.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(attend(q, k, v), want, atol=1e-5)


def test_outputs_are_means_of_past_values():
    q, k, v, g = problem(2.0, N=2)
    o = attend(q, k, v, log_gate=g)
    low, high = jax.lax.cummin(v, axis=1), jax.lax.cummax(v, axis=1)
    assert bool(jnp.all((o >= low - 1e-5) & (o <= high + 1e-5)))


def test_hedgehog_features_are_positive_halves():
    x = 3 * jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    w = jax.random.normal(jax.random.key(1), (3, 8, 4))
    phi = hedgehog(x, w)
    assert phi.shape == (2, 5, 3, 8)
    assert bool(jnp.all(phi >= 1e-12))
    np.testing.assert_allclose(phi.reshape(2, 5, 3, 2, 4).sum(-1), 1.0, atol=1e-5)
    assert hedgehog(1e4 * x).min() > 0


def test_streaming_is_the_whole_and_of_constant_size():
    spec = GatedLinear(half_life=8.0)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 21, n, 8)), jnp.float32) for n in (4, 2, 2))
    want, state = spec(q, k, v, mask=Causal()), spec.init_state(2, 2, 8)
    step, out = jax.jit(spec.step), []
    for t in range(21):
        o, new = step(*(x[:, t : t + 1] for x in (q, k, v)), state)
        assert new.shape == state.shape
        state = new
        out.append(o)
    np.testing.assert_allclose(jnp.concatenate(out, 1), want, atol=1e-5)


def test_a_decoder_has_a_state_for_a_cache():
    spec = Decoder(
        vocab=19, layers=2, width=32, heads=4, kv_heads=2, context=64,
        attention=(GatedLinear(half_life=8.0), Dense()),
    )  # fmt: skip
    graph, params = nnx.split(spec.build(jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (2, 21), 0, 19)
    want = jax.jit(lambda p, t: nnx.merge(graph, p)(t))(params, tokens)
    extend = jax.jit(lambda p, t, c: nnx.merge(graph, p).extend(t, c))
    model = nnx.merge(graph, params)
    sizes = [
        sum(x.nbytes for x in jax.tree.leaves(model.init_cache(2, n).layers[0][0])) for n in (8, 99)
    ]
    assert sizes[0] == sizes[1] == 2 * 2 * 16 * 9 * 4  # B K F (H + 1) of float32
    padded = jnp.stack([jnp.pad(tokens[0], (0, 3)), jnp.pad(tokens[1], (3, 0), constant_values=7)])
    cache, out = model.init_cache(2, 64, start=jnp.asarray([0, 3])), []
    for a, b in itertools.pairwise((0, 1, 12, 13, 24)):
        logits, cache = extend(params, padded[:, a:b], cache)
        out.append(logits)
    out = jnp.concatenate(out, 1)
    np.testing.assert_allclose(jnp.stack([out[0, :21], out[1, 3:]]), want, atol=2e-4)


def test_what_does_not_fit_is_named():
    q, k, v, g = problem(1.0)
    with pytest.raises(InputError, match="gate per feature"):
        gated_linear_attention(q, k, v, log_gate=g[..., :4], mask=Causal())
    with pytest.raises(InputError, match="a multiple of K"):
        gated_linear_attention(q[:, :, :3], k, v, mask=Causal())
    with pytest.raises(InputError, match="state"):
        gated_linear_attention(q, k, v, mask=Causal(), state=jnp.zeros((2, 2, 8, 5)))
    with pytest.raises(InputError, match="power of two"):
        GatedLinear(chunk=24)
    with pytest.raises(InputError, match="half_life"):
        GatedLinear(half_life=0.0)
    with pytest.raises(NotImplementedError, match="reference"):
        gated_linear_attention(q, k, v, mask=Causal() & Window(3, 0), implementation="xla")
    with pytest.raises(InputError, match="no more"):
        GatedLinear().step(q, k, v, jnp.zeros((2, 2, 16, 6)), mask=Causal() & Window(3, 0))
    with pytest.raises(NotImplementedError, match="state"):
        gated_linear_attention(q, k, v, mask=Causal() & Window(3, 0), return_state=True)
