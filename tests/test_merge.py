"""Merging attention to disjoint sets of keys equals attention to their union."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from causal_jax.attention import dense_attention
from causal_jax.attention.merge import merge_attention
from causal_jax.errors import InputError


def parts(count=3, rows=(2, 5, 3), width=4, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)  # noqa: E731
    return [draw(*rows, width) for _ in range(count)], [3 * draw(*rows) for _ in range(count)]


def close(a, b, tol=1e-6):
    np.testing.assert_allclose(a, b, atol=tol, rtol=tol)


def dense(q, k, v, mask):
    return dense_attention(q, k, v, mask=mask, return_lse=True, implementation="reference")


def test_parts_of_the_keys_are_all_keys():
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 7, 3, 4)), jnp.float32) for _ in range(3))
    owner = jnp.asarray(rng.integers(0, 3, (7, 7))).at[2].set(1)  # query 2 sees one part only

    def merged(q, k, v):
        return merge_attention(*zip(*(dense(q, k, v, owner == n) for n in range(3))))

    def whole(q, k, v):
        return dense(q, k, v, None)

    def loss(f):
        return lambda *a: sum(jnp.sum(jnp.sin(x)) for x in f(*a))  # lse has a cotangent too

    jax.tree.map(close, jax.jit(merged)(q, k, v), whole(q, k, v))
    ours, theirs = (jax.jit(jax.grad(loss(f), (0, 1, 2)))(q, k, v) for f in (merged, whole))
    jax.tree.map(lambda a, b: close(a, b, 1e-5), ours, theirs)


def test_associative_and_commutative():
    (a, b, c), (la, lb, lc) = parts()
    once = merge_attention((a, b, c), (la, lb, lc))
    left = merge_attention(*zip(merge_attention((a, b), (la, lb)), (c, lc)))
    right = merge_attention(*zip((a, la), merge_attention((b, c), (lb, lc))))
    swapped = merge_attention((c, a, b), (lc, la, lb))
    for other in (left, right, swapped):
        jax.tree.map(close, once, other)


@pytest.mark.parametrize("junk", [0.0, 7.0, jnp.nan, jnp.inf])
def test_a_part_without_keys_changes_nothing(junk):
    (a, b), (la, lb) = parts(2)
    b, lb = b.at[:, 1:3].set(junk), lb.at[:, 1:3].set(-jnp.inf)
    la = la.at[:, 2].set(-jnp.inf)  # nobody has a key in row 2

    def f(a, la, b, lb):
        return merge_attention((a, b), (la, lb))

    def loss(*args):
        o, lse = f(*args)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.where(lse == -jnp.inf, 0, lse))

    o, lse = f(a, la, b, lb)
    np.testing.assert_array_equal(o[:, 1], a[:, 1])
    np.testing.assert_array_equal(lse[:, 1], la[:, 1])
    assert not jnp.any(o[:, 2])
    assert jnp.all(lse[:, 2] == -jnp.inf)
    grads = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(a, la, b, lb)
    assert all(jnp.all(jnp.isfinite(g)) for g in grads)
    assert not any(jnp.any(g[:, 1:3]) for g in grads[2:])
    assert not any(jnp.any(g[:, 2]) for g in grads[:2])


def test_far_apart_is_the_larger_exactly():
    (a, b), _ = parts(2)
    la, lb = (jnp.full(a.shape[:-1], x, jnp.float32) for x in (-300.0, 300.0))
    o, lse = merge_attention((a, b), (la, lb))
    np.testing.assert_array_equal(o, b)
    np.testing.assert_array_equal(lse, lb)


def test_gradients():
    (a, b), (la, lb) = parts(2, rows=(2, 3))
    f = jax.jit(lambda a, la, b, lb: merge_attention((a, b), (la, lb)))
    check_grads(f, (a, la, b, lb), order=1, atol=1e-2, rtol=1e-2, eps=1e-2)


def test_half_precision_is_summed_in_float32():
    outs, lses = parts(4)
    half = [x.astype(jnp.bfloat16) for x in outs]
    o, lse = merge_attention(half, lses)
    assert o.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    exact, _ = merge_attention([x.astype(jnp.float32) for x in half], lses)
    np.testing.assert_array_equal(o, exact.astype(jnp.bfloat16))


def test_bad_input():
    outs, lses = parts(2)
    with pytest.raises(InputError, match="2 outs, 1 lses"):
        merge_attention(outs, lses[:1])
    with pytest.raises(InputError, match="0 outs"):
        merge_attention([], [])
