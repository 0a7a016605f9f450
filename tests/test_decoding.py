"""Contrastive decoding and the counterfactual attention it contrasts with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from causal_jax.data.tasks.conflicts import FACTS, conflicts
from causal_jax.data.tasks.prior_questions import PriorQuestions
from causal_jax.decoding import Contrastive, contrast
from causal_jax.errors import InputError
from causal_jax.generate import Sampling, generate
from causal_jax.interp import counterfactual, counterfactual_attention
from tests.tiny_decoder import model

KEY = jax.random.key(3)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 9)), jnp.int32)


def three(seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((3, 2, 7)), jnp.float32)


def test_contrast_is_its_formula():
    plain, a, b = three()
    got = contrast(plain, [a, b], gamma=[0.5, 2.0], eps=0.0)
    np.testing.assert_allclose(got, 3.5 * plain - 0.5 * a - 2 * b, atol=1e-5)
    shifted = contrast(plain + 3, [a - 1, b + 2], gamma=[0.5, 2.0], eps=0.0)
    np.testing.assert_allclose(jax.nn.softmax(shifted), jax.nn.softmax(got), atol=1e-5)


def test_strength_zero_leaves_the_cut_off_only():
    plain, a, _ = three()
    np.testing.assert_array_equal(contrast(plain, [a], 0.0, eps=0.0), plain)
    some = contrast(plain, [a], 0.0, eps=0.3)
    p = jax.nn.softmax(plain)
    np.testing.assert_array_equal(np.isfinite(some), p >= 0.3 * p.max(-1, keepdims=True))
    best = contrast(plain, [a], 5.0, eps=1.0)
    np.testing.assert_array_equal(best.argmax(-1), plain.argmax(-1))
    assert (np.isfinite(best).sum(-1) == 1).all()


@pytest.mark.parametrize(
    ("gamma", "eps", "message"),
    [(-1.0, 0.1, "gamma=-1.0"), ([1.0, 2.0], 0.1, "one for each of 1"), (1.0, 1.5, "eps=1.5")],
)
def test_wrong_strengths_are_refused(gamma, eps, message):
    plain, a, _ = three()
    with pytest.raises(InputError, match=message):
        contrast(plain, [a], gamma, eps)
    with pytest.raises(InputError, match=message):
        Contrastive(model(), [[]], gamma=gamma, eps=eps)


@functools.partial(jax.jit, static_argnums=0)
def one_pass(graph, params, tokens):
    return nnx.merge(graph, params)(tokens)


@functools.partial(jax.jit, static_argnums=0)
def stepwise(graph, params, tokens):
    both = nnx.merge(graph, params)
    logits, cache = both.extend(tokens[:, :4], both.init_cache(2, 16))
    out = [logits]
    for t in range(4, tokens.shape[1]):
        logits, cache = both.extend(tokens[:, t : t + 1], cache)
        out.append(logits)
    return jnp.concatenate(out, 1)


@pytest.mark.parametrize("kind", ["random", "shuffled", "reversed", "uniform"])
def test_every_branch_has_a_cache_of_its_own(kind):
    branch = counterfactual(kind, KEY if kind in ("random", "shuffled") else None)
    parts = nnx.split(Contrastive(model(), [branch], gamma=1.0, eps=0.0))
    full = one_pass(*parts, TOKENS)
    np.testing.assert_allclose(stepwise(*parts, TOKENS), full, atol=1e-4)
    plain = one_pass(*nnx.split(model()), TOKENS)
    assert jnp.abs(full - plain)[:, 1:].max(-1).min() > 1e-3  # at every step behind the first


def test_it_generates():
    def greedy(m):
        return generate(m, [np.array([1, 2, 3])], max_tokens=5, sampling=Sampling(0.0))[0].tokens

    branches = [counterfactual("random", KEY)]
    np.testing.assert_array_equal(
        greedy(Contrastive(model(), branches, gamma=0.0)), greedy(model())
    )
    strong = Contrastive(model(), branches, gamma=4.0, eps=0.0)
    text = np.array([1, 2, 3, *greedy(strong)], np.int32)
    logits = one_pass(*nnx.split(strong), jnp.asarray(text[None]))
    np.testing.assert_array_equal(logits[0, 2:-1].argmax(-1), text[3:])


def pattern(seed=0):
    scores = jnp.asarray(np.random.default_rng(seed).standard_normal((2, 3, 6, 6)), jnp.float32)
    causal = jnp.tril(jnp.ones((6, 6), bool))[None, None]
    return jax.nn.softmax(jnp.where(causal, 3 * scores, -jnp.inf)), causal


@pytest.mark.parametrize("kind", ["random", "shuffled"])
def test_draws_belong_to_slots(kind):
    """More keys behind, or fewer queries before, change no row; another key changes all."""
    p, causal = pattern()
    full = counterfactual_attention(p, causal, kind, KEY)
    wider = jnp.pad(p, ((0, 0), (0, 0), (0, 0), (0, 5)))
    seen = jnp.pad(causal, ((0, 0), (0, 0), (0, 0), (0, 5)))
    long = counterfactual_attention(wider[:, :, 3:], seen[:, :, 3:], kind, KEY)
    np.testing.assert_array_equal(long[..., :6], full[:, :, 3:])
    assert not long[..., 6:].any()
    other = counterfactual_attention(p, causal, kind, jax.random.key(4))
    assert (jnp.abs(other - full)[:, :, 4:].max(-1) > 1e-3).all()
    assert jnp.abs(full[0] - full[1]).max() > 1e-2  # rows of the batch draw apart


def test_shuffled_keeps_what_a_row_holds():
    p, causal = pattern()
    new = counterfactual_attention(p, causal, "shuffled", KEY)
    np.testing.assert_allclose(jnp.sort(new, -1), jnp.sort(p, -1), atol=1e-7)
    assert not (new * ~causal).any()


def test_uniform_gives_the_mean_of_what_is_seen():
    p, causal = pattern()
    v = jnp.asarray(np.random.default_rng(1).standard_normal((6, 4)), jnp.float32)
    got = counterfactual_attention(p, causal, "uniform")[0, 0] @ v
    np.testing.assert_allclose(got, jnp.cumsum(v, 0) / jnp.arange(1, 7)[:, None], atol=1e-6)


def test_the_authors_listings_do_not_sum_to_one():
    p, causal = pattern()
    raw = functools.partial(counterfactual_attention, p, causal, normalised=False)
    want = np.broadcast_to(np.arange(1, 7) / 6, (2, 3, 6))
    np.testing.assert_allclose(raw("uniform").sum(-1), want, atol=1e-6)
    assert (raw("random", KEY).sum(-1)[..., :-1] < 1).all()
    high = jnp.where(causal, p.max(-1, keepdims=True) - p, 0)
    np.testing.assert_allclose(raw("reversed")[:, :, 1:], high[:, :, 1:], atol=1e-6)


def test_prior_questions():
    task = PriorQuestions()
    draw = jax.jit(lambda key, split: task.sample(key, 2000, split), static_argnums=1)
    tokens, right, usual = draw(jax.random.key(0), "adversarial")
    assert (right != usual).all()
    asked = tokens[:, -1] - 1 - task.classes
    assert ((asked >= 0) & (asked < task.classes)).all()
    np.testing.assert_array_equal(usual, asked < task.classes // 2)
    seen = (tokens[:, :-1] == asked[:, None] + 1).any(-1)
    assert np.mean(seen[right]) > 0.7  # mentioned unless missed
    assert np.mean(seen[~right]) < 0.4
    tokens, right, usual = draw(jax.random.key(1), "train")
    assert 0.25 < np.mean((tokens[:, :-1] == 0).all(-1)) < 0.36
    assert 0.7 < np.mean(right == usual) < 0.8
    assert abs(np.mean(draw(jax.random.key(2), "balanced")[1]) - 0.5) < 0.05
    blank = task.blanked(tokens)
    assert not blank[:, :-1].any()
    np.testing.assert_array_equal(blank[:, -1], tokens[:, -1])
    with pytest.raises(InputError, match="split='odd'"):
        task.sample(jax.random.key(0), 4, "odd")


def test_conflicts_say_what_is_not_so():
    found = conflicts(len(FACTS))
    assert len({c.told for c in found}) == len(FACTS)
    for c in found:
        assert c.told.endswith(c.bare)
        assert c.said in c.told
        assert c.known not in c.told.removesuffix(c.bare)
