"""Subspaces: patches, the split by what is read, fitting, the audit, rank-one edits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causal_jax.attention import Dense
from causal_jax.data.tasks import indirect_object
from causal_jax.data.tokenizers import ByteTokenizer, Tokenizer
from causal_jax.errors import InputError
from causal_jax.interp import subspaces
from causal_jax.models.decoder import Decoder
from causal_jax.papers import _subspace_lm as lm
from causal_jax.papers.subspace_illusion import three_neurons

M, D, B = 12, 5, 6


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def columns(seed, k):
    return subspaces.random_subspace(jax.random.key(seed), M, k)


def test_the_distilled_example_is_exact():
    found = three_neurons()
    expected = {"v": -0.4, "e1": 1.3, "e2": 1.3, "e3": -0.4, "w2": -0.4}
    for name, value in expected.items():
        assert found[name].dtype == np.float64
        assert abs(float(found[name]) - value) < 1e-12


def test_a_patch_is_a_projection():
    x, source, v = normal(0, B, M), normal(1, B, M), columns(2, 3)
    patched = subspaces.subspace_patch(x, source, v)
    np.testing.assert_allclose(patched @ v, source @ v, atol=1e-5)
    moved = patched - x
    np.testing.assert_allclose(moved @ v @ v.T, moved, atol=1e-5)  # stays in the span of v
    np.testing.assert_allclose(subspaces.subspace_patch(patched, source, v), patched, atol=1e-5)
    turned = v @ jnp.linalg.qr(normal(3, 3, 3))[0]  # another basis of the same span
    np.testing.assert_allclose(subspaces.subspace_patch(x, source, turned), patched, atol=1e-5)
    np.testing.assert_allclose(subspaces.subspace_patch(x, source, jnp.eye(M)), source, atol=1e-5)
    np.testing.assert_array_equal(subspaces.subspace_patch(x, source, jnp.zeros((M, 1))), x)


@pytest.mark.parametrize("rank", [D, 2])
@pytest.mark.parametrize("k", [1, 3])
def test_the_split_by_what_is_read(rank, k):
    w = normal(0, M, rank) @ normal(1, rank, D)  # rank-deficient for rank 2
    v = columns(2, k)
    row, null = subspaces.split_row_null(v, w)
    np.testing.assert_allclose(row + null, v, atol=1e-6)
    np.testing.assert_allclose(row.T @ null, np.zeros((k, k)), atol=1e-5)
    np.testing.assert_allclose(null.T @ w, np.zeros((k, D)), atol=1e-4)
    assert float(jnp.linalg.norm(row)) > 0.1
    assert subspaces.orthonormal(w).shape == (M, rank)


def test_the_gradient_through_a_patch_is_that_of_finite_differences():
    x, source, w = normal(0, B, M), normal(1, B, M), normal(2, M)

    def loss(raw):
        v = (raw / jnp.linalg.norm(raw))[:, None]
        return jnp.sum(jnp.tanh(subspaces.subspace_patch(x, source, v) @ w))

    with jax.enable_x64(True):
        x, source, w = (jnp.asarray(np.asarray(a), jnp.float64) for a in (x, source, w))
        raw, step = jnp.asarray(np.asarray(normal(3, M)), jnp.float64), 1e-6
        steps = step * jnp.eye(M)
        wanted = [(loss(raw + e) - loss(raw - e)) / (2 * step) for e in steps]
        np.testing.assert_allclose(jax.grad(loss)(raw), wanted, rtol=1e-6, atol=1e-8)


def test_effects_are_shares_of_the_clean_difference():
    clean = jnp.array([2.0, 4.0])
    assert float(subspaces.fldd(clean, clean)) == 0.0
    assert float(subspaces.fldd(clean, jnp.zeros(2))) == 100.0
    assert float(subspaces.fldd(clean, -clean)) == 200.0
    logits = jnp.array([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    assert float(subspaces.interchange_accuracy(logits, jnp.array([2, 1]))) == 0.5


def test_a_fitted_direction_finds_the_one_that_is_read():
    base, source = normal(0, 64, M), normal(1, 64, M)
    truth = columns(2, 1)

    @jax.jit
    def fit(key):
        def loss(v, key):
            out = subspaces.subspace_patch(base, source, v) @ truth
            return jnp.square(out - source @ truth).mean()

        return subspaces.fit_subspace(loss, M, key=key, steps=300, lr=0.05, final=0.1)

    v, losses = fit(jax.random.key(3))
    assert v.shape == (M, 1)
    assert float(losses[-1]) < 0.01 * float(losses[0])
    assert abs(float(jnp.vdot(v, truth))) > 0.99


def honest_and_dormant():
    """x = (feature, feature, nothing, ...); only the first or only the third coordinate is read."""
    feature = jnp.where(jnp.arange(64) % 2 == 0, 1.0, -1.0)
    base = jnp.zeros((64, M)).at[:, :2].set(feature[:, None]) + 0.05 * normal(0, 64, M)
    source = jnp.zeros((64, M)).at[:, :2].set(-feature[:, None]) + 0.05 * normal(1, 64, M)
    return feature, base, source


def test_the_audit_tells_a_dormant_path_from_an_honest_one():
    feature, base, source = honest_and_dormant()
    direct = 2.0 * feature  # the model's own way round the site
    one = jnp.eye(M)[:, :1]

    def reads(weights, extra):
        w = jnp.zeros((M, 1)).at[:, 0].set(weights)
        return w, lambda x: feature * ((x @ w)[:, 0] + extra)

    w, metric = reads(jnp.eye(M)[0], 0.0)
    honest = subspaces.audit(metric, base, source, one, w, jax.random.key(0))
    assert honest.verdict == "consistent"
    assert honest.reasons == ()
    assert honest.effects["v"] > 150

    w, metric = reads(2.0 * jnp.eye(M)[2], direct)
    v = (jnp.eye(M)[1] + jnp.eye(M)[2])[:, None] / jnp.sqrt(2.0)  # disconnected + dormant
    dormant = subspaces.audit(metric, base, source, v, w, jax.random.key(0))
    assert dormant.verdict == "illusory"
    assert len(dormant.reasons) == 3
    assert dormant.effects["v"] > 80
    assert abs(dormant.effects["null"]) < 0.1
    assert abs(dormant.effects["full"]) < 10
    assert dormant.norms == pytest.approx({"row": 0.5**0.5, "null": 0.5**0.5}, abs=1e-5)

    nothing = subspaces.audit(metric, base, source, jnp.eye(M)[:, 5:6], w, jax.random.key(0))
    assert nothing.verdict == "no effect"


def test_a_patch_equals_a_rank_one_edit():
    hidden, w = normal(0, 50, M), normal(1, M, D)
    x, source, v = hidden[0], hidden[1], columns(2, 1)
    a, b = subspaces.patch_to_edit(x, source, v[:, 0], w, hidden.T @ hidden / 50)
    patched = subspaces.subspace_patch(x[None], source[None], v)[0]
    edited = w + b[:, None] * a[None]
    np.testing.assert_allclose(x @ edited, patched @ w, atol=1e-4)
    assert abs(float(jnp.vdot(b, x)) - 1) < 1e-5
    other = hidden[7]
    np.testing.assert_allclose(other @ edited - other @ w, jnp.vdot(b, other) * a, atol=1e-4)
    # of all b with b x = 1 it disturbs the other activations least
    worse = b + 0.1 * (columns(3, 1)[:, 0] - jnp.vdot(columns(3, 1)[:, 0], x) / jnp.vdot(x, x) * x)
    assert float(jnp.square(hidden @ b).sum()) < float(jnp.square(hidden @ worse).sum())


def test_a_rank_one_edit_is_a_patch_through_the_null_space():
    w, x, source = normal(0, M, D), normal(1, M), normal(2, M)
    a = 0.3 * normal(3, D)
    v = subspaces.edit_to_patch(a, x, source, w)
    assert abs(float(jnp.linalg.norm(v)) - 1) < 1e-5
    patched = subspaces.subspace_patch(x[None], source[None], v[:, None])[0]
    np.testing.assert_allclose(patched @ w, x @ w + a, atol=1e-4)
    assert not np.isfinite(subspaces.edit_to_patch(1e4 * a, x, source, w)).any()


def test_indirect_objects():
    tokenizer = Letters()
    made = indirect_object.pairs(tokenizer, 20, 0, ("{a} and {b}; {s} to", "{a} or {b}, {s} to"))
    assert made.base.shape == made.source.shape
    assert made.base.dtype == np.int32
    for base, source, answer, other in zip(*made, strict=True):
        names = [t for t in base if t >= Letters.FIRST]
        assert names.count(answer) == 1  # the one that is not repeated
        assert names.count(other) == 2
        assert sorted(set(names)) == sorted({answer, other})
        (at,) = np.flatnonzero(base != source)
        assert (base[at], source[at]) == (other, answer)
    again = indirect_object.pairs(tokenizer, 20, 0, ("{a} and {b}; {s} to", "{a} or {b}, {s} to"))
    np.testing.assert_array_equal(made.base, again.base)
    with pytest.raises(InputError, match="different numbers of tokens"):
        indirect_object.pairs(tokenizer, 20, 0, ("{a} {b} {s}", "{a} {b} {s} to"))
    with pytest.raises(InputError, match="single tokens"):
        indirect_object.pairs(ByteTokenizer(), 2, 0)


class Letters(Tokenizer):
    """Words as tokens; names have the ids from FIRST on."""

    FIRST = 100

    def encode(self, text):
        names = [*indirect_object.NAMES]
        words = [w.strip(",;") for w in text.split()]
        return [
            self.FIRST + names.index(w) if w in names else sum(map(ord, w)) % self.FIRST
            for w in words
        ]


@pytest.fixture(scope="module")
def decoder():
    """A small untrained decoder, prompts of six tokens, and both sides of them."""
    spec = Decoder(vocab=20, layers=3, width=16, heads=2, kv_heads=1, context=16)
    model = spec.build(jax.random.key(0))
    rng = np.random.default_rng(0)
    base, source = rng.integers(0, 20, (2, 8, 6)).astype(np.int32)
    source[:, -1] = base[:, -1]
    answers = rng.permuted(np.tile(np.arange(20), (8, 1)), axis=1)[:, :2].astype(np.int32)
    pairs = indirect_object.Pairs(base, source, answers[:, 0], answers[:, 1])
    return model, (lm.Side(model, base), lm.Side(model, source)), pairs


def test_the_rest_of_a_model_is_the_model(decoder):
    model, (base, _), pairs = decoder
    np.testing.assert_allclose(base.logits, model(jnp.asarray(pairs.base))[:, -1], atol=1e-4)
    for layer in (0, 1):
        after, params = lm.rest(model, layer)
        x = base.acts["resid_post"][layer][:, 0]
        out = jax.jit(after)(params, x, lm.later(base.cache, layer))
        np.testing.assert_allclose(out, base.logits, atol=1e-4)
    mixed = Decoder(
        vocab=20, layers=2, width=16, heads=2, attention=(Dense(), Dense(window=2)), context=16
    )
    with pytest.raises(InputError, match="layers are all alike"):
        lm.rest(mixed.build(jax.random.key(0)), 0)


def test_the_map_over_layers(decoder):
    model, (base, source), pairs = decoder
    effects = lm.layer_map(model, base, source, pairs)
    assert {k: v.shape for k, v in effects.items()} == {"resid_post": (3,), "mlp_act": (3,)}
    clean, other = (lm.difference(side.logits, pairs) for side in (base, source))
    # after the last layer the whole residual stream is the output
    np.testing.assert_allclose(effects["resid_post"][-1], subspaces.fldd(clean, other), rtol=1e-3)


@pytest.mark.parametrize("where", lm.SITES)
def test_a_direction_in_a_decoder_is_found_and_audited(decoder, where):
    model, sides, pairs = decoder
    options = {"where": where, "seed": 0, "steps": 30, "lr": 0.1, "batch": 4}
    found = lm.find(model, 1, sides, pairs, sides, pairs, **options)
    width = {"mlp_act": model.spec.hidden_width, "resid_post": 16}[where]
    assert found["v"].shape == (width, 1)
    assert np.mean(found["losses"][-5:]) < np.mean(found["losses"][:5])
    effects = dict(zip(lm.PARTS, found["effects"], strict=True))
    assert abs(effects["null"]) < 0.1
    if where == "mlp_act":  # what the edit of the model itself does, for the whole activation
        whole = lm.layer_map(model, *sides, pairs)["mlp_act"][1]
        assert effects["full"] == pytest.approx(whole, rel=1e-2, abs=1e-2)
