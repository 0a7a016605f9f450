"""GAM: what it sees and does not see, the bank as attention, parameters, streaming."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from causal_jax.errors import InputError
from causal_jax.masks import Causal, Window
from causal_jax.models.decoder import Decoder
from causal_jax.nn.attention import Rotations
from causal_jax.nn.gam import GAM, GAMMixer, memory_read, slot_usage, slot_weights
from causal_jax.nn.mixer import mixers
from causal_jax.taps import run, site

SPEC = Decoder(
    vocab=13, layers=2, width=12, heads=2, norm="layer", norm_eps=1e-5, activation="gelu",
    mlp_bias=True, learned_positions=True, rotary=None, context=32, attention=(GAM(slots=7),),
)  # fmt: skip
T = 12


@functools.cache
def model():
    return jax.jit(SPEC.build)(jax.random.key(0))


def ids(rows=2, length=T):
    return jnp.asarray(np.random.default_rng(0).integers(0, 13, (rows, length)), jnp.int32)


def test_it_sees_exactly_its_window():
    graph, params = nnx.split(model())

    def out(noise, params):
        add = site("embed").add(noise[None])
        return run(nnx.merge(graph, params).hidden, ids(1), edits=add)[0][0]

    jac = jax.jit(jax.jacrev(out))(jnp.zeros((T, 12)), params)  # [T, D, T, D]
    seen = np.abs(np.asarray(jac)).max((1, 3))
    distance = np.arange(T)[:, None] - np.arange(T)[None]
    reach = SPEC.attention[0].receptive_field(2) - 1
    assert reach == 4
    assert (seen[(distance < 0) | (distance > reach)] == 0).all()
    assert (seen[(distance >= 0) & (distance <= reach)] > 0).all()


call = jax.jit(lambda tokens, **kw: model()(tokens, **kw))
step = jax.jit(lambda tokens, cache: model().extend(tokens, cache))


@pytest.mark.parametrize("cut", [1, 3])
def test_streaming_equals_the_full_pass(cut):
    tokens, cache = ids(), model().init_cache(2, T)
    whole = call(tokens)
    first, cache = step(tokens[:, :cut], cache)
    parts = [first]
    for t in range(cut, T):
        one, cache = step(tokens[:, t : t + 1], cache)
        parts.append(one)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)


def test_documents_do_not_reach_into_each_other():
    tokens, segments = ids(), jnp.asarray([[0] * 5 + [1] * 7] * 2)
    places = jnp.asarray([[*range(5), *range(7)]] * 2)
    both = call(tokens, segments=segments, positions=places)
    np.testing.assert_allclose(both[:, :5], call(tokens)[:, :5], atol=1e-5)
    np.testing.assert_allclose(both[:, 5:], call(tokens[:, 5:]), atol=1e-5)


def test_the_bank_is_attention_over_itself_and_a_tied_feed_forward_layer():
    rng = np.random.default_rng(0)
    x, bank = (jnp.asarray(rng.standard_normal(n), jnp.float32) for n in ((2, 9, 8), (5, 8)))
    read = jax.jit(memory_read)(x, bank)
    kv = jnp.broadcast_to(bank[None, :, None], (2, 5, 1, 8))
    attended = jax.nn.dot_product_attention(x[:, :, None], kv, kv, scale=1.0)[:, :, 0]
    np.testing.assert_allclose(read, attended, atol=1e-5)
    np.testing.assert_allclose(read, jax.nn.softmax(x @ bank.T) @ bank, atol=1e-5)
    order = jnp.asarray([3, 1, 0, 2, 8, 7, 6, 5, 4])
    np.testing.assert_allclose(memory_read(x[:, order], bank), read[:, order], atol=1e-6)
    use = slot_usage(slot_weights(x, bank))
    assert float(use["load"].sum()) == pytest.approx(1.0, abs=1e-5)
    assert 0 < float(use["token_entropy"]) < float(use["load_entropy"]) <= np.log(5) + 1e-5


@pytest.mark.parametrize(("bias", "mode"), [((30.0, -30.0), "local"), ((-30.0, 30.0), "global")])
def test_the_gates_have_the_ablations_as_limits(bias, mode):
    gated = GAMMixer(GAM(slots=7), 12, rngs=nnx.Rngs(0))
    gated.gate.bias[...] = jnp.repeat(jnp.asarray(bias), 12)
    gated.gate.kernel[...] = jnp.zeros((12, 24))
    alone = GAMMixer(GAM(slots=7, mode=mode), 12, rngs=nnx.Rngs(1))
    for name in ("taps", "bias", "bank"):
        if getattr(alone, name) is not None:
            getattr(alone, name)[...] = getattr(gated, name)[...]
    x = jax.random.normal(jax.random.key(2), (2, 9, 12))
    mix = jax.jit(lambda m: m(x, mask=Causal(), rotations=Rotations({})))
    np.testing.assert_allclose(mix(gated), mix(alone), atol=1e-5)


PAPER = Decoder(
    vocab=10_000, layers=6, width=512, heads=8, norm="layer", norm_eps=1e-5, activation="gelu",
    mlp_bias=True, learned_positions=True, rotary=None, context=256, attention=(GAM(),),
)  # fmt: skip


def test_the_papers_parameter_counts():
    count = lambda **kw: dataclasses.replace(PAPER, **kw).param_count()  # noqa: E731
    assert count() == 22_599_680
    dense = Decoder().attention
    assert count(attention=dense, qkv_bias=True, out_bias=True) == 24_166_400
    for mode, millions in {"sum": 19.4, "global": 19.4, "local": 17.9}.items():
        assert count(attention=(GAM(mode=mode),)) / 1e6 == pytest.approx(millions, abs=0.1)
    assert (
        count(attention=(GAM(mode="sum"),)) - count(attention=(GAM(mode="global"),)) == 6 * 4 * 512
    )


def test_bad_input_is_named():
    with pytest.raises(InputError, match="kernel=0"):
        GAM(kernel=0)
    with pytest.raises(InputError, match="scale=nan"):
        GAM(scale=float("nan"))
    with pytest.raises(InputError, match="Window"):
        model()(ids(), mask=Window(3, 0))
    assert mixers["gam"] is GAM
