"""The contract of attention mechanisms, checked for every registered one and all its test cases."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from causal_jax import taps
from causal_jax.attention import attention, dense_attention
from causal_jax.masks import Causal, Full

CASES = [
    pytest.param(name, case, id=f"{name}-{number}")
    for name in attention.names()
    for number, case in enumerate(attention.cases(name, "test"))
]
every_case = pytest.mark.parametrize(("name", "case"), CASES)


class Problem:
    """Arrays of a case and the mechanism as a function of q, k, v and mask."""

    def __init__(self, name, case, dtype=jnp.float32, batch=None):
        self.spec = attention[name](**case.spec)
        B, self.T, N, H = case.shape
        self.B, self.S, K = batch or B, case.S or self.T, case.kv_heads or N
        rng = np.random.default_rng(0)
        self.qkv = tuple(
            jnp.asarray(rng.standard_normal(shape), dtype)
            for shape in (
                (self.B, self.T, N, H),
                (self.B, self.S, K, H),
                (self.B, self.S, K, H),
            )
        )
        form = "self" if self.S == self.T else "cross"
        self.causal = f"{form}-causal" in self.spec.patterns and form == "self"
        self.mask = Causal() if self.causal else Full()
        self.key = jax.random.key(7) if self.spec.needs_key else None

    def __call__(self, q, k, v, mask=None, **kw):
        mask = self.mask if mask is None else mask
        return self.spec(q, k, v, **{"mask": mask, "key": self.key} | kw)

    def loss(self, q, k, v, mask=None):
        return jnp.sum(jnp.sin(self(q, k, v, mask).astype(jnp.float32)))


def close(a, b, tol=2e-5):
    np.testing.assert_allclose(
        np.asarray(a, np.float32), np.asarray(b, np.float32), atol=tol, rtol=tol
    )


@every_case
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shape_and_type(name, case, dtype):
    p = Problem(name, case, dtype)
    o = jax.eval_shape(p, *p.qkv)
    assert o.shape == (*case.shape[:3], p.qkv[2].shape[-1])
    assert o.dtype == dtype


@every_case
def test_spec_is_a_hashable_config(name, case):
    spec, again = (attention[name](**case.spec) for _ in range(2))
    assert spec == again
    assert hash(spec) == hash(again)
    assert dataclasses.is_dataclass(spec)
    assert spec.patterns <= {"self-causal", "self-full", "cross-causal", "cross-full"}
    assert spec.patterns
    assert attention.name_of(spec) == name
    _, T, N, H = case.shape
    assert 0 < spec.cost(T, case.S or T, N, H, H) < spec.cost(2 * T, 2 * (case.S or T), N, H, H)


@every_case
def test_the_future_changes_nothing(name, case):
    p = Problem(name, case)
    if not p.causal:
        pytest.skip("not causal")
    f = jax.jit(p)
    before = f(*p.qkv)
    for t in (1, p.T // 2, p.T - 1):
        after = f(*(x.at[:, t:].set(3 * x[:, ::-1][:, t:] + 1) for x in p.qkv))
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert jnp.abs(before[:, t:] - after[:, t:]).max() > 1e-2


@every_case
def test_nan_in_masked_keys_stays_there(name, case):
    p = Problem(name, case)
    q, k, v = p.qkv
    hidden = jnp.arange(p.S) >= p.S - 4
    mask = p.mask & jnp.broadcast_to(~hidden[None], (p.T, p.S))
    poison = jnp.where(hidden[None, :, None, None], jnp.nan, jnp.zeros(k.shape))
    f = jax.jit(jax.value_and_grad(lambda *a: p.loss(*a, mask), argnums=(0, 1, 2)))
    clean, grads = f(q, k, v)
    dirty, dirty_grads = f(q, k + poison, v + poison)
    close(clean, dirty)
    jax.tree.map(close, grads, dirty_grads)
    assert not jnp.any(dirty_grads[1][:, hidden])
    assert not jnp.any(dirty_grads[2][:, hidden])


@every_case
def test_rows_that_see_nothing(name, case):
    p = Problem(name, case)
    mask = p.mask & jnp.ones((p.T, p.S), bool).at[3].set(False)
    grad = jax.grad(lambda *a: p.loss(*a, mask), argnums=(0, 1, 2))
    o, grads = jax.jit(lambda *a: (p(*a, mask), grad(*a)))(*p.qkv)
    assert not jnp.any(o[:, 3])
    assert jnp.any(o[:, 2])
    assert all(jnp.all(jnp.isfinite(g)) for g in grads)
    assert not jnp.any(grads[0][:, 3])


@every_case
def test_equals_dense_where_it_says_so(name, case):
    p = Problem(name, case)
    if not p.spec.exact_when(p.S):
        pytest.skip("not exact here")
    dense = functools.partial(dense_attention, mask=p.mask, implementation="reference")
    close(jax.jit(p)(*p.qkv), dense(*p.qkv))
    loss = lambda *a: jnp.sum(jnp.sin(dense(*a)))  # noqa: E731
    ours, theirs = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*p.qkv) for f in (p.loss, loss))
    jax.tree.map(functools.partial(close, tol=1e-4), ours, theirs)


@every_case
def test_gradients_are_those_of_finite_differences(name, case):
    p = Problem(name, case)
    check_grads(jax.jit(p.loss), p.qkv, order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)


@every_case
def test_jit_is_eager(name, case):
    p = Problem(name, case)
    close(jax.jit(p)(*p.qkv), p(*p.qkv), 1e-5)


@every_case
def test_vmap_is_a_loop(name, case):
    p = Problem(name, case)
    stacked = tuple(jnp.stack([x, 2 * x, x - 1]) for x in p.qkv)
    together = jax.jit(jax.vmap(p))(*stacked)
    f = jax.jit(p)
    for n in range(3):
        close(together[n], f(*(x[n] for x in stacked)))


@every_case
def test_remat_changes_no_gradient(name, case):
    p = Problem(name, case)
    plain, remat = (
        jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*p.qkv) for f in (p.loss, jax.checkpoint(p.loss))
    )
    jax.tree.map(functools.partial(close, tol=1e-5), plain, remat)


@every_case
def test_bfloat16_stays_near_float32(name, case):
    p, half = Problem(name, case), Problem(name, case, jnp.bfloat16)
    exact = jax.jit(p)(*(x.astype(jnp.float32) for x in half.qkv))
    close(exact, jax.jit(half)(*half.qkv), 2e-2)


@every_case
def test_the_same_key_gives_the_same_result(name, case):
    p = Problem(name, case)
    f = jax.jit(lambda q, k, v, key: p(q, k, v, key=key))
    first = f(*p.qkv, jax.random.key(1))
    np.testing.assert_array_equal(first, f(*p.qkv, jax.random.key(1)))
    different = jnp.any(first != f(*p.qkv, jax.random.key(2)))
    assert bool(different) == p.spec.needs_key


@every_case
def test_sharded_is_unsharded(name, case):
    p = Problem(name, case, batch=4)
    heads = 2 if p.qkv[1].shape[2] % 2 == 0 else 1
    mesh = jax.make_mesh((4, heads), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    split = NamedSharding(mesh, PartitionSpec("data", None, "tensor", None))
    grad = jax.jit(jax.value_and_grad(p.loss, argnums=(0, 1, 2)))
    here = grad(*p.qkv)
    there = grad(*(jax.device_put(x, split) for x in p.qkv))
    jax.tree.map(functools.partial(close, tol=1e-4), here, there)


@every_case
def test_taps(name, case):
    p = Problem(name, case)
    f = jax.jit(lambda *a, **kw: taps.run(p, *a, **kw), static_argnames=("capture",))
    o, seen = f(*p.qkv, capture=("z",))
    close(o, p(*p.qkv), 1e-5)
    np.testing.assert_array_equal(seen["z"], o)
    edited, _ = taps.run(p, *p.qkv, edits=[taps.site("z").at[:, 1].set(0.0)])
    assert not jnp.any(edited[:, 1])
    close(edited[:, 2:], o[:, 2:], 1e-5)


@every_case
def test_no_tap_no_trace_of_it(name, case):
    p = Problem(name, case)

    class Untapped(taps.Tap):
        """What a mechanism would see if nobody had thought of taps."""

        def __call__(self, name, x):
            return x

        def wants(self, name):
            return False

        def scope(self, prefix):
            return self

    off, untapped = (
        jax.make_jaxpr(lambda *a, tap=tap: p(*a, tap=tap))(*p.qkv) for tap in (taps.OFF, Untapped())
    )
    assert str(off) == str(untapped)


@pytest.mark.parametrize("name", attention.names())
def test_unknown_implementation(name):
    case = attention.cases(name, "test")[0]
    p = Problem(name, case)
    with pytest.raises(ValueError, match="reference"):
        p(*p.qkv, implementation="pallas")
