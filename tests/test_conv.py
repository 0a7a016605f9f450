"""Causal depthwise convolution: the definition, any cut, documents, padding, bad shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from causal_jax.errors import InputError
from causal_jax.linear_maps import causal_conv
from causal_jax.nn.conv import CausalConv


def _case(T, W=4, D=3, B=2):
    rng = np.random.default_rng(T)
    x, w = rng.normal(size=(B, T, D)), rng.normal(size=(W, D))
    padded = np.concatenate([np.zeros((B, W - 1, D)), x], 1)
    y = np.stack([(padded[:, t : t + W] * w).sum(1) for t in range(T)], 1)
    return jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), y


@pytest.mark.parametrize("T", [1, 2, 9])
def test_equals_the_sum_over_taps_however_cut(T):
    x, w, y = _case(T)
    whole, state = causal_conv(x, w)
    np.testing.assert_allclose(whole, y, atol=1e-5)
    for cut in range(T + 1):
        a, between = causal_conv(x[:, :cut], w)
        b, end = causal_conv(x[:, cut:], w, between)
        np.testing.assert_allclose(jnp.concatenate([a, b], 1), y, atol=1e-5)
        np.testing.assert_array_equal(end, state)


def test_documents_do_not_reach_into_each_other():
    x, w, _ = _case(9)
    segments = jnp.asarray([[0, 0, 0, 1, 1, 1, 1, 2, 2]] * 2)
    y, _ = causal_conv(x, w, segments=segments)
    parts = [causal_conv(x[:, a:b], w)[0] for a, b in ((0, 3), (3, 7), (7, 9))]
    np.testing.assert_allclose(y, jnp.concatenate(parts, 1), atol=1e-6)
    _, state = causal_conv(x[:, :5], w, segments=segments[:, :5])
    rest, _ = causal_conv(x[:, 7:], w, state, segments=segments[:, 7:])  # the state's rows continue
    np.testing.assert_allclose(rest, causal_conv(x[:, 7:], w, state)[0], atol=1e-6)


def test_zeros_in_front_change_nothing():
    x, w, y = _case(6)
    padded = jnp.pad(x, ((0, 0), (5, 0), (0, 0)))
    np.testing.assert_allclose(causal_conv(padded, w)[0][:, 5:], y, atol=1e-5)


def test_starts_near_the_identity_and_has_gradients():
    x, _, _ = _case(7)
    conv = CausalConv(3)
    np.testing.assert_allclose(conv(x)[0], x, atol=0.02)
    grad = jax.grad(lambda w: jnp.sum(causal_conv(x, w)[0] ** 2))(conv.taps[...])
    assert bool(jnp.all(grad != 0))
    one = CausalConv(3, size=1)
    np.testing.assert_array_equal(one(x)[0], x)
    assert one(x)[1].shape == (2, 0, 3)


@pytest.mark.parametrize(("taps", "rows"), [(0, None), (4, 4)])
def test_what_does_not_fit_is_named(taps, rows):
    x = jnp.zeros((2, 6, 3))
    with pytest.raises(InputError, match="expected"):
        causal_conv(x, jnp.zeros((taps, 3)), None if rows is None else jnp.zeros((2, rows, 3)))
